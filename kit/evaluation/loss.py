"""Loss of a model on the labelled tokens of rows, in batches that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kit.data.encode import IGNORED, EncodedRow
from kit.errors import ENVIRONMENT, KitError

MAX_LOGITS = 2**28  # logits of one forward pass at most: 1 GiB in float32


def answer_loss(model: Any, rows: Sequence[EncodedRow], batch_size: int) -> dict[str, Any]:
    """Mean negative log-likelihood per answer token; rows longer than the model's context are left out, counted."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    usable = [row for row in rows if not context or len(row.input_ids) <= context]
    total, tokens = 0.0, 0
    for batch in batch_by_length(model, usable, batch_size):
        nll, count = answer_nll(model, batch)
        total, tokens = total + nll, tokens + count
    loss = total / tokens if tokens else math.nan
    finite = math.isfinite(loss)
    return {
        "loss": loss if finite else None,
        "perplexity": math.exp(loss) if finite and loss < 700 else None,
        "tokens": tokens,
        "too_long": len(rows) - len(usable),
    }


def batch_by_length(model: Any, rows: Sequence[EncodedRow], batch_size: int) -> list[list[EncodedRow]]:
    """Rows of like length together, no batch with more logits than LOGITS."""
    vocabulary = model.config.get_text_config().vocab_size
    batches: list[list[EncodedRow]] = []
    for row in sorted(rows, key=lambda r: -len(r.input_ids)):
        last = batches[-1] if batches else None
        if (
            last is None
            or len(last) == batch_size
            or (len(last) + 1) * len(last[0].input_ids) * vocabulary > MAX_LOGITS
        ):
            batches.append([row])
        else:
            last.append(row)
    return batches


def answer_nll(model: Any, batch: Sequence[EncodedRow]) -> tuple[float, int]:
    """(sum of the negative log-likelihoods, number) of the answer tokens of one batch, padded on the right."""
    import torch
    from torch.nn import functional

    width = max(len(row.input_ids) for row in batch)
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for n, row in enumerate(batch):
        length = len(row.input_ids)
        ids[n, :length] = torch.tensor(row.input_ids)
        mask[n, :length] = 1
        labels[n, :length] = torch.tensor(row.labels)
    try:
        with torch.inference_mode():
            # use_cache=False: with a cache some attention paths treat the mask differently, and it costs memory
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            logits = logits[:, -width:]  # prompt tuning puts virtual tokens in front
            targets = labels[:, 1:].to(logits.device)
            nll = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
            )
            return nll.double().sum().item(), int((targets != IGNORED).sum())
    except torch.OutOfMemoryError as error:
        raise KitError(
            f"{len(batch)} rows of {width} tokens do not fit into GPU memory",
            where="batch_size",
            fix="lower the batch size",
            code=ENVIRONMENT,
        ) from error
