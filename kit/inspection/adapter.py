"""Adapter folders in PEFT's format, read and checked without torch: the one door for every verb that opens one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection.architectures import EMBEDDING_NAMES
from kit.storage import manifest
from kit.storage.json_files import read_json
from kit.storage.safetensors_header import TensorEntry, read_header

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others alter the base's weights
COPY_AGAIN = "copy the adapter again, or give an earlier checkpoint"
SAVE_AGAIN = f"load it once with peft where you trust it and save it again: that writes {WEIGHTS}"
# PEFT loads keys with its adapter's name in them as well as keys without, but not of these two.
ADAPTER_NAME = re.compile(r"(?<!modules_to_save)(?<!trainable_tokens_delta)\.default(?=(\.weight|\.bias)?$)")
# What PEFT's save_embedding_layers=True writes beside the matrix of a module that is saved whole.
COPIES = re.compile(r"^(?P<module>.+)\.(original_module|modules_to_save(\.default)?)\.(?P<parameter>weight|bias)$")
LORA_PART = re.compile(r"\.(lora_[A-Za-z_]+|token_adapter|trainable_tokens_delta)(\.|$)")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as it lies in a folder.

    `tensors`: the header of each by the key that PEFT itself writes, while `Tensor.name` is the key in the file; None
    of a pickle, which is not opened here. `manifest`: None where there is none, as in adapters of others.
    """

    folder: Path
    config: dict[str, Any]
    weights: Path
    tensors: dict[str, TensorEntry] | None
    manifest: dict[str, Any] | None

    @property
    def base(self) -> dict[str, Any]:
        """What the manifest records of the base: name_or_path, revision, config_sha256, fingerprint."""
        return (self.manifest or {}).get("base") or {}


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's, whole or not."""
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, PICKLE))


