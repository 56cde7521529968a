"""Raw rows of any common format as canonical rows, and which format the rows of a file have.

A canonical row is {"messages": [...]}, {"prompt", "completion"} (both text or both messages), {"text": str} or
{"input_ids": [int], "labels": [int] where given}. Chats also have "tools" and "chat_template_kwargs" where given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from kit.errors import KitError
from kit.inspection import row_template
from kit.rows.turns import (
    ROLES,
    EmptyAnswer,
    Row,
    RowProblem,
    check_text,
    clean_turns,
    kind,
    parse_json,
    short,
    template_arguments,
)
from kit.schema.run_plan import DataSource

CanonicalRow = dict[str, Any]
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "chats", "turns")
PAIRS = (
    *(("question", "answer"), ("query", "response"), ("instruction", "response"), ("prompt", "response")),
    *(("input", "output"), ("question", "response"), ("query", "answer"), ("prompt", "answer")),
    *(("problem", "solution"), ("user", "assistant"), ("human", "assistant")),
)
PREFERENCES = ({"chosen", "rejected"}, {"chosen_messages", "rejected_messages"})
SHAREGPT = ({"from", "value"}, {"role", "value"}, {"human", "assistant"}, {"user", "assistant"})  # keys of a turn
MASKS = ("assistant_masks", "completion_mask")
IGNORED = -100
# The prompts of github.com/tatsu-lab/stanford_alpaca (train.py): the answer stands right behind the colon
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Format:
    """A way to write rows."""

    convert: Callable[[Row, DataSource], CanonicalRow | None]  # None where the row has not the format's columns
    fits: Callable[[Row], bool]  # by its columns, and the kinds of their values
    columns: set[str]  # that `dataset.columns` can name
    kind: str  # what rows are in the end: messages, prompt_completion, text or tokenized


def convert_row(row: Row, format: str, source: DataSource) -> CanonicalRow:
    """Convert a raw row, which is not changed, to a canonical one. RowProblem for everything that is wrong with it.

    format: what `detect_format` returned for the rows of this source.
    """
    if not isinstance(row, dict):
        raise RowProblem(f"is {kind(row)}, not an object")
    row = _fill_template(row, format, source) if source.template else _rename(row, source)
    converted = FORMATS[format].convert(row, source)
    if converted is None:
        raise RowProblem(f"has the columns {short(_list(row))}; the format is {format}")
    return converted


def detect_format(rows: Sequence[Row], source: DataSource) -> str:
    """Return the format that most of the sampled rows have, judged by their columns and what stands in them.

    KitError where there is no row, where no format fits, or where what the source names (`format`, `columns`,
    `template`, `roles`) does not fit the rows.
    """
    rows = [row for row in rows if isinstance(row, dict)]
    if not rows:
        raise KitError("the data holds no rows", "dataset.path", "give a file with rows", rule="dataset-rows")
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    _check_source(source, columns)
    if source.template:
        return _template_format(source, columns)
    asked = None if source.format == "auto" else source.format
    if asked and any(FORMATS[asked].fits(_rename(row, source)) for row in rows):
        return asked
    votes = _count_votes(rows, source)
    found = votes.most_common(1)[0][0] if votes else None
    if found == "preference":
        raise _preference_data(rows, source)
    if found and not asked:
        return found
    key, what = "columns", f"of none of the formats {', '.join(FORMATS)}"
    if asked:
        key, what = "format", f"not of the format {asked}"
    fix = f"dataset.format={found}" if found else _advise(rows, columns)
    raise KitError(f"the columns {_list(columns)} are {what}", f"dataset.{key}", fix, rule=f"dataset-{key}")


# The formats: one function each


def convert_chat(row: Row, source: DataSource) -> CanonicalRow | None:
    """[{"role", "content"}] of OpenAI, [{"from", "value"}] of ShareGPT, or [{"human", "assistant"}], under any column;
    "system", "tools" or "functions", and "chat_template_kwargs" beside it."""
    for name in CHATS:  # the hot path: no look at what stands in the other columns
        if isinstance(turns := row.get(name), list) and turns and isinstance(turns[0], dict):
            return _make_chat(turns, name, row, source)
    found = _find_chat(row) or next((name for name in CHATS if name in row), None)
    return None if found is None else _make_chat(parse_json(row[found], found), found, row, source)


def convert_pair(row: Row, source: DataSource, question: str, answer: str) -> CanonicalRow | None:
    """Two columns of text as a chat; "input" or "context" belong to the question, "history" is a list of pairs."""
    if question not in row or answer not in row:
        return None
    answered = _answer(row, answer)
    names = dict.fromkeys((question, "input", "context"))
    asked = "\n".join(filter(None, (_optional_text(row, name) for name in names)))
    history = parse_json(row.get("history"), "history") or []
    turns = []
    for pair in [*history, (asked, answered)] if isinstance(history, list) else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem("history is not a list of pairs of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if not asked:
        raise RowProblem(f"{question} is empty")
    return _make_chat(turns, "history", row, source)


def convert_question_answer(row: Row, source: DataSource) -> CanonicalRow | None:
    """Two columns of PAIRS, in any case of letters."""
    return convert_pair(row, source, *(_find_pair(row) or PAIRS[0]))


def _fits_alpaca(row: Row) -> bool:
    return row.keys() >= {"instruction", "output"}


def convert_alpaca_prompt(row: Row, source: DataSource) -> CanonicalRow | None:
    """The same as prompt and completion in Stanford's words."""
    if not _fits_alpaca(row):
        return None
    if filled := [name for name in ("system", "history") if row.get(name)]:
        raise RowProblem(f"the prompts of Alpaca have no place for {filled[0]}")
    answer, instruction, given = _answer(row, "output"), _text(row, "instruction"), _optional_text(row, "input")
    prompt = (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given)
    return {"prompt": prompt, "completion": answer}


