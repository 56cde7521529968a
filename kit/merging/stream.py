"""Writes the merged shards: untouched bytes from file to file, changed tensors in float32 and rounded once.

No tensor is ever held whole. Workers write at offsets known in advance, each with one block of buffers, so memory is
about 16 MB per worker whatever the model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kit.errors import FAILED, KitError
from kit.merging.adapter import read_tensor_bytes
from kit.merging.byte_ranges import copy_range, read_into, reserve, write_all
from kit.merging.dequantize import make_restorer, rows_in_whole_blocks
from kit.merging.parts import LoraUpdate, MergePlan, OutputTensor
from kit.storage.safetensors_header import TensorEntry, encode_header

BLOCK = 1 << 21  # values at a time: what one core's cache holds, roughly
COPY = 64 << 20  # bytes of one file-to-file copy
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

_local = threading.local()


def torch_dtype(name: str) -> Any:
    """The torch dtype of a safetensors dtype name (floating types only)."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def read_adapter_tensor(tensor: TensorEntry) -> Any:
    """A whole tensor of the adapter in float32."""
    import torch

    flat = (
        torch.frombuffer(read_tensor_bytes(tensor), dtype=torch_dtype(tensor.dtype))
        if tensor.end > tensor.start
        else None
    )
    return (torch.empty(0) if flat is None else flat).float().reshape(tensor.shape)


def map_in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`work` of every item, in order, on a thread per core; the first problem ends it.

    Each has one thread of torch: so sums run in one order here and in `write_shards`, and double quantization, whose
    codes hang on the last bit of a mean, comes out alike.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:
            futures = [pool.submit(work, item) for item in items]
            for future in wait(futures, return_when=FIRST_EXCEPTION).not_done:
                future.cancel()
            return [future.result() for future in futures]
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    return max(1, min(16, len(os.sched_getaffinity(0))))


def write_shards(
    plan: MergePlan, folder: Path, *, fsync: bool, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write every shard of a plan into `folder`; gives seconds, fsync_seconds, bytes and the figures of each change.

    KitError (4) where a value of the result is not finite.
    """
    import torch

    started = time.perf_counter()
    threads = usable_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    files, queues, done, total = [], [], 0, 0
    try:
        for name, outputs in plan.shards.items():
            header = encode_header([(o.name, o.dtype, o.shape, _output_bytes(o)) for o in outputs])
            fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            files.append(fd)
            jobs, offset = [], len(header)
            for output in outputs:
                jobs.append((output, offset))
                offset += _output_bytes(output)
            reserve(fd, offset)
            write_all(fd, memoryview(header), 0)
            done, total = done + len(header), total + offset
            queues.append([(fd, job) for job in _join_copies(jobs)])
        figures = _run_jobs(queues, threads, done, total, progress)
        written = time.perf_counter()
        if fsync:
            for fd in files:
                os.fsync(fd)
        synced = time.perf_counter()
    finally:
        torch.set_num_threads(before)
        for fd in files:
            os.close(fd)
    return {
        "seconds": written - started,
        "fsync_seconds": synced - written if fsync else None,
        "bytes": total,
        "workers": threads,
        "tensors": sorted(figures, key=lambda f: f["tensor"]),
    }


def _run_jobs(
    queues: list[list], threads: int, done: int, total: int, progress: Callable[[int, int], None] | None
) -> list[dict]:
    """Run all jobs, taking from the shards in turn: writers of one file wait for each other, of several do not."""
    lock, figures = threading.Lock(), []

    def work(fd: int, job: tuple) -> None:
        nonlocal done
        if isinstance(job[0], OutputTensor):
            figure, size = _write_changed_tensor(fd, *job), _output_bytes(job[0])
        else:
            figure, size = None, copy_range(fd, *job)
        with lock:
            done += size
            if figure:
                figures.append(figure)
            if progress:
                progress(done, total)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, *item) for turn in zip_longest(*queues) for item in turn if item is not None]
        finished, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in finished:
            future.result()
    return figures


def _output_bytes(output: OutputTensor) -> int:
    if output.edit is None and output.dtype == output.source.dtype:
        return output.source.end - output.source.start
    count = 1
    for n in output.shape:
        count *= n
    return count * ITEM_SIZE[output.dtype]


def _join_copies(jobs: list[tuple[OutputTensor, int]]) -> list[tuple]:
    """Changed tensors as they are; neighbours that stay as they were joined into copies (file, from, to, bytes)."""
    out: list[tuple] = []
    run: list[Any] | None = None

    def flush() -> None:
        if run:
            file, source, target, size = run
            out.extend((file, source + i, target + i, min(COPY, size - i)) for i in range(0, size, COPY))

    for output, offset in jobs:
        source, size = output.source, _output_bytes(output)
        if output.edit or output.dtype != source.dtype:
            flush()
            run = None
            out.append((output, offset))
        elif run and run[0] == source.file and run[1] + run[3] == source.start and run[2] + run[3] == offset:
            run[3] += size
        else:
            flush()
            run = [source.file, source.start, offset, size]
    flush()
    return out


def _buffer(role: str, count: int, dtype: Any) -> tuple[Any, memoryview]:
    """This worker's buffer of that role as tensor and bytes; kept, because fresh pages cost more than the maths."""
    import torch

    need = count * dtype.itemsize
    kept = getattr(_local, role, None)
    if kept is None or kept.numel() < need:
        kept = torch.empty(max(need, BLOCK * 4), dtype=torch.uint8)
        setattr(_local, role, kept)
    part = kept[:need]
    return part.view(dtype), part.numpy().data


def _write_changed_tensor(fd: int, output: OutputTensor, offset: int) -> dict[str, Any]:
    """Compute and write one tensor; gives how far it moved. float64 weights stay in float64."""
    import torch

    work = torch.float64 if output.source.dtype == "F64" else torch.float32
    result, edit = torch_dtype(output.dtype), output.edit
    rows = output.shape[0] if output.shape else 1
    width = 1
    for n in output.shape[1:]:
        width *= n
    step = max(1, BLOCK // max(width, 1))
    restore = None
    if edit and edit.restore and not edit.replace:
        step = rows_in_whole_blocks(step, width, edit.restore[0])
        restore = make_restorer(*edit.restore, lambda: _blocks(output.source, rows, width, step, work), width)
    lora = _factors(edit.lora, work) if edit and edit.lora else None
    add = read_adapter_tensor(edit.add[0]).to(work).mul_(edit.add[1]) if edit and edit.add else None
    tokens = (torch.tensor(edit.rows[0]), read_adapter_tensor(edit.rows[1]).to(work)) if edit and edit.rows else None
    transposed = edit is not None and edit.lora is not None and edit.lora.transposed
    by_column = _column_factor(output, lora, rows, width, step, work, restore) if lora and transposed else None
    before = moved = 0.0
    limit = torch.finfo(result).max
    with open(output.source.file, "rb", buffering=0) as handle:
        for first in range(0, rows, step):
            last = min(rows, first + step)
            w = _block(handle.fileno(), output.source, first, last, width, work)
            if restore:
                w.copy_(restore(w, first))
            flat = w.view(-1)
            before += float(torch.dot(flat, flat))
            if lora:
                left, right, magnitude = lora
                kept = w.clone() if magnitude is not None else None
                w.addmm_(left[first:last], right)
                if by_column is not None:
                    w.mul_(by_column)
                elif magnitude is not None:
                    w.mul_((magnitude[first:last] / torch.linalg.norm(w, dim=1)).unsqueeze(1))
                if kept is not None:
                    moved += float((w - kept).square_().sum())
            if add is not None:
                w.add_(add[first:last].unsqueeze(1))
            if tokens is not None:
                inside = (tokens[0] >= first) & (tokens[0] < last)
                w[tokens[0][inside] - first] = tokens[1][inside]
            _check_finite(flat, limit, output)
            out, data = _buffer("out", flat.numel(), result)
            out.copy_(flat)
            write_all(fd, data, offset + first * width * result.itemsize)
    if lora and lora[2] is None:  # |L R| from two r x r products
        left, right = lora[0].double(), lora[1].double()
        moved = float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0))
    known = edit is not None and edit.lora is not None
    return {"tensor": output.name, "relative_change": (moved / before) ** 0.5 if known and before else None}


