"""Every known trap has a rule, a construction that makes it impossible, or a reason why only the run can tell."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from kit.config.rules.table import RULES

ROOT = Path(__file__).parents[2]
TABLE = yaml.safe_load(Path(__file__).with_name("coverage.yaml").read_text(encoding="utf-8"))


@cache
def names(file: Path) -> set[str]:
    """Functions and classes on the top level of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


@pytest.mark.parametrize("row", TABLE)
def test_what_a_row_points_to_exists(row: str):
    held = TABLE[row]
    assert set(held) <= {"rules", "made", "launch"}
    assert held.get("rules") or held.get("made") or held.get("launch"), "nothing keeps it from a run"
    assert set(held.get("rules", [])) <= {rule.id for rule in RULES}
    for place in held.get("made", []):
        file, _, name = place.partition(":")
        assert (ROOT / file).is_file(), place
        assert not name or name in names(ROOT / file), place
    assert "launch" not in held or len(held["launch"].split()) >= 5


# Numbers of lists that no reader can look up. "T4" is a GPU, "T5" a model.
PRIVATE = re.compile(
    r"\bT(?!4\b|5\b)\d{1,2}\b|\(T\d+\)|\b(?:[Ff]aults?|[Tt]raps?|(?:security|source) (?:rule|fault)) [A-Z]?\d+"
)


def test_no_private_code_is_in_the_package():
    """Upstream is cited by project and issue number or by file, which anyone can open."""
    for file in sorted((ROOT / "kit").rglob("*")):
        if file.suffix in (".py", ".yaml", ".md"):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                assert not PRIVATE.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
    for rule in RULES:
        assert rule.source and not re.search(r"\b[A-Z]\d+\b", rule.source), f"{rule.id}: {rule.source}"