def convert_prompt_completion(row: Row, source: DataSource) -> CanonicalRow | None:
    """{"prompt", "completion"}, both text or both chats."""
    if not row.keys() >= {"prompt", "completion"}:
        return None
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = clean_turns(prompt, "prompt", source)
        answers = clean_turns(completion, "completion", source)
        if all(turn["role"] != "assistant" for turn in answers):
            raise RowProblem("the completion has no assistant turn to train")
        return {"prompt": messages, "completion": answers, **template_arguments(row, [*prompt, *completion])}
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowProblem(f"prompt is {kind(prompt)} and completion is {kind(completion)}: both text or both chats")
    answer = _answer(row, "completion")  # may stand behind nothing
    return {"prompt": check_text(prompt, "prompt"), "completion": answer}


def convert_text(row: Row, source: DataSource) -> CanonicalRow | None:
    """{"text"}"""
    return {"text": _text(row, "text")} if "text" in row else None


def convert_tokenized(row: Row, source: DataSource) -> CanonicalRow | None:
    """{"input_ids"} with "labels", or with masks of what is trained; where "attention_mask" is 0 is cut off."""
    names = ("input_ids", "labels", "attention_mask", *MASKS)
    lists = {name: row[name] for name in names if row.get(name) is not None}
    if "input_ids" not in lists:
        return None
    ids = lists["input_ids"]
    for name, values in lists.items():
        if not isinstance(values, list) or not values or set(map(type, values)) != {int}:
            raise RowProblem(f"{name} is not a list of whole numbers")
        if len(values) != len(ids):
            raise RowProblem(f"{len(ids)} input_ids, but {len(values)} {name}")
        if name not in ("input_ids", "labels") and not set(values) <= {0, 1}:
            raise RowProblem(f"{name} holds more than 0 and 1")
    if min(ids) < 0:
        raise RowProblem(f"input_ids holds {min(ids)}")
    labels = lists.get("labels", ids)
    for mask in (lists[name] for name in MASKS if name in lists):
        labels = [label if kept else IGNORED for label, kept in zip(labels, mask, strict=True)]
    if any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
        raise RowProblem("labels hold more than -100 and the row's own tokens (they are not to be shifted)")
    seen = lists.get("attention_mask") or [1] * len(ids)
    if 1 not in seen:
        raise RowProblem("attention_mask is 0 everywhere")
    found = {"input_ids": [token for token, mask in zip(ids, seen, strict=True) if mask]}
    if labels is not ids:
        found["labels"] = [label for label, mask in zip(labels, seen, strict=True) if mask]
    return found


FORMATS = {  # the most particular first
    "tokenized": Format(
        convert_tokenized, lambda row: isinstance(row.get("input_ids"), list),
        {"input_ids", "labels", "attention_mask", *MASKS}, "tokenized"),
    "messages": Format(
        convert_chat, lambda row: any(_has_turns(row.get(name), {"role", "content"}) for name in CHATS),
        {"messages"}, "messages"),
    "sharegpt": Format(convert_chat, lambda row: _find_chat(row) is not None, {"messages"}, "messages"),
    "prompt_completion": Format(
        convert_prompt_completion, lambda row: row.keys() >= {"prompt", "completion"},
        {"prompt", "completion"}, "prompt_completion"),
    "alpaca": Format(
        partial(convert_pair, question="instruction", answer="output"), _fits_alpaca,
        {"instruction", "input", "output"}, "messages"),
    "alpaca_prompt": Format(
        convert_alpaca_prompt, _fits_alpaca, {"instruction", "input", "output"}, "prompt_completion"),
    "question_answer": Format(
        convert_question_answer, lambda row: _find_pair(row) is not None, set().union(*PAIRS), "messages"),
    "text": Format(convert_text, lambda row: isinstance(row.get("text", 0), str | None), {"text"}, "text"),
}  # fmt: skip
BESIDE = {"system", "history", "context", "tools", "chat_template_kwargs"}  # what `columns` can name for any


