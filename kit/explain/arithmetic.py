"""`kit plan --explain`: rules of thumb for training, what is wrong with them, and the figures of the run at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kit.explain.plan_text import INDENT, Figures, gb, seconds, sum_of, wrap
from kit.forecast.activations import sizes
from kit.forecast.memory import Sizes, Step, forecast_memory, weights_bytes
from kit.forecast.step_time import active_linears, count_flops

KEPT = ("layer inputs", "activations", "weights, cast", "embedding, norm", "inputs of int8 matmuls")
UTILIZATION = (0.55, 0.3)  # of a card's peak, as the rule of thumb for time has it
UTF8 = 3  # bytes of a Chinese character
CHINESE, ENGLISH = (1.4, 1.7), (3, 4)  # characters a token, by tokenizers with a large vocabulary


@dataclass(frozen=True)
class Line:
    """A rule of thumb, what is to be said against it, and what it comes to in this run."""

    topic: str
    rule: str
    correction: str
    here: str


def count_parts(step: Step, base: Sizes) -> dict[str, Any]:
    """Return what the explanation counts with, beside the forecast's own figures; operations are those of a token."""
    layers = active_linears(base)
    model, executed = count_flops(step, base, 0)
    whole = forecast_memory(replace(step, trainer={**step.trainer, "activation_checkpointing": False}), base)
    return {
        "in_layers": layers, "matrices": layers + sizes(base.text)["h"] * int(base.text.get("vocab_size") or 0),
        "layers": base.layers, "micro_tokens": step.tokens, "frozen_base": bool(step.peft),
        "matrix_flops": model / step.tokens, "recomputed_flops": (executed - model) / step.tokens,
        "weight_bytes": weights_bytes(step, base)[0] / base.total, "master_weights": bool(step.deepspeed),
        "activations_whole": sum(t.bytes for t in whole.terms if t.name in KEPT),
    }  # fmt: skip


def explain_arithmetic(figures: Figures) -> list[Figures]:
    """Return the lines of the explanation, each as a dictionary, from the figures of `forecast_run`."""
    parts = (_operations, _recomputation, _time, _adam, _weights, _lora, _activations, _bucket, _accumulation, _text,
             _tokens_a_parameter)  # fmt: skip
    return [asdict(part(figures)) for part in parts]


def _operations(f: Figures) -> Line:
    counts, step = f["counts"], f["step"]
    n, per_token = counts["matrices"], step["model_flops"] / step["tokens"]
    return Line(
        "operations", "6N a token: 2 forward, 2 for the gradients, 2 for the update",
        "2N forward and 4N backward, half for the gradients of inputs and half for those of weights; the update costs "
        "nothing a token. A frozen weight needs no gradient of its own: LoRA has 4N in all",
        f"N = {n / 1e9:,.2f} billion parameters in matrices that a token passes through: "
        f"{counts['matrix_flops'] / n:.2f} N, {per_token / n:.2f} N with attention, {per_token / 1e9:,.1f} GFLOP a "
        "token",
    )  # fmt: skip


def _recomputation(f: Figures) -> Line:
    counts, step = f["counts"], f["step"]
    again, more = counts["recomputed_flops"], step["executed_flops"] / step["model_flops"] - 1
    here = f"{again / counts['in_layers']:.2f} N of the layers' matrices, {100 * more:.0f} % more operations in all"
    return Line(
        "recomputed", "activation checkpointing makes 8N of 6N",
        "2N more, of the layers alone: the head is not computed again, selective checkpointing repeats no matmul, and "
        "torch stops before a layer's last one where nothing that is trained needs it",
        here if again else "no matmul is computed again",
    )  # fmt: skip


def _time(f: Figures) -> Line:
    step = f["step"]
    low, high = step["mfu"]
    by_rule = [
        8 * step["tokens"] * f["run"]["parameters"] / (f["host"]["tflops"] * 1e12 * part) for part in UTILIZATION
    ]
    return Line(
        "time", f"8 x tokens x N / (GPUs x peak x {UTILIZATION[1]} to {UTILIZATION[0]})",
        "full fine-tuning with all layers checkpointed; LoRA has fewer operations, and small models, links and "
        "offloads reach less of the peak",
        f"{seconds(*by_rule)} s a step by the rule, {seconds(step['fastest'], step['slowest'])} s by the forecast: "
        f"MFU {100 * low:.0f} to {100 * high:.0f} %",
    )  # fmt: skip


def _adam(f: Figures) -> Line:
    run, counts = f["run"], f["counts"]
    kinds = ["adapter", "gradients", "optimizer", "float32 gradients"] + ["base weights"] * (not counts["frozen_base"])
    size = sum_of(f["memory"]["terms"], *kinds)
    kept = (
        ""
        if counts["master_weights"]
        else "; without DeepSpeed Adam keeps the parameter's own dtype, no copy beside it"
    )
    return Line(
        "Adam", "a billion parameters with Adam take 200 GB",
        "16 bytes a trained parameter in mixed precision (2 weight, 2 gradient, 4 float32 copy, 8 Adam's states) and "
        f"4 in the step: {16 + 4} GB",
        f"{run['trained'] / 1e9:,.3g} billion trained, {gb(size)} GB on each GPU: {size / run['trained']:.1f} bytes "
        f"each{kept}",
    )  # fmt: skip


