"""Python as text: values, arguments and calls in the way that formatters write them."""

from __future__ import annotations

from typing import Any

WIDTH = 119


def assignment_lines(values: dict[str, Any]) -> list[str]:
    """The arguments that are not None."""
    return keyword_arguments({k: v for k, v in values.items() if v is not None})


def keyword_arguments(values: dict[str, Any]) -> list[str]:
    return [f"{k}={literal(v)}" for k, v in values.items()]


def literal(value: Any) -> str:
    """A plain value as Python source, with the quotes that formatters prefer."""
    if isinstance(value, str):
        plain = repr(value)
        return plain if '"' in value or "\\'" in plain else f'"{plain[1:-1]}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    return repr(value)


def call_lines(start: str, items: list[str], packed: bool = False, end: str = ")") -> list[str]:
    """`start item, item end`: in one line where it fits, else one item to a line, or as many as fit (`packed`)."""
    if len(whole := f"{start}{', '.join(items)}{end}") <= WIDTH - 4:  # 4: it may be indented
        return [whole]
    if not packed:
        return [start, *(f"    {item}," for item in items), end]
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= WIDTH:
            lines[-1] += f" {item},"
        else:
            lines.append(f"    {item},")
    return [start, *lines, f"{end}  # fmt: skip"]
