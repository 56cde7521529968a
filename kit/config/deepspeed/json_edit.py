"""Edits of a JSON text that leave the rest of it as it was written: spaces, order, `5e8`, line ends.

The text must be valid JSON with a block at the top (`parse_deepspeed_json` says where it is not).
A path is a tuple of keys.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
KeyPath = tuple[str, ...]


@dataclass
class Node:
    """A value and where its text stands; `members` only where it is a block."""

    value: Any
    start: int
    end: int = 0
    members: list[Member] = field(default_factory=list)


@dataclass
class Member:
    key: str
    key_start: int  # of its opening quote
    key_end: int
    node: Node


def parse_nodes(text: str) -> Node:
    """The top block with the places of all values in it. RecursionError where it is nested too deeply."""
    return _parse_value(text, _skip_space(text, 0))


def _skip_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _parse_value(text: str, position: int) -> Node:
    if text[position] != "{":
        value, end = DECODER.raw_decode(text, position)
        return Node(value, position, end)
    node = Node({}, position)
    position = _skip_space(text, position + 1)
    while text[position] != "}":
        key, end = DECODER.raw_decode(text, position)
        inner = _parse_value(text, _skip_space(text, _skip_space(text, end) + 1))  # over the colon
        node.members.append(Member(key, position, end, inner))
        node.value[key] = inner.value
        position = _skip_space(text, inner.end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    node.end = position + 1
    return node


def find_member(root: Node, path: KeyPath) -> Member | None:
    """The member at a path; of a key that is given twice the last, which is the one that counts."""
    member, members = None, root.members
    for key in path:
        member = next((m for m in reversed(members) if m.key == key), None)
        if member is None:
            return None
        members = member.node.members
    return member


def line_of(text: str, root: Node, path: KeyPath) -> int:
    """The line of a key, or of the deepest block on the way to it that is there; 1 is the first."""
    for end in range(len(path), 0, -1):
        if member := find_member(root, path[:end]):
            return text.count("\n", 0, member.key_start) + 1
    return text.count("\n", 0, root.start) + 1


def duplicate_keys(node: Node, above: KeyPath = ()) -> list[KeyPath]:
    """The paths of keys that stand twice or more in one block."""
    keys = [m.key for m in node.members]
    paths = [(*above, key) for key in dict.fromkeys(keys) if keys.count(key) > 1]
    return paths + [path for m in node.members for path in duplicate_keys(m.node, (*above, m.key))]


def rename_key(text: str, path: KeyPath, key: str) -> str:
    member = _member_at(text, path)
    return text[: member.key_start] + json.dumps(key, ensure_ascii=False) + text[member.key_end :]


def replace_value(text: str, path: KeyPath, value: Any) -> str:
    """Another value for a key; a block is written in the file's own style."""
    root = parse_nodes(text)
    member = find_member(root, path)
    assert member
    start = text.rfind("\n", 0, member.key_start) + 1
    own_line = not text[start : member.key_start].strip()
    indent = text[start : member.key_start] if own_line else None
    return (
        text[: member.node.start]
        + render_value(value, indent, _indentation(text, root), text)
        + text[member.node.end :]
    )


def remove_key(text: str, path: KeyPath, first: bool = False) -> str:
    """Without a key, its comma and its line; `first`: the first of several with that name."""
    root = parse_nodes(text)
    block = root if len(path) == 1 else _member_at(text, path[:-1]).node
    places = [i for i, m in enumerate(block.members) if m.key == path[-1]]
    index = places[0 if first else -1]
    members = block.members
    if index + 1 < len(members):
        return text[: members[index].key_start] + text[members[index + 1].key_start :]
    if index:
        return text[: members[index - 1].node.end] + text[members[index].node.end :]
    return text[: block.start] + "{}" + text[block.end :]


def add_key(text: str, path: KeyPath, value: Any) -> str:
    """With a key more at the end of a block that is there, written as the block's other keys are."""
    root = parse_nodes(text)
    block = root if len(path) == 1 else _member_at(text, path[:-1]).node
    key = json.dumps(path[-1], ensure_ascii=False)
    unit, end = _indentation(text, root), "\r\n" if "\r\n" in text else "\n"
    if not block.members:
        first = text.rfind("\n", 0, block.start) + 1
        outer = re.match(r"[ \t]*", text[first:])
        around = outer.group() if outer else ""
        if unit is None:
            return text[: block.start] + f"{{{key}: {render_value(value, None, None, text)}}}" + text[block.end :]
        inner = around + unit
        body = f"{end}{inner}{key}: {render_value(value, inner, unit, text)}{end}{around}"
        return text[: block.start] + "{" + body + "}" + text[block.end :]
    last = block.members[-1]
    start = text.rfind("\n", 0, last.key_start) + 1
    if text[start : last.key_start].strip():  # several keys in one line
        return text[: last.node.end] + f", {key}: {render_value(value, None, None, text)}" + text[last.node.end :]
    indent = text[start : last.key_start]
    return (
        text[: last.node.end]
        + f",{end}{indent}{key}: {render_value(value, indent, unit, text)}"
        + text[last.node.end :]
    )


def render_value(value: Any, indent: str | None, unit: str | None, text: str) -> str:
    """A value's text; a block gets lines of its own where the keys of `text` have them (`indent`: of its key)."""
    if not isinstance(value, dict) or indent is None or unit is None or not value:
        return json.dumps(value, ensure_ascii=False)
    end, inner = "\r\n" if "\r\n" in text else "\n", indent + unit
    rows = [
        f"{inner}{json.dumps(k, ensure_ascii=False)}: {render_value(v, inner, unit, text)}" for k, v in value.items()
    ]
    return "{" + end + f",{end}".join(rows) + end + indent + "}"


def _member_at(text: str, path: KeyPath) -> Member:
    member = find_member(parse_nodes(text), path)
    if member is None:
        raise KeyError(".".join(path))
    return member


def _indentation(text: str, root: Node) -> str | None:
    """The indentation of the first level; None where the file is written in one line."""
    if not root.members:
        return "  "
    start = text.rfind("\n", 0, root.members[0].key_start) + 1
    before = text[start : root.members[0].key_start]
    return None if before.strip() else (before or "  ")
