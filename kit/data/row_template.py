"""`dataset.template`: text, prompt and completion, or chat turns, written from the columns that a data set has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from string import Formatter
from typing import Any

from kit.errors import KitError

TURNS = ("system", "user", "assistant")
FORMAT_KEYS = {  # the keys of a template, what must be there, and the format of the rows that it writes
    "text": ({"text"}, {"text"}),
    "prompt_completion": ({"prompt", "completion"}, {"prompt", "completion"}),
    "messages": ({*TURNS}, {"user", "assistant"}),
}
TRAINED = ("text", "completion", "assistant")  # a row with nothing here has nothing to learn
KEY = "dataset.template"


def template_format(template: Mapping[str, str]) -> str:
    """text, prompt_completion or messages; KitError for any other set of keys."""
    keys = set(template)
    for name, (known, needed) in FORMAT_KEYS.items():
        if needed <= keys <= known:
            return name
    raise KitError(
        f"a template of {', '.join(sorted(keys))} makes no row",
        KEY,
        "give text, or prompt and completion, or user and assistant (and system)",
        rule="dataset-template",
    )


def template_columns(template: Mapping[str, str]) -> list[str]:
    """The data set's columns that a template names, in order, each once; KitError where it is not well formed."""
    columns: dict[str, None] = {}
    for key, text in template.items():
        for _, name in template_parts(key, text):
            if name is not None:
                columns[name] = None
    if not columns:
        raise KitError(
            "the template names no column", KEY, "write column names in braces: {Question}", rule="dataset-template"
        )
    return list(columns)


@cache
def template_parts(key: str, text: str) -> tuple[tuple[str, str | None], ...]:
    """(text before, column or None) pairs. Only plain names stand in braces: no attributes, indices or conversions."""
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise KitError(
            f"{key}: {error}",
            f"{KEY}.{key}",
            "double a brace that is meant as text: {{ and }}",
            rule="dataset-template",
        ) from None
    for _, name, spec, conversion in pieces:
        if name is not None and (spec or conversion or not name):
            problem = f"{key}: only {{column}} can stand in braces"
            raise KitError(problem, f"{KEY}.{key}", "name a column", rule="dataset-template")
    return tuple((before, name) for before, name, _, _ in pieces)


def check_template_columns(template: Mapping[str, str], columns: list[str]) -> None:
    """KitError listing the columns that the template names and the data set lacks."""
    missing = [name for name in template_columns(template) if name not in columns]
    if missing:
        raise KitError(
            f"the template names {', '.join(map(repr, missing))}; the data has {', '.join(columns)}",
            KEY,
            "name columns that exist",
            rule="dataset-template",
        )


def render_row(row: Mapping[str, Any], template: Mapping[str, str], apart: bool = False) -> dict[str, Any]:
    """One row in the format of the template. A null, or a column that the row lacks, is an empty text; chat turns lose
    surrounding blanks.

    apart: the assistant's turn as `completion` behind the others as `prompt`, so that the loss can leave out the
    prompt whatever the chat template marks.
    """
    filled: dict[str | None, str] = {name: str(value) for name, value in row.items() if value is not None}
    texts = {
        key: "".join(
            before + ("" if name is None else filled.get(name, "")) for before, name in template_parts(key, text)
        )
        for key, text in template.items()
    }
    if template_format(template) != "messages":
        return texts
    turns = [{"role": role, "content": texts[role].strip()} for role in TURNS if role in texts]
    turns = [turn for turn in turns if turn["content"] or turn["role"] != "system"]
    return {"prompt": turns[:-1], "completion": turns[-1:]} if apart else {"messages": turns}


def has_trained_text(row: Mapping[str, Any], template: Mapping[str, str]) -> bool:
    """Whether the columns behind the trained part of a row hold anything: else there is nothing to learn from it."""
    names = {name for key in TRAINED if key in template for _, name in template_parts(key, template[key]) if name}
    return not names or any(row.get(name) is not None and str(row[name]).strip() for name in names)
