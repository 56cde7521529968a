"""Where the assistant's turns stand in a rendered chat: by the template's marks, or derived by rendering prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kit.rows.turns import RowProblem

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters of the rendered chat: start, end
Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> the rendered chat

STRANGE = "\ue000"  # a character that no answer begins with


def assistant_turns(messages: Messages) -> list[int]:
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]


def chosen_turns(messages: Messages, train_on: str) -> list[int]:
    """The assistant turns (as indices) whose tokens are in the loss; a turn of weight 0 never is.

    train_on: assistant_turns (all of them), last_turn, or chosen_turns (those of weight 1).
    """
    turns = assistant_turns(messages)
    if train_on == "last_turn":
        turns = turns[-1:]
    if train_on == "chosen_turns":
        return [n for n in turns if messages[n].get("weight") == 1]
    return [n for n in turns if messages[n].get("weight") != 0]


def derive_spans(
    messages: Messages,
    turns: Sequence[int],
    rendered: str,
    render: Render,
    special: Sequence[str],
    unasked_prompt: str | None = "",
) -> dict[int, Span]:
    """Span of each assistant turn in `turns`: from behind the generation prompt to the token that ends it, included.

    Every boundary is verified on the row: what the template writes for the turns before answer n, with the generation
    prompt, must begin `rendered`; what it writes for answer n must follow there, less a beginning that it leaves out
    of earlier turns (reasoning), and up to the special token that closes the turn.

    special: the tokenizer's special tokens. unasked_prompt: templates.Traits. RowProblem where a boundary cannot be
    verified.
    """
    if unasked_prompt is None:
        raise RowProblem("the chat template writes a generation prompt behind every chat")
    spans: dict[int, Span] = {}
    last: Span = (0, 0)  # the turn before
    rendered = rendered.removesuffix(unasked_prompt)
    for n in turns:
        if n == 0:
            raise RowProblem("it begins with the assistant: where its turn starts cannot be derived from the template")
        before = messages[:n]
        opening = render(before, True)
        start, opened = _verified_start(messages, n, opening, rendered, render, last)
        if start < last[1]:
            raise RowProblem(
                f"the chat template writes what stands before turn {n + 1} in another way once more turns follow"
            )
        alone = rendered
        if n + 1 < len(messages):
            alone = render(messages[: n + 1], False).removesuffix(unasked_prompt)
        written = alone[min(opened, common_length(alone, opening)) :]
        end = _verified_end(written, start, rendered, partial(render, before, False), special)
        if end is None:
            raise RowProblem(f"where turn {n + 1} ends cannot be derived from the chat template")
        spans[n] = last = (start, end)
    return spans


def _verified_start(
    messages: Messages, n: int, opening: str, rendered: str, render: Render, last: Span
) -> tuple[int, int]:
    """(where turn n starts, the same in `opening`); (-1, -1) where it cannot be told.

    A generation prompt may hold more than a finished turn does (an open <think>): the turn starts where they part. One
    that happens to begin as the prompt goes on is told from it by a turn that does not.
    """
    if rendered.startswith(opening):
        return len(opening), len(opening)
    context = render(messages[:n], False)
    base = len(context) if rendered.startswith(context) else _behind(last, context, rendered)
    if not opening.startswith(context) or base < 0:
        return -1, -1
    prompt = opening[len(context) :]
    shared = common_length(prompt, rendered[base : base + len(prompt)])
    if shared < len(prompt):
        strange = render([*messages[:n], {"role": "assistant", "content": STRANGE}, *messages[n + 1 :]], False)
        shared = min(shared, common_length(rendered[: base + shared], strange) - base)
        if shared <= 0:
            return -1, -1
    return base + shared, len(context) + shared


def _behind(last: Span, context: str, rendered: str) -> int:
    """Where `context` ends in `rendered`, by what it writes behind the last turn; -1 where that is not the same.

    For templates that write the turns before the last one in another way than once more follow (Qwen 3.5's reasoning
    between calls of tools).
    """
    turn = rendered[slice(*last)].rsplit("</think>", 1)[-1].lstrip()
    ends = set()
    at = context.find(turn) if turn else -1
    while at >= 0:
        between = context[at + len(turn) :]
        if rendered.startswith(between, last[1]):
            ends.add(last[1] + len(between))
        at = context.find(turn, at + 1)
    return ends.pop() if len(ends) == 1 else -1


def _verified_end(
    written: str, start: int, rendered: str, context: Callable[[], str], special: Sequence[str]
) -> int | None:
    """Where the turn that starts at `start` ends.

    written: the turn where nothing follows it. context: renders the chat before it, finished. Behind a last turn
    some templates write one token more (Phi-3), or another than behind earlier turns (gpt-oss): there one that closes
    the turn before may stand as well, no other.
    """
    body, closing = split_closing(written, special)
    if not closing:
        end = _find_body(body, start, rendered)
        return None if end is None else end - (len(body) - len(body.rstrip())) or None
    end = _find_body(body, start, rendered)
    if end is not None and rendered.startswith(closing, end):
        return end + len(closing)
    before, outer = split_closing(context(), special)
    inner = split_closing(before, special)[1]
    for token in filter(None, (outer.lstrip(), inner.lstrip())):
        gap = len(closing) - len(closing.lstrip())
        if end is not None and rendered.startswith(closing[:gap] + token, end):
            return end + gap + len(token)
        if body.endswith(token):
            said, ending = split_closing(body, special)
            at = _find_body(said, start, rendered)
            if at is not None and rendered.startswith(ending, at):
                return at + len(ending)
    return None


def _find_body(body: str, start: int, rendered: str) -> int | None:
    """Where a turn ends whose text at `start` is `body`, less a part that is left out of earlier turns (reasoning)."""
    shared = common_length(body, rendered[start : start + len(body)])
    if shared == len(body):
        return start + shared
    for kept in (shared, 0):
        key = rendered[start + kept : start + kept + 1]
        at = body.find(key, kept) if key else -1
        while at >= 0:
            if rendered.startswith(body[at:], start + kept):
                return start + kept + len(body) - at
            at = body.find(key, at + 1)
    return None


def split_closing(written: str, special: Sequence[str]) -> tuple[str, str]:
    """(what a turn says, the special token that ends it with the blanks before it); blanks behind it are cut."""
    text = written.rstrip()
    token = next((t for t in special if text.endswith(t)), None)
    if token is None:
        return written, ""
    body = text[: -len(token)]
    stripped = body.rstrip()
    return stripped, body[len(stripped) :] + token


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many characters, or tokens, two of them begin with in common."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def marked_spans(messages: Messages, marks: Sequence[Span]) -> dict[int, Span]:
    """Spans of the assistant turns from the generation marks of a template; RowProblem where they do not match.

    Of the parts of one turn some templates mark each by itself: those that touch are one, empty ones none.
    """
    joined: list[Span] = []
    for start, end in marks:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    turns = assistant_turns(messages)
    if len(joined) != len(turns):
        raise RowProblem(f"the chat template marks {len(joined)} answers of {len(turns)} assistant turns")
    return dict(zip(turns, joined, strict=True))
