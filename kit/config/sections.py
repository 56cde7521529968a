"""Reads the sections of a composed tree, each against its schema, and reports every problem."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from kit.config.deepspeed.check import check_deepspeed_json, is_comment, load_deepspeed_file, use_aliases
from kit.config.init_from import InitialAdapter, take_init_from
from kit.config.input_checks import check_values
from kit.config.report import Report
from kit.errors import KitError, Problem, with_rule
from kit.schema import fields
from kit.schema.dotted import value_at
from kit.schema.fields import OWNED_ELSEWHERE
from kit.schema.run_plan import RunInput, Strict, leaves

# Keys whose "auto" is filled by kit/config/resolve.py.
TRAINER_AUTO = (
    "bf16", "fp16", "use_cpu", "packing", "activation_checkpointing", "per_device_train_batch_size",
    "use_liger_kernel",
)  # fmt: skip
QUANTIZATION_AUTO = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
FSDP_KEYS = (  # what transformers' _process_fsdp_args reads, with or without "fsdp_" before it
    "version", "cpu_offload", "auto_wrap_policy", "min_num_params", "transformer_layer_cls_to_wrap",
    "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing", "reshard_after_forward",
    "forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states",
)  # fmt: skip
GIVE = {  # what to type for a value that has no default
    "model.name_or_path": "model=NAME (kit list model), or model.name_or_path=... for any Hub id or folder",
    "dataset.path": "the file as it is: kit train my.jsonl ...; dataset=NAME (kit list dataset), or dataset.path=...",
}
PYDANTIC_TYPES = {  # first word of pydantic's error types
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "[a,b]",
    "dict": "key: value lines", "model": "key: value lines",
}  # fmt: skip


@dataclass
class Sections:
    """The sections of a run, each right by itself; those of the libraries hold the libraries' own fields."""

    run: RunInput  # the kit's own sections
    trainer: dict[str, Any]
    tracking: dict[str, Any]
    peft: dict[str, Any] | None
    init_from: InitialAdapter | None
    quantization: dict[str, Any] | None
    deepspeed: dict[str, Any] | None


def read_sections(tree: dict[str, Any], report: Report) -> Sections:
    """Read every section; KitError at once only where nothing further can be found out."""
    check_finite(tree, report)
    report.refuse()  # nothing can be computed with such numbers, and plan.json cannot hold them
    run = read_own_sections(tree, report)
    trainer = read_trainer_section(tree.get("trainer"), report)
    peft_type = value_at(tree, "peft.peft_type") or "LORA"
    peft_values, init_from, problems = take_init_from(tree.get("peft"))
    report.add(problems)
    peft = read_library_section(peft_values, str(peft_type), "peft", report)
    quantization = read_library_section(
        tree.get("quantization"), "BitsAndBytesConfig", "quantization", report, QUANTIZATION_AUTO
    )
    deepspeed = read_deepspeed_section(tree.get("deepspeed"), report)
    check_fsdp_section(tree.get("fsdp"), report)
    if run is None:
        raise KitError(report.problems)
    check_values(run, report)
    tracking = read_trainer_section(run.tracking, report, "tracking")
    if any(p.rule in ("path", "count") for p in report.problems):
        raise KitError(report.problems)
    return Sections(run, trainer, tracking, peft, init_from, quantization, deepspeed)


def check_finite(tree: Any, report: Report) -> None:
    """Report infinite numbers and NaN, wherever they stand."""

    def numbers(value: Any) -> Iterator[float]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for item in inner:
            yield from numbers(item)
        if isinstance(value, float):
            yield value

    for key, value in leaves(tree).items():
        if not all(map(math.isfinite, numbers(value))):
            report.problem(key, f"{key} holds a number that is not finite", "give a number", "range")


# ---- the kit's own sections ----


def read_own_sections(tree: dict[str, Any], report: Report) -> RunInput | None:
    """Validate the kit's own sections with pydantic; None, with missing values ("???") and wrong keys reported."""
    missing = [k for k, v in leaves(tree).items() if v == "???"]
    for key in missing:
        report.problem(key, f"{key} is not given", GIVE.get(key, f"{key}=..."), "missing")
    try:
        run = RunInput.model_validate(tree)
        return None if missing else run
    except ValidationError as error:
        report_invalid(error, tree, report)
        return None


def report_invalid(error: ValidationError, tree: dict[str, Any], report: Report) -> None:
    """Report unknown keys, and once for each key the values that pydantic does not take."""
    invalid: dict[str, tuple[str, list[Any]]] = {}  # where a key takes one type or another, each has its complaint
    for e in error.errors():
        key = ".".join(str(part) for part in e["loc"] if isinstance(part, str) and not is_type_name(part))
        if value_at(tree, e["loc"]) == "???":
            continue
        if e["type"] == "extra_forbidden":
            report.problem(
                key, f"there is no key {key}", suggest_key(key, e["loc"], e["input"], report), "unknown-key"
            )
        else:
            value = f": {e['input']!r}" if not isinstance(e["input"], dict) else ""
            text = f"{key}: {e['msg'][0].lower()}{e['msg'][1:]}{value}"
            invalid.setdefault(key, (text, []))[1].append(e)
    for key, (text, errors) in invalid.items():
        report.problem(key, text, suggest_type_fix(key, errors), "type")


