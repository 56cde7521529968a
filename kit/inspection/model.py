"""What can be known of a base model without loading it: its config, the names of its matrices, its fingerprint."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import KitError, Problem, with_rule
from kit.inspection import architectures
from kit.schema.run_plan import Model, Tokenizer
from kit.storage import hub_cache, safetensors_header
from kit.system import paths

DERIVED = ("head_dim", "num_key_value_heads")  # null in config.json: what transformers makes of the other keys


@dataclass
class Base:
    """Facts of the base model; None where they cannot be known on this machine."""

    config: dict[str, Any] | None = None
    folder: Path | None = None
    modules: list[str] | None = None
    bytes: int | None = None  # of the weights as they are stored
    numbers: int | None = None  # parameters, as they are stored
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> dict[str, Any]:
        """The config of the language model, which lies inside where the base has towers; empty where not known."""
        config = self.config or {}
        inside = config.get("text_config")
        return inside if isinstance(inside, dict) and inside else config

    @property
    def hidden_size(self) -> int | None:
        text = self.text
        size = text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
        return size if isinstance(size, int) else None


def inspect_model(model: Model, here: bool) -> tuple[Base, list[Problem]]:
    """Inspect `model.name_or_path` on disk and in the Hub cache; problems where it is there and not a model.

    `here`: the run is about to start on this machine, so what is only promised will not do.
    """
    name = model.name_or_path
    folder = safetensors_header.find_model_folder(name, model.revision)
    if folder is None and hub_cache.is_hub_id(name):
        if refused := architectures.refuse_name(name):
            return Base(config=dict(model.config) or None), refused
        if here:
            try:
                folder = fetch_config(name, model.revision)
            except KitError as error:
                return Base(), with_rule(error.problems, "hub")
    return inspect_absent(model, here) if folder is None else inspect_folder(model, folder, here)


def inspect_absent(model: Model, here: bool) -> tuple[Base, list[Problem]]:
    """Return what the preset knows of a model that is not on this machine; a problem where it cannot come to be."""
    name, key, preset = model.name_or_path, "model.name_or_path", dict(model.config) or None
    if preset and paths.is_made_by_quickstart(name) and not here:
        return Base(config=preset, notes=[f"{name} is not made yet: `make quickstart` makes it"]), []
    if not hub_cache.is_hub_id(name):
        if paths.is_made_by_quickstart(name):
            return Base(), [Problem(f"{name} is not made yet", key, "make quickstart", "model-folder")]
        fix = "check the path, or give a Hub id"
        return Base(), [Problem(f"there is no model folder {name}", key, fix, "model-folder")]
    note = f"{name} is not on this machine: " + (
        "its shape is the preset's" if preset else "what depends on its shape cannot be checked here"
    )
    if hub_cache.is_offline():
        note += f"; {hub_cache.fetch_command(key, name, model.revision)}"
    if preset is None:
        return Base(notes=[note]), []
    refused, notes = architectures.refuse_config(name, preset, model.trust_remote_code, "model.config.model_type")
    return Base(preset, modules=architectures.module_names(preset), notes=[note, *notes]), refused


def inspect_folder(model: Model, folder: Path, here: bool) -> tuple[Base, list[Problem]]:
    """Read config.json and the headers of the weights in a folder, one of the Hub cache's too."""
    name, local = model.name_or_path, Path(model.name_or_path).expanduser().is_dir()
    try:
        config = safetensors_header.read_model_config(folder)
        # A part of the shards in the cache is a download that was cut short: the model is not here.
        part = not local and any(
            not (folder / file).is_file() for file in safetensors_header.indexed_shard_names(folder)
        )
        tensors = {} if part else safetensors_header.read_tensors(folder)
    except KitError as error:
        return Base(folder=folder), with_rule(error.problems, "model-files")
    base = Base(config=config, folder=folder)
    refused, base.notes = architectures.refuse_config(name, config, model.trust_remote_code)
    if refused:
        return base, refused
    if tensors:
        base.bytes = sum(t.end - t.start for t in tensors.values())
        base.numbers = sum(math.prod(t.shape) for t in tensors.values())
    base.modules = architectures.module_names(config)  # stored names differ where transformers renames or fuses them
    if base.modules is None and tensors:
        base.modules = [
            n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) == 2
        ]
    if not tensors and not model.random_init:
        if local or (here and hub_cache.is_offline()):
            return base, [weights_missing(model, folder, local)]
        base.notes.append(f"the weights of {name} are not on this machine: the ranks fetch them")
    if differ := preset_differences(dict(model.config), config):
        listed = ", ".join(f"{key} {a} against {b}" for key, (a, b) in sorted(differ.items()))
        file = folder / safetensors_header.CONFIG
        base.notes.append(f"the preset's shape differs from {file}, which wins: {listed}")
    return base, []


