"""Refuses a run that its GPUs' memory cannot hold by the forecast, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from kit.config.memory_choice import describe_choice, describe_level, find_device, option_of
from kit.errors import KitError, Problem
from kit.forecast.memory import CONTEXT_BYTES, FORECAST_ERROR, Memory
from kit.forecast.of_plan import forecast_plan
from kit.inspection.model import inspect_model
from kit.schema.run_plan import RunPlan

RULE = "memory-forecast"
KEY = "launch.ignore_memory_forecast"


def needed_gb(memory: Memory) -> float:
    return (memory.peak + memory.outside_allocator) / 1e9


def describe_forecast(plan: RunPlan) -> str | None:
    """Say in a line what a plan needs on each GPU; None for a CPU, and where it is not forecast."""
    if plan.memory:
        return describe_choice(plan.memory)
    memory = None if plan.trainer["use_cpu"] else forecast_plan(plan, inspect_model(plan.model, here=False)[0].text)
    if memory is None:
        return None
    device = find_device(plan.launch, on_cpu=False)
    room = f" of {device.name}'s {device.bytes / 1e9:.1f} GB" if device else ", and no GPU is here to compare it with"
    return f"{describe_level(option_of(plan))}; forecast {needed_gb(memory):.1f} GB{room}"


def check_memory(plan: RunPlan, text: Callable[[], Mapping[str, Any]], starts_here: bool) -> RunPlan:
    """Return the plan, with a warning where the forecast is more than a GPU has; KitError where the run starts here.

    By more than the forecast's own error: less is for the trial step to find out. text: gives the config of the
    language model. A base that stands in for another one in the forecast, FSDP and CPUs are never refused.
    """
    device = None if plan.trainer["use_cpu"] else find_device(plan.launch, on_cpu=False)
    memory = device and forecast_plan(plan, text())
    if not device or not memory or not memory.exact:
        return plan
    if memory.peak * (1 - FORECAST_ERROR) + CONTEXT_BYTES <= device.bytes:
        return plan
    rows, length = plan.trainer["per_device_train_batch_size"], plan.trainer["max_length"]
    problem = Problem(
        f"the run needs {needed_gb(memory):.1f} GB on each GPU by the forecast, "
        f"{device.name} has {device.bytes / 1e9:.1f} ({rows} x {length:,} tokens, {describe_level(option_of(plan))})",
        "trainer.per_device_train_batch_size, trainer.max_length",
        f"kit plan names changes that fit; {KEY}=true starts it all the same",
        RULE,
    )
    if starts_here and not plan.launch.ignore_memory_forecast:
        raise KitError([problem])
    return plan.model_copy(update={"warnings": [*plan.warnings, asdict(problem)]})
