"""What a card can do at most of a LoRA step: GEMMs and attention alone. `card_limit.py BASE SETTINGS.json OUT.json`.

GEMMs of the frozen weights, forward and gradient of the input, over all tokens of a step, for each linear of the base
and its head; attention of one layer, forward and backward, times the layers: full rows by cuDNN, documents by
`varlen_attn`. Random bf16 numbers, medians. Norms, rotations, the adapter, the loss and the optimizer cost nothing.
"""

from __future__ import annotations

import collections
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import trl_expert
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def seconds(act: Callable[[], object], times: int) -> float:
    """Median seconds of a call, with the device idle before and after."""
    taken = []
    for _ in range(times + 2):
        if CUDA:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        act()
        if CUDA:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[2:])


def linear_shapes(base: str) -> collections.Counter[tuple[int, int]]:
    """Count the linears of a base by (inputs, outputs), the head among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    found: collections.Counter[tuple[int, int]] = collections.Counter()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            found[module.in_features, module.out_features] += 1
        elif isinstance(module, Conv1D):
            found[module.weight.shape[0], module.weight.shape[1]] += 1
    return found


def time_gemms(shapes: collections.Counter[tuple[int, int]], tokens: int, times: int) -> float:
    """Seconds of all GEMMs of a step: [tokens, in] x [in, out] and [tokens, out] x [out, in], for each linear."""
    total = 0.0
    for (inputs, outputs), count in shapes.items():
        weight = torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
        x, gradient = (torch.randn(tokens, n, device=DEVICE, dtype=DTYPE) for n in (inputs, outputs))
        total += count * (seconds(lambda: x @ weight.T, times) + seconds(lambda: gradient @ weight, times))  # noqa: B023
    return total


def time_attention(base: str, lengths: list[int], packed: bool, times: int) -> float:
    """Seconds of attention of all layers, forward and backward: rows of one length, or packed documents."""
    config = AutoConfig.from_pretrained(base)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows, tokens = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    q, k, v = (
        torch.randn(rows, n, tokens, size, device=DEVICE, dtype=DTYPE, requires_grad=True)
        for n in (heads, groups, groups)
    )
    if packed and CUDA:
        trl_expert.register_varlen()
        varlen = trl_expert.AttentionInterface()["varlen"]
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
        named = {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}

        def attend() -> torch.Tensor:
            return varlen(None, q, k, v, None, **named)[0].transpose(1, 2)
    else:  # a rehearsal on a CPU takes packed documents as one row

        def attend() -> torch.Tensor:
            with trl_expert.cudnn_first():
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != heads)

    upstream = torch.randn(rows, heads, tokens, size, device=DEVICE, dtype=DTYPE)
    return layers * seconds(lambda: attend().backward(upstream), times)


def main(base: str, settings: str, out: str) -> None:
    asked = json.loads(Path(settings).read_text())
    tokens, times = sum(asked["lengths"]), asked["times"]
    gemms = time_gemms(linear_shapes(base), tokens, times)
    attention = time_attention(base, asked["lengths"], asked["packed"], times)
    found = {"useful_tokens_per_second": round(tokens / (gemms + attention), 1), "tokens": tokens}
    found |= {"gemm_seconds": round(gemms, 5), "attention_seconds": round(attention, 5)}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])
