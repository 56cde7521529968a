"""What the loss will see, looked at on the first rows before the first step (T63)."""

from __future__ import annotations

from itertools import islice
from typing import Any

from transformers.utils import logging

from kit.data.encode import IGNORED, end_of_turn_id
from kit.errors import KitError

logger = logging.get_logger(__name__)
CHECKED_ROWS = 8


def require_chat_template(tokenizer: Any, rows: Any) -> None:
    """KitError where the rows are chats and the tokenizer has no chat template; before any weight is loaded."""
    from trl.data_utils import is_conversational

    if is_conversational(next(iter(rows))) and not tokenizer.chat_template:
        raise KitError(
            "the data are chats, and the tokenizer has no chat template",
            "tokenizer.chat_template",
            "tokenizer=chatml adds one with its tokens; or tokenizer.chat_template=NAME or FILE.jinja",
        )


def check_rows_have_loss(dataset: Any, tokenizer: Any, args: Any) -> None:
    """Of the first rows: KitError where no token is in the loss, a warning where no end token is.

    dataset: the trainer's, with input_ids and labels. A model that never sees an end token in its loss does not stop.
    """
    rows = [row for row in islice(dataset, CHECKED_ROWS) if "input_ids" in row]
    labels = [[i for i in row.get("labels", row["input_ids"]) if i != IGNORED] for row in rows]
    if not rows:
        return
    if not any(labels):
        raise KitError(
            f"none of the first {len(rows)} rows has a token in the loss",
            "dataset, trainer.max_length",
            "raise trainer.max_length if prompts fill it; look at completion_only_loss and assistant_only_loss",
        )
    ends = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None}
    if any(ends & set(row) for row in labels):
        return
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
    if any(ends & set(row["input_ids"]) for row in rows):
        reason = "it is in the rows, but masked: the chat template leaves it outside its {% generation %} marks"
    elif args.max_length and all(len(row["input_ids"]) >= args.max_length for row in rows):
        reason = f"all of them are cut at trainer.max_length={args.max_length}"
    else:
        reason = "the chat template does not write it"
    logger.warning(
        f"the end token ({names}) is in the loss of none of the first {len(rows)} rows: {reason}. "
        "The tuned model may not learn to stop."
    )
