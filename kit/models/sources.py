"""What a run, an adapter folder or a model holds, and how its models are opened one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection.adapter import CONFIG as ADAPTER_CONFIG
from kit.inspection.adapter import AdapterFolder, holds_adapter, read_adapter_folder
from kit.models.open import library_errors
from kit.storage.json_files import read_json
from kit.storage.manifest import NAME as MANIFEST
from kit.storage.safetensors_header import CONFIG, find_model_folder, fingerprint_tensors, read_tensors

PLAN = "plan.json"
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class ModelSource:
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


def output_path(source: ModelSource, out: Path | str | None, name: str) -> Path | None:
    """Where a result goes: `out` (a .json file or a folder), else the run directory, else nowhere."""
    if out is not None:
        return Path(out) if str(out).endswith(".json") else Path(out) / name
    return source.run_dir / name if source.run_dir else None


def locate_models(source: str | Path, base: str | None = None, revision: str | None = None) -> ModelSource:
    """Find the models of a run directory, an adapter folder, a model folder or a cached Hub id.

    The base of an adapter is looked for in manifest.json, then plan.json, then adapter_config.json; `base` overrides.
    `revision` is that of a Hub id, given as source or as base.
    KitError where nothing usable is found or the base is not the one that the adapter was trained on.
    """
    folder = find_model_folder(str(source), revision)
    if folder is None:
        raise KitError(
            f"{source} is neither a folder nor a model in the local Hub cache",
            where=str(source),
            fix="give a run directory, an adapter folder, a model folder, or fetch the model first (kit fetch)",
        )
    if (folder / PLAN).is_file():
        return _locate_run(folder, base, revision)
    if holds_adapter(folder):
        adapter = read_adapter_folder(folder)
        plan = next((read_json(p / PLAN) for p in list(folder.parents)[:2] if (p / PLAN).is_file()), None)
        base_folder, reason = _locate_base(folder, adapter, plan, base, revision)
        if base_folder is None:
            raise KitError(reason, where=str(folder), fix="name the base model with --base MODEL")
        return ModelSource(folder, "adapter", {"base": base_folder, "adapter": folder}, base_folder, plan)
    if (folder / CONFIG).is_file():
        return ModelSource(folder, "model", {"model": _require_weights(folder)})
    raise KitError(
        f"{folder} is not a run, an adapter or a model: it has no {PLAN}, {ADAPTER_CONFIG} or {CONFIG}",
        where=str(source),
        fix="give a run directory, an adapter folder or a model folder",
    )


def _locate_run(folder: Path, base: str | None, revision: str | None) -> ModelSource:
    plan = read_json(folder / PLAN)
    paths: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    full, merged = folder / "model", folder / "merged"
    adapter = read_adapter_folder(folder / "adapter") if holds_adapter(folder / "adapter") else None
    base_folder, reason = _locate_base(adapter.folder if adapter else full, adapter, plan, base, revision)
    if base_folder:
        paths["base"] = base_folder
    else:
        skipped["base"] = reason
    if adapter:
        if base_folder:
            paths["adapter"] = adapter.folder
        else:
            skipped["adapter"] = reason
    elif (full / CONFIG).is_file():
        paths["model"] = _require_weights(full)
    if (merged / CONFIG).is_file():
        paths["merged"] = _require_weights(merged)
    if adapter is None and not {"model", "merged"} & set(paths):
        raise KitError(
            f"{folder} holds no finished adapter or model",
            where=str(folder),
            fix=f"finish the run with `kit resume {folder}`, or give one of its checkpoints",
        )
    if not paths:
        raise KitError(reason, where=str(folder), fix="name the base model with --base MODEL")
    return ModelSource(folder, "run", paths, base_folder, plan, skipped)


def _locate_base(
    trained: Path, adapter: AdapterFolder | None, plan: dict | None, asked: str | None, revision: str | None
) -> tuple[Path | None, str]:
    """The base model's folder, or None and why."""
    if adapter:
        recorded, config = adapter.base, adapter.config
    else:
        described = read_json(trained / MANIFEST) if (trained / MANIFEST).is_file() else {}
        recorded, config = described.get("base") or {}, {}
    model = (plan or {}).get("model") or {}
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
    for name, candidate_revision in candidates:
        folder = find_model_folder(str(name), candidate_revision) if name else None
        if folder is None:
            continue
        if not read_tensors(folder):
            return None, f"the base model {folder} has no safetensors weights (was it initialised at random?)"
        expected = recorded.get("fingerprint")
        if expected and fingerprint_tensors(folder) != expected:
            raise KitError(
                f"{folder} is not the base that {trained.name} was trained on: its weights differ",
                where=str(trained / MANIFEST),
                fix="give the same model and revision with --base",
            )
        return folder, ""
    if tried:
        return None, f"the base model was not found here: {', '.join(dict.fromkeys(map(str, tried)))}"
    return None, f"{trained} does not say which base model it belongs to"


def _require_weights(folder: Path) -> Path:
    if not read_tensors(folder):
        raise KitError(f"{folder} has no safetensors weights", where=str(folder), fix="give a folder with weights")
    return folder


def choose_models(source: ModelSource, which: Sequence[str] | None) -> list[str]:
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


def trusts_remote_code(source: ModelSource) -> bool:
    return bool(((source.plan or {}).get("model") or {}).get("trust_remote_code"))


def open_source_tokenizer(source: ModelSource) -> Any:
    """One tokenizer for all models of the source: the one saved with what was trained, so that prompts agree."""
    folders = [source.paths[n] for n in ("adapter", "model", "merged", "base") if n in source.paths]
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            with library_errors(folder):
                return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusts_remote_code(source))
    raise KitError(f"{source.folder} has no tokenizer", where=str(source.folder), fix="save one beside the model")