def row_kind(format: str, template: Mapping[str, str]) -> str:
    """What rows of a format are in the end: messages, prompt_completion, text or tokenized."""
    if template and format != "prompt_completion":
        return row_template.template_format(template)
    return FORMATS[format].kind


def resolve_train_on(
    train_on: str | None, assistant_only: bool, completion_only: bool | None, row_kind: str
) -> tuple[str, bool]:
    """(which tokens are in the loss, whether of these only the assistant's) for rows of a kind (formats.row_kind).

    train_on leads; without it TRL's two settings mean what they mean there.
    """
    if train_on is not None:
        return train_on, False
    if row_kind == "prompt_completion" and completion_only is not False:
        return "completion", assistant_only
    return ("assistant_turns" if assistant_only else "everything"), False


def row_turns(row: CanonicalRow) -> list[str | dict[str, Any]]:
    """The texts and turns of a canonical row, in order."""
    parts = [row[key] for key in ("text", "messages", "prompt", "completion") if key in row]
    return [turn for part in parts for turn in ([part] if isinstance(part, str) else part)]


def turn_text(turn: str | dict[str, Any]) -> str:
    """What a text, or a turn of a chat, says."""
    return turn if isinstance(turn, str) else str(turn["content"]) + str(turn.get("reasoning_content", ""))


def is_chat(row: CanonicalRow) -> bool:
    """Whether a canonical row is rendered by a chat template."""
    return "messages" in row or isinstance(row.get("prompt"), list)


# What they share


def _find_chat(row: Row) -> str | None:
    """The first column that holds the turns of a ShareGPT chat, or their JSON; those of CHATS go before others."""
    names = [*(name for name in CHATS if name in row), *row]
    return next((name for name in names if _has_turns(row[name], *SHAREGPT)), None)


