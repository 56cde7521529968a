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
EXPECTED = {
    *(f"T{n}" for n in range(1, 95)),
    *(f"F{n}" for n in range(20, 38)),
    *(f"S{letter}" for letter in "abcdefghijklmno"),
}


@cache
def names(file: Path) -> set[str]:
    """Functions and classes on the top level of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


def test_no_row_is_missing_and_none_is_too_many():
    assert set(TABLE) == EXPECTED


@pytest.mark.parametrize("row", TABLE)
def test_what_a_row_points_to_exists(row: str):
    held = TABLE[row]
    assert set(held) <= {"title", "rules", "made", "launch"} and held["title"]
    assert held.get("rules") or held.get("made") or held.get("launch"), "nothing keeps it from a run"
    assert set(held.get("rules", [])) <= {rule.id for rule in RULES}
    for place in held.get("made", []):
        file, _, name = place.partition(":")
        assert (ROOT / file).is_file(), place
        assert not name or name in names(ROOT / file), place
    assert "launch" not in held or len(held["launch"].split()) >= 5


def test_a_rule_that_names_a_row_stands_in_it():
    """`source` of a rule and `rules` of a row say the same."""
    for rule in RULES:
        sources = re.sub(r"source fault (\w)", r"S\1", re.sub(r"(?<!source )fault (\d+)", r"F\1", rule.source))
        for row in re.findall(r"\b[TF]\d+\b|\bS[a-o]\b", sources):
            assert rule.id in TABLE[row].get("rules", []), f"{rule.id} says {row}, whose row does not name it"
