"""Rows of a data set as question and answer, as token ids, and behind worked examples.

A row is {"messages": [...]}, {"prompt", "completion"} (text or messages) or {"text"}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kit.data.encode import IGNORED, EncodedRow, Encoding, encode_open_text, encode_prompt, encode_row
from kit.data.load import load_rows
from kit.data.masks import Messages
from kit.errors import KitError
from kit.models.sources import ModelSource
from kit.rows.formats import CanonicalRow
from kit.rows.turns import RowProblem

SEPARATORS = ("\n", "\n\n", "\n\n###\n\n")  # between worked examples: the first that no example holds


@dataclass(frozen=True)
class Example:
    """One row: `completion` is None for plain text, which has no answer of its own."""

    prompt: str | Messages
    completion: str | Messages | None
    template: dict[str, Any] = field(default_factory=dict)  # the row's tools and chat_template_kwargs

    @property
    def question(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        return "\n".join(message_text(m) for m in self.prompt if m.get("role") != "system").strip()

    @property
    def answer(self) -> str:
        if isinstance(self.completion, str):
            return self.completion.strip()
        return "\n".join(message_text(m) for m in self.completion or ()).strip()


@dataclass(frozen=True)
class TokenizedExample(EncodedRow):
    """A row whose labels are the tokens of its answer; generation starts from `prompt_ids`."""

    prompt_ids: list[int] = field(default_factory=list)

    @property
    def answer_ids(self) -> list[int]:
        return [label for label in self.labels if label != IGNORED]


@dataclass(frozen=True)
class FewShotPrompt:
    """Worked examples to stand before a question."""

    examples: tuple[Example, ...]
    style: str
    separator: str

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]], style: str) -> FewShotPrompt:
        if style not in ("chat", "text"):
            raise KitError(f"the style {style!r} of worked examples is not known", where="style", fix="chat or text")
        examples = tuple(example_from_row(row, i, "few_shot") for i, row in enumerate(load_rows(rows, "few_shot")))
        if any(example.completion is None for example in examples):
            problem = "plain text rows have no answer to show as a worked example"
            raise KitError(problem, "few_shot", "rows with prompt and completion, or chats; or --few-shot 0")
        texts = [text for example in examples for text in (example.question, example.answer)]
        separator = next((s for s in SEPARATORS if not any(s in t for t in texts)), SEPARATORS[-1])
        return cls(examples, style, separator)

    @property
    def stop_text(self) -> str | None:
        # a base that continues lines does not end its answer, it goes on to the next example
        return self.separator if self.style == "text" else None


def message_text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def example_from_row(row: CanonicalRow | RowProblem, index: int, where: str = "data") -> Example:
    """A row as question and answer: of a chat the last assistant turn is the answer. KitError for any other row."""
    place = f"{where}, row {index + 1}"
    if isinstance(row, RowProblem):
        raise KitError(f"a row {row}", place, "mend the row, or leave it out")
    template: dict[str, Any] = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
    if "messages" in row:
        messages = row["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if not last:
            raise KitError("a chat has no assistant turn after a question", place, "leave the chat out")
        return Example(messages[:last], [messages[last]], template)
    if "prompt" in row:
        return Example(row["prompt"], row["completion"], template)
    if "text" in row:
        return Example(row["text"], None)
    raise KitError("a row of token ids has no question", place, "rows with prompt and completion, or chats")


def tokenize_example(
    tokenizer: Any, example: Example, stops: Sequence[int], trained: Encoding, prompted: Encoding
) -> TokenizedExample:
    """Tokenize a row as the training does, and its prompt as generation does; the labels are the answer's tokens.

    trained, prompted: encodings with the chat template that the run trained with, and with the tokenizer's own. What a
    template puts behind the end token (a newline) is trained but nobody's answer: it is left out.
    """
    if example.completion is None:
        row = encode_row(tokenizer, {"text": example.prompt}, replace(trained, train_on="everything"))
        return TokenizedExample(row.input_ids, row.labels, prompt_ids=row.input_ids[:1])
    prompt_ids = encode_prompt(tokenizer, example.prompt, chat=False, row=example.template, encoding=prompted)
    columns = {"prompt": example.prompt, "completion": example.completion, **example.template}
    row = encode_row(tokenizer, columns, replace(trained, train_on="completion"))
    end = len(row.labels)
    if not isinstance(example.prompt, str):
        end = next((n for n in range(end, 0, -1) if row.labels[n - 1] in stops), end)
    return TokenizedExample(row.input_ids[:end], row.labels[:end], prompt_ids=prompt_ids)


def choose_few_shot_style(source: ModelSource, tokenizer: Any) -> str:
    """ "chat" where the base itself knows chats, else "text": a base without chat training follows lines better."""
    folder = source.base or source.folder
    if source.base is None:
        return "chat" if getattr(tokenizer, "chat_template", None) else "text"
    if (folder / "chat_template.jinja").is_file():
        return "chat"
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "text"
    return "chat" if config.get("chat_template") else "text"


def few_shot_messages(example: Example, shots: FewShotPrompt) -> Messages:
    """The prompt of a row as a chat, the worked examples as earlier turns behind its system prompt."""
    turns = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else list(example.prompt)
    lead = 1 if turns[0].get("role") == "system" else 0
    examples: Messages = []
    for shot in shots.examples:
        examples.append({"role": "user", "content": shot.question})
        examples.append({"role": "assistant", "content": shot.answer})
    return [*turns[:lead], *examples, *turns[lead:]]


def encode_few_shot_prompt(
    tokenizer: Any, example: Example, shots: FewShotPrompt, *, system: str | None = None
) -> list[int]:
    """Token ids of a prompt behind worked examples, as earlier turns or as lines of question and answer."""
    if shots.style == "chat":
        return encode_prompt(
            tokenizer, few_shot_messages(example, shots), chat=True, system=system, row=example.template
        )
    lines = [f"{shot.question} {shot.answer}" for shot in shots.examples] + [example.question]
    turns = example.prompt if isinstance(example.prompt, list) else []
    header = system or next((message_text(m) for m in turns if m.get("role") == "system"), "")
    return encode_open_text(tokenizer, shots.separator.join([header, *lines] if header else lines))


def sample_rows(rows: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows chosen with a fixed seed, all where there are fewer; one that cannot be read is left out."""
    chosen = []
    for index in random.Random(seed).sample(range(len(rows)), min(count, len(rows))):
        try:
            row = rows[index]
        except RowProblem:
            continue
        chosen += [] if isinstance(row, RowProblem) else [row]
    return chosen
