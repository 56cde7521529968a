"""The kit's column of the table of common mistakes: each is refused, or warned of, by its rule and with its key.

The other columns are run by hand: tests/benchmarks/mistakes.py, whose JSON is in benchmarks/results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "benchmarks"))

from mistakes_cases import CASES, make_world, overrides  # noqa: E402

from kit import api  # noqa: E402
from kit.errors import KitError  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    return make_world(tmp_path_factory.mktemp("world"), base, CASES)


def test_there_are_twenty():
    assert len({case["id"] for case in CASES}) == len(CASES) == 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_kit_names_it(case, world):
    if case["rule"] is None:
        assert api.compose(*overrides(case, world)).train_on == "assistant_turns"
        return
    rule, key = case["rule"]
    try:
        found = [(w["rule"], f"{w['problem']} {w['where']}") for w in api.compose(*overrides(case, world)).warnings]
    except KitError as error:
        found = [(p.rule, f"{p.problem} {p.where}") for p in error.problems]
    assert any(r == rule and key in said for r, said in found), found


def test_the_recorded_table_is_of_these():
    recorded = json.loads(sorted((HERE / "benchmarks" / "results").glob("*-mistakes.json"))[-1].read_text())
    assert {case["id"] for case in CASES} <= recorded["results"].keys()
    kit = [recorded["results"][case["id"]]["kit"] for case in CASES]
    assert all(cell["said"] and not cell["weights"] for cell in kit)
