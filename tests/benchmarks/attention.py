"""Attention alone, forward and backward: sdpa_varlen beside transformers' sdpa, and both against float32.

    python tests/benchmarks/attention.py --out results.json            (one GPU, under a minute)
    python tests/benchmarks/attention.py --out /tmp/x.json --tiny      (rehearsal, CPU too)

For each shape (query heads / key heads x head size) two works of the same tokens: full rows, and documents drawn from
a lognormal distribution (5.6, 0.9) packed into one row. Times are medians in ms. An error is the norm of a difference
from float32 eager attention of each document, relative to that one's norm, the worst of output and gradients. Exit
code 1 where sdpa_varlen is farther from float32 than 1.2 times sdpa is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kit.inspection.attention import ATTENTION  # noqa: E402
from kit.models import attention  # noqa: E402

SHAPES = {  # heads, key heads, head size, window
    "llama3_1_8b": (32, 8, 128, None), "qwen2_5_7b": (28, 4, 128, None), "mistral_7b": (32, 8, 128, 2048),
    "gemma3_12b": (16, 8, 256, 1024), "gpt2_xl": (25, 25, 64, None),
}  # fmt: skip
WORSE = 1.2  # times sdpa's own error in bfloat16
Tensors = list[torch.Tensor]


def draw_lengths(total: int, longest: int) -> list[int]:
    rng, lengths = random.Random(0), []
    while sum(lengths) < total:
        lengths.append(max(8, min(longest, int(rng.lognormvariate(5.6, 0.9) * longest / 4096))))
    lengths[-1] -= sum(lengths) - total
    return lengths


def reference(states: Tensors, lengths: list[int], window: int | None) -> torch.Tensor:
    """Eager attention in float32, document by document: [1, T, H, D]."""
    outputs = []
    for q, k, v in zip(*(s.float().split(lengths, dim=2) for s in states), strict=True):
        k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], dim=1) for s in (k, v))
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        outputs.append((scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2))
    return torch.cat(outputs, 1)


def dense_mask(lengths: list[int], window: int | None, device: Any) -> torch.Tensor:
    """The boolean mask [1, 1, T, T] that transformers makes of packed documents, or of a window."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    seen = (document[:, None] == document[None]).tril()
    return (seen if window is None else seen.triu(1 - window))[None, None]


def arms(states: Tensors, rows: int, lengths: list[int], window: int | None) -> dict[str, Callable[[], torch.Tensor]]:
    """What makes [1, T, H, D] of the same states; full rows come as `rows` of them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = types.SimpleNamespace(num_key_value_groups=states[0].shape[1] // states[1].shape[1], is_causal=True)
    packed = rows == 0
    tokens = states[0].shape[2]
    cut = states if packed else [
        s.unflatten(2, (rows, tokens // rows))[0].transpose(0, 1).contiguous() for s in states
    ]  # fmt: skip
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=states[0].device)
    lengths_of = {"cu_seq_lens_q": ends, "max_length_q": max(lengths)} if packed else {}
    mask = dense_mask(lengths, window, states[0].device) if packed else None
    if not packed and window is not None:
        mask = dense_mask([tokens // rows], window, states[0].device)

    def whole(output: torch.Tensor) -> torch.Tensor:
        return output.flatten(0, 1)[None]

    def ours(dropout: float = 0.0) -> torch.Tensor:
        out, _ = attention.attention_forward(layer, *cut, None, dropout, sliding_window=window, **lengths_of)
        return whole(out)

    def sdpa() -> torch.Tensor:
        return whole(sdpa_attention_forward(layer, *cut, mask)[0])

    found: dict[str, Callable[[], torch.Tensor]] = {"sdpa": sdpa, ATTENTION: ours}
    if not packed and window is None and states[0].is_cuda:

        def flash() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return sdpa()

        found["flash"] = flash
    if packed:
        found["dropout"] = lambda: ours(0.1)
    return found


def measure(act: Callable[[], torch.Tensor], states: Tensors, upstream: torch.Tensor, times: int) -> tuple[Any, float]:
    """Output and gradients, and the median milliseconds of forward and backward."""
    cuda, taken = states[0].is_cuda, []
    for _ in range(times + 2):
        for s in states:
            s.grad = None
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        output = act()
        output.backward(upstream)
        if cuda:
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begun))
    return [output.detach(), *(s.grad.clone() for s in states if s.grad is not None)], statistics.median(taken[2:])


def distance(found: Tensors, truth: Tensors) -> float:
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def compare(shape: str, work: str, tokens: int, device: str, times: int) -> dict[str, Any]:
    heads, groups, size, window = SHAPES[shape]
    longest = tokens // 2
    window = window and min(window, longest // 2)
    lengths = [longest] * 2 if work == "rows" else draw_lengths(tokens, longest)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    states = [torch.randn(1, h, tokens, size, device=device, dtype=dtype) for h in (heads, groups, groups)]
    upstream = torch.randn(1, tokens, heads, size, device=device, dtype=dtype)
    for s in states:
        s.requires_grad_()
    output = reference(states, lengths, window)
    output.backward(upstream.float())
    truth = [output.detach(), *(s.grad.float() for s in states if s.grad is not None)]
    del output
    row: dict[str, Any] = {"shape": shape, "work": work, "tokens": tokens, "documents": len(lengths), "window": window}
    for name, act in arms(states, 2 if work == "rows" else 0, lengths, window).items():
        found, ms = measure(act, states, upstream, times)
        row[name] = {"ms": round(ms, 3)}
        if name != "dropout":
            row[name]["error"] = distance(found, truth)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "date": time.strftime("%F"), "rows": []}
    wrong = []
    print(f"{'shape':14}{'work':11}{'tokens':>7}{'sdpa ms':>10}{'flash':>9}{ATTENTION:>13}{'dropout':>9}"
          f"{'times':>7}{'error/sdpa':>12}")  # fmt: skip
    for tokens in [256] if a.tiny else a.tokens:
        for shape in SHAPES:
            for work in ("rows", "documents"):
                row = compare(shape, work, tokens, device, 1 if a.tiny else a.times)
                result["rows"].append(row)
                ms = {n: f"{row[n]['ms']:.2f}" if n in row else "-" for n in ("sdpa", "flash", ATTENTION, "dropout")}
                ratio = row[ATTENTION]["error"] / row["sdpa"]["error"]
                faster = row["sdpa"]["ms"] / row[ATTENTION]["ms"]
                print(f"{shape:14}{work:11}{tokens:7}{ms['sdpa']:>10}{ms['flash']:>9}{ms[ATTENTION]:>13}"
                      f"{ms['dropout']:>9}{faster:7.1f}{ratio:12.2f}", flush=True)  # fmt: skip
                if ratio > WORSE and row[ATTENTION]["error"] > 1e-5:
                    wrong.append(f"{shape}, {work}: error {row[ATTENTION]['error']:.1e}, {ratio:.2f} times sdpa's")
                result["wrong"] = wrong
                a.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
