"""A DeepSpeed JSON beside a model or a run: what each "auto" becomes, and which literals the run's trainer refuses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from kit.config.deepspeed import json_edit
from kit.config.deepspeed.check import accepts_auto, check_deepspeed_json
from kit.config.deepspeed.filled_keys import FILLED_KEYS
from kit.config.deepspeed.findings import REFUSE, FileFinding, path_in_tree
from kit.config.deepspeed.fixes import Edit, field_at
from kit.config.deepspeed.resolve import fill_deepspeed_json
from kit.errors import KitError, Problem
from kit.schema.dotted import value_at

PLACEHOLDER = "not-given"  # for what a run must name and this check does not need


@dataclass
class RunSettings:
    """What is known beside the file: a model's width, and a run's trainer where one was named."""

    hidden_size: int | None = None
    trainer: dict[str, Any] | None = None
    world_size: int = 1
    precision: Any = "float32"
    notes: list[str] = field(default_factory=list)


def read_run_settings(overrides: list[str], model: str | None, config_dir: str | None) -> RunSettings:
    """The width of the model and the trainer's values; KitError where what was named is wrong."""
    from kit.inspection.model import inspect_model
    from kit.schema.run_plan import Model

    if not overrides:
        if not model:
            return RunSettings()
        base, found = inspect_model(Model(name_or_path=model, random_init=True), here=False)  # its shape is enough
        if found:
            raise KitError([Problem(p.problem, "--model", p.fix, p.rule) for p in found])
        return RunSettings(base.hidden_size, notes=base.notes)
    heads = [o.lstrip("+~").partition("=")[0].split(".")[0].split("@")[0] for o in overrides]
    if "deepspeed" in heads:
        raise KitError("deepspeed is what --deepspeed gives", "command line", "change the file itself")
    from kit.config.compose import compose
    from kit.config.report import Report
    from kit.config.resolve import resolve_processes
    from kit.config.sections import read_sections

    composed = compose(overrides, config_dir)
    tree = copy.deepcopy(composed.tree) | {"deepspeed": {}}  # the file takes its place
    if model and isinstance(tree.get("model"), dict):
        tree["model"] |= {"name_or_path": model, "config": {}}
    for section, key in (("model", "name_or_path"), ("dataset", "path")):
        if isinstance(tree.get(section), dict) and tree[section].get(key) == "???":
            tree[section][key] = PLACEHOLDER
    report = Report(composed.provenance)
    sections = read_sections(tree, report)
    setting = RunSettings(notes=report.notes)
    if sections.run.model.name_or_path != PLACEHOLDER:
        base, problems = inspect_model(sections.run.model, here=False)
        report.add(problems, "model.name_or_path")
        report.notes += base.notes
        setting.hidden_size = base.hidden_size
    if set(heads) - {"model"}:  # a run
        processes = resolve_processes(sections, report, deepspeed=True, here=False, world_size=None)
        setting.world_size, setting.precision = processes.world_size, processes.precision
        setting.trainer = sections.trainer
    report.refuse()
    return setting


def fill_for_run(tree: dict[str, Any], setting: RunSettings) -> tuple[dict[str, Any], list[Problem]]:
    """The file filled as for a run, and what disagrees with the run; without what is wrong by itself."""
    return fill_deepspeed_json(
        drop_faults(tree),
        trainer=setting.trainer or {},
        world_size=setting.world_size,
        hidden_size=setting.hidden_size,
        precision=setting.precision,
    )


def drop_faults(tree: dict[str, Any]) -> dict[str, Any]:
    """The file without what is wrong in it: what is left can be compared and filled."""
    tree = copy.deepcopy(tree)
    for _ in range(10):
        problems = check_deepspeed_json(tree)
        if not problems:
            return tree
        for problem in problems:
            path = path_in_tree(tree, problem.where.removeprefix("deepspeed."))
            if problem.rule == "missing-key":
                path = path[:-1]
            holder: Any = tree
            for key in path[:-1]:
                holder = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(holder, dict) and path:
                holder.pop(path[-1], None)
        tree.setdefault("zero_optimization", {})
    return {"zero_optimization": {}}


def add_mismatches(
    findings: list[FileFinding], tree: dict[str, Any], text: str, setting: RunSettings, disagreements: list[Problem]
) -> list[FileFinding]:
    """Literals that differ from what the run's trainer would set, in place of the remark that they are literals."""
    if setting.trainer is None:
        return findings
    by_path = {f.path: f for f in findings}
    root = json_edit.parse_nodes(text)
    for disagreement in disagreements:
        if disagreement.rule not in ("mismatch", "optimizer", "offload-optimizer"):
            continue
        inside = disagreement.where.startswith("deepspeed.")
        path = path_in_tree(tree, disagreement.where.removeprefix("deepspeed.")) if inside else (disagreement.where,)
        value = value_at(tree, ".".join(path))
        if inside and disagreement.rule == "mismatch" and (value is None or value == "auto"):
            continue  # mended, or in a block that goes
        problem, fix = (t.replace("deepspeed.", "") for t in (disagreement.problem, disagreement.fix))
        before = by_path.get(path)
        line = json_edit.line_of(text, root, path if inside else ("zero_optimization", "offload_optimizer"))
        edits = (Edit("replace", path, "auto"),) if disagreement.rule == "mismatch" else ()
        new = FileFinding(disagreement.rule, REFUSE, path, line, problem, fix, edits)
        by_path[path] = replace(new, edits=before.edits, fix=before.fix, keep=before.keep) if before else new
    return sorted(by_path.values(), key=lambda f: f.line)


def describe_autos(
    tree: dict[str, Any], text: str, setting: RunSettings, out: dict[str, Any], disagreements: list[Problem]
) -> list[dict[str, Any]]:
    """Every "auto" that is filled: the line, the key, what it becomes where that is known, and where it comes from."""
    root, rows = json_edit.parse_nodes(text), []
    missing = {p.where.removeprefix("deepspeed."): p.problem for p in disagreements if p.rule == "scheduler"}

    def walk(block: dict[str, Any], above: json_edit.KeyPath) -> None:
        for name, value in block.items():
            path = (*above, name)
            if isinstance(value, dict):
                walk(value, path)
            if value != "auto" or not accepts_auto(field_at(path, tree)[1]):
                continue
            key = ".".join(path)
            becomes, source = describe_auto(key, out, setting)
            if becomes is None and key in missing:
                source = missing[key].replace("deepspeed.", "")
            rows.append({"line": json_edit.line_of(text, root, path), "key": key, "becomes": becomes, "from": source})

    walk(tree, ())
    return rows


def describe_auto(key: str, out: dict[str, Any], setting: RunSettings) -> tuple[Any, str]:
    """(value or None, where it comes from) of one "auto"."""
    row = FILLED_KEYS.get(key)
    if row is None:
        return None, "a word of DeepSpeed's own: it decides by itself"
    if row.filled_by == "constant":
        return row.constant, "accelerate and transformers, always"
    value = value_at(out, key)
    if row.filled_by == "trainer":
        return (value if setting.trainer is not None else None), f"the trainer's {row.words}"
    if setting.hidden_size is None:
        return None, f"{row.words}: needs the model (model=NAME or --model DIR)"
    return value, f"{row.words}, hidden_size {setting.hidden_size}"