def suggest_key(key: str, loc: tuple[Any, ...], value: Any, report: Report) -> str:
    """Say what is meant by a key that none of the kit's own sections has."""
    known, parent = known_keys(loc[:-1]), key.rpartition(".")[0]
    close = {n: difflib.get_close_matches(str(loc[-1]), known, 1, n) for n in (0.85, 0.6)}
    near = {
        n: f"did you mean {parent + '.' if parent else ''}{names[0]}?" if names else "" for n, names in close.items()
    }
    if meant := suggest_elsewhere(key, value, report, near[0.85]) or near[0.6]:
        return meant
    if parent:
        return f"remove it; the keys of {parent} are {', '.join(known)}"
    return "remove it, or give it in its section: trainer.KEY=VALUE, peft.KEY=VALUE, ...; kit show RECIPE has examples"


def suggest_elsewhere(key: str, value: Any, report: Report, near: str = "") -> str:
    """Say which key of which section is meant by one that stands in the wrong place or has another tool's name."""
    from kit.config.pointers import suggest_override  # the tables of other tools, which a run without faults needs not

    place = report.provenance.get(key, "")
    _, equals, typed = place.removeprefix("command line: ").partition("=")
    return suggest_override(key, value, typed if equals else None, not place.startswith("command line"), near)


def is_type_name(part: str) -> bool:
    """Tell whether a part of pydantic's location names one of several accepted types, and not a key."""
    return part.startswith(("function-", "literal", "constrained-")) or part in ("str", "int", "float", "bool")


def suggest_type_fix(key: str, errors: list[Any]) -> str:
    """Suggest a value in place of one of the wrong type."""
    value, error_type = errors[0]["input"], errors[0]["type"]
    if len(errors) == 1:  # the key takes one type alone: the value as that
        if error_type == "list_type" and isinstance(value, str) and '"' not in value:
            return f"'{key}=[\"{value}\"]'"
        if error_type == "string_type" and type(value) in (int, float):
            return f"{key}=\"'{value}'\", in quotes"
        if error_type == "string_type" and isinstance(value, list):
            return f"{key}=\"'{','.join(map(str, value))}'\", one text"
    if error_type == "string_pattern_mismatch" and key in ("launch.include", "launch.exclude"):
        return f"{key}=\"'host1@host2:0,2'\": hosts, each with its slots or without"
    accepted = " or ".join(dict.fromkeys(words for e in errors if (words := accepted_values(e))))
    return f"give {accepted}" if accepted else f"give another value: kit why {key} says what it is"


def accepted_values(error: Any) -> str:
    """Name the values that pydantic accepts, "" where that needs more than a few words."""
    limits = error.get("ctx") or {}
    if "expected" in limits:
        return str(limits["expected"])
    for sign, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if sign in limits:
            return f"{words} {limits[sign]:g}"
    return PYDANTIC_TYPES.get(error["type"].split("_")[0], "")


def known_keys(loc: tuple[Any, ...]) -> list[str]:
    """List the keys of RunInput below a location."""
    model: type[Strict] = RunInput
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        model = next(m for m in (*get_args(annotation), annotation) if m is not NoneType)  # a section may be null
    return list(model.model_fields)


def read_slurm_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Read launch.slurm by itself and complete it; KitError with every unknown key and every value of a wrong type."""
    report = Report({})
    run = read_own_sections(
        {"model": {"name_or_path": ""}, "dataset": {"path": ""}, "launch": {"slurm": settings}}, report
    )
    if run is None or run.launch.slurm is None:
        raise KitError([replace(p, where=f"command line: {p.where}") for p in report.problems])
    return run.launch.slurm.model_dump()


# ---- the libraries' sections ----


def read_library_section(
    values: Any, table: str, section: str, report: Report, allow_auto: Collection[str] = ()
) -> dict[str, Any] | None:
    """Read a section whose keys are a library's own fields; None where it is empty. `allow_auto`: as check_fields."""
    if not values:
        return None
    if not isinstance(values, dict):
        report.problem(section, f"{section} must hold keys", f"{section}=none, or {section}.KEY=VALUE", "section")
        return None
    if section == "peft":
        if values.get("peft_type") is None:
            keys = ", ".join(f"peft.{k}" for k in values)
            text = f"peft=none, but {keys} is given"
            report.problem(f"peft.{next(iter(values))}", text, "peft=lora, or drop it", "peft-none")
            return None
        if table.upper() not in fields.peft_types():
            close = difflib.get_close_matches(table.upper(), fields.peft_types(), 1)
            fix = f"peft.peft_type={close[0]}" if close else f"one of {', '.join(fields.peft_types())}"
            report.problem("peft.peft_type", f"there is no PEFT method {table!r}", fix, "peft-type")
            return None
        table = table.upper()
        values = drop_lora_defaults({**values, "peft_type": table}, report)
    return read_fields(values, table, section, report, allow_auto)


