"""Every "auto" becomes a plain value: launcher, device, precision, batch, DeepSpeed's sizes, paths."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kit.config import slurm
from kit.config.deepspeed import resolve as zero
from kit.config.sections import located
from kit.errors import KitError, Problem
from kit.inspection.model import Base
from kit.inspection.tokenizer import is_file_name
from kit.schema.run_plan import Launch
from kit.system import hardware

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
QUANTIZATION_AUTO = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def resolve_launch(
    launch: Launch, trainer: dict[str, Any], deepspeed: bool, here: bool, world: int | None, notes: list[str]
) -> tuple[Launch, bool]:
    """The launcher, the processes on each node, and whether it is on CPU. num_nodes is a number already."""
    gpus = len(hardware.gpus())
    on_cpu = trainer.get("use_cpu", "auto")
    if launch.slurm and world is None:
        launch = resolve_slurm(launch, on_cpu is True)
        on_cpu, here = on_cpu is True, False  # the nodes have the GPUs; this machine need not
    nodes = launch.num_nodes if isinstance(launch.num_nodes, int) else 1
    count = max(1, world // nodes) if world else launch.num_gpus
    if on_cpu == "auto":
        # A count that was asked for on a machine without GPUs is meant for another machine.
        on_cpu = gpus == 0 and (count == "auto" or (world is not None))
    if not on_cpu and gpus == 0 and not here:
        notes.append("no GPU on this machine: planned for one that has them, with bfloat16")
    if count == "auto":
        count = 1 if on_cpu or launch.launcher == "local" else max(gpus, 1)
    launcher = launch.launcher
    # Ranks that a launcher has already started are no plain process, whatever the recipe would start.
    if launcher == "auto" or (launcher == "local" and (world or 1) > 1):
        launcher = "local" if count * nodes == 1 else ("deepspeed" if deepspeed else "torchrun")
        if launch.hostfile or launch.include or launch.exclude:  # nobody else reads them
            launcher = "deepspeed"
    return launch.model_copy(update={"launcher": launcher, "num_gpus": count}), bool(on_cpu)


def resolve_slurm(launch: Launch, on_cpu: bool) -> Launch:
    """GPUs per node are said once: by launch.slurm.gres or by launch.num_gpus (1 where neither says it)."""
    assert launch.slurm
    count, gres = launch.num_gpus, launch.slurm.gres
    if count == "auto":
        count = 1 if on_cpu else (slurm.gpus_of(gres) or 1)
    if gres == "auto":
        gres = None if on_cpu else f"gpu:{count}"
    return launch.model_copy(update={"num_gpus": count, "slurm": launch.slurm.model_copy(update={"gres": gres})})


def resolve_precision(trainer: dict[str, Any], on_cpu: bool, notes: list[str]) -> Any:
    """Set trainer.bf16 and trainer.fp16 to plain values; `auto` is what the hardware is fast at."""
    asked = {flag: trainer.get(flag, "auto") for flag in PRECISIONS}
    if True in asked.values():
        chosen = "bf16" if asked["bf16"] is True else "fp16"
    elif "auto" not in asked.values():
        chosen = None
    elif on_cpu:
        chosen = "bf16" if asked["bf16"] == "auto" and hardware.cpu_multiplies_bf16() else None
    else:
        old = any(g.capability and g.capability < (8, 0) for g in hardware.gpus())
        chosen = "fp16" if old and asked["fp16"] == "auto" else ("bf16" if asked["bf16"] == "auto" else None)
    for flag in PRECISIONS:
        # Both true is left as it is for the rule that refuses it.
        trainer[flag] = True if asked[flag] is True else flag == chosen
    return PRECISIONS.get(chosen or "", "float32")


def load_dtype(asked: str, precision: str, peft: bool, deepspeed: bool) -> Any:
    """The dtype of the loaded weights: fp16 without DeepSpeed needs float32 weights where they train."""
    if asked != "auto":
        return asked
    return "float32" if precision == "float16" and not (peft or deepspeed) else precision


def resolve_quantization(quantization: dict[str, Any] | None, precision: str, sharded: bool) -> Any:
    """The dtypes that are "auto". `sharded`: ranks gather the weights, which must then be of one float dtype (T42)."""
    if not quantization:
        return quantization
    values = (precision, precision if sharded else "uint8")
    auto = {k: v for k, v in zip(QUANTIZATION_AUTO, values, strict=True) if quantization.get(k) == "auto"}
    return {**quantization, **auto}


def resolve_batch(
    trainer: dict[str, Any], wanted: int | None, world: int, set_by: Any, provenance: dict[str, str]
) -> tuple[int, list[Problem]]:
    """rows per optimizer step = per_device_train_batch_size x gradient_accumulation_steps x processes."""
    micro, steps = trainer.get("per_device_train_batch_size", 8), trainer.get("gradient_accumulation_steps", 1)
    if not all(isinstance(n, int) and n > 0 for n in (micro, steps)):
        return 1, []  # the field tables have refused it already
    if wanted is None:
        return micro * steps * world, []
    # The group's own 1 is a default; a value from anywhere else was meant.
    given = not provenance.get("trainer.gradient_accumulation_steps", "trainer/").startswith("trainer/")
    if given and micro * steps * world != wanted:
        return wanted, [
            Problem(
                f"global_batch_size={wanted} is not {micro} rows x {steps} accumulation steps x {world} processes",
                set_by("global_batch_size"),
                "leave out trainer.gradient_accumulation_steps: it is derived",
                "batch",
            )
        ]
    if wanted % (micro * world):
        # The largest that divides; nobody asks for more than 4096 rows per process.
        fits = [m for m in range(1, min(micro, 4096) + 1) if wanted % (m * world) == 0]
        fix = (
            f"trainer.per_device_train_batch_size={fits[-1]}"
            if fits
            else f"global_batch_size={math.ceil(wanted / (micro * world)) * micro * world}"
        )
        return wanted, [
            Problem(
                f"global_batch_size={wanted} does not divide by {micro} rows x {world} processes",
                set_by("global_batch_size"),
                fix,
                "batch",
            )
        ]
    trainer["gradient_accumulation_steps"] = wanted // (micro * world)
    return wanted, []


def resolve_deepspeed(
    deepspeed: dict[str, Any],
    trainer: dict[str, Any],
    world: int,
    base: Base,
    precision: Any,
    set_by: Any,
    here: bool,
    notes: list[str],
    chosen: Collection[str] = (),
) -> tuple[dict[str, Any], list[Problem]]:
    """Every "auto" of the JSON as a plain value; a literal that disagrees with the trainer is a problem.

    For another machine the width of a model that is not here may stay unknown: it is said, not guessed.
    """
    try:
        return zero.resolve(
            deepspeed,
            trainer=trainer,
            world_size=world,
            hidden_size=base.hidden_size,
            precision=precision,
            chosen=chosen,
        ), []
    except KitError as error:
        unknown = [p for p in error.problems if p.rule == "hidden-size"]
        if unknown and not here:
            notes.append(f"{unknown[0].problem}; resolved when the run starts")
            return deepspeed, located([p for p in error.problems if p not in unknown], set_by)
        return deepspeed, located(error.problems, set_by)


def absolute(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with local paths made absolute, in place: workers start elsewhere, a resume may too (T80)."""
    for section, keys in (
        ("model", ["name_or_path"]),
        ("tokenizer", ["name_or_path", "chat_template"]),
        ("dataset", ["path", "eval_path"]),
        ("launch", ["script", "hostfile"]),
        ("deepspeed", ["file"]),
    ):
        held = tree.get(section) or {}
        for key in keys:
            if key == "chat_template" and not is_file_name(str(held.get(key))):
                continue  # a name, whatever lies here under it
            if held.get(key) and (path := Path(str(held[key])).expanduser()).exists():
                held[key] = str(path.absolute())
    return tree
