"""Paths and values in the tree of a foreign config, and the secrets among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kit.errors import KitError
from kit.system import secrets

KeyPath = tuple[str | int, ...]
SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|webhook(_url)?)$|(^|_)(hub|auth|access|hf|wandb|api)_token$"
    r"|^(token|use_auth_token|key)$|(^|_)private_key$|_secret(_|$)",
    re.IGNORECASE,
)
MAX_KEYS = 20_000  # a config of a run has hundreds; aliases of aliases make millions of a short file
MAX_DEPTH = 40


def iterate_leaves(
    tree: Any, where: str, path: KeyPath = (), count: list[int] | None = None
) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of every leaf; a list is opened where it holds blocks. KitError where it is no config."""
    count = [0] if count is None else count
    if len(path) > MAX_DEPTH:
        raise KitError(f"{where} is nested too deeply", dotted_key(path[:4]), "write it flat")
    blocks = isinstance(tree, list) and any(isinstance(item, dict) for item in tree)
    if (isinstance(tree, dict) and tree) or blocks:
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from iterate_leaves(value, where, (*path, name), count)
        return
    count[0] += 1
    if count[0] > MAX_KEYS or (isinstance(tree, list) and len(tree) > MAX_KEYS):
        raise KitError(f"{where} holds more than {MAX_KEYS} keys: this is no config of a run", where, "check the file")
    if path:
        yield path, tree


def path_exists(tree: Any, path: KeyPath) -> bool:
    for part in path:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and type(part) is int and part < len(tree):
            tree = tree[part]
        else:
            return False
    return True


def value_at_path(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def without_paths(value: Any, hidden: list[KeyPath]) -> Any:
    """A copy without the named places."""
    gone = {p[0] for p in hidden if len(p) == 1}
    inner = {k: [p[1:] for p in hidden if p[0] == k and len(p) > 1] for k in {p[0] for p in hidden}}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    kept = {k: without_paths(v, inner[k]) if inner.get(k) else v for k, v in pairs if k not in gone}
    return kept if isinstance(value, dict) else list(kept.values())


def dotted_key(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if type(part) is int and text else f".{part}" if text else str(part)
    return " ".join(text.split())[:200]


def is_secret_value(path: KeyPath, value: Any) -> bool:
    if value is None or isinstance(value, bool) or value == "":
        return False
    texts = value if isinstance(value, list) else [value]
    named = bool(path) and isinstance(path[-1], str) and SECRET_NAME.search(path[-1]) is not None
    return named or any(isinstance(text, str) and secrets.SECRET_VALUE.search(text) is not None for text in texts)


def secret_fix_for(path: KeyPath) -> str:
    name = str(path[-1]).lower()
    variables = {"wandb": "WANDB_API_KEY", "comet": "COMET_API_KEY", "swanlab": "SWANLAB_API_KEY"}
    variable = next((v for k, v in variables.items() if k in name), "HF_TOKEN")
    return f"give it in the environment alone: export {variable}=..."


def value_on_one_line(value: Any) -> str:
    """A value on one line, short, with secrets inside it blotted out."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = secrets.SECRET_VALUE.sub("(a secret)", " ".join(text.split()))
    return text if len(text) <= 70 else text[:67] + "..."
