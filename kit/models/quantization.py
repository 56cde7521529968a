"""A base quantized by bitsandbytes, the same for training, merging and inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.errors import ENVIRONMENT, KitError


def bnb_config(fields: Mapping[str, Any]) -> Any:
    """The BitsAndBytesConfig of a plan's `quantization`; KitError (3) where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401 - absent, it would fail half-way through loading
    except ImportError:
        raise KitError(
            "this run's base is quantized, and bitsandbytes is not installed",
            where="quantization",
            fix="pip install bitsandbytes",
            code=ENVIRONMENT,
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{k: v for k, v in fields.items() if k != "quant_method" and v is not None})


def disable_cpu_repacking(model: Any) -> Any:
    """Keep two habits of bitsandbytes 0.50 from ending a run half-way; gives the model.

    On a CPU with AVX512-BF16 an evaluation repacks 4-bit weights for a kernel that has no gradient, rounds to bfloat16
    and needs widths that divide by 64 (nn/modules.py, Linear4bit.forward). An int8 layer takes its scales off the
    weight when it first runs, after which DeepSpeed can load no checkpoint into it (Linear8bitLt.init_8bit_state).
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.init_8bit_state()
            weight: Any = module.weight
            weight.SCB = module.state.SCB
    return model


def set_compute_dtype(model: Any, dtype: Any) -> Any:
    """Let a quantized model compute in `dtype`, its packed weights as they are; gives the model."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    for parameter in model.parameters():
        if not isinstance(parameter, Int8Params | Params4bit):
            parameter.data = parameter.data.to(dtype)
    return model
