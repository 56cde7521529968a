"""The GPU memory of what a run does beside its steps: loading, evaluating, saving."""

from __future__ import annotations

import math
from dataclasses import replace

from kit.forecast.activations import saved_per_token, sizes
from kit.forecast.head import head_bytes
from kit.forecast.memory import DTYPE_BYTES, Memory, Sizes, Step, gathered_terms
from kit.inspection.trainable import list_modules
from kit.schema.fields import field_default


def add_phases(memory: Memory, step: Step, base: Sizes) -> Memory:
    """Add the terms of loading, evaluation and saves to those of a step, in place, and return them."""
    _add_loading(memory, step, base)
    _add_evaluation(memory, step, base)
    _add_saving(memory, step, base)
    return memory


def _add_loading(memory: Memory, step: Step, base: Sizes) -> None:
    """Add what loading holds beside the weights: the tensor that is quantized or parted among the ranks."""
    modules = list_modules(base.text) or {}
    largest = max((math.prod(shape) for m in modules.values() for shape in m.shapes.values()), default=0)
    width = DTYPE_BYTES[step.weights]
    if step.stage == 3 and not step.quantization:
        formula = f"{largest:,} x {width}: the largest tensor, from rank 0"
        memory.add("tensor on its way", largest * width, "load", formula, "transformers integrations/deepspeed.py")
    elif step.quantization:
        formula = f"{largest:,} x {width}: the largest tensor"
        memory.add("tensor to quantize", largest * width, "load", formula, "bitsandbytes nn/modules.py")


def _add_evaluation(memory: Memory, step: Step, base: Sizes) -> None:
    """Add a forward pass without gradients: one layer's work at a time, and the head's."""
    if step.trainer.get("eval_strategy") in (None, "no"):
        return
    rows = step.trainer.get("per_device_eval_batch_size") or field_default("SFTConfig", "per_device_eval_batch_size")
    tokens = int(rows) * step.tokens // step.rows
    autocast = step.precision != "float32" and not step.deepspeed
    dtype = step.precision if step.quantization else step.weights
    saved = saved_per_token(
        base.text, peft=dict(step.peft) if step.peft else None, base_dtype=dtype, autocast=autocast,
        row_tokens=step.tokens // step.rows, attention=step.attention,
        liger=step.trainer.get("use_liger_kernel") is True,
    )  # fmt: skip
    per_token = saved.recomputed_per_token
    memory.add("one layer, evaluated", tokens * per_token, "evaluate", f"{tokens:,} tokens x {per_token:,} bytes",
               "at most what a layer keeps in training")  # fmt: skip
    size, source = head_bytes(
        base.text, tokens, base_dtype=dtype, autocast=autocast,
        fused=not step.trainer.get("label_smoothing_factor"), triton=not step.trainer.get("use_cpu"),
    )  # fmt: skip
    vocabulary = f"{tokens:,} tokens, vocabulary {base.text.get('vocab_size', 0):,}"
    memory.add("head, evaluated", size, "evaluate", vocabulary, source)
    for term in gathered_terms(step, base):
        memory.terms.append(replace(term, phase="evaluate"))


def _add_saving(memory: Memory, step: Step, base: Sizes) -> None:
    """Add what ZeRO-3 gathers to be saved: the adapter, or module after module of the whole model."""
    if step.stage != 3 or step.processes == 1:
        return
    width = DTYPE_BYTES[step.precision]
    largest = base.trained if step.peft else max(base.largest_end, sizes(base.text)["h"])
    word = "adapter" if step.peft else "largest module"
    formula = f"{largest:,} x {width}, the {word}"
    memory.add("gathered to be saved", largest * width, "save", formula, "DeepSpeed engine.py")
