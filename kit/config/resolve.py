"""Every "auto" becomes a plain value: launcher, device, precision, batch, DeepSpeed's sizes, paths."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kit.config import memory_choice, slurm
from kit.config.added_tokens import train_embeddings, vocabulary_rows
from kit.config.data_words import is_there, matches_files
from kit.config.deepspeed.resolve import resolve_deepspeed_json
from kit.config.inputs import Inputs
from kit.config.memory_choice import AUTO_ROWS
from kit.config.nodes import resolve_nodes
from kit.config.packing import resolve_packing
from kit.config.report import Report
from kit.config.sections import QUANTIZATION_AUTO, Sections
from kit.errors import KitError
from kit.forecast.memory import measure_sizes
from kit.inspection.architectures import decoder_layer_classes
from kit.inspection.attention import choose_attention
from kit.inspection.liger import why_not_liger
from kit.inspection.model import Base
from kit.inspection.tokenizer import examine_tokenizer, is_file_name
from kit.schema.dotted import value_at
from kit.schema.run_plan import InitFrom, Launch
from kit.system import hardware

Precision = Literal["float32", "bfloat16", "float16"]
# Settings of the trainer that an optimizer or a scheduler in the DeepSpeed JSON takes the place of.
TYPED_BESIDE_DEEPSPEED = ("optim", "lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
PRECISIONS: dict[str, Precision] = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass
class Processes:
    """How many processes run, how they start, on what and in which precision."""

    launch: Launch
    on_cpu: bool
    precision: Precision
    world_size: int
    global_batch_size: int


@dataclass
class Resolved:
    """A run without "auto": its sections as plain values, and its processes."""

    tree: dict[str, Any]  # model, tokenizer, dataset, peft, init_from, quantization, deepspeed, fsdp, trainer, launch
    processes: Processes
    zero_stage: int
    template_writes_date: bool | None  # None where the tokenizer is not here


def resolve(sections: Sections, inputs: Inputs, report: Report, here: bool, world_size: int | None) -> Resolved:
    """Give every "auto" its value. `world_size`: processes already started; None: `launch.num_gpus` decides."""
    run, base = sections.run, inputs.base
    processes = resolve_processes(sections, report, bool(sections.deepspeed), here, world_size)
    trainer, precision = sections.trainer, processes.precision
    tokens = examine_tokenizer(run.tokenizer, run.model, vocabulary_rows(base), bool(inputs.data.chats))
    report.add(tokens.problems)
    report.notes += tokens.notes
    peft, init_from = resolve_adapter(sections, inputs, tokens.new_tokens, report, here)
    for key, value in sections.tracking.items():
        trainer.setdefault(key, value)
    dtype = load_dtype(run.model.dtype, precision, bool(peft), bool(sections.deepspeed))
    deepspeed = sections.deepspeed
    if deepspeed:
        chosen = [key for key in TYPED_BESIDE_DEEPSPEED if report.chosen(f"trainer.{key}")]
        deepspeed = resolve_deepspeed(deepspeed, trainer, processes, base, peft, report, here, chosen)
        if schedule := value_at(deepspeed, "scheduler.type"):
            report.note(f"the learning rate follows the DeepSpeed JSON's {schedule}, not trainer.lr_scheduler_type")
    if trainer.get("packing") == "auto":
        batch, samples = processes.global_batch_size, inputs.data.samples
        trainer["packing"] = resolve_packing(run, samples, base, trainer, peft, deepspeed, batch, report)
    attention = run.model.attn_implementation
    if attention == "auto":
        attention = choose_attention(base.text, trainer, deepspeed)
    if trainer.get("use_liger_kernel") == "auto":
        trainer["use_liger_kernel"] = not why_not_liger(base.text, trainer, precision, processes.on_cpu)
    stage = value_at(deepspeed, "zero_optimization.stage")
    stage = int(stage) if isinstance(stage, int) else 0  # a stage of another kind is refused already
    fsdp = dict(run.fsdp) or None
    tree: dict[str, Any] = {
        "model": run.model.model_copy(update={"dtype": dtype, "attn_implementation": attention}).model_dump(),
        "tokenizer": run.tokenizer.model_dump(),
        "dataset": run.dataset.model_dump(),
        "peft": peft,
        "init_from": init_from.model_dump() if init_from else None,
        "quantization": resolve_quantization(sections.quantization, precision, stage == 3 or bool(fsdp)),
        "deepspeed": deepspeed,
        "fsdp": fsdp,
        "trainer": trainer,
        "launch": processes.launch.model_dump(),
    }
    return Resolved(tree, processes, stage, tokens.writes_date)


def resolve_processes(
    sections: Sections, report: Report, deepspeed: bool, here: bool, world_size: int | None
) -> Processes:
    """Resolve launcher, device, precision and batch; the trainer's own settings for them are set in place."""
    trainer = sections.trainer
    launch = resolve_nodes(sections.run.launch, world_size, report)
    launch, on_cpu = resolve_launch(launch, trainer, deepspeed, here, world_size, report)
    trainer["use_cpu"] = on_cpu
    precision = resolve_precision(trainer, on_cpu)
    assert isinstance(launch.num_gpus, int) and isinstance(launch.num_nodes, int)
    world_size = world_size or launch.num_gpus * launch.num_nodes
    global_batch_size = resolve_batch(trainer, sections.run.global_batch_size, world_size, report)
    memory_choice.settle_without_choice(trainer, global_batch_size // world_size, report)
    return Processes(launch, on_cpu, precision, world_size, global_batch_size)


def resolve_adapter(
    sections: Sections, inputs: Inputs, new_tokens: list[str], report: Report, here: bool
) -> tuple[dict[str, Any] | None, InitFrom | None]:
    """Resolve the adapter's settings, which added tokens extend, and the adapter that it starts from."""
    run, base = sections.run, inputs.base
    peft, problems, notes = train_embeddings(sections.peft, base, new_tokens)
    report.add(problems)
    report.notes += notes
    if not (sections.init_from and peft):
        return peft, None
    from kit.config.initial_adapter import find_initial_adapter  # which reads manifests and weights: few runs need it

    init_from, problems, notes = find_initial_adapter(sections.init_from, peft, run.model, base, here)
    report.add(problems)
    report.notes += notes
    return peft, init_from


def resolve_launch(
    launch: Launch, trainer: dict[str, Any], deepspeed: bool, here: bool, world_size: int | None, report: Report
) -> tuple[Launch, bool]:
    """Resolve the launcher, the processes on each node, and whether they run on CPU. num_nodes is a number already."""
    gpus = len(hardware.list_gpus())
    on_cpu = trainer.get("use_cpu", "auto")
    if launch.slurm and world_size is None:
        launch = resolve_slurm(launch, on_cpu is True)
        on_cpu, here = on_cpu is True, False  # the nodes have the GPUs; this machine need not
    nodes = launch.num_nodes if isinstance(launch.num_nodes, int) else 1
    count = max(1, world_size // nodes) if world_size else launch.num_gpus
    if on_cpu == "auto":
        # A count that was asked for on a machine without GPUs is meant for another machine.
        on_cpu = gpus == 0 and (count == "auto" or world_size is not None)
    if not on_cpu and gpus == 0 and not here:
        report.note("no GPU on this machine: planned for one that has them, with bfloat16")
    if count == "auto":
        count = 1 if on_cpu or launch.launcher == "local" else max(gpus, 1)
    launcher = launch.launcher
    # Ranks that a launcher has already started are no plain process, whatever the recipe would start.
    if launcher == "auto" or (launcher == "local" and (world_size or 1) > 1):
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


def resolve_precision(trainer: dict[str, Any], on_cpu: bool) -> Precision:
    """Set trainer.bf16 and trainer.fp16 to plain values; `auto` is what the hardware is fast at."""
    asked = {flag: trainer.get(flag, "auto") for flag in PRECISIONS}
    if True in asked.values():
        chosen = "bf16" if asked["bf16"] is True else "fp16"
    elif "auto" not in asked.values():
        chosen = None
    elif on_cpu:
        chosen = "bf16" if asked["bf16"] == "auto" and hardware.cpu_has_bf16_matmul() else None
    else:
        old = any(g.capability and g.capability < (8, 0) for g in hardware.list_gpus())
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
    """The dtypes that are "auto". `sharded`: ranks gather the weights, which must then be of one float dtype."""
    if not quantization:
        return quantization
    values = (precision, precision if sharded else "uint8")
    auto = {k: v for k, v in zip(QUANTIZATION_AUTO, values, strict=True) if quantization.get(k) == "auto"}
    return {**quantization, **auto}


def resolve_batch(trainer: dict[str, Any], global_batch_size: int | None, world_size: int, report: Report) -> int:
    """Return the rows of an optimizer step: per_device_train_batch_size x gradient_accumulation_steps x processes.

    A global_batch_size sets the accumulation steps in place.
    """
    micro, steps = trainer.get("per_device_train_batch_size", 8), trainer.get("gradient_accumulation_steps", 1)
    if micro == "auto":
        micro = resolve_auto_rows(trainer, global_batch_size, world_size, report)
    if not all(isinstance(n, int) and n > 0 for n in (micro, steps)):
        return 1  # the field tables have refused it already
    if global_batch_size is None:
        return micro * steps * world_size
    key = "global_batch_size"
    # The group's own 1 is a default; a value from anywhere else was meant.
    if report.chosen("trainer.gradient_accumulation_steps") and micro * steps * world_size != global_batch_size:
        text = f"{key}={global_batch_size} is not {micro} rows x {steps} accumulation steps x {world_size} processes"
        report.problem(key, text, "leave out trainer.gradient_accumulation_steps: it is derived", "batch")
    elif global_batch_size % (micro * world_size):
        # The largest that divides; nobody asks for more than 4096 rows per process.
        fits = [m for m in range(1, min(micro, 4096) + 1) if global_batch_size % (m * world_size) == 0]
        rounded = math.ceil(global_batch_size / (micro * world_size)) * micro * world_size
        fix = f"trainer.per_device_train_batch_size={fits[-1]}" if fits else f"{key}={rounded}"
        text = f"{key}={global_batch_size} does not divide by {micro} row{'s' * (micro != 1)} x {world_size} processes"
        report.problem(key, text, fix, "batch")
    else:
        trainer["gradient_accumulation_steps"] = global_batch_size // (micro * world_size)
    return global_batch_size


def resolve_auto_rows(trainer: dict[str, Any], global_batch_size: int | None, world_size: int, report: Report) -> int:
    """Return the rows of a micro-step from which the batch of a run with per_device_train_batch_size=auto follows.

    They stay "auto" where the accumulation is free too: then the memory decides (kit/config/memory_choice.py). Given
    accumulation steps divide a given global batch, and make another one of them out of TRL's rows.
    """
    steps = trainer.get("gradient_accumulation_steps", 1)
    if not (isinstance(steps, int) and steps > 0) or not report.chosen("trainer.gradient_accumulation_steps"):
        return AUTO_ROWS if global_batch_size is None else 1
    if global_batch_size is None or global_batch_size % (steps * world_size):
        rows = AUTO_ROWS
    else:
        rows = global_batch_size // (steps * world_size)
    trainer["per_device_train_batch_size"] = rows
    return rows


def resolve_deepspeed(
    deepspeed: dict[str, Any],
    trainer: dict[str, Any],
    processes: Processes,
    base: Base,
    peft: Mapping[str, Any] | None,
    report: Report,
    here: bool,
    chosen: Collection[str],
) -> dict[str, Any]:
    """Fill every "auto" of the JSON; a literal that disagrees with the trainer is a problem.

    For another machine the width of a model that is not here may stay unknown: it is said, not guessed.
    """
    try:
        filled = resolve_deepspeed_json(
            deepspeed,
            trainer=trainer,
            world_size=processes.world_size,
            hidden_size=base.hidden_size,
            precision=processes.precision,
            decoder_layers=decoder_layer_classes(base.text),
            sizes=measure_sizes(base.text, peft) if base.text else None,
            chosen=chosen,
        )
    except KitError as error:
        unknown = [p for p in error.problems if p.rule == "hidden-size"]
        if unknown and not here:
            report.note(f"{unknown[0].problem}; resolved when the run starts")
            report.add(p for p in error.problems if p not in unknown)
        else:
            report.add(error.problems)
        return deepspeed
    key = "zero_optimization.leaf_module.classes"
    if value_at(deepspeed, key) is None and (classes := value_at(filled, key)):
        report.note(f"ZeRO-3 gathers {' and '.join(classes)} whole; deepspeed.{key}=[] gathers each module by itself")
    return filled


def make_paths_absolute(tree: dict[str, Any]) -> dict[str, Any]:
    """Make local paths absolute, in place, and return the tree: workers start elsewhere, a resume may too."""
    for section, keys in (
        ("model", ["name_or_path"]),
        ("tokenizer", ["name_or_path", "chat_template"]),
        ("dataset", ["path", "eval_path"]),
        ("launch", ["script", "hostfile"]),
        ("deepspeed", ["file"]),
    ):
        values = tree.get(section) or {}
        for key in [key for key in keys if key in values]:
            if key == "chat_template" and not is_file_name(str(values.get(key))):
                continue  # a name, whatever lies here under it
            if value := values.get(key):
                values[key] = [absolute_path(v) for v in value] if isinstance(value, list) else absolute_path(value)
    for source in (tree.get("dataset") or {}).get("mix") or []:
        if isinstance(source, dict) and (value := source.get("path")):
            source["path"] = [absolute_path(v) for v in value] if isinstance(value, list) else absolute_path(value)
    return tree


def absolute_path(value: Any) -> Any:
    """The absolute path of what is here, a glob that matches included; anything else as it is."""
    text = str(value)
    return str(Path(text).expanduser().absolute()) if is_there(text) or matches_files(text) else value
