"""Finds what is wrong in a DeepSpeed JSON from anywhere for a transformers trainer, and what would mend it.

What DeepSpeed refuses or ignores, check.py knows. Here comes what only the trainer misses: keys that it fills
when they are there and never adds, literals that it will compare with its own, an optimizer that takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kit.config.deepspeed import json_edit
from kit.config.deepspeed.check import ADAMS, check_deepspeed_json, parse_deepspeed_json
from kit.config.deepspeed.filled_keys import TRAINER_SETTINGS
from kit.config.deepspeed.fixes import Edit, as_trainer_setting, edits_for, shorten_json
from kit.errors import Problem
from kit.schema import fields
from kit.schema.dotted import value_at

REFUSE, WARN = "refuse", "warn"
NEVER_ADDED = {  # the trainer fills these where they are, and nobody adds them
    "train_micro_batch_size_per_gpu": "DeepSpeed then wants train_batch_size, or stops",
    "gradient_accumulation_steps": "accelerate puts 1 there, whatever the trainer accumulates",
    "gradient_clipping": "DeepSpeed then clips at {clipping}, whatever max_grad_norm says",
    "fp16.enabled": "fp16=True of the trainer would not reach DeepSpeed",
    "bf16.enabled": "bf16=True of the trainer, TRL's default, would not reach DeepSpeed",
}
SCHEDULED = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")
PLAIN_ADAM = {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "bias_correction", "fused"}


@dataclass(frozen=True)
class FileFinding:
    """One thing that is wrong or unwise at a key of the file; `edits` mend it, none where that would be a guess."""

    rule: str
    severity: str
    path: json_edit.KeyPath
    line: int
    problem: str
    fix: str
    edits: tuple[Edit, ...] = ()
    keep: str = ""  # what to give the trainer, so that the value that goes is not lost

    @property
    def key(self) -> str:
        return ".".join(self.path)


def find_faults(text: str, name: str = "the file") -> list[FileFinding]:
    """All findings of one file in the order of its lines; KitError only where it is no JSON."""
    tree = parse_deepspeed_json(text, name, twice=True)
    root = json_edit.parse_nodes(text)
    findings = [*_duplicates(text, root), *_checked(tree)]
    renamed = {(*e.path[:-1], e.value) for f in findings for e in f.edits if e.what == "rename"}
    own = list(_optimizer(tree))
    removed = {f.path for f in own if f.rule == "optimizer"}  # what is inside needs no word of its own
    moved = {e.path for f in findings for e in f.edits if e.what == "add"}  # they are there, in another block
    reported = {f.path for f in findings} | moved
    for finding in [*own, *_missing(tree), *_literals(tree)]:
        if (
            finding.path not in reported
            and finding.path[:-2] not in removed
            and not any(finding.path[: len(m)] == m for m in renamed)
        ):
            findings.append(finding)
            reported.add(finding.path)
    placed = [FileFinding(**vars(f) | {"line": json_edit.line_of(text, root, f.path)}) for f in findings]
    return sorted(placed, key=lambda f: f.line)


def path_in_tree(tree: Any, dotted: str) -> json_edit.KeyPath:
    """The keys of a dotted name; a key of the file may hold dots itself."""
    dotted = re.sub(r"\[\d+\]$", "", dotted)
    path: list[str] = []
    while isinstance(tree, dict):
        inside = [k for k in tree if dotted == k or dotted.startswith(f"{k}.")]
        if not inside:
            break
        key = max(inside, key=len)
        path.append(key)
        if dotted == key:
            return tuple(path)
        tree, dotted = tree[key], dotted[len(key) + 1 :]
    return (*path, *dotted.split("."))


def _checked(tree: dict[str, Any]) -> Iterator[FileFinding]:
    """What check_deepspeed_json says, each with its edits."""
    seen = set()
    for problem in check_deepspeed_json(tree):
        path = path_in_tree(tree, problem.where.removeprefix("deepspeed."))
        edits = edits_for(problem.rule, path, tree)
        message, fix = (text.replace("deepspeed.", "") for text in (problem.problem, problem.fix))
        if (path, problem.rule) not in seen:
            key = "gradient_clipping" if path[-1] == "max_grad_norm" else ".".join(path)
            value = value_at(tree, ".".join(path))
            keep = (
                as_trainer_setting(key, value)
                if key in TRAINER_SETTINGS and edits and value not in (None, "auto")
                else ""
            )
            # DeepSpeed starts without the block; accelerate does not, as the check of a run says.
            severity = WARN if path == ("zero_optimization",) and path[0] not in tree else REFUSE
            yield FileFinding(problem.rule or "kind", severity, path, 0, message, fix, edits, keep)
        seen.add((path, problem.rule))


def _duplicates(text: str, root: json_edit.Node) -> Iterator[FileFinding]:
    for path in json_edit.duplicate_keys(root):
        block = root if len(path) == 1 else json_edit.find_member(root, path[:-1])
        members = block.members if isinstance(block, json_edit.Node) else block.node.members if block else []
        values = [m.node.value for m in members if m.key == path[-1]]
        same = all(repr(v) == repr(values[0]) for v in values)
        edits = (Edit("remove-first", path),) if same else ()
        fix = "keep one of them" + ("" if same else "; a JSON reader takes the last")
        yield FileFinding("doubled", REFUSE, path, 0, f"{'.'.join(path)} is given {len(values)} times", fix, edits)


def _add_auto(tree: dict[str, Any], key: str) -> Edit | None:
    """The edit that makes a key "auto", in its block or with it; None where the block is of another kind."""
    block, _, last = key.rpartition(".")
    holder = tree.get(block) if block else tree
    if isinstance(holder, dict):
        return Edit("replace" if last in holder else "add", tuple(key.split(".")), "auto")
    return None if holder is not None else Edit("replace" if block in tree else "add", (block,), {last: "auto"})


def said_otherwise(tree: dict[str, Any], key: str) -> bool:
    """Tell whether the other precision is switched on, so that this one is off and need not stand in the file."""
    other = {"fp16.enabled": "bf16.enabled", "bf16.enabled": "fp16.enabled"}.get(key, "")
    return bool(other) and value_at(tree, other) is True


def _missing(tree: dict[str, Any]) -> Iterator[FileFinding]:
    """Keys that the trainer would fill, had they been there."""
    clipping = fields.field_default("deepspeed", "gradient_clipping")
    for key, reason in NEVER_ADDED.items():
        edit = _add_auto(tree, key)
        if value_at(tree, key) is None and edit and not said_otherwise(tree, key):
            starts = key != "train_micro_batch_size_per_gpu" or tree.get("train_batch_size") is not None
            if starts and key == "train_micro_batch_size_per_gpu":
                reason = "DeepSpeed then divides train_batch_size, whatever the trainer's batches are"
            problem = f"{key} is missing: {reason.format(clipping=clipping)}"
            outer, _, last = key.rpartition(".")
            text = f'"{outer}": {{"{last}": "auto"}}' if outer else f'"{last}": "auto"'
            severity = WARN if starts else REFUSE
            yield FileFinding("missing", severity, tuple(key.split(".")), 0, problem, f"add {text}", (edit,))
    kind, params = value_at(tree, "scheduler.type"), value_at(tree, "scheduler.params")
    table = fields.field_tables().get(f"deepspeed.scheduler.{kind}", {}) if isinstance(kind, str) else {}
    for key in (k for k in SCHEDULED if k in table):
        if isinstance(params, dict) and params.get(key) is None:
            value = table[key].get("default")
            problem = f"scheduler.params.{key} is missing: " + (
                f"{kind} needs it" if value is None else f"{kind} then takes {value}, whatever the trainer says"
            )
            what = "replace" if key in params else "add"
            path = ("scheduler", "params", key)
            yield FileFinding("missing", REFUSE, path, 0, problem, f'"{key}": "auto"', (Edit(what, path, "auto"),))
    if table and isinstance(tree["scheduler"], dict) and "params" not in tree["scheduler"]:
        block = ("scheduler", "params")
        autos = {key: "auto" for key in SCHEDULED if key in table}
        problem = f"scheduler.params is missing: {kind} then warms up for 1000 steps of its own"
        if autos:
            yield FileFinding(
                "missing", REFUSE, block, 0, problem, 'give its keys as "auto"', (Edit("add", block, autos),)
            )


def _literals(tree: dict[str, Any]) -> Iterator[FileFinding]:
    """Values that are the trainer's: others raise after the model is loaded, equal ones wait to differ."""
    for key, setting in TRAINER_SETTINGS.items():
        value = value_at(tree, key)
        if value is None or value == "auto" or isinstance(value, dict):
            continue
        path = tuple(key.split("."))
        text = f"{key} is {shorten_json(value)}: the trainer refuses any other than its own {setting}"
        if key == "train_batch_size":
            text = f"{key} is {shorten_json(value)}: that ties the file to one number of GPUs"
        keep = as_trainer_setting(key, value)
        fix = f'"auto", and {keep} in the training arguments'
        yield FileFinding("literal", WARN, path, 0, text, fix, (Edit("replace", path, "auto"),), keep)


