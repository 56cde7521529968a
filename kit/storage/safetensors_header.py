"""Where a model's files are and what its safetensors hold, read without torch.

The header of a safetensors file is JSON behind an 8-byte length (https://github.com/huggingface/safetensors#format),
so names, shapes and dtypes of a 70B model cost a few reads.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.storage import hub_cache

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
META_PARAMS = "params.json"  # of Meta's checkpoints
FINGERPRINT_BYTES = 4096  # bytes of each tensor that enter the fingerprint


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file; `start` and `end` are absolute byte offsets in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def find_model_folder(name_or_path: str, revision: str | None = None) -> Path | None:
    """The local folder of a model: a path as it is, or a Hub id's snapshot in the cache; None without either."""
    path = Path(name_or_path).expanduser()
    return path.resolve() if path.is_dir() else hub_cache.find_snapshot(name_or_path, hub_cache.MODEL, revision)


def holds_meta_checkpoint(folder: Path) -> bool:
    """Whether this is a download of Meta's own release, which `kit convert` reads."""
    return (folder / META_PARAMS).is_file() and any(folder.glob("consolidated.*.pth"))


def read_model_config(folder: Path) -> dict:
    """config.json of a model folder as a dict; KitError where it is missing or not JSON."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if holds_meta_checkpoint(folder):
            raise KitError(
                f"{folder} holds Meta's own checkpoint format ({META_PARAMS}, consolidated.*.pth)",
                where="model.name_or_path",
                fix=f"kit convert {folder} OUT, then give OUT",
            ) from None
        raise KitError(
            f"{folder} is not a model: it has no {CONFIG}",
            where="model.name_or_path",
            fix="give a folder with config.json and safetensors, or a Hub id",
        ) from None
    except (OSError, ValueError) as error:
        raise KitError(f"{path} cannot be read: {error}", "model.name_or_path", "fetch the file again") from None
    if not isinstance(config, dict):
        raise KitError(f"{path} does not hold a JSON object", "model.name_or_path", "fetch the file again")
    return config


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file in file order; KitError where the file is damaged."""
    try:
        size, length, header = _parse_header(file)
        tensors = [
            TensorEntry(
                name,
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise KitError(f"{file} is damaged: {error}", fix="fetch the file again") from None
    tensors.sort(key=lambda t: t.start)
    if tensors and max(t.end for t in tensors) != size:
        raise KitError(
            f"{file} is cut short or too long: {size} bytes, its header names {max(t.end for t in tensors)}",
            fix="fetch the file again",
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The words that stand beside the tensors of a safetensors file; KitError where the file is damaged."""
    try:
        return dict(_parse_header(file)[2].get("__metadata__") or {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise KitError(f"{file} is damaged: {error}", fix="fetch the file again") from None


def _parse_header(file: Path) -> tuple[int, int, Any]:
    """(bytes of the file, bytes of its header, the header)."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        prefix = f.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size + 1,)
        if length > size - 8:
            raise ValueError("the header is longer than the file")
        return size, length, json.loads(f.read(length))


def encode_header(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The head of a safetensors file whose tensors (name, dtype, shape, bytes) follow in this order.

    Padded to 8 bytes, as the format asks.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model in index order; empty where it has none."""
    names = indexed_shard_names(folder)
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise KitError(f"{folder} lacks {', '.join(missing)}, which its index names", fix="fetch the model again")
    if names:
        return [folder / n for n in names]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else []


def indexed_shard_names(folder: Path) -> list[str]:
    """The files that a sharded model's index names, in its order; empty where there is no index."""
    if not (folder / INDEX).is_file():
        return []
    try:
        return list(dict.fromkeys(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise KitError(f"{folder / INDEX} cannot be read: {error}", fix="fetch the file again") from None


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder by name; empty where it has no safetensors."""
    return {t.name: t for file in shard_files(folder) for t in read_header(file)}


def fingerprint_tensors(folder: Path) -> str:
    """A hash over every tensor's name, dtype, shape and first bytes: tells apart two bases of the same shape.

    Independent of how the tensors are spread over shards. It shows a mix-up, not an attack.
    """
    digest = hashlib.sha256()
    tensors = read_tensors(folder)
    handles = {file: open(file, "rb") for file in {t.file for t in tensors.values()}}
    try:
        for name in sorted(tensors):
            t = tensors[name]
            handle = handles[t.file]
            handle.seek(t.start)
            digest.update(json.dumps([name, t.dtype, t.shape]).encode())
            digest.update(handle.read(min(FINGERPRINT_BYTES, t.end - t.start)))
    finally:
        for handle in handles.values():
            handle.close()
    return digest.hexdigest()