def weights_missing(model: Model, folder: Path, local: bool) -> Problem:
    """Return the problem of a model that has no safetensors: pickles alone, nothing, or a download cut short."""
    name, key = model.name_or_path, "model.name_or_path"
    if not local:
        text = f"the weights of {name} are not in {hub_cache.hub_cache_folder()}, and HF_HUB_OFFLINE is set"
        return Problem(text, key, hub_cache.fetch_command(key, name, model.revision), "offline")
    if pickles := sorted(folder.glob("*.bin")):
        fix = f"kit convert {folder} OUT makes safetensors of it: give OUT"
        return Problem(f"{folder} holds {pickles[0].name}, a pickle", key, fix, "model-files")
    fix = "give a folder with safetensors, or model.random_init=true"
    return Problem(f"{folder} is not a model: it has no weights", key, fix, "model-files")


def preset_differences(preset: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of a preset that config.json holds with another value, as (preset's, config.json's).

    A model with towers keeps the shape of its text part in `text_config`, transformers 5 keeps rope_theta and
    rope_scaling in `rope_parameters`: keys are looked for there too.
    """
    rope = config.get("rope_parameters")
    places = [p for p in (config, config.get("text_config"), rope) if isinstance(p, dict)]
    elsewhere = {"text_config": config, "rope_scaling": rope if isinstance(rope, dict) else {}}
    differences: dict[str, tuple[Any, Any]] = {}
    for key, value in preset.items():
        value_there = next((p[key] for p in places if key in p), elsewhere.get(key, value))
        if isinstance(value, dict) and isinstance(value_there, dict):
            differences |= {f"{key}.{k}": pair for k, pair in preset_differences(value, value_there).items()}
        elif (
            value_there != value
            and key not in ("torch_dtype", "dtype")
            and not (value_there is None and key in DERIVED)
        ):
            differences[key] = (value, value_there)
    return differences


def check_tokenizer_cached(tokenizer: Tokenizer, here: bool) -> list[Problem]:
    """The problem of a tokenizer of its own that is not in the Hub cache where the Hub may not be asked."""
    key, name = "tokenizer.name_or_path", tokenizer.name_or_path
    if not (here and hub_cache.is_offline() and name and hub_cache.is_hub_id(name)):
        return []
    if hub_cache.find_snapshot(name, hub_cache.MODEL, tokenizer.revision):
        return []
    problem = f"the tokenizer {name} is not in {hub_cache.hub_cache_folder()}, and HF_HUB_OFFLINE is set"
    return [Problem(problem, key, hub_cache.fetch_command(key, name, tokenizer.revision), "offline")]


def fetch_config(name: str, revision: str | None) -> Path:
    """config.json of a Hub model, into the cache; the folder it lies in. KitError where the Hub does not give it."""
    key = "model.name_or_path"
    if hub_cache.is_offline():
        problem = f"{name} is neither a folder nor in {hub_cache.hub_cache_folder()}, and HF_HUB_OFFLINE is set"
        raise KitError(problem, key, hub_cache.fetch_command(key, name, revision), rule="offline")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise KitError(
            f"{name} is not here, and huggingface_hub is not installed", fix="pip install '.[train]'"
        ) from None
    try:
        return Path(hf_hub_download(name, safetensors_header.CONFIG, revision=revision)).parent
    except Exception as error:  # the Hub's refusals, the network's, a broken name: all are put in words
        raise hub_cache.hub_error(error, name, hub_cache.MODEL, key) from None


def identify_base(model: Model, folder: Path | None) -> dict[str, Any] | None:
    """What ties an adapter to its base: name, revision, and hashes of config.json and of the weights."""
    if folder is None or model.random_init or not safetensors_header.shard_files(folder):
        return None
    return {
        "name_or_path": model.name_or_path,
        "revision": model.revision,
        "config_sha256": hashlib.sha256((folder / safetensors_header.CONFIG).read_bytes()).hexdigest(),
        "fingerprint": safetensors_header.fingerprint_tensors(folder),
    }
