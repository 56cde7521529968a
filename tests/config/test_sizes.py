"""Functions of kit/config stay short; ruff holds their complexity (pyproject.toml)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES = 60


def test_no_function_is_longer_than_a_screen():
    long = []
    for file in sorted((ROOT / "kit" / "config").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MOST_LINES:
                long.append(f"{file.relative_to(ROOT)}:{node.name}")
    assert long == []
