"""Rows as token ids and labels, and prompts as token ids: one encoding for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kit.data.masks import Messages, Span, assistant_turns, chosen_turns, common_length, derive_spans, marked_spans
from kit.data.templates import (
    ChatTemplate,
    Traits,
    check_written,
    probe_template,
    reasoning_is_left_out,
    row_template,
)
from kit.errors import KitError
from kit.rows.turns import RowProblem

IGNORED = -100  # a label that is not in the loss
BY_TURNS = ("assistant_turns", "last_turn", "chosen_turns")


@dataclass(frozen=True)
class Encoding:
    """How the rows of a run become tokens."""

    train_on: str = "everything"  # everything, completion, assistant_turns, last_turn or chosen_turns
    answers_only: bool = False  # of a completion the assistant's turns alone: both of TRL's settings together
    template: str | None = None  # the chat template to render with, None for the tokenizer's own
    traits: Traits = Traits()  # of that template
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    on_long_row: str = "truncate"  # or split, drop, refuse


def make_encoding(tokenizer: Any, template: str | None = None, **settings: Any) -> Encoding:
    """An Encoding with the traits of its template; template: None for the tokenizer's own."""
    traits = probe_template(tokenizer, template) if tokenizer.chat_template or template else Traits()
    return Encoding(template=template, traits=traits, **settings)


