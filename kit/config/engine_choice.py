"""Chooses the DeepSpeed JSON of `deepspeed=auto`: the fastest engine whose forecast fits this machine's GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from kit.config.compose import Composed
from kit.config.deepspeed.check import load_deepspeed_file
from kit.config.memory_choice import Device, choose_memory, find_device, find_free, usable_bytes
from kit.config.provenance import read_file_layer
from kit.config.report import Report
from kit.config.sections import merge_trees
from kit.errors import KitError
from kit.inspection.model import inspect_model
from kit.schema.run_plan import MemoryOption, RunPlan
from kit.system import paths

# What a step takes beside the same step without sharding: an adapter, all weights. From an H200 with one of its like
# (Llama-3.1-8B: ZeRO-3 0.31 to 0.5 of ZeRO-2 for LoRA, offloads 0.74 of ZeRO-3 for LoRA and 0.32 for all weights).
COSTS = {
    "none": (1.0, 1.0), "zero2": (1.0, 1.0), "zero2_offload": (1.1, 3.0), "zero3": (2.2, 1.25),
    "zero3_offload": (3.0, 4.0),
}  # fmt: skip
OFFLOADS = ("zero2_offload", "zero3_offload")
KEY = "deepspeed"


@dataclass
class Candidate:
    """An engine, the plan of a run with it, and the fastest option of its memory."""

    name: str
    plan: RunPlan
    option: MemoryOption

    @property
    def cost(self) -> float:
        return self.option.cost * COSTS[self.name][not self.plan.peft]


def is_auto(composed: Composed) -> bool:
    """Whether `deepspeed=auto` was chosen."""
    section = composed.tree.get(KEY)
    return isinstance(section, dict) and section.get("auto") is True


def choose_engine(composed: Composed, build: Callable[[Composed], RunPlan]) -> RunPlan:
    """Return the plan with the fastest engine that fits; where none fits, with the one that needs least, and a note.

    build: makes the plan of a composed run. KitError where the run is refused with every engine, and where the GPUs
    are not here or the base's memory cannot be forecast.
    """
    if composed.tree[KEY].get("file"):
        raise KitError("deepspeed=auto beside deepspeed.file: both name the JSON", "deepspeed.file", "leave out one")
    alone = build(with_engine(composed, "none"))
    if alone.fsdp:
        raise KitError(
            "deepspeed=auto beside fsdp: they shard the same weights", "fsdp", "fsdp=none or deepspeed=none"
        )
    device = find_device(alone.launch, alone.trainer["use_cpu"])
    if device is None or alone.launch.slurm and not alone.trainer["use_cpu"]:
        fix = "name one: deepspeed=zero2 (zero3 where the weights are larger than a GPU)"
        raise KitError("deepspeed=auto chooses by the GPUs' memory, and they are not on this machine", KEY, fix)
    candidates, refusals = [], []
    for name in engines_for(alone):
        try:
            plan = alone if name == "none" else build(with_engine(composed, name))
        except KitError as error:  # a rule against this engine: another may do
            refusals.append(error)
            continue
        if option := fastest_option(plan, device):
            candidates.append(Candidate(name, plan, option))
    if not candidates:
        if refusals:
            raise refusals[0]
        text = f"deepspeed=auto forecasts memory, and knows too little of {alone.model.name_or_path}"
        raise KitError(text, KEY, "name one: deepspeed=none, zero2 or zero3")
    limit = usable_bytes(device.bytes, alone.trainer["use_cpu"])
    fitting = [c for c in candidates if c.option.bytes <= limit]
    chosen = min(fitting, key=lambda c: c.cost) if fitting else min(candidates, key=lambda c: c.option.bytes)
    others = [f"{c.name} {c.option.bytes / 1e9:.1f} GB" for c in candidates if c is not chosen]
    why = "the fastest that fits" if fitting else "needs least, and the forecast is more than there is"
    note = f"deepspeed=auto: {chosen.name}, {chosen.option.bytes / 1e9:.1f} GB of {device.bytes / 1e9:.1f}, {why}"
    note += f"; beside it {', '.join(others)}" if others else ""
    return chosen.plan.model_copy(update={"notes": [note, *chosen.plan.notes]})


def engines_for(plan: RunPlan) -> tuple[str, ...]:
    """Return the engines that are compared.

    One process with an adapter needs none. All weights are trained with DeepSpeed's float32 copies on any number of
    processes: without it they would be stepped in 16 bits where one GPU has room for that. On CPUs there is nowhere to
    offload to.
    """
    sharded = ("none",) if plan.world_size == 1 and plan.peft else ("zero2", "zero3")
    return sharded if plan.trainer["use_cpu"] else (*sharded, *OFFLOADS)


def fastest_option(plan: RunPlan, device: Device) -> MemoryOption | None:
    """Return how the memory of a device is used best under a plan's engine; None where it cannot be forecast."""
    if plan.memory:
        return plan.memory.options[0]
    free = find_free(plan.composed.get("trainer") or {}, Report(plan.provenance))
    text = inspect_model(plan.model, here=False)[0].text
    memory = choose_memory(plan, {**plan.trainer, **dict.fromkeys(free, "auto")}, text, device)
    return memory.options[0] if memory else None


def with_engine(composed: Composed, name: str) -> Composed:
    """Return a composed run with the JSON of ds_configs/ in place of "auto", keys given beside it on top."""
    file = paths.DS_CONFIGS / f"{name}.json"
    given = {key: value for key, value in composed.tree[KEY].items() if key != "auto"}
    values = {} if name == "none" else merge_trees(load_deepspeed_file(file), given)
    layer = {} if name == "none" else {key: place for key, (place, _) in read_file_layer(file, KEY).items()}
    provenance = {key: place for key, place in composed.provenance.items() if key != f"{KEY}.auto"}
    tree = copy.deepcopy({**composed.tree, KEY: values})
    return replace(composed, tree=tree, provenance={**layer, **provenance})
