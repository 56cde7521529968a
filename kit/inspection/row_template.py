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


def template_format(template: Mapping[str, str]) -> str:
    """text, prompt_completion or messages; KitError for any other set of keys."""
    for name, (known, needed) in FORMAT_KEYS.items():
        if needed <= template.keys() <= known:
            return name
    fix = "give text, or prompt and completion, or user and assistant (and system)"
    raise refuse_template(f"a template of {', '.join(sorted(template))} makes no row", fix)


def template_columns(template: Mapping[str, str]) -> list[str]:
    """The data set's columns that a template names, in order, each once; KitError where it is not well formed."""
    parts = [part for key, text in template.items() for part in template_parts(key, text)]
    columns = list(dict.fromkeys(name for _, name in parts if name is not None))
    if not columns:
        raise refuse_template("the template names no column", "write column names in braces: {Question}")
    return columns


@cache
def template_parts(key: str, text: str) -> tuple[tuple[str, str | None], ...]:
    """(text before, column or None) pairs. Only plain names stand in braces: no attributes, indices or conversions."""
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise refuse_template(f"{key}: {error}", "double a brace that is meant as text: {{ and }}", key) from None
    if any(name is not None and (spec or conversion or not name) for _, name, spec, conversion in pieces):
        raise refuse_template(f"{key}: only {{column}} can stand in braces", "name a column", key)
    return tuple((before, name) for before, name, _, _ in pieces)


def check_template_columns(template: Mapping[str, str], columns: list[str]) -> None:
    """KitError listing the columns that the template names and the data set lacks."""
    if missing := [name for name in template_columns(template) if name not in columns]:
        problem = f"the template names {', '.join(map(repr, missing))}; the data has {', '.join(columns)}"
        raise refuse_template(problem, "name columns that exist")


def refuse_template(problem: str, fix: str, key: str = "") -> KitError:
    return KitError(problem, "dataset.template" + (f".{key}" if key else ""), fix, rule="dataset-template")


def render_row(row: Mapping[str, Any], template: Mapping[str, str], apart: bool = False) -> dict[str, Any]:
    """One row in the format of the template. A null, or a column that the row lacks, is an empty text; chat turns lose
    surrounding blanks.

    apart: the assistant's turn as `completion` behind the others as `prompt`, so that the loss can leave out the
    prompt whatever the chat template marks.
    """
    filled: dict[str | None, Any] = {name: value for name, value in row.items() if value is not None} | {None: ""}
    texts = {
        key: "".join(f"{before}{filled.get(name, '')}" for before, name in template_parts(key, text))
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
