"""From the composed tree to a RunPlan: every section checked, every "auto" resolved, all problems in one refusal."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit import __version__
from kit.config.added_tokens import is_tied, train_embeddings, vocabulary_rows
from kit.config.compose import Composed
from kit.config.deepspeed import resolve as zero
from kit.config.initial_adapter import find_source, take_out
from kit.config.nodes import resolve_nodes
from kit.config.resolve import (
    QUANTIZATION_AUTO,
    absolute,
    load_dtype,
    resolve_batch,
    resolve_deepspeed,
    resolve_launch,
    resolve_precision,
    resolve_quantization,
)
from kit.config.rules import table as rules
from kit.config.sections import (
    chosen_by_person,
    located,
    look_at_data,
    not_finite,
    origin,
    read_deepspeed,
    read_fsdp,
    read_input,
    read_table,
    read_trainer,
    tree_at,
    unique,
    unusable,
)
from kit.errors import KitError, Problem
from kit.inspection.model import identify, inspect, look_at_tokenizer
from kit.inspection.tokenizer import examine
from kit.schema.run_plan import RunPlan, identity_hash
from kit.system import hardware


def build_plan(composed: Composed, *, here: bool = True, world_size: int | None = None) -> RunPlan:
    """The frozen plan of a composed run; KitError with every problem found.

    `here`: the run is about to start on this machine, so its hardware must do; else it is planned for elsewhere.
    `world_size`: processes already started (the worker door under a launcher); None: `launch.num_gpus` decides.
    """
    tree = composed.tree
    problems: list[Problem] = []
    set_by, chosen = origin(composed.provenance), chosen_by_person(composed.provenance)

    if problems := not_finite(tree, set_by):
        raise KitError(problems)  # nothing can be computed with them, and plan.json cannot hold them
    given, found = read_input(tree, set_by)
    problems += found
    trainer, found = read_trainer(tree.get("trainer"), set_by)
    problems += found
    peft_type = tree_at(tree, ("peft", "peft_type")) or "LORA"
    peft_values, start, found = take_out(tree.get("peft"))
    problems += located(found, set_by)
    peft, found = read_table(peft_values, str(peft_type), "peft", set_by)
    problems += found
    quantization, found = read_table(
        tree.get("quantization"), "BitsAndBytesConfig", "quantization", set_by, QUANTIZATION_AUTO
    )
    problems += found
    deepspeed, found = read_deepspeed(tree.get("deepspeed"), set_by)
    problems += found + read_fsdp(tree.get("fsdp"), set_by)
    if given is None:
        raise KitError(problems)
    problems += unusable(given, set_by)
    tracking, found = read_trainer(given.tracking, set_by, "tracking")
    problems += found
    if any(p.rule in ("path", "count") for p in problems):
        raise KitError(problems)

    base, found = inspect(given.model, here)
    problems += located(found, set_by, "model.name_or_path")
    problems += located(look_at_tokenizer(given.tokenizer, here), set_by)
    columns_format, found = look_at_data(given.dataset, here)
    problems += located(found, set_by)

    notes = list(base.notes)
    launch, found = resolve_nodes(given.launch, world_size, set_by)
    problems += found
    launch, on_cpu = resolve_launch(launch, trainer, bool(deepspeed), here, world_size, notes)
    trainer["use_cpu"] = on_cpu
    precision = resolve_precision(trainer, on_cpu, notes)
    assert isinstance(launch.num_gpus, int) and isinstance(launch.num_nodes, int)
    world = world_size or launch.num_gpus * launch.num_nodes
    global_batch, found = resolve_batch(trainer, given.global_batch_size, world, set_by, composed.provenance)
    problems += found
    chat, assistant_only = columns_format == "messages", trainer.get("assistant_only_loss") is True
    tokens = examine(given.tokenizer, given.model, vocabulary_rows(base), chat, assistant_only)
    problems += located(tokens.problems, set_by)
    notes += tokens.notes
    peft, found, remarks = train_embeddings(peft, base, tokens.new_tokens)
    problems += located(found, set_by)
    notes += remarks
    init_from = None
    if start and peft:
        init_from, found, remarks = find_source(start, peft, given.model, base, here)
        problems += located(found, set_by)
        notes += remarks
    for key, value in tracking.items():
        trainer.setdefault(key, value)

    model = given.model.model_copy(
        update={"dtype": load_dtype(given.model.dtype, precision, bool(peft), bool(deepspeed))}
    )
    resolved: dict[str, Any] = {
        "model": model.model_dump(),
        "tokenizer": given.tokenizer.model_dump(),
        "dataset": given.dataset.model_dump(),
        "peft": peft,
        "init_from": init_from.model_dump() if init_from else None,
        "quantization": quantization,
        "deepspeed": deepspeed,
        "fsdp": dict(given.fsdp) or None,
        "trainer": trainer,
        "launch": launch.model_dump(),
    }
    if deepspeed:
        resolved["deepspeed"], found = resolve_deepspeed(
            deepspeed, trainer, world, base, precision, set_by, here, notes, ["optim"] * chosen("trainer.optim")
        )
        problems += found
    stage = zero.at(resolved["deepspeed"], "zero_optimization.stage")
    stage = int(stage) if isinstance(stage, int) else 0  # a stage of another kind is refused already
    resolved["quantization"] = resolve_quantization(quantization, precision, stage == 3 or bool(resolved["fsdp"]))
    # A batch job finds its files here and its GPUs elsewhere: kit/launchers/node.py looks at the node's.
    runs_here = here and (launch.slurm is None or world_size is not None)
    facts = rules.Facts(
        resolved, set_by, world, stage, precision, base.modules, columns_format,
        hardware.gpus() if runs_here or not launch.slurm else (), on_cpu, base.config or {}, is_tied(base), base.bytes,
        base.numbers, chosen, runs_here,
    )  # fmt: skip
    refused, warned = rules.apply(facts, runs_here)
    problems += refused
    if problems:
        raise KitError(unique(problems))

    if columns_format:
        resolved["dataset"]["format"] = columns_format
    absolute(resolved)
    name = given.name or re.sub(r"[^A-Za-z0-9._-]", "_", composed.recipe or Path(given.model.name_or_path).name)
    digest = identity_hash(resolved, global_batch)
    return RunPlan(
        kit_version=__version__,
        name=name,
        hash=digest,
        run_dir=str(Path(given.runs_dir).expanduser().absolute() / f"{name}-{digest}"),
        recipe=composed.recipe,
        world_size=world,
        global_batch_size=global_batch,
        precision=precision,
        **resolved,
        tracking=dict(given.tracking),
        prompts=given.prompts,
        base=identify(given.model, base.folder) if here else None,
        notes=notes,
        warnings=[asdict(w) for w in unique(warned)],
        overrides=composed.overrides,
        provenance=composed.provenance,
        composed=absolute(copy.deepcopy(tree)),
    )
