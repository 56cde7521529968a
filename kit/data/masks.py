"""Where the assistant's turns stand in a rendered chat: by the template's marks, or derived by rendering prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kit.data.turns import RowProblem

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters of the rendered chat: start, end
Render = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> the rendered chat


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
    messages: Messages, rendered: str, render: Render, special: Sequence[str], unasked_prompt: str = ""
) -> dict[int, Span]:
    """Span of each assistant turn: from behind the generation prompt to the token that ends the turn, included.

    Every boundary is verified on the row: what the template writes for the turns before answer n, with the generation
    prompt, must begin `rendered`; what it writes for answer n must follow there, less a beginning that it leaves out
    of earlier turns (reasoning), and up to the special token that closes the turn.

    special: the tokenizer's special tokens. unasked_prompt: templates.Traits. RowProblem where a boundary cannot be
    verified.
    """
    spans: dict[int, Span] = {}
    reached = 0
    rendered = cut_unasked_prompt(rendered, unasked_prompt, special)
    for n in assistant_turns(messages):
        if n == 0:
            raise RowProblem("it begins with the assistant: where its turn starts cannot be derived from the template")
        opening = render(messages[:n], True)
        start = _verified_start(messages[:n], opening, rendered, render)
        if start is None or start < reached:
            raise RowProblem(
                f"the chat template writes what stands before turn {n + 1} in another way once more turns follow"
            )
        alone = rendered
        if n + 1 < len(messages):
            alone = cut_unasked_prompt(render(messages[: n + 1], False), unasked_prompt, special)
        end = _verified_end(alone, start, rendered, opening, special)
        if end is None:
            raise RowProblem(f"where turn {n + 1} ends cannot be derived from the chat template")
        spans[n] = (start, end)
        reached = end
    return spans


def _verified_start(before: Messages, opening: str, rendered: str, render: Render) -> int | None:
    if rendered.startswith(opening):
        return len(opening)
    # A generation prompt may hold more than a finished turn (an open <think>): the turn starts where they part.
    context = render(before, False)
    if rendered.startswith(context) and opening.startswith(context):
        common = common_length(opening, rendered)
        return common if common > len(context) else None
    return None


def _verified_end(alone: str, start: int, rendered: str, opening: str, special: Sequence[str]) -> int | None:
    """Where the turn that starts at `start` ends; alone: the chat up to this turn, as the template writes it."""
    written = alone[common_length(alone, opening) :]
    body, closing = split_closing(written, special)
    key = rendered[start : start + 1]
    at = written.find(key)
    while 0 <= at < len(body):
        if rendered.startswith(body[at:], start):
            end = start + len(body) - at
            if not closing:
                return end - (len(body) - len(body.rstrip())) or None
            if rendered.startswith(closing, end):
                return end + len(closing)
            # The last turn of a chat may close with another token than the earlier ones (gpt-oss).
            gap = len(closing) - len(closing.lstrip())
            other = next((t for t in special if rendered.startswith(closing[:gap] + t, end)), None)
            return None if other is None else end + gap + len(other)
        at = written.find(key, at + 1)
    return None


def cut_unasked_prompt(rendered: str, unasked_prompt: str, special: Sequence[str]) -> str:
    """A rendered chat less the generation prompt that some templates write behind every chat (Meta's of Llama 3).

    RowProblem where the template does so and the prompt cannot be told from the last turn.
    """
    if not unasked_prompt:
        return rendered
    tail = rendered[len(rendered) - common_length(rendered[::-1], unasked_prompt[::-1]) :]
    ends = [tail.find(t) + len(t) for t in special if t in tail]
    if not ends:
        raise RowProblem("the chat template writes a generation prompt behind every chat")
    return rendered[: len(rendered) - len(tail) + min(ends)]


def split_closing(written: str, special: Sequence[str]) -> tuple[str, str]:
    """(what a turn says, the special token that ends it with the blanks before it); blanks behind it are cut."""
    text = written.rstrip()
    token = next((t for t in special if text.endswith(t)), None)
    if token is None:
        return written, ""
    body = text[: -len(token)]
    stripped = body.rstrip()
    return stripped, body[len(stripped) :] + token


def common_length(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def marked_spans(messages: Messages, marks: Sequence[Span]) -> dict[int, Span]:
    """Spans of the assistant turns from the generation marks of a template; RowProblem where they do not match."""
    turns = assistant_turns(messages)
    if len(marks) != len(turns):
        raise RowProblem(f"the chat template marks {len(marks)} answers of {len(turns)} assistant turns")
    return dict(zip(turns, marks, strict=True))
