"""Joined tensors as a stream of blocks: read from the ranks' files, reordered for transformers' RoPE, written.

Memory is a few blocks of BLOCK values, whatever the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kit.errors import FAILED, KitError
from kit.merging.stream import BLOCK, torch_dtype
from kit.storage.safetensors_header import INDEX, SINGLE, TensorEntry, encode_header


@dataclass
class JoinedTensor:
    """One tensor of the converted model and the slices that it is joined from along `axis`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: list[TensorEntry]
    axis: int = 0
    head_dim: int | None = None  # of a projection whose rows are reordered for rotate_half

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def drop_tied_output(tensors: list[JoinedTensor]) -> bool:
    """Whether the output projection is the embedding (Llama-3.2 1B and 3B); if so it is taken out of the list."""
    import torch

    embedding, head = tensors[0], tensors[-1]
    if head.name != "lm_head.weight":
        return True
    if {s.dtype for s in embedding.slices} != {s.dtype for s in head.slices}:
        return False
    with ExitStack() as stack:
        handles = open_shard_slices([embedding, head], stack)
        if all(
            torch.equal(a, b)
            for a, b in zip(iterate_blocks(embedding, handles), iterate_blocks(head, handles), strict=True)
        ):
            tensors.pop()
            return True
    return False


def shard_names(count: int) -> list[str]:
    """The files of a model in `count` parts."""
    return [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, places: dict[str, str], size: int) -> None:
    """Which file holds each tensor, for a model in several; `size`: bytes of all tensors."""
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shards(
    tensors: list[JoinedTensor], folder: Path, shard_gb: float, progress: Callable[[int, int], None] | None
) -> list[str]:
    """Write the safetensors files and, for several, their index; gives the files' names.

    KitError (4) where a value is not finite in the dtype that it is written in.
    """
    groups: list[list[JoinedTensor]] = [[]]
    for t in tensors:
        if groups[-1] and sum(g.nbytes for g in groups[-1]) + t.nbytes > shard_gb * 1e9:
            groups.append([])
        groups[-1].append(t)
    total, done = sum(t.nbytes for t in tensors), 0
    names = shard_names(len(groups))
    for name, group in zip(names, groups, strict=True):
        with open(folder / name, "wb") as file, ExitStack() as stack:
            file.write(encode_header([(t.name, t.dtype, t.shape, t.nbytes) for t in group]))
            handles = open_shard_slices(group, stack)
            for t in group:
                for block in iterate_blocks(t, handles):
                    block = block.to(torch_dtype(t.dtype))
                    if not bool(block.isfinite().all()):
                        raise KitError(
                            f"{t.name} would hold values that are not finite in {t.dtype}",
                            where=", ".join(str(s.file) for s in t.slices),
                            fix="fetch the files again (see --verify-checklist), or give a wider --dtype",
                            code=FAILED,
                        )
                    done += file.write(raw_bytes(block))
                    if progress:
                        progress(done, total)
    write_index(folder, {t.name: name for name, group in zip(names, groups, strict=True) for t in group}, total)
    return names


def open_shard_slices(tensors: list[JoinedTensor], stack: ExitStack) -> dict[Path, BinaryIO]:
    files = {s.file for t in tensors for s in t.slices}
    return {f: stack.enter_context(open(f, "rb", buffering=0)) for f in files}


def iterate_blocks(t: JoinedTensor, handles: dict[Path, BinaryIO]) -> Iterator[Any]:
    """The joined tensor in pieces of whole rows (whole heads where they are reordered), as stored."""
    width = math.prod(t.shape[1:])
    unit = t.head_dim or 1
    step = max(1, BLOCK // (width * unit)) * unit
    for first in range(0, t.shape[0], step):
        block = _rows(t, first, min(first + step, t.shape[0]), handles)
        yield _reorder(block, t.head_dim) if t.head_dim else block


def _rows(t: JoinedTensor, first: int, last: int, handles: dict[Path, BinaryIO]) -> Any:
    """Rows [first, last) of the joined tensor."""
    import torch

    if t.axis == 1:
        return torch.cat([_read(s, first, last, handles[s.file]) for s in t.slices], dim=1)
    parts, start = [], 0
    for s in t.slices:
        rows = s.shape[0]
        if max(first, start) < min(last, start + rows):
            parts.append(_read(s, max(first - start, 0), min(last - start, rows), handles[s.file]))
        start += rows
    return torch.cat(parts)


def _read(s: TensorEntry, first: int, last: int, handle: BinaryIO) -> Any:
    """Rows [first, last) of a slice."""
    import torch

    stored = torch_dtype(s.dtype)
    stride = math.prod(s.shape[1:]) * stored.itemsize
    block = torch.empty(last - first, *s.shape[1:], dtype=stored)
    view, offset = raw_bytes(block), s.start + first * stride
    while view:
        handle.seek(offset)
        count = handle.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise KitError(f"{s.file} ended early", fix="fetch the file again", code=FAILED)
        view, offset = view[count:], offset + count
    return block


def raw_bytes(block: Any) -> memoryview:
    """The bytes of a contiguous tensor."""
    import torch

    return block.contiguous().view(-1).view(torch.uint8).numpy().data


def _reorder(rows: Any, head_dim: int) -> Any:
    """Rows of whole heads from Meta's order to transformers'.

    Meta rotates rows 2i and 2i + 1 as one complex number; transformers' rotate_half rotates i and i + head_dim / 2.
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
