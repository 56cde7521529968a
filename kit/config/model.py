"""What can be known of a base model without loading it: its config, the names of its matrices, its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit import hub, paths, weights
from kit.config.schema import Model, Tokenizer
from kit.errors import KitError, Problem

# Leaf names of the linear layers by model_type, for bases whose weights are not here (transformers 5.23's models).
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], _LLAMA),
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}


@dataclass
class Base:
    """Facts of the base model; None where they cannot be known on this machine."""

    config: dict[str, Any] | None = None
    folder: Path | None = None
    modules: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def hidden_size(self) -> int | None:
        config = self.config or {}
        text = config.get("text_config") or config
        size = text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
        return size if isinstance(size, int) else None


def inspect(model: Model, here: bool) -> tuple[Base, list[Problem]]:
    """Look at `model.name_or_path` on disk and in the Hub cache; problems where it is there and not a model.

    `here`: the run is about to start on this machine, so what is only promised will not do.
    """
    name = model.name_or_path
    preset = dict(model.config) or None
    folder = weights.find_model(name, model.revision)
    local = Path(name).expanduser().is_dir()
    if folder is None and here and hub.looks_like_id(name):
        try:
            folder = fetch_config(name, model.revision)
        except KitError as error:
            return Base(), error.problems
    if folder is None:
        if preset and paths.made_by_quickstart(name) and not here:
            return Base(config=preset, notes=[f"{name} is not made yet: `make quickstart` makes it"]), []
        if not hub.looks_like_id(name):
            if paths.made_by_quickstart(name):
                return Base(), [Problem(f"{name} is not made yet", "model.name_or_path", "make quickstart")]
            return Base(), [
                Problem(f"there is no model folder {name}", "model.name_or_path", "check the path, or give a Hub id")
            ]
        note = f"{name} is not on this machine: " + (
            "its shape is the preset's" if preset else "what depends on its shape cannot be checked here"
        )
        if hub.offline():
            note += f"; {hub.fetch_command('model.name_or_path', name, model.revision)}"
        linears = LINEARS.get((preset or {}).get("model_type", ""))
        modules = [f"model.layers.0.{n}" for n in linears] if linears else None
        return Base(config=preset, modules=modules, notes=[note]), []
    try:
        config = weights.read_config(folder)
        # A part of the shards in the cache is a download that was cut short: the model is not here.
        part = not local and any(not (folder / file).is_file() for file in weights.indexed(folder))
        tensors = {} if part else weights.read_tensors(folder)
    except KitError as error:
        return Base(folder=folder), error.problems
    base = Base(config=config, folder=folder)
    if tensors:
        base.modules = [
            n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) == 2
        ]
    elif linears := LINEARS.get(config.get("model_type", "")):
        base.modules = [f"model.layers.0.{n}" for n in linears]
    if not tensors and not local and not model.random_init:
        if here and hub.offline():
            fix = hub.fetch_command("model.name_or_path", name, model.revision)
            return base, [Problem(f"the weights of {name} are not in {hub.cache()}, and HF_HUB_OFFLINE is set",
                                  "model.name_or_path", fix)]  # fmt: skip
        base.notes.append(f"the weights of {name} are not on this machine: the ranks fetch them")
    elif not tensors and not model.random_init:
        pickles = sorted(folder.glob("*.bin"))
        problem = (
            f"{folder} holds {pickles[0].name}, a pickle" if pickles else f"{folder} is not a model: it has no weights"
        )
        fix = "convert it to safetensors" if pickles else "give a folder with safetensors, or model.random_init=true"
        return base, [Problem(problem, "model.name_or_path", fix)]
    differ = {
        k: (v, config[k]) for k, v in (preset or {}).items() if k in config and config[k] != v and k != "torch_dtype"
    }
    if differ:
        listed = ", ".join(f"{k} {a} against {b}" for k, (a, b) in sorted(differ.items()))
        base.notes.append(f"the preset's shape differs from {folder / weights.CONFIG}, which wins: {listed}")
    return base, []


def look_at_tokenizer(tokenizer: Tokenizer, here: bool) -> list[Problem]:
    """The problem of a tokenizer of its own that is not in the Hub cache where the Hub may not be asked."""
    key, name = "tokenizer.name_or_path", tokenizer.name_or_path
    if not (here and hub.offline() and name and hub.looks_like_id(name)):
        return []
    if hub.find_snapshot(name, hub.MODEL, tokenizer.revision):
        return []
    problem = f"the tokenizer {name} is not in {hub.cache()}, and HF_HUB_OFFLINE is set"
    return [Problem(problem, key, hub.fetch_command(key, name, tokenizer.revision))]


def fetch_config(name: str, revision: str | None) -> Path:
    """config.json of a Hub model, into the cache; the folder it lies in. KitError where the Hub does not give it."""
    key = "model.name_or_path"
    if hub.offline():
        problem = f"{name} is neither a folder nor in {hub.cache()}, and HF_HUB_OFFLINE is set"
        raise KitError(problem, key, hub.fetch_command(key, name, revision))
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise KitError(
            f"{name} is not here, and huggingface_hub is not installed", fix="pip install '.[train]'"
        ) from None
    try:
        return Path(hf_hub_download(name, weights.CONFIG, revision=revision)).parent
    except Exception as error:  # the Hub's refusals, the network's, a broken name: all are put in words
        raise hub.explain(error, name, hub.MODEL, key) from None


def identify(model: Model, folder: Path | None) -> dict[str, Any] | None:
    """What ties an adapter to its base: name, revision, and hashes of config.json and of the weights."""
    if folder is None or model.random_init or not weights.shard_files(folder):
        return None
    return {
        "name_or_path": model.name_or_path,
        "revision": model.revision,
        "config_sha256": hashlib.sha256((folder / weights.CONFIG).read_bytes()).hexdigest(),
        "fingerprint": weights.fingerprint(folder),
    }
