"""Chooses how a run uses its GPUs' memory: which activations are kept, and how many rows are computed at once.

`trainer.activation_checkpointing=auto` and `trainer.per_device_train_batch_size=auto` become the fastest pair that the
forecast (kit/forecast/memory.py) finds to fit; the pairs that need less stay in the plan, for a first step that meets
an "out of memory" all the same (kit/launchers/supervise.py).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kit.config.report import Report
from kit.forecast.memory import forecast_memory, measure_sizes
from kit.forecast.of_plan import step_of_plan
from kit.inspection.model import inspect_model
from kit.schema.checkpointing import checkpointing_kwargs, is_checkpointed
from kit.schema.run_plan import Launch, MemoryChoice, MemoryOption, RunPlan
from kit.system import hardware

# Names under which a user says what is recomputed; with one of them the kit does not choose.
TYPED = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# Settings that choose anew where they change.
KEYS = {f"trainer.{key}" for key in (*TYPED, "activation_checkpointing", "per_device_train_batch_size",
                                     "gradient_accumulation_steps", "use_cpu")}  # fmt: skip
AUTO_ROWS = 8  # rows of a process in an optimizer step where nobody says a number: TRL's per_device_train_batch_size
# Activation checkpointing from the fastest to the one that needs least, with the share of a forward pass that the
# backward repeats: selective keeps what the matmuls and attention gave, and repeats what is bound by memory.
LEVELS: tuple[tuple[dict[str, Any] | None, float], ...] = (
    (None, 0.0), ({"selective": True}, 0.15), ({"every_n_layers": 4}, 0.25), ({"every_n_layers": 3}, 0.34),
    ({"every_n_layers": 2}, 0.5), ({}, 1.0),
)  # fmt: skip
# Of a step's time, the forward pass has half under LoRA (2N of 4N operations a token) and a third in full fine-tuning.
FORWARD_SHARE = {True: 1 / 2, False: 1 / 3}
# What a micro-step costs beside its tokens, as so many of them: launches and matmuls of few rows; ZeRO-3 gathers.
STEP_TOKENS, GATHER_TOKENS = 512, 1024
GPU_SHARE, CPU_SHARE = 0.95, 0.6  # of the memory that a forecast may fill: the rest is other programs', or its error's
AS_FAST = 1.04  # options whose costs differ by less are as fast as each other: the one that needs less is taken
NEXT_SHARE = 0.9  # the next option after an "out of memory" needs at most so much of the one that failed


@dataclass(frozen=True)
class Device:
    """What one process has: its name, and its memory in bytes."""

    name: str
    bytes: int


def find_device(launch: Launch, on_cpu: bool) -> Device | None:
    """Return the smallest GPU that the run gets, or its share of the host's memory; None where they are elsewhere."""
    count = launch.num_gpus if isinstance(launch.num_gpus, int) else 1
    if on_cpu:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("CPU", int(min(total, hardware.cgroup_memory_limit() or total) / count))
    gpus = hardware.list_gpus()[:count]
    if len(gpus) < count:
        return None
    smallest = min(gpus, key=lambda gpu: gpu.memory_gb)
    return Device(smallest.name, int(smallest.memory_gb * 2**30))


def find_free(trainer: Mapping[str, Any], report: Report) -> set[str]:
    """Return which of the two settings are the kit's to choose: "auto" in `trainer`, and not said in another way."""
    free = set()
    if trainer.get("activation_checkpointing") == "auto" and not any(report.chosen(f"trainer.{k}") for k in TYPED):
        free.add("activation_checkpointing")
    if trainer.get("per_device_train_batch_size") == "auto":
        if not report.chosen("trainer.gradient_accumulation_steps"):
            free.add("per_device_train_batch_size")
    return free