def _optimizer(tree: dict[str, Any]) -> Iterator[FileFinding]:
    """An optimizer block takes the place of trainer.optim and of all that builds on it, as accelerate reads it."""
    block = tree.get("optimizer")
    if not isinstance(block, dict):
        return
    kind, params = str(block.get("type")), block.get("params") or {}
    text = f"the optimizer block ({kind}) takes the place of the trainer's optim and of LoRA+"
    adam = kind.lower() in ADAMS and isinstance(params, dict) and "scheduler" not in tree
    if adam and params.keys() <= PLAIN_ADAM and params.get("bias_correction", True) is True:
        decoupled = kind.lower() == "adamw" or params.get("adam_w_mode", True) is True
        if decoupled and not block.get("legacy_fusion"):
            keys = [
                k for k in params if f"optimizer.params.{k}" in TRAINER_SETTINGS and params[k] not in ("auto", None)
            ]
            keep = ", ".join(as_trainer_setting(f"optimizer.params.{k}", params[k]) for k in keys)
            fix = "remove it: adamw_torch, the trainer's default, is the same arithmetic"
            fix += f"; give the training arguments {keep}" if keep else ""
            yield FileFinding("optimizer", WARN, ("optimizer",), 0, text, fix, (Edit("remove", ("optimizer",)),), keep)
            return
    if isinstance(block.get("params"), dict) and params.get("lr") is None:
        path = ("optimizer", "params", "lr")
        what = "replace" if "lr" in params else "add"
        lost = "optimizer.params.lr is missing: the optimizer takes its own rate, not the trainer's learning_rate"
        yield FileFinding("missing", REFUSE, path, 0, lost, '"lr": "auto"', (Edit(what, path, "auto"),))


def to_problem(finding: FileFinding, file: str) -> Problem:
    """The finding as people read it: problem, file:line and key, fix."""
    text = finding.problem if finding.severity == REFUSE else f"note: {finding.problem}"
    return Problem(text, f"{file}:{finding.line}: {finding.key}", finding.fix, finding.rule)
