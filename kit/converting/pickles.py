"""A Hugging Face folder whose weights are pickles (pytorch_model*.bin): the same tensors as safetensors.

torch's weights-only loader reads them: it builds tensors and nothing else, so that no code in a file can run.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.converting.stream import raw_bytes, shard_names, write_index
from kit.errors import KitError, Problem, first_line
from kit.storage.safetensors_header import CONFIG, encode_header

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
KEPT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # tokenizer and configs; never a *.py


def find_pickles(folder: Path) -> list[Path]:
    """The files of a pickled model in order; empty where there is none. KitError where a named one is missing."""
    if not (folder / CONFIG).is_file():
        return []
    if not (folder / BIN_INDEX).is_file():
        return [folder / BIN] if (folder / BIN).is_file() else []
    try:
        named = json.loads((folder / BIN_INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise KitError(f"{folder / BIN_INDEX} is damaged: {error}", "DIR", "fetch the file again") from None
    files = [folder / Path(name).name for name in sorted(set(named))]
    if missing := [f.name for f in files if not f.is_file()]:
        raise KitError(f"{folder} lacks {', '.join(missing)}", "DIR", "fetch all files of the model")
    return files


def read_pickle(file: Path) -> dict[str, Any]:
    """Tensors by name, mapped from the file where its format allows it; each matrix that is there twice once."""
    import torch

    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: such a file cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise KitError(
            f"{file} holds more than tensors: torch's weights-only loader refuses it",
            first_line(error)[:200],
            "take the model from somebody you trust, or its safetensors",
        ) from None
    except Exception as error:  # torch and zipfile name a cut file in many ways
        raise KitError(f"{file} is damaged or cut short: {first_line(error)}", "DIR", "fetch the file again") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise KitError(f"{file} is not a dict of tensors", "DIR", "it is no model of transformers")
    if strange := sorted({str(t.dtype) for t in loaded.values()} - {f"torch.{d}" for d in DTYPES}):
        raise KitError([Problem(f"{file} holds {', '.join(strange)}", "DIR", "convert an unquantized model")])
    tensors: dict[str, Any] = {}
    seen: set[tuple[Any, ...]] = set()
    # The output projection of a tied model comes last, so it is the embedding that stays.
    for name in sorted(loaded, key=lambda n: "lm_head" in n):
        tensor = loaded[name]
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    return tensors


def write_safetensors(
    files: list[Path], folder: Path, dtype: str | None, progress: Callable[[int, int], None] | None
) -> tuple[list[str], int, int, str]:
    """One safetensors file for each pickle, tensor by tensor; (names, parameters, bytes, commonest dtype)."""
    import torch

    done, parameters, total = 0, 0, sum(f.stat().st_size for f in files)
    names = shard_names(len(files))
    places: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name, file in zip(names, files, strict=True):
        tensors = {k: t for k, t in read_pickle(file).items() if k not in places}
        kinds = {k: dtype if dtype and t.is_floating_point() else str(t.dtype)[6:] for k, t in tensors.items()}
        entries = [
            (k, DTYPES[kinds[k]], tuple(t.shape), t.numel() * getattr(torch, kinds[k]).itemsize)
            for k, t in tensors.items()
        ]
        with open(folder / name, "wb") as out:
            out.write(encode_header(entries))
            for key, _, _, size in entries:
                value = tensors[key].to(getattr(torch, kinds[key]))
                out.write(raw_bytes(value) if value.numel() else b"")
                places[key] = name
                sizes[kinds[key]] = sizes.get(kinds[key], 0) + size
                parameters, done = parameters + value.numel(), done + size
                if progress:
                    progress(min(done, total), total)
    written = sum(sizes.values())
    write_index(folder, places, written)
    return names, parameters, written, max(sizes, key=sizes.__getitem__)


def copy_side_files(source: Path, folder: Path) -> None:
    """Configs and tokenizer files, as they are."""
    for pattern in KEPT_FILES:
        for file in source.glob(pattern):
            if file.name != BIN_INDEX:
                shutil.copyfile(file, folder / file.name)
