"""`kit list` and `kit show`: the recipes and the choices of every group, of which runs are composed."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path

import yaml

from kit.errors import DONE, KitError
from kit.system import paths
from kit.system.terminal import verb_parser

RECIPE = "recipe"


def list_verb(argv: list[str]) -> int:
    parser = verb_parser("list", "Recipes: model and method, data, engine, hardware, memory; or a group's choices.")
    parser.add_argument("group", nargs="?", default=RECIPE)
    group = parser.parse_args(argv).group
    print(describe_group(group), end="")
    if group == RECIPE:  # not among the names that a script reads
        print("\nEach with model and method, data, engine, hardware, memory of each GPU.", file=sys.stderr)
        print(f"kit list GROUP: {', '.join(g for g in list_groups() if g != RECIPE)}", file=sys.stderr)
    return DONE


def show_verb(argv: list[str]) -> int:
    parser = verb_parser(
        "show", "A recipe or a choice of a group as it is written; for a recipe also what it composes to."
    )
    parser.add_argument("name", metavar="RECIPE | GROUP/NAME | NAME")
    print(describe_choice(parser.parse_args(argv).name), end="")
    return DONE


def list_groups() -> list[str]:
    return sorted(p.name for p in paths.CONF.iterdir() if p.is_dir())


def choice_files(group: str) -> list[Path]:
    """List the files of a group by name; of `deepspeed` the JSON files too."""
    files = list((paths.CONF / group).glob("*.yaml"))
    if group == "deepspeed":
        files += paths.DS_CONFIGS.glob("*.json")
    return sorted(files, key=lambda f: f.stem)


def first_comment(file: Path) -> str:
    """Return the first comment of a file, "" where it has none."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")


def describe_group(group: str = RECIPE) -> str:
    """List the choices of a group, one to a line: recipes in columns, the others with their first comments."""
    known = list_groups()
    if group not in known:
        close = difflib.get_close_matches(group, known, 1)
        fix = f"did you mean kit list {close[0]}? " if close else ""
        raise KitError(f"there is no group {group!r}", "command line", f"{fix}one of {', '.join(known)}")
    files = choice_files(group)
    rows = [describe_recipe(f) if group == RECIPE else [f.stem, first_comment(f)] for f in files]
    widths = [max(len(row[n]) for row in rows) + 2 for n in range(len(rows[0]))]
    lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def describe_recipe(file: Path) -> list[str]:
    """Say of a recipe: name, model and method, data, engine, hardware, and the memory of each GPU."""
    choices = recipe_choices(file)
    model = choices.get("model", "a model of your own")
    dora = (yaml.safe_load(file.read_text(encoding="utf-8")).get("peft") or {}).get("use_dora")
    method = "dora" if dora else "full" if choices.get("peft") == "none" else choices.get("peft", "lora")
    bits = {"nf4": "4-bit ", "int8": "8-bit "}.get(choices.get("quantization", "none"), "")
    engine = next((choices[g] for g in ("deepspeed", "fsdp") if choices.get(g, "none") != "none"), "one process")
    comment = " ".join(line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    hardware = re.search(r"Hardware: (.*?)\. Expected: ((?:under )?[\d.]+ GB(?: on each(?: of \d+)?)?)", comment)
    place, memory = hardware.groups() if hardware else ("", "")
    return [file.stem, f"{model}, {bits}{method}", choices.get("dataset", ""), engine, place, memory]


def recipe_choices(file: Path) -> dict[str, str]:
    """Read which choice of each group a recipe takes, with those of a recipe that it stands on."""
    choices: dict[str, str] = {}
    for entry in yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", []):
        if isinstance(entry, str) and (below := file.with_name(f"{entry}.yaml")).is_file():
            choices = recipe_choices(below) | choices
        elif isinstance(entry, dict):
            choices |= {str(k).removeprefix("override").strip(" /"): str(v) for k, v in entry.items()}
    return choices


def find_choice(name: str) -> tuple[str, Path]:
    """Find group and file of `GROUP/NAME`, of a recipe's name, or of a name that one group alone has."""
    group, _, inner = name.rpartition("/")
    everything = {g: {f.stem: f for f in choice_files(g)} for g in list_groups()}
    holders = [g for g, files in everything.items() if inner in files and group in ("", g)]
    if RECIPE in holders:
        holders = [RECIPE]
    if len(holders) == 1:
        return holders[0], everything[holders[0]][inner]
    if holders:
        fix = " or ".join(f"kit show {g}/{inner}" for g in holders)
        raise KitError(f"{inner} is a choice of {', '.join(holders)}", "command line", fix)
    if group and group not in everything:
        close = difflib.get_close_matches(group, everything, 1)
        fix = f"kit show {close[0]}/{inner}" if close else f"one of {', '.join(everything)}"
        raise KitError(f"there is no group {group!r}", "command line", fix)
    known = {n: n if g == RECIPE else f"{g}/{n}" for g in everything if group in ("", g) for n in everything[g]}
    close = difflib.get_close_matches(inner, known, 1)
    fix = f"did you mean kit show {known[close[0]]}?" if close else f"kit list {group}".rstrip()
    raise KitError(f"there is no {group or 'recipe or choice'} named {inner!r}", "command line", fix)


def describe_choice(name: str) -> str:
    """Return the text of a file; of a recipe also what it composes to, as comments: the whole stays a YAML file."""
    group, file = find_choice(name)
    text = file.read_text(encoding="utf-8")
    text = text if text.endswith("\n") else text + "\n"
    if group != RECIPE:
        return text
    return text + "\n# It composes to:\n" + "".join(f"#   {line}\n" for line in summarize_recipe(file.stem))


def summarize_recipe(recipe: str) -> list[str]:
    """Say what a recipe is when nothing is changed, a line to a fact; the first problem where it cannot be one."""
    from kit import api

    try:
        facts = api.plan_summary(api.compose(f"recipe={recipe}"))
    except KitError as error:
        return [f"nothing yet: {error.problems[0].problem} (kit check recipe={recipe})"]
    notes = facts.pop("notes") + facts.pop("warnings")
    del facts["run"]
    return [f"{key:<10} {value}" for key, value in facts.items()] + [f"note       {note}" for note in notes]
