"""The first lines of a recipe say what `kit plan` says of it on the machine that they name."""

from __future__ import annotations

import re

import pytest

from kit.explain.plan import forecast_run
from kit.forecast.hosts import parse_host
from kit.system import paths

FILES = [file for file in sorted(paths.RECIPES.glob("*.yaml")) if not file.stem.startswith("quickstart")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_first_lines(file) -> None:
    text = " ".join(line.lstrip("# ") for line in file.read_text().splitlines()[:5] if line.startswith("#"))
    found = re.search(r"Expected: (\d+) GB(?: on each)? and (\S+) to (\S+) seconds a step on hardware=(\S+)", text)
    assert found, text
    figures = forecast_run([f"recipe={file.stem}"], parse_host(found[4]))
    memory, step = figures["memory"], figures["step"]
    said = f"{memory['needed'] / 1e9:.0f}", f"{step['fastest']:.2g}", f"{step['slowest']:.2g}"
    assert found.groups()[:3] == said and memory["fits"]
