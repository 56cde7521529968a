"""Chats and text as token ids."""

from __future__ import annotations

from typing import Any

from kit.errors import KitError, first_line

Turns = list[dict[str, Any]]


def check_turns(turns: Any, place: str) -> None:
    if not isinstance(turns, list) or not turns or any(not isinstance(m, dict) or "role" not in m for m in turns):
        raise KitError("a chat is not a list of messages with role and content", where=place)


def render_ids(tokenizer: Any, turns: Turns, template: dict[str, Any], *, opening: bool) -> list[int]:
    """A chat as token ids, `opening` with the header of the next assistant turn; KitError where it does not render."""
    if not getattr(tokenizer, "chat_template", None):
        raise KitError(
            "a chat was given, but the tokenizer has no chat template",
            where="tokenizer",
            fix="give text, or a tokenizer with a chat template",
        )
    try:
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, add_generation_prompt=opening, **template
        )
    except Exception as error:  # noqa: BLE001 - jinja errors and whatever a template raises
        raise KitError(f"the chat template refuses a chat: {first_line(error)}", where="chat") from error
    return list(encoded["input_ids"])


def encode_prompt(
    tokenizer: Any,
    prompt: str | Turns,
    *,
    chat: bool,
    system: str | None = None,
    template: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids that an answer is to follow; text is a user turn where `chat`, else it is continued as it is."""
    if isinstance(prompt, str) and not chat:
        if system:
            raise KitError("a system prompt needs a chat", where="system", fix="put it into the prompt")
        return open_ended(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    check_turns(turns, "prompts")
    if system and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return render_ids(tokenizer, turns, template or {}, opening=True)


def open_ended(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    # some tokenizers close every text with eos, after which nothing is left to continue
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        ids = [start] if start is not None else []
    if not ids:
        raise KitError("a prompt is empty", where="prompts")
    return ids


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an assistant turn, where it differs from eos (ChatML's end).

    None without a template or where the turn ends in plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "answer7"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}], tokenize=False
        )
    except Exception:  # noqa: BLE001 - a template may refuse such a chat for reasons of its own
        return None
    after = tokenizer(text.rsplit(mark, 1)[-1], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return after[0] if after and after[0] in special else None
