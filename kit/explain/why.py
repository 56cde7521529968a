"""`kit why KEY`: a value, where it was set and over what, what the libraries get of it, and which rules read it."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from kit.config import keys
from kit.config.data_words import is_data_word
from kit.config.flags import parse_words
from kit.config.provenance import read_file_layer
from kit.config.rules.table import RULES
from kit.errors import DONE, KitError, Problem
from kit.explain.key_effects import (
    ABSENT,
    SET_BY_WORKER,
    describe_default,
    describe_field,
    describe_library_effect,
    describe_resolution,
    shorten,
)
from kit.schema.dotted import value_at
from kit.schema.run_plan import RunPlan, field_class, leaves, load_plan
from kit.storage import run_directory
from kit.system import paths


def why_verb(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="kit why", description=__doc__, allow_abbrev=False)
    parser.add_argument("key", help="trainer.learning_rate, learning_rate, zero_optimization.stage, a section, ...")
    parser.add_argument("overrides", nargs="*", metavar="RUN | run.yaml | DATA | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--json", action="store_true")
    a = parse_words(parser, argv)
    explanation = explain_key(a.key, *a.overrides, config_dir=a.config_dir)
    print(json.dumps(explanation, indent=1, ensure_ascii=False) if a.json else format_explanation(explanation))
    return DONE


def explain_key(typed: str, *args: str, config_dir: str | None = None) -> dict[str, Any]:
    """All that is known of a key in a run: value, origin, chain, targets, rules. KitError for a key that is none."""
    composed, plan, problems, run = read_run(list(args), config_dir)
    resolved = plan.model_dump() if plan else {}
    peft_type = str((composed.tree.get("peft") or {}).get("peft_type", "LORA")).upper()
    key, *also = keys.find_keys(typed, composed.tree, peft_type)
    explanation: dict[str, Any] = {"key": key, "also": also, "run": str(run) if run else None, "refused": []}
    entries = keys.all_keys(peft_type)
    inside = sorted(k for k in {**leaves(composed.tree), **leaves(resolved)} if k.startswith(key + "."))
    if inside and key not in entries:  # a section: its keys, one by one
        explanation["keys"] = [
            explain_value(k, entries, composed, plan, peft_type, run)
            for k in inside
            if k.split(".")[0] in keys.SECTIONS
        ]
    else:
        explanation |= explain_value(key, entries, composed, plan, peft_type, run)
    explanation["rules"] = rules_reading(key)
    explanation["refused"] = [vars(p) for p in sorted(problems, key=lambda p: key not in p.where + p.problem)]
    return explanation


def read_run(args: list[str], config_dir: str | None) -> tuple[Any, RunPlan | None, list[Problem], Path | None]:
    """The composed tree and its plan (None with the problems, where it is refused); of a run what it froze."""
    from kit.config.compose import Composed, compose
    from kit.config.plan import build_plan

    data = bool(args) and is_data_word(args[0]) and (len(args) > 1 or not Path(args[0]).is_dir())
    if args and not data and "=" not in args[0] and not args[0].endswith((".yaml", ".yml")):
        if len(args) > 1:
            raise KitError(f"{args[0]} is a run: its values stand", args[1], "name the run alone, or overrides alone")
        if (paths.RECIPES / f"{args[0]}.yaml").is_file() and not (Path(args[0]) / run_directory.PLAN).is_file():
            raise KitError(f"{args[0]} is a recipe", args[0], f"recipe={args[0]}")
        run = run_directory.find_run(args[0])
        plan = load_plan(run)
        layers = [{k: (place, "") for k, place in plan.provenance.items()}]
        return Composed(plan.composed, plan.overrides, plan.provenance, plan.recipe, layers), plan, [], run
    composed = compose(args, config_dir)
    try:
        return composed, build_plan(composed, here=False), [], None
    except KitError as error:
        return composed, None, error.problems, None


def explain_value(
    key: str, entries: dict[str, Any], composed: Any, plan: RunPlan | None, peft_type: str, run: Path | None
) -> dict[str, Any]:
    """One key: value, where it comes from, what was below, what it becomes."""
    entry = entries.get(key) or {}
    written = value_at(composed.tree, key, ABSENT)
    resolved = value_at(plan.model_dump(), key, ABSENT) if plan else ABSENT
    chain = origins_of(key, composed, entry, peft_type, run)
    worker = SET_BY_WORKER.get(key.removeprefix("trainer.")) if key.startswith("trainer.") else None
    value = next((v for v in (resolved, written, entry.get("default")) if v is not ABSENT), None)
    origin = chain[0]["where"] if chain else "nothing sets it"
    if chain and "${" in str(chain[0]["value"]):
        taken = [k for k in re.findall(r"[\w.]+", chain[0]["value"]) if k in composed.provenance]
        origin += "".join(f", which takes {k} from {composed.provenance[k]}" for k in taken)
    if worker:
        value, origin = worker, "the worker sets it"
        chain = [{"where": origin, "value": worker}, *chain]
    elif how := describe_resolution(key, written, resolved, chain[0]["value"] if len(chain) > bool(entry) else None):
        chain = [{"where": how, "value": resolved}, *chain]
        origin = how
    return {
        "key": key,
        "value": value,
        "set": origin,
        "over": chain[1:],
        "becomes": describe_library_effect(key, value, plan, peft_type, composed.tree),
        "upstream": describe_field(key, entry, peft_type),
        "class": None if worker or key in keys.PLAN_KEYS else field_class(key),
    }


def origins_of(
    key: str, composed: Any, entry: dict[str, Any], peft_type: str, run: Path | None
) -> list[dict[str, Any]]:
    """Where the key is set, the winner first, down to the library's default. A run keeps only the winner."""
    layers = list(composed.layers)
    file = (composed.tree.get("deepspeed") or {}).get("file") if key.startswith("deepspeed.") else None
    if isinstance(file, str) and os.path.isfile(os.path.expanduser(file)):
        layers.insert(max(len(layers) - 1, 0), read_file_layer(Path(file).expanduser(), "deepspeed"))
    origins = []
    section, _, name = key.partition(".")
    for layer in layers:
        parents = [k for k in layer if key.startswith(k + ".") and layer[k][1] not in ("{}", "", "null")]
        for k in [*parents, *([key] if key in layer else [])]:
            origins.append({"where": layer[k][0], "value": layer[k][1] or None})
        if section == "trainer" and (k := f"tracking.{name}") in layer:
            origins.insert(0, {"where": f"tracking.{name} in {layer[k][0]}", "value": layer[k][1] or None})
    removed = [o for o in composed.overrides if o.startswith("~") and o[1:].partition("=")[0] in (key, section)]
    origins += [{"where": f"command line: {o}", "value": "removed"} for o in removed]
    if run and origins and origins[-1]["value"] is None:
        origins[-1]["value"] = value_at(composed.tree, key)
    default = {"where": describe_default(key, peft_type), "value": entry.get("default")}
    return [*reversed(origins), *([default] if entry else [])]