def _has_turns(value: Any, *layouts: set[str]) -> bool:
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = parse_json(value, "")
        except RowProblem:
            return False
    turns = [turn.keys() for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    return any(keys >= layout for keys in turns for layout in layouts)


def _find_pair(row: Row) -> tuple[str, str] | None:
    lower = {name.lower(): name for name in row if isinstance(name, str)} | {name: name for name in row}
    return next(((lower[q], lower[a]) for q, a in PAIRS if q in lower and a in lower), None)


def _make_chat(turns: Any, name: str, row: Row, source: DataSource) -> CanonicalRow:
    messages = clean_turns(turns, name, source)
    if (system := _optional_text(row, "system")) and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    roles = {message["role"] for message in messages}
    if "assistant" not in roles:
        raise RowProblem(f"has no {'' if 'user' in roles else 'user or '}assistant turn to train")
    return {"messages": messages, **template_arguments(row, turns)}


def _text(row: Row, column: str) -> str:
    if not (text := check_text(row[column], column)).strip():
        raise RowProblem(f"{column} is empty")
    return text


def _optional_text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None or not str(value).strip() else check_text(value, column)


def _answer(row: Row, column: str) -> str:
    if row[column] is None or not check_text(row[column], column).strip():
        raise EmptyAnswer
    return str(row[column])


def _list(columns: Iterable[Any]) -> str:
    return ", ".join(map(short, columns)) or "(none)"


# From the file's columns to the format's


def _rename(row: Row, source: DataSource) -> Row:
    """The row with what `columns` names under our names; a column of the file that has our name gives way."""
    if not source.columns:
        return row
    gone = {*source.columns, *source.columns.values()}
    renamed = {name: value for name, value in row.items() if name not in gone}
    return renamed | {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}


def _fill_template(row: Row, format: str, source: DataSource) -> Row:
    names = row_template.template_columns(source.template)
    if not any(name in row for name in names):
        raise RowProblem(f"has the columns {short(_list(row))}; the template needs {_list(names)}")
    for name in names:
        if isinstance(value := row.get(name), list | dict | bytes) or kind(value) == "NaN":
            raise RowProblem(f"{name} is {kind(value)}, not text")
    if not row_template.has_trained_text(row, source.template):
        raise EmptyAnswer
    apart = format == "prompt_completion" and "assistant" in source.template
    return row_template.render_row(row, source.template, apart)


def _count_votes(rows: Sequence[Row], source: DataSource) -> Counter[str]:
    """Rows of each format; "preference" for those with a rejected answer. Columns that are named go before others."""
    named = [name for name in FORMATS if FORMATS[name].columns & source.columns.keys()] or list(FORMATS)
    votes: Counter[str] = Counter()
    renamed = [_rename(row, source) for row in rows]
    for row in renamed:
        judged = isinstance(row.get("label"), bool) and ("completion" in row or "messages" in row)
        if judged or any(row.keys() >= pair for pair in PREFERENCES) or row.keys() & {"rejected_response", "kto_tag"}:
            votes["preference"] += 1
        elif found := next((name for name in named if FORMATS[name].fits(row)), None):
            votes[found] += 1
    if not votes and any("messages" in row for row in renamed):  # none of them a chat: each row's reason says more
        votes["messages"] = 1
    return votes


def _check_source(source: DataSource, columns: list[str]) -> None:
    """KitError where roles or columns are named that there are not."""
    if wrong := [(theirs, ours) for theirs, ours in source.roles.items() if ours not in (*ROLES.values(), theirs)]:
        theirs, ours = wrong[0]
        fix = f"dataset.roles.{theirs}= one of {', '.join(sorted(set(ROLES.values())))}; {theirs} to keep it"
        raise KitError(f"{ours!r} is no role", "dataset.roles", fix, rule="dataset-format")
    if source.columns and source.template:
        problem = "both dataset.columns and dataset.template are given"
        raise KitError(problem, "dataset.template", "keep one", rule="dataset-template")
    known = BESIDE.union(*(format.columns for format in FORMATS.values()))
    if unknown := [ours for ours in source.columns if ours not in known]:
        problem = f"dataset.columns.{unknown[0]} names no column that a format has"
        fix = f"the key is one of {', '.join(sorted(known))}, the value the file's column"
        raise KitError(problem, "dataset.columns", fix, rule="dataset-columns")
    if missing := [theirs for theirs in source.columns.values() if theirs not in columns]:
        problem = f"the data has no column {', '.join(map(repr, missing))}; it has {_list(columns)}"
        raise KitError(problem, "dataset.columns", "name columns that exist", rule="dataset-columns")


def _template_format(source: DataSource, columns: list[str]) -> str:
    made = row_template.template_format(source.template)
    row_template.check_template_columns(source.template, columns)
    if source.format in ("auto", made):
        return made
    if (made, source.format) == ("messages", "prompt_completion"):  # the last turn apart from the others
        return source.format
    problem = f"the template makes {made}, not {source.format}"
    raise KitError(problem, "dataset.format", "dataset.format=auto", rule="dataset-format")


def _preference_data(rows: Sequence[Row], source: DataSource) -> KitError:
    fix = "give rows with one answer each"
    for ours in ("completion", "messages", "output", "answer"):  # the preferred answers alone can be trained
        tried = source.model_copy(update={"columns": source.columns | {ours: "chosen"}})
        with suppress(RowProblem, IndexError, KeyError, StopIteration):  # not of such rows
            found = _count_votes(rows, tried).most_common(1)[0][0]
            convert_row(next(row for row in rows if "chosen" in row), found, tried)
            fix = f"to train the preferred answers alone: dataset.columns.{ours}=chosen"
            break
    problem = "these are preferences between answers, for DPO and its kin; here answers are trained"
    return KitError(problem, "dataset.path", fix, rule="dataset-format")


def _advise(rows: Sequence[Row], columns: list[str]) -> str:
    """What makes these columns a format: of those that hold text, the two with the longest, or the one."""
    if chats := [name for name in columns if any(isinstance(row.get(name), list | dict) for row in rows)]:
        return f"write {short(chats[0])} as a list of objects with role and content, in the column messages"
    lengths = {name: sum(len(row[name]) for row in rows if isinstance(row.get(name), str)) for name in columns}
    texts = [name for name in sorted(columns, key=lengths.__getitem__)[-2:] if lengths[name]]
    ours = ("question", "answer") if len(texts) == 2 else ("text",)
    if not texts:
        return "write rows with messages, with prompt and completion, or with text"
    quoted = [t if re.fullmatch(r"[\w-]+", t) else f"'\"{t}\"'" for t in sorted(texts, key=columns.index)]
    return " ".join(f"dataset.columns.{name}={theirs}" for name, theirs in zip(ours, quoted, strict=True))
