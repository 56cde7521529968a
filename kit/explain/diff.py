"""`kit diff A B`: what differs between two resolved runs, and what it means for a run that has started."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

from kit.config import keys
from kit.errors import DONE, KitError, Problem
from kit.explain.key_effects import shorten
from kit.schema import fields
from kit.schema.run_plan import RunPlan, field_class, leaves, load_plan
from kit.storage import run_directory

# In the order in which they are printed; the DeepSpeed JSON is the resolved one. `tracking` is in `trainer` by then.
SECTIONS = (
    "run model tokenizer dataset peft init_from quantization deepspeed fsdp trainer launch prompts rehearsal base"
).split()
RUN_CLASSES = {
    "precision": "identity",
    "global_batch_size": "identity",
    "world_size": "machine",
    "kit_version": "machine",
}


def diff_verb(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="kit diff", description=__doc__, allow_abbrev=False)
    help = 'a recipe, run.yaml, run directory, plan.json, or overrides in quotes: "recipe=quickstart peft.r=8"'
    parser.add_argument("a", metavar="A", help=help)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args(argv)
    comparison = compare_runs(a.a, a.b, config_dir=a.config_dir)
    print(json.dumps(comparison, indent=1, ensure_ascii=False) if a.json else format_comparison(comparison))
    return DONE


def compare_runs(a: str, b: str, config_dir: str | None = None) -> dict[str, Any]:
    """The differing keys of two runs, each with both values and its class; KitError where one cannot be read."""
    one, two = read_plans(a, b, config_dir)
    differing = list_differences(one, two)
    return {
        "a": {"name": a, "run": one.name, "hash": one.hash},
        "b": {"name": b, "run": two.name, "hash": two.hash},
        "same_run": one.hash == two.hash,
        "differences": differing,
    }


def read_plans(a: str, b: str, config_dir: str | None) -> tuple[RunPlan, RunPlan]:
    plans, problems, codes = [], [], []
    for name in (a, b):
        try:
            plans.append(read_plan(name, config_dir))
        except KitError as error:
            problems += [Problem(f"{name}: {p.problem}", p.where, p.fix, p.rule) for p in error.problems]
            codes.append(error.code)
    if problems:
        raise KitError(problems, code=codes[0])
    return plans[0], plans[1]


def read_plan(name: str, config_dir: str | None = None) -> RunPlan:
    """The plan behind a word: a run directory, plan.json, run.yaml, overrides, or a recipe's name."""
    from kit import api
    from kit.explain import catalog

    if "=" in name and not Path(name).exists():
        return api.compose(*shlex.split(name), config_dir=config_dir)
    if name.endswith((".yaml", ".yml")):
        return api.compose(name, config_dir=config_dir)
    if name.endswith(".json"):
        return load_plan(name)
    own = [Path(config_dir) / "recipe" / f"{name}.yaml"] if config_dir else []
    recipes = {f.stem for f in catalog.choice_files(catalog.RECIPE)} | {f.stem for f in own if f.is_file()}
    if name in recipes and not (Path(name) / run_directory.PLAN).is_file():
        return api.compose(f"recipe={name}", config_dir=config_dir)
    try:
        return load_plan(run_directory.find_run(name))
    except KitError:
        if (Path(name) / run_directory.PLAN).is_file():
            raise
    import difflib

    close = difflib.get_close_matches(name, recipes, 1)
    fix = f"did you mean {close[0]}?" if close else "kit list names the recipes"
    raise KitError(f"there is neither a recipe nor a run named {name!r}", "command line", fix)


def list_differences(a: RunPlan, b: RunPlan) -> list[dict[str, Any]]:
    """One entry per key whose effective value differs: what is not said has the library's default."""
    entries = []
    for section in SECTIONS:
        ours, theirs = section_leaves(a, section), section_leaves(b, section)
        tables = [keys.table_of_section(section, str((p.peft or {}).get("peft_type", "LORA")).upper()) for p in (a, b)]
        for key in dict.fromkeys([*ours, *theirs]):
            values = (effective_value(ours, key, tables[0]), effective_value(theirs, key, tables[1]))
            if values[0][0] == values[1][0]:
                continue
            key_class = RUN_CLASSES.get(key) or ("identity" if section == "base" else field_class(key))
            entry: dict[str, Any] = {"section": section, "key": key, "class": key_class}
            for side, (value, is_default) in zip("ab", values, strict=True):
                entry[side] = value
                entry[f"{side}_is_default"] = is_default
            entries.append(entry)
    return entries


def section_leaves(plan: RunPlan, section: str) -> dict[str, Any]:
    """The dotted leaves of one section; lists of a mapping's values are values."""
    if section == "run":
        return {key: getattr(plan, key) for key in RUN_CLASSES}
    value = plan.model_dump()[section]
    if section == "prompts":
        return {section: value}
    return leaves({section: value}) if value else {}


def effective_value(values: dict[str, Any], key: str, table: str | None) -> tuple[Any, bool]:
    """The value of a key, and whether it is the library's default because nobody says it."""
    if key in values:
        return values[key], False
    name = key.partition(".")[2]
    if table and values and name in fields.field_tables()[table]:
        return fields.field_default(table, name), True
    return None, False


def format_comparison(comparison: dict[str, Any]) -> str:
    a, b = comparison["a"], comparison["b"]
    lines = [f"A  {a['name']}  ({a['run']}-{a['hash']})", f"B  {b['name']}  ({b['run']}-{b['hash']})"]
    differing = comparison["differences"]
    if not differing:
        return "\n".join([*lines, "", "nothing differs"])
    width = min(max(len(d["key"]) for d in differing), 60)
    for section in SECTIONS:
        of_section = [d for d in differing if d["section"] == section]
        if of_section:
            title = "deepspeed (as resolved)" if section == "deepspeed" else section
            lines += ["", title]
        for d in of_section:
            lines.append(f"  {d['key']:<{width}}  {'  ->  '.join(format_values(d))}  [{d['class']}]")
    return "\n".join([*lines, "", describe_verdict(comparison)])


def format_values(d: dict[str, Any]) -> list[str]:
    """Both values in a line; long ones from where they part."""
    texts = ["-" if d[s] is None else shorten(d[s]) for s in "ab"]
    if texts[0] == texts[1]:
        whole = [d[s] if isinstance(d[s], str) else json.dumps(d[s], ensure_ascii=False) for s in "ab"]
        start = max(len(os.path.commonprefix(whole)) - 20, 0)
        texts = ["..." + shorten(w[start:]) for w in whole]
    return [f"{t} (default)" if d[f"{s}_is_default"] else t for s, t in zip("ab", texts, strict=True)]


def describe_verdict(comparison: dict[str, Any]) -> str:
    """What the differences amount to."""
    classes = [d["class"] for d in comparison["differences"]]
    counts = ", ".join(f"{classes.count(c)} {c}" for c in ("identity", "extendable", "machine") if c in classes)
    if comparison["same_run"]:
        return f"the same run ({counts}): kit resume could change A into B"
    return f"another run ({counts})"
