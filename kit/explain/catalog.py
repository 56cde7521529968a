"""What there is to compose a run of: the recipes and the choices of every group, listed and shown."""

from __future__ import annotations

import difflib
from pathlib import Path

from kit.errors import KitError
from kit.system import paths

RECIPE = "recipe"


def groups() -> list[str]:
    return sorted(p.name for p in paths.CONF.iterdir() if p.is_dir())


def choices(group: str) -> list[Path]:
    """The files of a group, by name; of `deepspeed` the JSON files too."""
    files = list((paths.CONF / group).glob("*.yaml"))
    if group == "deepspeed":
        files += paths.DS_CONFIGS.glob("*.json")
    return sorted(files, key=lambda f: f.stem)


def first_line(file: Path) -> str:
    """The first comment of a file, "" where it has none."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")


def list_group(group: str = RECIPE) -> str:
    """The choices of a group with their first lines, one to a line."""
    known = groups()
    if group not in known:
        near = difflib.get_close_matches(group, known, 1)
        fix = f"did you mean kit list {near[0]}? " if near else ""
        raise KitError(f"there is no group {group!r}", "command line", f"{fix}one of {', '.join(known)}")
    files = choices(group)
    width = max(len(f.stem) for f in files) + 2
    lines = [f"{f.stem:<{width}}{first_line(f)}".rstrip() for f in files]
    return "\n".join(lines) + "\n"


def find(name: str) -> tuple[str, Path]:
    """Group and file of `GROUP/NAME`, of a recipe's name, or of a name that one group alone has."""
    group, _, inner = name.rpartition("/")
    everything = {g: {f.stem: f for f in choices(g)} for g in groups()}
    held_by = [g for g, files in everything.items() if inner in files and group in ("", g)]
    if RECIPE in held_by:
        held_by = [RECIPE]
    if len(held_by) == 1:
        return held_by[0], everything[held_by[0]][inner]
    if held_by:
        fix = " or ".join(f"kit show {g}/{inner}" for g in held_by)
        raise KitError(f"{inner} is a choice of {', '.join(held_by)}", "command line", fix)
    if group and group not in everything:
        near = difflib.get_close_matches(group, everything, 1)
        fix = f"kit show {near[0]}/{inner}" if near else f"one of {', '.join(everything)}"
        raise KitError(f"there is no group {group!r}", "command line", fix)
    known = {n: n if g == RECIPE else f"{g}/{n}" for g in everything if group in ("", g) for n in everything[g]}
    near = difflib.get_close_matches(inner, known, 1)
    fix = f"did you mean kit show {known[near[0]]}?" if near else f"kit list {group}".rstrip()
    raise KitError(f"there is no {group or 'recipe or choice'} named {inner!r}", "command line", fix)


def show(name: str) -> str:
    """The text of a file; of a recipe also what it composes to, as comments: the whole stays a YAML file."""
    group, file = find(name)
    text = file.read_text(encoding="utf-8")
    text = text if text.endswith("\n") else text + "\n"
    if group != RECIPE:
        return text
    return text + "\n# It composes to:\n" + "".join(f"#   {line}\n" for line in summary(file.stem))


def summary(recipe: str) -> list[str]:
    """What a recipe is when nothing is changed, a line to a fact; the first problem where it cannot be one."""
    from kit import api

    try:
        facts = api.plan_summary(api.compose(f"recipe={recipe}"))
    except KitError as error:
        return [f"nothing yet: {error.problems[0].problem} (kit check recipe={recipe})"]
    notes = facts.pop("notes") + facts.pop("warnings")
    del facts["run"]
    return [f"{key:<10} {value}" for key, value in facts.items()] + [f"note       {note}" for note in notes]
