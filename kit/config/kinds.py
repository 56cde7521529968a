"""What would do in place of a value of the wrong kind, from what pydantic says of it."""

from __future__ import annotations

from typing import Any

KINDS = {  # first word of pydantic's error types
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "[a,b]",
    "dict": "key: value lines", "model": "key: value lines",
}  # fmt: skip


def is_kind(part: str) -> bool:
    """Whether a part of pydantic's location is a kind of value, one of several that would do, and not a key."""
    return part.startswith(("function-", "literal", "constrained-")) or part in ("str", "int", "float", "bool")


def fix_of(key: str, errors: list[Any]) -> str:
    """What would do in place of a value that pydantic did not take, "" where that needs more than a few words."""
    given, kind = errors[0]["input"], errors[0]["type"]
    if len(errors) == 1:  # the key takes one kind alone: the value as that
        if kind == "list_type" and isinstance(given, str) and '"' not in given:
            return f"'{key}=[\"{given}\"]'"
        if kind == "string_type" and type(given) in (int, float):
            return f"{key}=\"'{given}'\", in quotes"
        if kind == "string_type" and isinstance(given, list):
            return f"{key}=\"'{','.join(map(str, given))}'\", one text"
    if kind == "string_pattern_mismatch" and key in ("launch.include", "launch.exclude"):
        return f"{key}=\"'host1@host2:0,2'\": hosts, each with its slots or without"
    found = " or ".join(dict.fromkeys(words for e in errors if (words := what_is_wanted(e))))
    return found and f"give {found}"


def what_is_wanted(error: Any) -> str:
    """What pydantic would have taken, "" where that needs more than a few words."""
    limits = error.get("ctx") or {}
    if "expected" in limits:
        return str(limits["expected"])
    for sign, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if sign in limits:
            return f"{words} {limits[sign]:g}"
    return KINDS.get(error["type"].split("_")[0], "")
