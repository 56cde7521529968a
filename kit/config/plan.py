"""Builds the RunPlan of a composed run: reads its sections, inspects its inputs, resolves them, applies the rules."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from kit import __version__
from kit.config import engine_choice
from kit.config.compose import Composed
from kit.config.input_checks import check_values
from kit.config.inputs import Inputs, inspect_data, inspect_inputs
from kit.config.memory_check import check_memory
from kit.config.memory_choice import choose_for_plan
from kit.config.packing import find_documents
from kit.config.report import Report, unique
from kit.config.resolve import Resolved, make_paths_absolute, resolve
from kit.config.rules import table
from kit.config.rules.context import RuleContext
from kit.config.rules.trainer import note_steps, rows_of_epoch
from kit.config.sections import Sections, read_own_sections, read_sections
from kit.inspection.model import identify_base
from kit.inspection.trainable import count_trained, describe_trained
from kit.rows.formats import resolve_train_on
from kit.schema.dotted import value_at
from kit.schema.run_plan import Dataset, RunPlan, identity_hash
from kit.system import hardware


def build_plan(
    composed: Composed, *, here: bool = True, world_size: int | None = None, bad_rows: bool = True
) -> RunPlan:
    """Build the frozen plan of a composed run; KitError with every problem there is.

    `here`: the run is about to start on this machine, so its hardware must do; else it is planned for elsewhere.
    `world_size`: processes already started (the worker door under a launcher); None: `launch.num_gpus` decides.
    `bad_rows`: those among the first rows are problems.
    """
    if engine_choice.is_auto(composed):
        build = partial(build_plan, here=here, world_size=world_size, bad_rows=bad_rows)
        return engine_choice.choose_engine(composed, build)
    report = Report(composed.provenance)
    sections = read_sections(composed.tree, report)
    inputs = inspect_inputs(sections, report, here, bad_rows)
    resolved = resolve(sections, inputs, report, here, world_size)
    # A batch job finds its files here and its GPUs elsewhere: kit/launchers/node.py looks at the node's.
    batch_job = resolved.processes.launch.slurm is not None
    on_this_machine = here and (not batch_job or world_size is not None)
    context = RuleContext(
        plan=resolved.tree,
        report=report,
        base=inputs.base,
        row_kind=inputs.data.kind,
        chats=inputs.data.chats,
        world_size=resolved.processes.world_size,
        zero_stage=resolved.zero_stage,
        precision=resolved.processes.precision,
        on_cpu=resolved.processes.on_cpu,
        gpus=hardware.list_gpus() if on_this_machine or not batch_job else (),
        on_this_machine=on_this_machine,
        few_rows=inputs.data.few_rows,
    )
    table.apply_rules(context)
    report.refuse()
    if not sections.run.tokenizer.added_tokens and (trained := count_trained(inputs.base.text, resolved.tree["peft"])):
        report.note(f"trains {describe_trained(trained)}")
    note_steps(context)
    known: dict[str, Any] = {"rows": rows_of_epoch(context) or None}
    if isinstance(resolved.tree["trainer"].get("max_length", 1024), int):
        known["documents"] = find_documents(sections.run.dataset, inputs.data.samples, resolved.tree["trainer"])
    plan = freeze(composed, sections, inputs, resolved, report, here).model_copy(update=known)
    if batch_job and world_size is None:
        return plan
    return check_memory(choose_for_plan(plan, lambda: inputs.base.text), lambda: inputs.base.text, on_this_machine)


def read_dataset(composed: Composed) -> Dataset:
    """The data of a composed run that need not name a model; KitError with all that is wrong with that section."""
    report = Report(composed.provenance)
    tree = {"model": {"name_or_path": "any"}, "dataset": composed.tree.get("dataset")}
    if run := read_own_sections(tree, report):
        check_values(run, report)
        if bool(run.dataset.path) == bool(run.dataset.mix):
            report.add(inspect_data(run.dataset, here=False)[1])
    report.refuse()
    assert run is not None
    return Dataset.model_validate(make_paths_absolute({"dataset": run.dataset.model_dump()})["dataset"])


def freeze(
    composed: Composed, sections: Sections, inputs: Inputs, resolved: Resolved, report: Report, here: bool
) -> RunPlan:
    """Make the plan of what was resolved: absolute paths, the name, the hash of what identifies the run."""
    run, tree, processes = sections.run, resolved.tree, resolved.processes
    freeze_formats(tree["dataset"], inputs)
    make_paths_absolute(tree)
    name = run.name or re.sub(r"[^A-Za-z0-9._-]", "_", composed.recipe or Path(run.model.name_or_path).name)
    digest = identity_hash(without_auto_packing(composed.tree, tree), processes.global_batch_size)
    return RunPlan(
        kit_version=__version__,
        name=name,
        hash=digest,
        run_dir=str(Path(run.runs_dir).expanduser().absolute() / f"{name}-{digest}"),
        recipe=composed.recipe,
        world_size=processes.world_size,
        global_batch_size=processes.global_batch_size,
        precision=processes.precision,
        train_on=describe_loss(run.dataset, tree["trainer"], inputs),
        **{**tree, "tokenizer": freeze_date(tree["tokenizer"], resolved.template_writes_date)},
        tracking=dict(run.tracking),
        prompts=run.prompts,
        rehearsal=None if run.rehearsal == "auto" else run.rehearsal,
        base=identify_base(run.model, inputs.base.folder) if here else None,
        notes=report.notes,
        warnings=[asdict(w) for w in unique(report.warnings)],
        overrides=composed.overrides,
        provenance=composed.provenance,
        composed=make_paths_absolute(copy.deepcopy(composed.tree)),
    )


def without_auto_packing(composed: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """The resolved tree without trainer.packing where nobody set it and it is off: the name of a run of before."""
    trainer = resolved["trainer"]
    if value_at(composed, "trainer.packing") != "auto" or trainer.get("packing"):
        return resolved
    return {**resolved, "trainer": {key: value for key, value in trainer.items() if key != "packing"}}


def freeze_formats(dataset: dict[str, Any], inputs: Inputs) -> None:
    """Note the format that was found of each set, in place."""
    formats = inputs.data.formats
    if found := formats.get("dataset.path"):
        dataset["format"] = found
    for number, source in enumerate(dataset["mix"]):
        source["format"] = formats.get(f"dataset.mix.{number}.path", source["format"])


def describe_loss(dataset: Dataset, trainer: dict[str, Any], inputs: Inputs) -> str | None:
    """Which tokens are in the loss, in one word for each kind of rows; None where the rows are not here."""
    if dataset.train_on:
        return dataset.train_on
    answers, completion = bool(trainer.get("assistant_only_loss")), trainer.get("completion_only_loss")
    words = {resolve_train_on(None, answers, completion, kind)[0] for kind in inputs.data.kinds}
    return ", ".join(sorted(words)) or None


def freeze_date(tokenizer: dict[str, Any], writes_date: bool | None) -> dict[str, Any]:
    """The section with today's date for a chat template that writes it, unless one is given; not part of the hash."""
    if tokenizer["date"] or writes_date is False:
        return tokenizer
    return {**tokenizer, "date": date.today().isoformat()}