@dataclass(frozen=True)
class EncodedRow:
    """One row as a model trains on it; `labels` are its `input_ids`, IGNORED where they are not in the loss."""

    input_ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = ()  # what is worth counting: "cut", "reasoning left out", "second BOS taken off"

    @property
    def trained(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


class LongRow(RowProblem):
    """A row longer than max_length, or one of which cutting leaves no trained token."""


@dataclass
class RenderedRow:
    """A row on its way to tokens."""

    text: str
    is_chat: bool
    trained: list[Span] | None = None  # the characters in the loss, None for all
    left_out: list[Span] = field(default_factory=list)  # turns of weight 0
    prompt: str | None = None  # what stands before the completion, where only that is in the loss
    notes: list[str] = field(default_factory=list)


def encode_rows(
    tokenizer: Any, rows: Sequence[dict[str, Any]], encoding: Encoding
) -> list[list[EncodedRow] | RowProblem]:
    """Encode canonical rows (formats.py): of each its pieces (several where it is split), or what is wrong with it.

    With train_on "everything" and "completion" the ids and labels are those that SFTTrainer prepares;
    tests/data/test_encode.py compares them on every chat template that TRL ships.
    """
    special = special_tokens_by_length(tokenizer)  # once: with thousands of added tokens it takes milliseconds
    rendered: list[RenderedRow | RowProblem | None] = []
    for row in rows:
        try:
            rendered.append(render_row(tokenizer, row, encoding, special))
        except RowProblem as problem:
            rendered.append(problem)
    texts = [r for r in rendered if isinstance(r, RenderedRow)]
    tokens = {
        is_chat: _tokenize(tokenizer, [r.text for r in texts if r.is_chat == is_chat], is_chat)
        for is_chat in (True, False)
    }
    prompts = {
        is_chat: _tokenize(
            tokenizer, [r.prompt for r in texts if r.is_chat == is_chat and r.prompt is not None], is_chat
        )
        for is_chat in (True, False)
    }
    encoded: list[list[EncodedRow] | RowProblem] = []
    for row, made in zip(rows, rendered, strict=True):
        try:
            if isinstance(made, RowProblem):
                raise made
            if made is None:
                whole = _check_token_row(tokenizer, row)
            else:
                ids, offsets = next(tokens[made.is_chat])
                prompt = None if made.prompt is None else next(prompts[made.is_chat])[0]
                whole = _label(tokenizer, made, ids, offsets, prompt)
            encoded.append(fit_length(whole, encoding))
        except RowProblem as problem:
            encoded.append(problem)
    return encoded


def encode_row(tokenizer: Any, row: dict[str, Any], encoding: Encoding) -> EncodedRow:
    """Encode one row; KitError where it cannot be. A row that would be split is one piece here."""
    made = encode_rows(tokenizer, [row], encoding)[0]
    if isinstance(made, RowProblem):
        raise KitError(str(made), "row", "mend the row, or leave it out")
    return made[0]


def render_row(tokenizer: Any, row: dict[str, Any], encoding: Encoding, special: Sequence[str]) -> RenderedRow | None:
    """A row as text, with what of it is in the loss; None for a row of token ids. RowProblem where it cannot be.

    special: what special_tokens_by_length returns.
    """
    if "input_ids" in row:
        return None
    completes = encoding.train_on == "completion"
    if "text" in row:
        return RenderedRow(append_eos(tokenizer, row["text"]), False)
    if isinstance(row.get("prompt"), str):
        completes = completes or encoding.train_on in BY_TURNS  # in a mix with chats its answer is the completion
        text = row["prompt"] + append_eos(tokenizer, row["completion"])
        return RenderedRow(text, False, prompt=row["prompt"] if completes else None)
    messages = row["prompt"] + row["completion"] if "prompt" in row else row["messages"]
    template = row_template(tokenizer, row, encoding.template, encoding.traits)
    if encoding.train_on in BY_TURNS or encoding.answers_only or any(m.get("weight") == 0 for m in messages):
        rendered = _render_turns(messages, template, encoding, special)
    else:
        rendered = RenderedRow(template.render(messages), True)
        check_written(messages, rendered.text)
    if completes and "prompt" in row:
        rendered.prompt = template.render(row["prompt"], add_generation_prompt=True)
    if reasoning_is_left_out(messages, rendered.text):
        rendered.notes.append("reasoning left out")
    return rendered


def _render_turns(
    messages: Messages, template: ChatTemplate, encoding: Encoding, special: Sequence[str]
) -> RenderedRow:
    """A chat with the spans of its assistant turns that are in the loss, and of those that must not be."""
    by_turns = encoding.train_on in BY_TURNS or encoding.answers_only
    weighted = any("weight" in m for m in messages)
    turns = chosen_turns(messages, encoding.train_on if encoding.train_on in BY_TURNS else "assistant_turns")
    if by_turns and not turns:
        raise RowProblem("none of its turns is trained: every weight is 0" if weighted else "it has no turn to train")
    if not by_turns:
        turns = [n for n, m in enumerate(messages) if m.get("weight") == 0]
        if encoding.train_on == "everything" and not {*turns} <= {*assistant_turns(messages)}:
            raise RowProblem("a turn that is not the assistant's has weight 0: dataset.train_on=chosen_turns")
    if template.has_marks:
        text, marks = template.render_with_marks(messages)
        spans = marked_spans(messages, marks)
    else:
        text = template.render(messages)
        check_written(messages, text)
        asked = [n for n in turns if messages[n]["role"] == "assistant"]
        spans = derive_spans(messages, asked, text, template.render, special, template.traits.unasked_prompt)
    check_written(messages, text, spans)
    chosen = [spans[n] for n in turns if n in spans]
    return RenderedRow(text, True, trained=chosen) if by_turns else RenderedRow(text, True, left_out=chosen)


def special_tokens_by_length(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
    return sorted(names, key=len, reverse=True)


def _tokenize(tokenizer: Any, texts: Sequence[str], is_chat: bool) -> Iterator[tuple[list[int], Any]]:
    """Yield (ids, what finds the token of a character) of each text. A chat's template has written its BOS already."""
    if not texts:
        return
    out = tokenizer(
        list(texts), add_special_tokens=not is_chat, return_attention_mask=False, return_token_type_ids=False
    )
    found = out.encodings or [None] * len(texts)
    yield from zip(out["input_ids"], found, strict=True)


def _label(tokenizer: Any, row: RenderedRow, ids: list[int], offsets: Any, prompt: list[int] | None) -> EncodedRow:
    notes = list(row.notes)
    if not row.is_chat:
        ids, changed = fit_bos(tokenizer, ids)
        prompt = None if prompt is None else fit_bos(tokenizer, prompt)[0]
        notes += [changed] if changed else []
    labels = list(ids)
    if row.trained is not None:
        labels = [IGNORED] * len(ids)
        for span in row.trained:
            first, last = token_range(tokenizer, row.text, span, ids, offsets)
            labels[first:last] = ids[first:last]
    for span in row.left_out:
        first, last = token_range(tokenizer, row.text, span, ids, offsets)
        labels[first:last] = [IGNORED] * (last - first)
    if prompt is not None:
        common = common_length(prompt, ids)
        labels[:common] = [IGNORED] * common
    if labels.count(IGNORED) == len(labels):
        raise RowProblem("it has no trained token")
    return EncodedRow(ids, labels, tuple(notes))


def token_range(tokenizer: Any, text: str, span: Span, ids: list[int], offsets: Any) -> tuple[int, int]:
    """First token of a span of characters and the one behind it; a token that the beginning cuts through counts.

    offsets: the `tokenizers.Encoding` of the text. None for a tokenizer without one: there the text before the span
    and up to its end are tokenized by themselves, and must be beginnings of `ids`.
    """
    start, end = span
    if offsets is not None:
        first = last = None
        while first is None and start < end:
            first, start = offsets.char_to_token(start), start + 1
        while last is None and end > span[0]:
            end -= 1
            last = offsets.char_to_token(end)
        if first is None or last is None:
            raise RowProblem("it has a turn without tokens")
        behind = last + 1  # a character may be several tokens
        while (chars := offsets.token_to_chars(behind) if behind < len(ids) else None) and chars[0] <= end < chars[1]:
            behind += 1
        return first, behind
    edges = [tokenizer(text[:edge], add_special_tokens=False)["input_ids"] for edge in span]
    if any(ids[: len(edge)] != edge for edge in edges):
        raise RowProblem("the tokens of its turns cannot be told apart with this tokenizer")
    return len(edges[0]), len(edges[1])


def fit_bos(tokenizer: Any, ids: list[int]) -> tuple[list[int], str]:
    """(ids with one BOS where the tokenizer's settings ask for it, what was changed).

    A text that holds the BOS itself would have two. Some tokenizers say add_bos_token and do not add it (DeepSeek V3).
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids, ""
    if ids[:2] == [bos, bos]:
        return ids[1:], "second BOS taken off"
    if getattr(tokenizer, "add_bos_token", False) and ids[:1] != [bos]:
        return [bos, *ids], "BOS put in front"
    return ids, ""


def _check_token_row(tokenizer: Any, row: dict[str, Any]) -> EncodedRow:
    ids = row["input_ids"]
    labels = row.get("labels", ids)
    size = len(tokenizer)
    if max(ids) >= size:
        raise RowProblem(f"it holds the token {max(ids)}, the tokenizer has {size:,}")
    if any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
        raise RowProblem("its labels are neither its tokens nor -100")
    if labels.count(IGNORED) == len(labels):
        raise RowProblem("it has no trained token")
    return EncodedRow(list(ids), list(labels))


def fit_length(row: EncodedRow, encoding: Encoding) -> list[EncodedRow]:
    """The pieces of a row that are no longer than max_length; LongRow where nothing of it may or can be trained on."""
    limit = encoding.max_length
    length = len(row.input_ids)
    if limit is None or length <= limit:
        return [row]
    if encoding.on_long_row in ("drop", "refuse"):
        raise LongRow(f"it has {length:,} tokens, more than max_length={limit:,}")
    if encoding.on_long_row == "split":
        starts = list(range(0, length, limit))
    else:
        starts = [length - limit if encoding.truncation_mode == "keep_end" else 0]
    note = "split" if encoding.on_long_row == "split" else "cut"
    cut = [(row.input_ids[s : s + limit], row.labels[s : s + limit]) for s in starts]
    pieces = [
        EncodedRow(ids, labels, (*row.notes, note)) for ids, labels in cut if labels.count(IGNORED) < len(labels)
    ]
    if not pieces:
        raise LongRow(f"no trained token is left of its {length:,} after cutting to max_length={limit:,}")
    return pieces


def append_eos(tokenizer: Any, text: str) -> str:
    """Return the text with the end token behind it, once."""
    eos = tokenizer.eos_token
    return text if not eos or text.endswith(eos) else text + eos


# ---- prompts: what an answer is to follow ----


def encode_prompt(
    tokenizer: Any,
    prompt: str | Messages,
    *,
    chat: bool,
    system: str | None = None,
    row: dict[str, Any] | None = None,
    encoding: Encoding | None = None,
) -> list[int]:
    """Token ids that an answer is to follow; text is a user turn where `chat`, else it is continued as it is.

    row: the tools and chat_template_kwargs that go with the prompt. KitError where the chat template refuses it.
    """
    if isinstance(prompt, str) and not chat:
        if system:
            raise KitError("a system prompt needs a chat", where="system", fix="put it into the prompt")
        return encode_open_text(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not getattr(tokenizer, "chat_template", None):
        problem, fix = "a chat was given, but the tokenizer has no chat template", "give text, or tokenizer=chatml"
        raise KitError(problem, where="tokenizer", fix=fix)
    if system and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": system}, *turns]
    settings = replace(encoding or Encoding(), max_length=None)
    try:
        template = row_template(tokenizer, row or {}, settings.template, settings.traits)
        text = template.render(turns, add_generation_prompt=True)
    except RowProblem as problem:
        raise KitError(str(problem), "prompts", "write the prompt as the template takes it") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_open_text(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    # some tokenizers close every text with eos, after which nothing is left to continue
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    ids = fit_bos(tokenizer, ids)[0] if ids else ids
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        ids = [start] if start is not None else []
    if not ids:
        raise KitError("a prompt is empty", "prompts", "leave the empty line out")
    return ids


def end_of_turn_id(tokenizer: Any, template: str | None = None) -> int | None:
    """The special token that the chat template puts after an assistant turn, where it differs from eos (ChatML's end).

    None without a template or where the turn ends in plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "answer7"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = row_template(tokenizer, {}, template, Traits()).render(chat)
    except RowProblem:  # a template may refuse such a chat for reasons of its own
        return None
    after = tokenizer(text.rsplit(mark, 1)[-1], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    first = next((token for token in after if tokenizer.decode([token]).strip()), None)
    return first if first in special else None
