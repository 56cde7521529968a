"""Reads and sets values of nested dicts by dotted keys, such as `zero_optimization.stage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def value_at(tree: Any, key: str | Sequence[Any], default: Any = None) -> Any:
    """Return the value at a dotted key, or at the parts of one; `default` where any part is absent."""
    for part in key.split(".") if isinstance(key, str) else key:
        if not isinstance(tree, Mapping) or part not in tree:
            return default
        tree = tree[part]
    return tree


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, making the blocks on the way."""
    *blocks, last = key.split(".")
    for part in blocks:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value