def settle_without_choice(trainer: dict[str, Any], rows: int, report: Report) -> None:
    """Give what is "auto" TRL's values, which need the least memory, in place; `choose_for_plan` may change them.

    rows: those of one process in an optimizer step.
    """
    if "activation_checkpointing" in find_free(trainer, report):
        trainer["activation_checkpointing"] = True
    elif trainer.get("activation_checkpointing") == "auto":
        del trainer["activation_checkpointing"]
    if trainer.get("per_device_train_batch_size") == "auto":
        trainer["per_device_train_batch_size"] = max(n for n in divisors(rows) if n <= AUTO_ROWS)
        trainer["gradient_accumulation_steps"] = rows // trainer["per_device_train_batch_size"]


def choose_for_plan(plan: RunPlan, text: Callable[[], Mapping[str, Any]]) -> RunPlan:
    """Return the plan with what is "auto" chosen for this machine's GPUs; as it is where they are not here.

    text: gives the config of the language model; called where there is something to choose. FSDP's memory is not
    forecast.
    """
    free = find_free(plan.composed.get("trainer") or {}, Report(plan.provenance))
    device = find_device(plan.launch, plan.trainer["use_cpu"]) if free and not plan.fsdp else None
    if device is None:
        return plan
    memory = choose_memory(plan, {**plan.trainer, **dict.fromkeys(free, "auto")}, text(), device)
    return with_option(plan, memory) if memory else plan


def choose_memory(
    plan: RunPlan, trainer: Mapping[str, Any], text: Mapping[str, Any], device: Device
) -> MemoryChoice | None:
    """Return the options of a run, the fastest that fits first; None where its memory cannot be forecast.

    trainer: the plan's with "auto" where something is to be chosen. Where none fits, the option that needs least
    stands alone, and the trial step says whether it does.
    """
    length, sizes = trainer.get("max_length"), measure_sizes(text, plan.peft)
    if sizes is None or not isinstance(length, int):
        return None
    rows, fixed = plan.global_batch_size // plan.world_size, trainer["per_device_train_batch_size"]
    options = []
    for micro in [n for n in divisors(rows) if n <= AUTO_ROWS] if fixed == "auto" else [fixed]:
        for kwargs, repeated in levels_of(trainer, plan.peft, plan.zero_stage):
            option = {"activation_checkpointing": kwargs is not None, "activation_checkpointing_kwargs": kwargs}
            step = step_of_plan(plan, {**trainer, **option, "per_device_train_batch_size": micro})
            memory = forecast_memory(step, sizes)
            overhead = (STEP_TOKENS + GATHER_TOKENS * (step.stage == 3)) / step.tokens
            options.append(
                MemoryOption(
                    activation_checkpointing=kwargs is not None,
                    activation_checkpointing_kwargs=kwargs or {},
                    per_device_train_batch_size=micro,
                    gradient_accumulation_steps=rows // micro,
                    bytes=int(memory.peak + memory.outside_allocator * (not trainer["use_cpu"])),
                    cost=round((1 + repeated * FORWARD_SHARE[bool(plan.peft)]) * (1 + overhead), 4),
                )
            )
    limit = usable_bytes(device.bytes, trainer["use_cpu"])
    return MemoryChoice(device=device.name, device_bytes=device.bytes, options=order_options(options, limit))


def usable_bytes(size: float, on_cpu: bool) -> int:
    """Return how much of a device's memory a forecast may fill."""
    return int(size * (CPU_SHARE if on_cpu else GPU_SHARE))


def levels_of(
    trainer: Mapping[str, Any], peft: Mapping[str, Any] | None, stage: int
) -> Sequence[tuple[dict[str, Any] | None, float]]:
    """Return the levels of activation checkpointing that are open to a run: its own where it names one."""
    if trainer.get("activation_checkpointing") != "auto":
        if not is_checkpointed(trainer):
            return [(None, 0.0)]
        kwargs = checkpointing_kwargs(trainer)
        return [(kwargs, 1 / kwargs.get("every_n_layers", 1))]
    # TRL makes checkpointing reentrant for an adapter under ZeRO-3, which torch's selective checkpointing is not.
    reentrant = bool(peft) and stage == 3
    return [level for level in LEVELS if not (reentrant and (level[0] or {}).get("selective"))]