def drop_lora_defaults(values: dict[str, Any], report: Report) -> dict[str, Any]:
    """Leave out what the group peft=lora gives LoRA where another method is trained: that one's own defaults stand."""
    kind = values["peft_type"]
    if kind in ("LORA", "ADALORA"):
        return values
    kept = {"peft_type", "task_type"} | ({"target_modules"} & fields.field_tables()[kind].keys())
    dropped = [key for key in values if key not in kept and not report.chosen(f"peft.{key}")]
    if dropped:
        report.note(f"{', '.join(dropped)} of peft=lora are LoRA's: {kind}'s own defaults stand")
    return {key: value for key, value in values.items() if key not in dropped}


def read_fields(
    values: dict[str, Any], table: str, section: str, report: Report, allow_auto: Collection[str] = ()
) -> dict[str, Any]:
    """Check values against a library's fields; return them without those of a wrong type or size.

    The rules compute with what is left.
    """
    problems = fields.check_fields(table, values, section, allow_auto)
    report.add(replace(p, fix=suggest_field(p, section, values, report)) for p in problems)
    wrong = {
        re.split(r"[.\[]", p.where.removeprefix(section + "."))[0] for p in problems if p.rule in ("kind", "range")
    }
    return fields.cast_fields(table, {key: value for key, value in values.items() if key not in wrong})


def suggest_field(problem: Problem, section: str, values: dict[str, Any], report: Report) -> str:
    """Say what to write for an unknown field: the key of another section, or the one that `problem` names."""
    name = problem.where.removeprefix(section + ".")
    if problem.rule not in ("unknown-key", "renamed-key") or name not in values:
        return problem.fix
    if section == "peft" and name in fields.field_tables()["LORA"]:
        kind = str(values.get("peft_type"))
        return f"remove it: {kind} has no such setting; it has {', '.join(k for k in fields.field_names(kind))}"
    alike = problem.rule == "unknown-key" and likeness(name, problem.fix) > 0.85
    return suggest_elsewhere(problem.where, values[name], report, problem.fix if alike else "") or problem.fix


def likeness(name: str, fix: str) -> float:
    """Measure how like a name is to the first key that a fix names."""
    return difflib.SequenceMatcher(None, name, re.split(r"[ ?]", fix.partition(".")[2])[0]).ratio()


def read_trainer_section(values: Any, report: Report, section: str = "trainer") -> dict[str, Any]:
    """Read `trainer.*` as SFTConfig's fields; keys that other sections own are refused with the key to use."""
    values = dict(values) if isinstance(values, dict) else {}
    owned = [k for k in OWNED_ELSEWHERE if value_at(values, k) is not None]
    for k in owned:
        report.problem(f"{section}.{k}", f"{section}.{k} is not set here", OWNED_ELSEWHERE[k], "owned")
    for k in owned:
        values.pop(k.split(".")[0], None)
    return read_fields(values, "SFTConfig", section, report, TRAINER_AUTO)


def read_deepspeed_section(values: Any, report: Report) -> dict[str, Any] | None:
    """Read the DeepSpeed JSON: the group's choice, or `deepspeed.file` with the overrides merged on top."""
    if not values:
        return None
    if not isinstance(values, dict):
        report.problem("deepspeed", "deepspeed must hold keys", "deepspeed=none, or deepspeed=FILE.json", "section")
        return None
    values = dict(values)
    if file := values.pop("file", None):
        try:
            values = merge_trees(load_deepspeed_file(Path(os.path.expanduser(str(file)))), values)
        except KitError as error:
            place = report.set_by("deepspeed.file")
            problems = [Problem(p.problem, p.where or place, p.fix, p.rule) for p in error.problems]
            report.problems += with_rule(problems, "deepspeed-file")
            return None
    report.add(check_deepspeed_json(values))
    return {key: value for key, value in use_aliases(values).items() if not is_comment(key)}


def merge_trees(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees; where both hold a value, that of `above` stands."""
    out = dict(below)
    for key, value in above.items():
        out[key] = (
            merge_trees(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
        )
    return out


def check_fsdp_section(values: Any, report: Report) -> None:
    """Report names in `fsdp` that transformers never reads: it would shard otherwise than was meant."""
    for key, value in (values or {}).items() if isinstance(values, dict) else ():
        name, dotted = str(key).removeprefix("fsdp_"), f"fsdp.{key}"
        if name not in FSDP_KEYS:
            close = difflib.get_close_matches(name, FSDP_KEYS, 1)
            fix = f"did you mean fsdp.{close[0]}?" if close else f"one of {', '.join(FSDP_KEYS)}"
            report.problem(dotted, f"unknown key {dotted}", fix, "unknown-key")
        elif name == "auto_wrap_policy" and value not in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"):
            fix = "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP"
            report.problem(dotted, f"{dotted} is {value!r}", fix, "choice")
        elif name == "version" and value not in (1, 2):
            report.problem(dotted, f"{dotted} must be 1 or 2, not {value!r}", "fsdp.version=2", "choice")
