"""What a run, an adapter folder or a model holds, and how its models are opened one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import ENVIRONMENT, KitError, first_line
from kit.storage.json_files import read_json
from kit.storage.safetensors_header import CONFIG, find_model, fingerprint, read_header, read_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, PLAN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "plan.json",
)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Source:
    """Where each named model is; `adapter` stands for the base plus that adapter."""

    folder: Path
    kind: str  # "run", "adapter" or "model"
    paths: dict[str, Path]
    base: Path | None = None
    plan: dict[str, Any] | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether the base is opened as quantized as it was trained on."""
        return bool(self.base and (self.plan or {}).get("quantization"))

    @property
    def run_dir(self) -> Path | None:
        return self.folder if self.kind == "run" else None


def output_path(source: Source, out: Path | str | None, name: str) -> Path | None:
    """Where a result goes: `out` (a .json file or a folder), else the run directory, else nowhere."""
    if out is not None:
        return Path(out) if str(out).endswith(".json") else Path(out) / name
    return source.run_dir / name if source.run_dir else None


def resolve(source: str | Path, base: str | None = None, revision: str | None = None) -> Source:
    """Find the models of a run directory, an adapter folder, a model folder or a cached Hub id.

    The base of an adapter is looked for in manifest.json, then plan.json, then adapter_config.json; `base` overrides.
    `revision` is that of a Hub id, given as source or as base.
    KitError where nothing usable is found or the base is not the one that the adapter was trained on.
    """
    folder = find_model(str(source), revision)
    if folder is None:
        raise KitError(
            f"{source} is neither a folder nor a model in the local Hub cache",
            where=str(source),
            fix="give a run directory, an adapter folder, a model folder, or fetch the model first (kit fetch)",
        )
    if (folder / PLAN).is_file():
        return _resolve_run(folder, base, revision)
    if (folder / ADAPTER_CONFIG).is_file():
        plan = next((read_json(p / PLAN) for p in list(folder.parents)[:2] if (p / PLAN).is_file()), None)
        found, reason = _find_base(folder, plan, base, revision)
        if found is None:
            raise KitError(reason, where=str(folder), fix="name the base model with --base MODEL")
        return Source(folder, "adapter", {"base": found, "adapter": _whole_adapter(folder)}, found, plan)
    if (folder / CONFIG).is_file():
        return Source(folder, "model", {"model": _whole_model(folder)})
    raise KitError(
        f"{folder} is not a run, an adapter or a model: it has no {PLAN}, {ADAPTER_CONFIG} or {CONFIG}",
        where=str(source),
    )


def _resolve_run(folder: Path, base: str | None, revision: str | None) -> Source:
    plan = read_json(folder / PLAN)
    paths: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    adapter, full, merged = folder / "adapter", folder / "model", folder / "merged"
    trained = adapter if (adapter / ADAPTER_CONFIG).is_file() else full
    found, reason = _find_base(trained, plan, base, revision)
    if found:
        paths["base"] = found
    else:
        skipped["base"] = reason
    if trained is adapter:
        if found:
            paths["adapter"] = _whole_adapter(adapter)
        else:
            skipped["adapter"] = reason
    elif (full / CONFIG).is_file():
        paths["model"] = _whole_model(full)
    if (merged / CONFIG).is_file():
        paths["merged"] = _whole_model(merged)
    if trained is not adapter and not {"model", "merged"} & set(paths):
        raise KitError(
            f"{folder} holds no finished adapter or model",
            where=str(folder),
            fix=f"finish the run with `kit resume {folder}`, or give one of its checkpoints",
        )
    if not paths:
        raise KitError(reason, where=str(folder), fix="name the base model with --base MODEL")
    return Source(folder, "run", paths, found, plan, skipped)


def _find_base(trained: Path, plan: dict | None, asked: str | None, revision: str | None) -> tuple[Path | None, str]:
    """The base model's folder, or None and why."""
    manifest = read_json(trained / MANIFEST) if (trained / MANIFEST).is_file() else {}
    recorded = manifest.get("base") or {}
    model = (plan or {}).get("model") or {}
    config = read_json(trained / ADAPTER_CONFIG) if (trained / ADAPTER_CONFIG).is_file() else {}
    candidates = [
        (recorded.get("name_or_path"), recorded.get("revision")),
        (model.get("name_or_path"), model.get("revision")),
        (config.get("base_model_name_or_path"), config.get("revision")),
    ]
    if asked:
        candidates = [(asked, revision)]
    elif model.get("random_init"):
        return None, "the run drew its base at random and did not keep it"
    tried = [name for name, _ in candidates if name]
    for name, at in candidates:
        found = find_model(str(name), at) if name else None
        if found is None:
            continue
        if not read_tensors(found):
            return None, f"the base model {found} has no safetensors weights (was it initialised at random?)"
        expected = recorded.get("fingerprint")
        if expected and fingerprint(found) != expected:
            raise KitError(
                f"{found} is not the base that {trained.name} was trained on: its weights differ",
                where=str(trained / MANIFEST),
                fix="give the same model and revision with --base",
            )
        return found, ""
    if tried:
        return None, f"the base model was not found here: {', '.join(dict.fromkeys(map(str, tried)))}"
    return None, f"{trained} does not say which base model it belongs to"


def _whole_adapter(folder: Path) -> Path:
    # without this file PEFT would take the folder for a Hub id and go online
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise KitError(f"{folder} has no {ADAPTER_WEIGHTS}", where=str(folder), fix="the adapter was not saved whole")
    read_header(folder / ADAPTER_WEIGHTS)
    return folder


def _whole_model(folder: Path) -> Path:
    if not read_tensors(folder):
        raise KitError(f"{folder} has no safetensors weights", where=str(folder), fix="give a folder with weights")
    return folder


def choose(source: Source, which: Sequence[str] | None) -> list[str]:
    """The names to load, base first; KitError for a name that the source does not have."""
    for name in which or ():
        if name not in source.paths:
            reason = source.skipped.get(name)
            raise KitError(
                f"{source.folder} has no {name!r}" + (f": {reason}" if reason else ""),
                where="which",
                fix=f"choose from {', '.join(source.paths)}",
            )
    return [name for name in source.paths if not which or name in which]


def trust(source: Source) -> bool:
    return bool(((source.plan or {}).get("model") or {}).get("trust_remote_code"))


def open_tokenizer(source: Source) -> Any:
    """One tokenizer for all models of the source: the one saved with what was trained, so that prompts agree."""
    folders = [source.paths[n] for n in ("adapter", "model", "merged", "base") if n in source.paths]
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            with loading(folder):
                return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust(source))
    raise KitError(f"{source.folder} has no tokenizer", where=str(source.folder), fix="save one beside the model")


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Say a library's failure on a damaged or unsuitable folder as a KitError."""
    try:
        yield
    except KitError:
        raise
    except ImportError as error:
        raise KitError(f"{path} needs a package that is missing: {error}", code=ENVIRONMENT) from error
    except Exception as error:  # noqa: BLE001 - safetensors, tokenizers and remote code raise their own types
        if "out of memory" in str(error).lower():
            raise KitError(f"{path} does not fit into memory", code=ENVIRONMENT, fix="use a smaller dtype") from error
        raise KitError(f"{path} cannot be loaded: {first_line(error)}", where=str(path)) from error