def read_adapter_folder(folder: Path, accept_pickle: bool = False) -> AdapterFolder:
    """Read an adapter's config and the headers of its tensors, and compare both files with its manifest.

    KitError where a file is missing, damaged or not the one that was saved, where the weights are a pickle (unless
    `accept_pickle`), and where tensors are empty or stored twice.
    """
    if not (folder / CONFIG).is_file():
        raise KitError(
            f"{folder} is no adapter: it has no {CONFIG}",
            where=str(folder),
            fix="give a run or an adapter folder; or copy the file from where the adapter was saved",
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        if not (folder / PICKLE).is_file():
            raise KitError(
                f"{folder} has no {WEIGHTS}: the adapter was not saved whole",
                where=str(folder),
                fix="copy the adapter again, or finish the run that saves it",
            )
        weights = folder / PICKLE
        if not accept_pickle:
            raise KitError(
                f"{weights} is a pickle, which can run any code when it is read", where=str(folder), fix=SAVE_AGAIN
            )
    recorded = _check_manifest(folder, weights)
    try:
        config = read_json(folder / CONFIG)
    except KitError as error:
        raise KitError(error.problems[0].problem, where=str(folder), fix=COPY_AGAIN) from None
    if not isinstance(config.get("peft_type"), str):
        raise KitError(f"{folder / CONFIG} names no peft_type", where=str(folder), fix=COPY_AGAIN)
    tensors = None if weights.name == PICKLE else _read_tensors(weights)
    return AdapterFolder(folder, config, weights, tensors, recorded)


def _check_manifest(folder: Path, weights: Path) -> dict[str, Any] | None:
    """The folder's manifest, None without one; KitError where config or weights are not what it lists."""
    if not (folder / manifest.NAME).is_file():
        return None
    try:
        recorded = manifest.read_manifest(folder)
    except KitError as error:
        raise KitError(error.problems[0].problem, where=str(folder), fix=COPY_AGAIN) from None
    for path in (folder / CONFIG, weights):
        entry = recorded["files"].get(path.name)
        if entry and path.stat().st_size != entry["bytes"]:
            size = f"it was cut short or grew: {path.stat().st_size} bytes, not {entry['bytes']}"
            raise KitError(
                f"{path} is not the file that was saved: its SHA-256 differs from {manifest.NAME}; {size}",
                where=str(folder),
                fix=COPY_AGAIN,
            )
        if entry and manifest.hash_file(path)["sha256"] != entry["sha256"]:
            raise KitError(
                f"{path} is not the file that was saved: its SHA-256 differs from {manifest.NAME}",
                where=str(folder),
                fix=COPY_AGAIN,
            )
    return recorded


def _read_tensors(weights: Path) -> dict[str, TensorEntry]:
    """The tensors of an adapter file by PEFT's own keys."""
    headers = read_header(weights)
    if not headers:
        raise KitError(f"{weights} holds no tensors", where=str(weights.parent), fix=COPY_AGAIN)
    for tensor in headers:
        check_size(tensor)
    if empty := [t.name for t in headers if 0 in t.shape]:
        raise KitError(
            f"{weights} was saved under ZeRO-3 without gathering: {len(empty)} of its {len(headers)} tensors are "
            f"empty, the first {empty[0]}",
            where=str(weights.parent),
            fix="save it again from a checkpoint of that run, with every parameter gathered",
        )
    keys = standard_keys(t.name for t in headers)
    tensors: dict[str, TensorEntry] = {}
    for tensor in headers:
        key = keys.get(tensor.name)
        if key is None:
            continue
        if key in tensors:
            raise KitError(
                f"{weights} holds {key} twice, as {tensors[key].name} and as {tensor.name}",
                where=str(weights.parent),
                fix="load it once with peft, look at which one is meant, and save it again",
            )
        tensors[key] = tensor
    return tensors


def standard_keys(names: Iterable[str]) -> dict[str, str]:
    """{key in a file: the key that PEFT writes}, without the copies that PEFT does not read back.

    `lora_A.default.weight` is `lora_A.weight`; of a module that is saved whole PEFT reads `module.weight` alone,
    also where save_embedding_layers wrote `module.original_module.weight` beside it
    (peft/utils/save_and_load.py, get_peft_model_state_dict and set_peft_model_state_dict).
    """
    names = list(names)
    known = set(names)
    keys = {}
    for name in names:
        match = COPIES.match(name)
        if not match or f"{match['module']}.{match['parameter']}" not in known:
            keys[name] = ADAPTER_NAME.sub("", name)
    return keys


def check_size(tensor: TensorEntry) -> None:
    """KitError where a tensor's bytes are not what its shape and dtype need."""
    bits = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BOOL": 8}.get(tensor.dtype)
    if bits is None:
        bits = 16 if tensor.dtype in ("F16", "BF16", "I16", "U16") else 8 if "8" in tensor.dtype else 0
    need = math.prod(tensor.shape) * bits // 8
    if bits and need != tensor.end - tensor.start or tensor.end < tensor.start:
        raise KitError(
            f"{tensor.file} is damaged: {tensor.name} is said to be {tensor.dtype} {list(tensor.shape)} "
            f"but has {tensor.end - tensor.start} bytes",
            fix="fetch the file again",
        )


def module_or_parameter(key: str) -> str:
    """The module that a LoRA tensor changes, or the parameter that a whole tensor replaces."""
    name = key.removeprefix(PREFIX)
    match = LORA_PART.search(name)
    return name[: match.start()] if match else name.replace(".base_layer.", ".")


def is_embedding(parameter: str) -> bool:
    """Whether a parameter (`model.embed_tokens.weight`) is a matrix with a row per token."""
    parts = parameter.removeprefix(PREFIX).replace(".base_layer.", ".").split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in EMBEDDING_NAMES


def embedding_rows(adapter: AdapterFolder) -> dict[str, int]:
    """{parameter: rows} of the embedding matrices that an adapter holds whole."""
    return {
        module_or_parameter(key): tensor.shape[0]
        for key, tensor in (adapter.tensors or {}).items()
        if len(tensor.shape) == 2 and ".lora_" not in key and is_embedding(key)
    }


def missing_tensors(folder: Path, keys: Iterable[str]) -> KitError:
    """The refusal of an adapter that lacks tensors which its config asks for: PEFT leaves them as it drew them."""
    keys = sorted(keys)
    return KitError(
        f"the adapter lacks {len(keys)} tensors that its config asks for, the first {keys[0]}",
        where=str(folder),
        fix="give an adapter that was saved whole, and the base that it was trained on",
    )


def unknown_modules(folder: Path, names: Iterable[str]) -> KitError:
    """The refusal of an adapter for modules that the base does not have: PEFT passes over their tensors in silence."""
    names = list(dict.fromkeys(names))
    return KitError(
        f"the base has no module for {len(names)} of the adapter's: {', '.join(names[:5])}",
        where=str(folder),
        fix="give the base that the adapter was trained on",
    )


def partial_vocabulary(folder: Path, rows: Iterable[int], behind: Iterable[str]) -> KitError:
    """The refusal of an adapter that resized one end of the vocabulary and does not hold the other."""
    return KitError(
        f"the vocabulary was resized to {sorted(rows)} rows, but not everywhere: {', '.join(behind)}",
        where=str(folder),
        fix="save the adapter with save_embedding_layers=true",
    )
