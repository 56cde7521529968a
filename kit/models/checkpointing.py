"""Selective activation checkpointing: results of attention and of the base's matmuls are kept, the rest is recomputed.

What a layer's backward then computes again are norms, rotary embeddings, activation functions, casts and the low-rank
adapters: little work, and most of the bytes. TRL's own policy keeps attention alone, not torch's varlen op, and its
wrapper does not reach an adapter's base: transformers 5.23 asks the base itself and passes `selective` on to torch,
which refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

SELECTIVE = "selective"
# In the names of the operators: the backends of sdpa, `varlen_attn` of torch, the flash-attn package's own.
ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::_varlen_attn", "flash_attn")
# Position of the two matrices among the arguments.
MATMULS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1), "aten::_grouped_mm": (0, 1)}
# Of bitsandbytes, which also multiplies dequantized weights by aten::mm. No adapter is quantized.
QUANTIZED_MATMULS = ("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit", "bitsandbytes::int8_scaled_mm",
                     "bitsandbytes::int8_linear_matmul")  # fmt: skip


def enable_selective(model: Any) -> None:
    """Make `activation_checkpointing_enable` of `model`, or of the base below its adapter, checkpoint selectively."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    vars(base).pop("gradient_checkpointing_enable", None)  # TRL's, which transformers would prefer
    keep = functools.partial(create_selective_checkpoint_contexts, make_policy(adapter_ranks(model)))
    enable: Any = base.activation_checkpointing_enable

    def activation_checkpointing_enable(activation_checkpointing_kwargs: Any = None, **layers: Any) -> None:
        given = {k: v for k, v in (activation_checkpointing_kwargs or {}).items() if k != SELECTIVE}
        enable(activation_checkpointing_kwargs={**given, "use_reentrant": False, "context_fn": keep}, **layers)

    base.activation_checkpointing_enable = activation_checkpointing_enable


def adapter_ranks(model: Any) -> set[int]:
    """The inner sizes of all low-rank adapters of a model."""
    return {rank for layer in model.modules() if isinstance(layer, LoraLayer) for rank in layer.r.values()}


def make_policy(ranks: Collection[int]) -> Any:
    """Return the policy for torch's `create_selective_checkpoint_contexts`.

    ranks: inner sizes of adapters, whose matmuls are recomputed. A matrix of the base that happens to be as narrow is
    recomputed too, which costs its time and changes no number.
    """

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator_name(op)
        if name.startswith(ATTENTION[:2]) or ATTENTION[2] in name:
            # Kept dropout would draw nothing in the recomputation, and the next one other numbers than before.
            keep = not argument(op, "dropout_p", args, kwargs)
        elif name in MATMULS:
            left, right = (args[i] for i in MATMULS[name])
            # Attention written out has one matrix for each row and head, and results of a row's length squared.
            linear = name != "aten::bmm" or right.stride(0) == 0
            keep = linear and left.shape[-1] not in ranks and right.shape[-1] not in ranks
        else:
            keep = name in QUANTIZED_MATMULS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@functools.cache
def operator_name(op: Any) -> str:
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else str(op)


@functools.cache
def argument_position(op: Any, name: str) -> int | None:
    if not isinstance(op, torch._ops.OpOverload):
        return None
    return next((i for i, a in enumerate(op._schema.arguments) if a.name == name), None)


def argument(op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value that an operator was given for the argument `name`, None where it has none."""
    position = argument_position(op, name)
    return kwargs.get(name, args[position] if position is not None and position < len(args) else None)