def _check_finite(values: Any, limit: float, output: OutputTensor) -> None:
    """KitError (4) where a value is not finite in the dtype that is written, whose largest number is `limit`."""
    import torch

    # The root of the sum of squares bounds every value: one cheap pass in the usual case.
    if not float(torch.dot(values, values)) < float(limit) ** 2 and not bool((values.abs() <= limit).all()):
        raise KitError(
            f"{output.name} would hold values that are not finite in {output.dtype}",
            where=str(output.source.file),
            fix="the adapter or the base is damaged, or the base's dtype is too narrow (see --dtype)",
            code=FAILED,
        )


def _block(fd: int, source: TensorEntry, first: int, last: int, width: int, work: Any) -> Any:
    """Rows [first, last) of a stored tensor as a (rows, width) block in the working dtype."""
    stored = torch_dtype(source.dtype)
    count = (last - first) * width
    raw, data = _buffer("raw", count, stored)
    read_into(fd, data, source.start + first * width * stored.itemsize, source.file)
    w, _ = _buffer("work", count, work)
    w.copy_(raw)
    return w.view(last - first, width)


def _blocks(source: TensorEntry, rows: int, width: int, step: int, work: Any) -> Iterator[Any]:
    """A stored tensor from its start, `step` rows at a time, each in this worker's buffer."""
    with open(source.file, "rb", buffering=0) as handle:
        for first in range(0, rows, step):
            yield _block(handle.fileno(), source, first, min(rows, first + step), width, work)


def _factors(lora: LoraUpdate, work: Any) -> tuple[Any, Any, Any]:
    """(rows, r), (r, columns) with the scale in it, and the DoRA magnitude or None."""
    a, b = read_adapter_tensor(lora.a).to(work), read_adapter_tensor(lora.b).to(work)
    left, right = (a.T.contiguous(), b.T.contiguous()) if lora.transposed else (b, a)
    return left, right * lora.scale, read_adapter_tensor(lora.magnitude).to(work) if lora.magnitude else None


def _column_factor(
    output: OutputTensor, lora: tuple, rows: int, width: int, step: int, work: Any, restore: Any
) -> Any:
    """DoRA over columns (Conv1D, embeddings): the norms need a pass of their own. None without a magnitude."""
    import torch

    left, right, magnitude = lora
    if magnitude is None:
        return None
    squares = torch.zeros(width, dtype=torch.float64)
    for index, w in enumerate(_blocks(output.source, rows, width, step, work)):
        first = index * step
        if restore:
            w.copy_(restore(w, first))
        squares += w.addmm_(left[first : first + w.shape[0]], right).square_().sum(0, dtype=torch.float64)
    return magnitude / squares.sqrt_().to(work)