def rules_reading(key: str, table: Any = None) -> list[dict[str, str]]:
    """The rules that look at a key, at what stands in it, or at what it stands in."""
    reading = []
    for rule in RULES if table is None else table:
        rule_keys = getattr(rule, "keys", ())
        if any(k == key or key.startswith(k + ".") or k.startswith(key + ".") for k in rule_keys):
            reading.append({"id": rule.id, "severity": rule.severity, "source": rule.source})
    return reading


def format_explanation(explanation: dict[str, Any]) -> str:
    lines = []
    if "keys" in explanation:
        width = min(max((len(k["key"]) for k in explanation["keys"]), default=0), 50)
        lines += [f"{k['key']:<{width}}  {shorten(k['value']):<24}  {k['set']}" for k in explanation["keys"]]
    else:
        value = "not given" if explanation["value"] == "???" else shorten(explanation["value"])
        lines.append(f"{explanation['key']} = {value}")
        lines.append(f"  set by    {explanation['set']}")
        lines += [f"  over      {o['where']}: {shorten(o['value'])}" for o in explanation["over"]]
        lines += [f"  becomes   {line}" for line in explanation["becomes"]]
        lines += [f"  is        {explanation['upstream']}"] if explanation["upstream"] else []
        meaning = {
            "identity": "another value is another run",
            "extendable": "kit resume may change it",
            "machine": "about the machine: kit resume may change it",
        }
        lines += (
            [f"  class     {explanation['class']}: {meaning[explanation['class']]}"] if explanation["class"] else []
        )
    rules_read = [r["id"] + (" (warns)" if r["severity"] == "warn" else "") for r in explanation["rules"]]
    lines += [f"  rules     {', '.join(rules_read)}"] if rules_read else []
    lines += [f"  also      kit why {k}" for k in explanation["also"]]
    if explanation["refused"]:
        count = len(explanation["refused"])
        lines.append(f"  refused   this run has {count} problem{'s' * (count != 1)}: values may still change")
        for p in explanation["refused"]:
            lines.append(f"            {p['problem']}" + (f" ({p['where']})" if p["where"] else ""))
    return "\n".join(lines)
