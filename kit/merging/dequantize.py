"""What a linear layer multiplied with after bitsandbytes had quantized it, from its float weight, some rows at a time.

The same numbers that transformers' `model.dequantize()` gives, up to the last bit of a sum over the scales: 4-bit
weights in the dtype that they were loaded in, int8 weights in float32. A base quantized on a GPU can differ in codes
that lie on the border between two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 64  # values that share a scale in 4 bits (bitsandbytes.functional.quantize_4bit)


@dataclass(frozen=True)
class BaseQuantization:
    """How a run quantized its base: the plan's `quantization`, and the dtype that the weights were loaded in."""

    fields: dict[str, Any]
    dtype: str

    @property
    def bits(self) -> int:
        return 8 if self.fields.get("load_in_8bit") else 4

    @property
    def kind(self) -> str:
        return "int8" if self.bits == 8 else str(self.fields.get("bnb_4bit_quant_type") or "fp4")

    @property
    def nested(self) -> bool:
        return self.bits == 4 and bool(self.fields.get("bnb_4bit_use_double_quant"))


def quantized_modules(base: Path, quantization: BaseQuantization) -> set[str]:
    """The linear layers that transformers quantizes in this base, by its own rule; skip modules are left out."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.quantizers.auto import AutoHfQuantizer

    from kit.merging.names import build_on_meta
    from kit.models.quantization import bnb_config

    model = build_on_meta(base)
    quantizer = AutoHfQuantizer.from_config(bnb_config(quantization.fields), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def rows_in_whole_blocks(rows: int, width: int, quantization: BaseQuantization) -> int:
    """About `rows` rows of `width` values that hold whole blocks."""
    unit = BLOCK // math.gcd(BLOCK, width) if quantization.bits == 4 else 1
    return max(unit, rows - rows % unit)


def make_restorer(
    quantization: BaseQuantization, conv1d: bool, blocks: Callable[[], Iterator[Any]], width: int
) -> Callable[[Any, int], Any]:
    """A function (rows of the stored weight, index of the first one) -> what the quantized layer had there, float32.

    blocks: reads the weight from its start, in pieces of `aligned` size; taken where scales span all of it. conv1d:
    the weight is stored transposed, so it is held whole.
    """
    import torch

    if conv1d:
        whole = restore_weight(torch.cat([block.float() for block in blocks()]).T.contiguous(), quantization).T
        return lambda rows, first: whole[first : first + rows.shape[0]]
    scales = (
        quantize_scales(torch.cat([block_scales(b, quantization) for b in blocks()])) if quantization.nested else None
    )

    def some(rows: Any, first: int) -> Any:
        start = first * width // BLOCK
        part = None if scales is None else scales[start : start - (-rows.numel() // BLOCK)]
        return _restore_rows(rows, quantization, part)

    return some


def restore_weight(weight: Any, quantization: BaseQuantization) -> Any:
    """All of a weight (out, in) at once."""
    scales = quantize_scales(block_scales(weight, quantization)) if quantization.nested else None
    return _restore_rows(weight, quantization, scales)


def _restore_rows(rows: Any, quantization: BaseQuantization, scales: Any) -> Any:
    import torch
    from bitsandbytes import functional

    loaded = rows.to(getattr(torch, quantization.dtype))
    if quantization.bits == 8:  # LLM.int8() takes its rows from float16, whatever the dtype
        codes, scale, _ = functional.int8_vectorwise_quant(loaded.to(torch.float16))
        return functional.int8_vectorwise_dequant(codes, scale)
    packed, state = functional.quantize_4bit(loaded, blocksize=BLOCK, quant_type=quantization.kind)
    if scales is not None:
        state.absmax = scales
    return functional.dequantize_4bit(packed, state).float()


def block_scales(rows: Any, quantization: BaseQuantization) -> Any:
    """The largest absolute value of every block of 64, float32."""
    import torch

    flat = rows.to(getattr(torch, quantization.dtype)).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
    return flat.view(-1, BLOCK).abs().amax(1).float()


def quantize_scales(scales: Any) -> Any:
    """Scales after double quantization: 8 bits in blocks of 256 around their mean."""
    from bitsandbytes import functional

    mean = scales.mean()
    return functional.dequantize_blockwise(*functional.quantize_blockwise(scales - mean, blocksize=256)) + mean


def restore_by_bitsandbytes(weight: Any, quantization: BaseQuantization, conv1d: bool) -> Any:
    """The second opinion: a whole stored weight through the parameter classes of bitsandbytes."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Params4bit

    loaded = (weight.T.contiguous() if conv1d else weight).to(getattr(torch, quantization.dtype))
    if quantization.bits == 8:
        int8: Any = Int8Params(loaded, requires_grad=False)
        int8 = int8.to("cpu")  # bitsandbytes quantizes when a parameter arrives on a device
        restored = functional.int8_vectorwise_dequant(int8.CB, int8.SCB)
    else:
        packed: Any = Params4bit(
            loaded, compress_statistics=quantization.nested, quant_type=quantization.kind, requires_grad=False
        )
        packed = packed.to("cpu")
        restored = functional.dequantize_4bit(packed.data, packed.quant_state)
    return (restored.T if conv1d else restored).float()
