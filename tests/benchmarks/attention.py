"""Attention alone, forward and backward: the kit's beside transformers' sdpa or eager, and both against float32.

    python tests/benchmarks/attention.py --out results.json            (one GPU, under a minute)
    python tests/benchmarks/attention.py --out /tmp/x.json --tiny      (rehearsal, CPU too)

For each shape (query heads / key heads x head size) two works of the same tokens: full rows, and documents drawn from
a lognormal distribution (5.6, 0.9) packed into one row. Times are medians in ms. An error is the norm of a difference
from float32 eager attention of each document, relative to that one's norm, the worst of output and gradients. Exit
code 1 where the kit's is farther from float32 than 1.2 times the library's. Shapes with capped logits or sinks have
flex_varlen beside eager attention; `no dropout` is what packed documents with dropout take, without any.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kit.inspection.attention import ATTENTION, FLEX  # noqa: E402
from kit.models import attention  # noqa: E402

SHAPES = {  # heads, key heads, head size, window, softcap, whether it has sinks
    "llama3_1_8b": (32, 8, 128, None, None, False), "qwen2_5_7b": (28, 4, 128, None, None, False),
    "mistral_7b": (32, 8, 128, 2048, None, False), "gemma3_12b": (16, 8, 256, 1024, None, False),
    "gpt2_xl": (25, 25, 64, None, None, False), "gemma2_9b": (16, 8, 256, 2048, 50.0, False),
    "gpt_oss_20b": (64, 8, 64, 128, None, True),
}  # fmt: skip
WORSE = 1.2  # times sdpa's own error in bfloat16
Tensors = list[torch.Tensor]


def draw_lengths(total: int, longest: int) -> list[int]:
    rng, lengths = random.Random(0), []
    while sum(lengths) < total:
        lengths.append(max(8, min(longest, int(rng.lognormvariate(5.6, 0.9) * longest / 4096))))
    lengths[-1] -= sum(lengths) - total
    return lengths


@dataclass(frozen=True)
class Case:
    """Documents in rows: their lengths, and how a layer attends."""

    lengths: list[int]
    rows: int  # 0: packed into one
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [H]


def eager(states: Tensors, case: Case) -> torch.Tensor:
    """Eager attention in the dtype of the states, document by document: [1, T, H, D]. Softmax in float32."""
    outputs = []
    for q, k, v in zip(*(s.split(case.lengths, dim=2) for s in states), strict=True):
        k, v = (s.repeat_interleave(q.shape[1] // s.shape[1], dim=1) for s in (k, v))
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        seen = seen if case.window is None else seen.triu(1 - case.window)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        if case.softcap is not None:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        scores = scores.masked_fill(~seen, -math.inf).float()
        if case.sinks is not None:
            sinks = case.sinks.float()[None, :, None, None].expand(1, -1, q.shape[2], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., : q.shape[2]].to(q.dtype)
        outputs.append((weights @ v).transpose(1, 2))
    return torch.cat(outputs, 1)


def dense_mask(lengths: list[int], window: int | None, device: Any) -> torch.Tensor:
    """The boolean mask [1, 1, T, T] that transformers makes of packed documents, or of a window."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    seen = (document[:, None] == document[None]).tril()
    return (seen if window is None else seen.triu(1 - window))[None, None]


def arms(states: Tensors, case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """What makes [1, T, H, D] of the same states, the library's first; full rows come as `rows` of them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = types.SimpleNamespace(num_key_value_groups=states[0].shape[1] // states[1].shape[1], is_causal=True)
    packed, tokens, device, window = case.rows == 0, states[0].shape[2], states[0].device, case.window
    rows = case.rows or 1
    cut = states if packed else [
        s.unflatten(2, (rows, tokens // rows))[0].transpose(0, 1).contiguous() for s in states
    ]  # fmt: skip
    ends = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], dtype=torch.int32, device=device)
    lengths_of = {"cu_seq_lens_q": ends, "max_length_q": max(case.lengths)} if packed else {}

    def whole(output: torch.Tensor) -> torch.Tensor:
        return output.flatten(0, 1)[None]

    if case.softcap is not None or case.sinks is not None:
        blocks = attention.causal_blocks(tokens // rows, window, device)

        def flex() -> torch.Tensor:
            settings = {"scaling": states[0].shape[-1] ** -0.5, "softcap": case.softcap, "s_aux": case.sinks}
            return whole(
                attention.flex_forward(layer, *cut, blocks, sliding_window=window, **lengths_of, **settings)[0]
            )

        return {"eager": lambda: eager(states, case)} | ({FLEX: flex} if states[0].is_cuda else {})

    mask = dense_mask(case.lengths, window, device) if packed else None
    if not packed and window is not None:
        mask = dense_mask([tokens // rows], window, device)

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
    if packed and states[0].is_cuda:

        def none_dropped() -> torch.Tensor:
            q, k, v = (s.transpose(1, 2).flatten(0, 1) for s in states)
            return attention.documents_with_dropout(q, k, v, ends, max(case.lengths), None, window, 0.0)[None]

        found["no dropout"] = none_dropped
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
    heads, groups, size, window, softcap, sinks = SHAPES[shape]
    longest = tokens // 2
    window = window and min(window, longest // 2)
    lengths = [longest] * 2 if work == "rows" else draw_lengths(tokens, longest)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    states = [torch.randn(1, h, tokens, size, device=device, dtype=dtype) for h in (heads, groups, groups)]
    upstream = torch.randn(1, tokens, heads, size, device=device, dtype=dtype)
    drawn = torch.randn(heads, device=device, dtype=dtype) if sinks else None
    case = Case(lengths, 2 if work == "rows" else 0, window, softcap, drawn)
    for s in states:
        s.requires_grad_()
    output = eager([s.float() for s in states], case)
    output.backward(upstream.float())
    truth = [output.detach(), *(s.grad.float() for s in states if s.grad is not None)]
    del output
    row: dict[str, Any] = {"shape": shape, "work": work, "tokens": tokens, "documents": len(lengths), "window": window}
    for name, act in arms(states, case).items():
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
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "date": time.strftime("%F"), "rows": []}
    wrong = []
    print(f"{'shape':14}{'work':11}{'tokens':>7}{'library ms':>12}{'flash':>9}{'kit':>9}{'dropout':>9}"
          f"{'times':>7}{'error/library':>15}")  # fmt: skip
    for tokens in [256] if a.tiny else a.tokens:
        for shape in a.shapes:
            for work in ("rows", "documents"):
                row = compare(shape, work, tokens, device, 1 if a.tiny else a.times)
                result["rows"].append(row)
                library = "sdpa" if "sdpa" in row else "eager"
                kit = next((name for name in (ATTENTION, FLEX) if name in row), library)
                ms = {n: f"{row[n]['ms']:.2f}" if n in row else "-" for n in (library, "flash", kit, "dropout")}
                print(f"{shape:14}{work:11}{tokens:7}{ms[library]:>12}{ms['flash']:>9}{ms[kit]:>9}"
                      f"{ms['dropout']:>9}{row[library]['ms'] / row[kit]['ms']:7.1f}"
                      f"{row[kit]['error'] / (row[library]['error'] or 1):15.2f}", flush=True)  # fmt: skip
                for name in (kit, "no dropout"):
                    error = row.get(name, {}).get("error", 0)
                    if error > WORSE * row[library]["error"] and error > 1e-5:
                        ratio = error / (row[library]["error"] or 1)
                        wrong.append(f"{shape}, {work}, {name}: error {error:.1e}, {ratio:.2f} times {library}'s")
                result["wrong"] = wrong
                a.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
