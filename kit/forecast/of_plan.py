"""The memory of a plan: what its micro-step is computed from, and the terms of all its phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.forecast.memory import Memory, Step, forecast_memory, measure_sizes
from kit.forecast.phases import add_phases
from kit.schema.run_plan import RunPlan


def step_of_plan(plan: RunPlan, trainer: Mapping[str, Any]) -> Step:
    """Return a micro-step of a plan with another trainer section, its rows of max_length tokens."""
    rows = trainer["per_device_train_batch_size"]
    return Step(
        peft=plan.peft, quantization=plan.quantization, deepspeed=plan.deepspeed, trainer=trainer,
        weights=plan.model.dtype, precision=plan.precision, processes=plan.world_size, rows=rows,
        tokens=rows * trainer["max_length"], attention=plan.model.attn_implementation,
    )  # fmt: skip


def forecast_plan(plan: RunPlan, text: Mapping[str, Any]) -> Memory | None:
    """Return the memory of a plan's micro-step; None where it is not forecast. text: the language model's config."""
    base = None if plan.fsdp else measure_sizes(text, plan.peft)
    if base is None or not isinstance(plan.trainer.get("max_length"), int):
        return None
    step = step_of_plan(plan, plan.trainer)
    return add_phases(forecast_memory(step, base), step, base)
