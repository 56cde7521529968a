"""Liger's kernels in a trainer: which of them are applied, and the line that says so."""

from __future__ import annotations

import sys
from typing import Any

from kit.inspection.liger import why_not_liger
from kit.models.checkpointing import SELECTIVE

UNPATCHED: dict[str, dict[str, Any]] = {}  # what modules of transformers held before Liger: name, attributes
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def liger_kernel_config(args: Any) -> dict[str, Any]:
    """Return the `liger_kernel_config` of a trainer: kernels of layers alone, for TRL has a loss of its own.

    Liger rotates q and k in place, unseen by autograd: what selective checkpointing keeps of q_proj and k_proj would
    be rotated once more in the backward, and the gradients wrong. Without it they keep transformers' rotation.
    """
    config = {**dict.fromkeys(LOSSES, False), **(args.liger_kernel_config or {})}
    if (args.activation_checkpointing_kwargs or {}).get(SELECTIVE):
        config["rope"] = False
    return config


def undo_liger(base: Any, use_liger_kernel: bool) -> None:
    """Put back what Liger replaced in the module of a model's class for an earlier trainer of this process.

    It replaces the rotary embedding there, for every model of the class, and never undoes it. Before the first trainer
    that uses Liger the module is as transformers made it.
    """
    module = sys.modules[type(base).__module__]
    if use_liger_kernel:
        UNPATCHED.setdefault(module.__name__, dict(vars(module)))
    vars(module).update(UNPATCHED.get(module.__name__, {}))


def describe_kernels(args: Any, config: Any, precision: str) -> str:
    """Say whose kernels compute norms, rotary embedding and activation, and why not Liger's.

    config: of the base.
    """
    if args.use_liger_kernel:
        off = [k for k, v in (args.liger_kernel_config or {}).items() if v is False and k not in LOSSES]
        return "Liger's for norms, rotary embedding and activation" + (f", without {', '.join(off)}" if off else "")
    reason = why_not_liger(config.get_text_config().to_dict(), vars(args), precision, args.device.type == "cpu")
    return f"transformers' own: {reason or 'trainer.use_liger_kernel=false'}"
