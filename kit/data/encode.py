"""Rows as token ids and labels, and prompts as token ids: one encoding for training and evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kit.errors import KitError, first_line

IGNORED = -100  # a label that is not in the loss
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class EncodedRow:
    """One row as a model trains on it; `labels` are its `input_ids`, IGNORED where they are not in the loss."""

    input_ids: list[int]
    labels: list[int]


def encode_row(
    tokenizer: Any,
    row: dict[str, Any],
    *,
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    chat_template: str | None = None,
) -> EncodedRow:
    """Encode one row to the `input_ids` and labels that SFTTrainer prepares from it with the same settings.

    tests/data/test_encode.py compares both on every chat template that TRL ships.

    Args:
        row: {"messages"}, {"prompt", "completion"} (both text or both chats) or {"text"}; a chat with "tools" (a list,
            or JSON) and "chat_template_kwargs" where it has them.
        completion_only_loss: None stands for True; it has no meaning for other rows than prompt and completion.
        max_length: tokens at most; `truncation_mode` "keep_start" or "keep_end" says which remain. SFTTrainer leaves
            out a row that is cut to nothing but IGNORED labels; here the caller does.
        chat_template: what `training_chat_template` returns, None for the tokenizer's own.

    Raises:
        KitError: the chat template refuses the row, or assistant_only_loss meets a row without assistant tokens.
    """
    from trl.data_utils import common_prefix_length, is_conversational  # seconds that `kit generate` need not wait

    for key in ("messages", "prompt", "completion"):
        if isinstance(row.get(key), list):
            check_messages(row[key], key)
    if assistant_only_loss and not is_conversational(row):
        raise KitError("the rows are not chats", "assistant_only_loss", "leave it out, or give messages")
    arguments = template_arguments(row) | ({"chat_template": chat_template} if chat_template else {})
    prompt_length = 0
    if not is_conversational(row):
        text = row["prompt"] + append_eos(tokenizer, row["completion"]) if "prompt" in row else None
        encoded = tokenizer(append_eos(tokenizer, row["text"]) if text is None else text)
        if text is not None:
            prompt_length = common_prefix_length(tokenizer(row["prompt"])["input_ids"], encoded["input_ids"])
    else:
        turns = row["prompt"] + row["completion"] if "prompt" in row else row["messages"]
        encoded = render_chat(tokenizer, turns, arguments, return_assistant_tokens_mask=assistant_only_loss)
        if "prompt" in row:
            opening = render_chat(tokenizer, row["prompt"], arguments, add_generation_prompt=True)
            prompt_length = common_prefix_length(opening["input_ids"], encoded["input_ids"])

    labels = list(encoded["input_ids"])
    if completion_only_loss is not False:
        labels[:prompt_length] = [IGNORED] * prompt_length
    if assistant_only_loss:
        labels = _mask_others(labels, encoded["assistant_masks"])
    kept = slice(None)
    if max_length is not None:
        kept = slice(-max_length, None) if truncation_mode == "keep_end" else slice(max_length)
    return EncodedRow(list(encoded["input_ids"])[kept], labels[kept])


def _mask_others(labels: list[int], assistant_masks: list[int]) -> list[int]:
    if 1 not in assistant_masks:
        raise KitError(
            "a row has no assistant tokens",
            "assistant_only_loss",
            "mark the assistant's turns in the chat template with {% generation %} and {% endgeneration %}",
        )
    return [label if mask else IGNORED for label, mask in zip(labels, assistant_masks, strict=True)]


def training_chat_template(tokenizer: Any, assistant_only_loss: bool) -> str | None:
    """Return the chat template that SFTTrainer trains with, None where it is the tokenizer's own.

    With assistant_only_loss TRL replaces a template that it knows and that has no {% generation %} marks by its own.
    KitError where the template has none and TRL does not know it.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not assistant_only_loss or not tokenizer.chat_template or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise KitError(first_line(error), "tokenizer.chat_template", "add {% generation %} marks to it") from error


def template_arguments(row: dict[str, Any], place: str = "chat") -> dict[str, Any]:
    """Return what a row passes to the chat template; `chat_template_kwargs` overrule its `tools`, as in TRL."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError:
        raise KitError("tools is not JSON", where=place) from None
    return {**({} if tools in (None, "") else {"tools": tools}), **(row.get("chat_template_kwargs") or {})}


def check_messages(turns: Any, place: str) -> None:
    if not isinstance(turns, list) or not turns or any(not isinstance(m, dict) or "role" not in m for m in turns):
        raise KitError("a chat is not a list of messages with role and content", where=place)


def append_eos(tokenizer: Any, text: str) -> str:
    """Return the text with the end token behind it, once."""
    eos = tokenizer.eos_token
    return text if not eos or text.endswith(eos) else text + eos


def render_chat(tokenizer: Any, turns: Messages, arguments: dict[str, Any], **settings: Any) -> Any:
    """Render a chat to {"input_ids", "assistant_masks" where asked for}; KitError where the template refuses it."""
    if not getattr(tokenizer, "chat_template", None):
        raise KitError(
            "a chat was given, but the tokenizer has no chat template",
            where="tokenizer",
            fix="give text, or a tokenizer with a chat template",
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **settings, **arguments)
    except Exception as error:  # noqa: BLE001 - jinja errors and whatever a template raises
        raise KitError(f"the chat template refuses a chat: {first_line(error)}", where="chat") from error


def encode_prompt(
    tokenizer: Any,
    prompt: str | Messages,
    *,
    chat: bool,
    system: str | None = None,
    template: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids that an answer is to follow; text is a user turn where `chat`, else it is continued as it is."""
    if isinstance(prompt, str) and not chat:
        if system:
            raise KitError("a system prompt needs a chat", where="system", fix="put it into the prompt")
        return encode_open_text(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    check_messages(turns, "prompts")
    if system and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return list(render_chat(tokenizer, turns, template or {}, add_generation_prompt=True)["input_ids"])


def encode_open_text(tokenizer: Any, text: str) -> list[int]:
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


def end_of_turn_id(tokenizer: Any) -> int | None:
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
