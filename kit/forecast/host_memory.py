"""What a run needs beside its GPUs: memory of each host, and disk for checkpoints and the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kit.forecast.memory import DTYPE_BYTES, SUB_GROUP_SIZE, Sizes, Step, Term, weights_bytes
from kit.inspection.trainable import list_modules
from kit.schema.dotted import value_at

PROCESS_BYTES = 3e9  # Python, CUDA's host side and the libraries of one rank
FULL_PRECISION_STATES = 12  # bytes of master weight and Adam's two states under DeepSpeed


def pinned_bytes(size: float) -> float:
    """Return what a pinned buffer takes: torch's caching host allocator rounds it up to a power of two."""
    return float(1 << (int(size) - 1).bit_length()) if size >= 1 else 0.0


def forecast_host_memory(step: Step, base: Sizes, local: int) -> list[Term]:
    """Return the terms of one host with `local` processes; weights are mapped from files: not counted.

    ZeRO-1 and 2 have one flat buffer of all that is trained, ZeRO-3 one for each sub_group_size of it, and pins
    offloaded parameters one by one. Adam's states are not pinned.
    """
    trained, processes, number = base.trained, step.processes, DTYPE_BYTES[step.precision]
    terms = [Term("processes", PROCESS_BYTES * local, "always", f"{local} x 3 GB", "estimate")]
    group = value_at(dict(step.deepspeed or {}), "zero_optimization.sub_group_size")
    groups = 1
    if step.stage == 3:
        groups = math.ceil(trained / (group if isinstance(group, int | float) and group > 0 else SUB_GROUP_SIZE))

    def add(name: str, size: float, formula: str, source: str) -> None:
        terms.append(Term(name, size * local, "always", f"{local} x {formula}", source))

    if step.offload_device("optimizer") == "nvme":
        group_size = min(trained / processes, trained / groups / processes)
        count = _number(step, "optimizer", "buffer_count", 4)
        size = count * pinned_bytes(group_size * 4)
        add("buffers of optimizer states", size, f"{count} x {group_size:,.0f} x 4, pinned", "optimizer_utils.py")
        add("float32 gradients", pinned_bytes(group_size * 4), f"{group_size:,.0f} x 4", "DeepSpeed stage3.py")
    elif step.offloads("optimizer"):
        pinned, part = _is_pinned(step, "optimizer"), trained / processes

        def flat(width: float) -> float:
            return groups * pinned_bytes(part * width / groups) if pinned else part * width

        add("master weights", flat(4), f"{trained:,} x 4 / {processes}", "DeepSpeed stage_1_and_2.py, stage3.py")
        add("Adam's states", 8 * part, f"{trained:,} x 8 / {processes}", "DeepSpeed cpu_adam.py")
        add("float32 gradients", flat(4), f"{trained:,} x 4 / {processes}", "stage_1_and_2.py, stage3.py")
        add("16-bit copy", flat(number), f"{trained:,} x {number} / {processes}", "stage_1_and_2.py, stage3.py")
    if step.offload_device("param") == "nvme":
        count, size = _number(step, "param", "buffer_count", 5), _number(step, "param", "buffer_size", 1e8)
        kept = min(_number(step, "param", "max_in_cpu", 1e9), base.total / processes)
        formula = f"{count} x {size:,.0f} x {number}, pinned"
        add("buffers of weights", count * pinned_bytes(size * number), formula, "partitioned_param_swapper.py")
        add("weights kept", kept * number, f"max_in_cpu, {kept:,.0f} x {number}", "partition_parameters.py")
    elif step.offloads("param"):
        weights, formula = weights_bytes(step, base)
        size = weights / processes
        if _is_pinned(step, "param") and not step.quantization:
            shapes = [s for m in (list_modules(base.text) or {}).values() for s in m.shapes.values()]
            size = sum(pinned_bytes(math.prod(s) * DTYPE_BYTES[step.weights] / processes) for s in shapes)
        add("base weights", size, f"({formula}) / {processes}, pinned", "partition_parameters.py")
    if step.stage == 3 and not step.peft:
        whole = base.total * number
        terms.append(Term("whole model, saved", whole, "save", f"{base.total:,} x {number}, on rank 0", "engine.py"))
    return [term for term in terms if term.bytes]


def _number(step: Step, what: str, key: str, default: float) -> float:
    value = value_at(dict(step.deepspeed or {}), f"zero_optimization.offload_{what}.{key}")
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _is_pinned(step: Step, what: str) -> bool:
    return value_at(dict(step.deepspeed or {}), f"zero_optimization.offload_{what}.pin_memory") is not False


def forecast_disk(step: Step, base: Sizes, trainer: Mapping[str, Any], steps: int | None) -> list[Term]:
    """Return the terms of a run's disk: its checkpoints at the fullest moment, and what it leaves at the end."""
    number, trained = DTYPE_BYTES[step.weights], base.trained
    swapped: list[Term] = []
    adapter = 4 if step.peft and not step.quantization else number  # as the adapter's weights are kept
    model, word = (trained * adapter, "adapter") if step.peft else (base.total * number, "model")
    if step.deepspeed:
        states = trained * FULL_PRECISION_STATES + (0 if step.peft else base.total * number)
    else:
        states = trained * 2 * (adapter if step.peft else number)
    for what, width in (("optimizer", 16), ("param", number)):
        if step.offload_device(what) == "nvme":  # master weights, two states and gradients; the base in 16 bits
            size = (trained if what == "optimizer" else base.total) * width
            formula = f"{size / width:,.0f} x {width}"
            swapped.append(Term(f"{what}, on NVMe", size, "always", formula, "DeepSpeed swap_tensor"))
    each = model + states
    kept = _checkpoints_kept(trainer, steps)
    terms = [Term(word, model, "always", f"{model / 1e9:.3f} GB", "safetensors")]
    if kept:
        formula = (
            f"{kept} checkpoint{'s' * (kept > 1)} x ({model / 1e9:.3f} GB {word} + {states / 1e9:.3f} GB optimizer)"
        )
        terms.append(
            Term("checkpoints", kept * each, "always", formula, "trainer.save_total_limit, one more meanwhile")
        )
    return terms + swapped


def _checkpoints_kept(trainer: Mapping[str, Any], steps: int | None) -> int:
    """Return how many checkpoints lie on disk at once at most."""
    strategy, limit = str(trainer.get("save_strategy") or "steps"), trainer.get("save_total_limit")
    if strategy == "no":
        return 0
    every = trainer.get("save_steps") or 500
    made = max(1, int(steps // every)) if steps and strategy == "steps" and every >= 1 else 1
    if strategy == "epoch":
        made = max(1, int(trainer.get("num_train_epochs") or 3))
    return min(made, int(limit) + 1) if limit else made
