"""kit/README.md is true to the code: every room and module that it names, and both walks, call by call."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parents[1] / "kit"
PAGE = (KIT / "README.md").read_text(encoding="utf-8")
ROOMS = dict(re.findall(r"^\| `([a-z]+(?:/|\.py))` \| (.*) \|$", PAGE, re.M))
WALKS = re.findall(r"^## (One [^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)


def test_every_room_is_on_the_map():
    here = {f"{p.name}/" for p in KIT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert set(ROOMS) == here | {p.name for p in KIT.glob("*.py")} - {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_the_modules_of_a_room_are_there(room: str):
    for name in re.findall(r"`([a-z_]+/?)`", ROOMS[room]):
        assert (KIT / room / f"{name}.py").is_file() or (KIT / room / name).is_dir(), f"{room}{name}"


def definition(stop: str) -> tuple[str, ast.AST]:
    """The name and the definition of a function or class, as `room.module.name`."""
    module, _, name = stop.rpartition(".")
    tree = ast.parse((KIT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return name, next(node for node in tree.body if isinstance(node, kinds) and node.name == name)


def mentions(node: ast.AST, module: str, name: str) -> bool:
    """Whether a definition uses `name`, `module.name` or the module's dotted name as text."""
    last = module.rpartition(".")[2]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id == name:
            return True
        if isinstance(inner, ast.Attribute) and inner.attr == name and last in ast.unparse(inner.value):
            return True
    return False


@pytest.mark.parametrize("title, text", WALKS, ids=[title for title, _ in WALKS])
def test_a_walk_can_be_walked(title: str, text: str):
    """At most 12 stops, and each is called by one before it, or stands in a table or constant that one reads."""
    stops = re.findall(r"^\d+\. `([\w.]+)`", text, re.M)
    assert 8 <= len(stops) <= 12 and len(set(stops)) == len(stops)
    passed: list[ast.AST] = []
    for stop in stops:
        name, node = definition(stop)
        module = stop.rpartition(".")[0]
        named = f'kit.{module}:{name}"', f'"kit.{module}"'  # the table of verbs; what `--module` is given
        tables = [(KIT / f"{file}.py").read_text(encoding="utf-8") for file in ("cli/verbs", "launchers/command")]
        by_table = any(text in table for text in named for table in tables)
        by_worker = f"from kit.{module} import {name}" in (KIT / "worker.py").read_text(encoding="utf-8")
        called = any(mentions(before, module, name) for before in passed)
        assert not passed or called or by_table or by_worker, f"{stop} is called by none before it"
        passed.append(node)