def _weights(f: Figures) -> Line:
    size = sum_of(f["memory"]["terms"], "base weights")
    return Line(
        "weights", "4 bytes a parameter: 7 billion train in 28 GB",
        "that is float32 weights, and nothing else of training; bfloat16 has 2 bytes, nf4 about half of one",
        f"{f['run']['parameters'] / 1e9:,.2f} billion x {f['counts']['weight_bytes']:.2f} bytes, {gb(size)} GB on "
        "each GPU",
    )  # fmt: skip


def _lora(f: Figures) -> Line:
    run = f["run"]
    size, share = sum_of(f["memory"]["terms"], "gradients", "optimizer"), 100 * run["trained"] / run["parameters"]
    return Line(
        "optimizer", "gradients and optimizer are each as large as the model",
        "of what is trained alone: LoRA's base has neither, which is why its optimizer is small",
        f"{run['trained']:,} of {run['parameters']:,} parameters are trained ({share:.3g} %): gradients and optimizer "
        f"{gb(size)} GB on each GPU",
    )  # fmt: skip


def _activations(f: Figures) -> Line:
    counts, terms = f["counts"], f["memory"]["terms"]
    at_work = sum_of(terms, "one layer, computed again", "gradients of activations")
    return Line(
        "activations", "they grow with the square of the length",
        "where attention keeps its scores (eager). SDPA and Flash Attention keep none: a layer keeps so many bytes a "
        "token. Checkpointing keeps the inputs of layers, and makes the rest again, one layer at a time",
        f"{counts['micro_tokens']:,} tokens x {counts['layers']} layers: {gb(counts['activations_whole'])} GB without "
        f"checkpointing, {gb(sum_of(terms, *KEPT))} GB as it is, and {gb(at_work)} GB for the layer at work",
    )  # fmt: skip


def _bucket(f: Figures) -> Line:
    buckets = [t for t in f["memory"]["terms"] if "buckets" in t["name"]]
    here = f"{gb(sum(t['bytes'] for t in buckets))} GB ({buckets[0]['formula']})" if buckets else "one process: none"
    return Line(
        "bucket", "gradients are sent at the end of the backward",
        "a gradient bucket is a buffer that gradients are copied into as they come; a full one is sent while the "
        "backward goes on. Buckets take memory beside the gradients",
        here,
    )  # fmt: skip


def _accumulation(f: Figures) -> Line:
    tokens, micro = f["step"]["tokens"], f["counts"]["micro_tokens"]
    return Line(
        "accumulation", "two accumulation steps take twice the time",
        "for twice the rows: a row takes as long. Activations are those of one micro-step",
        f"{tokens // micro} micro-steps of {micro:,} tokens are an optimizer step of {tokens:,} on each GPU",
    )  # fmt: skip


def _text(f: Figures) -> Line:
    tokens, what = _tokens(f)
    chinese, english = ([tokens * n * width for n in count] for count, width in ((CHINESE, UTF8), (ENGLISH, 1)))
    return Line(
        "text", "a Chinese character has 2 bytes: a billion tokens are 3 GB",
        f"{UTF8} bytes in UTF-8: with {CHINESE[0]} to {CHINESE[1]} characters a token {CHINESE[0] * UTF8:.1f} to "
        f"{CHINESE[1] * UTF8:.1f} GB; English has {ENGLISH[0]} to {ENGLISH[1]} characters a token, a byte each",
        f"{tokens:,} tokens of {what}: {megabytes(chinese)} MB of Chinese text, {megabytes(english)} MB of English",
    )  # fmt: skip


def _tokens_a_parameter(f: Figures) -> Line:
    tokens, what = _tokens(f)
    share = f"{tokens / f['run']['parameters']:.2g} tokens a parameter in {what}"
    return Line(
        "data", "20 tokens a parameter (Chinchilla)",
        "the best use of operations in training from nothing; fine-tuning starts from a trained model and is not "
        "bound by it",
        share + ("" if "total" in f else "; trainer.max_steps=N tells the run's"),
    )  # fmt: skip


def _tokens(f: Figures) -> tuple[int, str]:
    return (f["total"]["tokens"], "the run") if "total" in f else (f["step"]["tokens_all"], "a step")


def megabytes(both: Sequence[float]) -> str:
    return " to ".join(f"{size / 1e6:,.{0 if size >= 1e7 else 1}f}" for size in both)


def render_arithmetic(lines: Sequence[Figures]) -> str:
    """Return the explanation as text: the rule, the correction and the run's figure of each line."""
    found = ["rules of thumb, and this run"]
    for line in lines:
        found += ["", line["topic"]]
        for label, key in (("rule", "rule"), ("but", "correction"), ("here", "here")):
            found += wrap(line[key], f"  {label:<{INDENT - 2}}")
    return "\n".join(found)
