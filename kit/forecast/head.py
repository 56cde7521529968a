"""The peak of the LM head and the loss, in bytes, from config.json alone."""

from __future__ import annotations

from typing import Any

from kit.forecast.activations import sizes

# Tokens and columns of the vocabulary in a tile: TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py,
# _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py (TRL 1.16).
TILE = (4096, 32768)


def head_bytes(
    text: dict[str, Any],
    tokens: int,
    *,
    trains_head: bool = False,
    base_dtype: str = "bfloat16",
    autocast: bool = True,
    fused: bool = True,
    triton: bool = True,
) -> tuple[int, str]:
    """What head and loss take at their peak, in the backward, beside the hidden states and the weights: bytes, source.

    Args:
        tokens: that have a label; all of them where Triton is not used (a CPU) or `fused` is off.
        trains_head: the head's weight, or the embedding that it is tied to, gets a gradient.
        fused: TRL's tiled head (add_fused_lm_head), which SFTTrainer uses but where compute_loss_func or
            label_smoothing_factor ask for logits (sft_trainer.py, compute_loss). Else transformers' loss on all of
            them.
    """
    hidden, vocabulary, weight = sizes(text)["h"], int(text["vocab_size"]), 4 if base_dtype == "float32" else 2
    number = 2 if autocast else weight
    if not fused:
        return full_logits(hidden, vocabulary, tokens, trains_head * weight, number), "transformers ForCausalLMLoss"
    rows, columns = min(tokens, TILE[0]), min(vocabulary, TILE[1])
    total = rows * TILE[1] * number  # the tile is made in full width, for a small vocabulary too
    total += tokens * hidden * (4 + weight * (weight != 4))  # gradient of the states in float32, then in their dtype
    total += tokens * hidden * weight if triton else 0  # the labelled tokens' states, taken out
    if weight != number:
        total += (columns + rows) * hidden * number  # autocast's copies
    if trains_head:
        total += vocabulary * hidden * (4 + weight * (weight != 4))
    if not triton:  # folded by torch: seven float32 copies of the tile and a mask (_backward_tile)
        total += 29 * rows * columns
    return total, "trl ChunkedLogProbFunction"


def full_logits(hidden: int, vocabulary: int, tokens: int, weight: int, number: int) -> int:
    """Logits, which the caller keeps, and the larger of: log_softmax, its gradient and that of its result in float32;
    the gradients of the logits, of the weight (`weight` bytes each, 0 where frozen) and of the states.
    """
    gradients = vocabulary * (tokens * number + hidden * weight) + tokens * hidden * number
    return tokens * vocabulary * number + max(tokens * vocabulary * 12, gradients)
