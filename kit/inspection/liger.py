"""Whether a base is trained with Liger's kernels for its norms, rotary embedding and activation."""

from __future__ import annotations

from typing import Any

from kit.inspection.architectures import architecture_table
from kit.system.dependencies import installed_version, release_numbers


def why_not_liger(text: dict[str, Any], trainer: dict[str, Any], precision: str, on_cpu: bool) -> str:
    """Say why `trainer.use_liger_kernel=auto` is false, "" where it is true.

    text: the config of the language model. The architectures are those of architectures.json, tried beside
    transformers' own layers: same loss, same gradients, of all weights and of LoRA's.
    """
    table, kind = architecture_table()["liger"], str(text.get("model_type"))
    version = installed_version("liger-kernel")
    if on_cpu:
        return "Liger's are for GPUs"
    if version is None:
        return "liger-kernel is not installed"
    if release_numbers(version) < release_numbers(table["liger_kernel"]):
        return f"liger-kernel {version} is older than {table['liger_kernel']}"
    if text.get("auto_map") or kind not in table["model_types"]:
        return f"Liger's are not known to fit {kind}"
    if precision == "float32":
        return "Liger's are for bfloat16 and float16"
    if trainer.get("torch_compile") or trainer.get("torch_compile_backend"):
        return "torch.compile makes its own"
    return ""