def order_options(options: Sequence[MemoryOption], limit: int) -> list[MemoryOption]:
    """Return the fastest option below the limit, then each time the fastest that needs clearly less."""
    ordered: list[MemoryOption] = []
    while fitting := [o for o in options if o.bytes <= limit]:
        fastest = min(o.cost for o in fitting)
        ordered.append(min((o for o in fitting if o.cost <= AS_FAST * fastest), key=lambda o: o.bytes))
        limit = int(ordered[-1].bytes * NEXT_SHARE)
    return ordered or [min(options, key=lambda o: o.bytes)]


def apply_option(option: MemoryOption, trainer: dict[str, Any], deepspeed: dict[str, Any] | None = None) -> None:
    """Put an option's values into the trainer section, and into the resolved DeepSpeed JSON, in place."""
    trainer["activation_checkpointing"] = option.activation_checkpointing
    if option.activation_checkpointing_kwargs:
        trainer["activation_checkpointing_kwargs"] = dict(option.activation_checkpointing_kwargs)
    else:
        trainer.pop("activation_checkpointing_kwargs", None)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        trainer[key] = getattr(option, key)
    if deepspeed:
        deepspeed["train_micro_batch_size_per_gpu"] = option.per_device_train_batch_size
        deepspeed["gradient_accumulation_steps"] = option.gradient_accumulation_steps


def option_of(plan: RunPlan) -> MemoryOption:
    """Return how a plan uses the memory, whoever chose it; without its bytes."""
    trainer = plan.trainer
    kwargs = checkpointing_kwargs(trainer) if is_checkpointed(trainer) else None
    return MemoryOption(
        activation_checkpointing=kwargs is not None, activation_checkpointing_kwargs=kwargs or {},
        per_device_train_batch_size=trainer["per_device_train_batch_size"],
        gradient_accumulation_steps=trainer["gradient_accumulation_steps"], bytes=0, cost=1.0,
    )  # fmt: skip


def take_next_option(plan: RunPlan) -> RunPlan | None:
    """Return the plan with the option after the chosen one; None where none is left."""
    memory = plan.memory
    if memory is None or memory.chosen + 1 >= len(memory.options):
        return None
    return with_option(plan, memory.model_copy(update={"chosen": memory.chosen + 1}))


def with_option(plan: RunPlan, memory: MemoryChoice) -> RunPlan:
    """Return the plan with the chosen option's values in its trainer and DeepSpeed sections."""
    trainer, deepspeed = dict(plan.trainer), copy.deepcopy(plan.deepspeed)
    apply_option(memory.options[memory.chosen], trainer, deepspeed)
    return plan.model_copy(update={"memory": memory, "trainer": trainer, "deepspeed": deepspeed})


def choose_on_the_node(plan: RunPlan) -> RunPlan:
    """Return the plan with its memory chosen for this node's GPUs, where they were not known when it was made.

    Every rank gets the same answer from GPUs of one kind; kit/training/run.py compares them.
    """
    if plan.memory or plan.trainer["use_cpu"]:
        return plan
    return choose_for_plan(plan, lambda: inspect_model(plan.model, here=False)[0].text)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def describe_choice(choice: MemoryChoice) -> str:
    """Say what was chosen and by which figures, in one line."""
    option = choice.options[choice.chosen]
    rows, steps = option.per_device_train_batch_size, option.gradient_accumulation_steps
    return (
        f"{describe_level(option)}, {rows} row{'s' * (rows != 1)} x {steps} accumulation step{'s' * (steps != 1)}; "
        f"forecast {option.bytes / 1e9:.1f} GB of {choice.device}'s {choice.device_bytes / 1e9:.1f} GB"
        f"{': more than it has' if option.bytes > choice.device_bytes else ''}"
    )


def describe_level(option: MemoryOption) -> str:
    """Say which activations are computed again."""
    kwargs = option.activation_checkpointing_kwargs
    if not option.activation_checkpointing:
        return "activation checkpointing off"
    if kwargs.get("selective"):
        return "selective activation checkpointing"
    every = int(kwargs.get("every_n_layers") or 1)
    return f"activation checkpointing of {f'1 layer in {every}' if every > 1 else 'all layers'}"
