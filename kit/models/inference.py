"""Models for inference: one in memory at a time, the adapter laid over the base that is already there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kit.errors import ENVIRONMENT, KitError
from kit.inspection.adapter import read_adapter_folder
from kit.models.adapters import attach_adapter
from kit.models.open import embedding_row_count, library_errors, open_base, resize_embeddings
from kit.models.quantization import set_compute_dtype
from kit.models.sources import DTYPE_NAMES, ModelSource, trusts_remote_code
from kit.storage.safetensors_header import read_model_config, read_tensors
from kit.system.hardware import cpu_has_bf16_matmul

T = TypeVar("T")
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


def pick_device(device: str | None) -> str:
    """Return the device to run on: the one asked for, else the GPU where torch can use one."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise KitError("there is no GPU that torch can use", where="device", fix="device=cpu", code=ENVIRONMENT)
    return device


def pick_dtype(asked: str | None, device: str, folder: Path, plan: dict[str, Any] | None) -> str:
    """Return the dtype to run in: what is asked, else the run's own on a GPU, else what the device is good at."""
    import torch

    if asked and asked != "auto":
        name = DTYPE_NAMES.get(asked, asked).removeprefix("torch.")
        if name not in BYTES_PER_PARAMETER:
            raise KitError(f"dtype {asked!r} is not known", where="dtype", fix="float32, bfloat16 or float16")
        return name
    if device.startswith("cuda"):
        half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return "float32" if (plan or {}).get("precision") == "float32" else half
    config = read_model_config(folder)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return "bfloat16" if device == "cpu" and stored == "bfloat16" and cpu_has_bf16_matmul() else "float32"


def run_each_model(
    use: Callable[[str, Any], T],
    source: ModelSource,
    names: Sequence[str],
    tokenizer: Any,
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, T]:
    """{name: use(name, model in eval mode)} in order: base, adapter, then whole models, each freed before the next.

    The base is used before the adapter is put on it, so a resized or retrained embedding cannot leak into it.
    A run that trained over a quantized base gets that same base, since it is what the adapter has learned to correct.
    A callback rather than a generator: a loop variable would keep each model alive while the next one loads.
    """
    device = pick_device(device)
    results: dict[str, T] = {}
    if {"base", "adapter"} & set(names):
        assert source.base is not None  # resolve() names neither without it
        model = _open_source_model(source, source.base, dtype, device, (source.plan or {}).get("quantization"))
        rows = embedding_row_count(model)
        resize_embeddings(model, max(len(tokenizer), rows))
        if "base" in names:
            results["base"] = use("base", model)
        if "adapter" in names:
            adapter = read_adapter_folder(source.paths["adapter"])
            model = attach_adapter(model, adapter, base_rows=rows, float32=True)
            results["adapter"] = use("adapter", model)
        del model
        _free_memory()
    for name in names:
        if name in ("base", "adapter"):
            continue
        model = _open_source_model(source, source.paths[name], dtype, device, None)
        results[name] = use(name, model)
        del model
        _free_memory()
    return results


def _open_source_model(
    source: ModelSource, folder: Path, dtype: str | None, device: str, quantization: dict[str, Any] | None
) -> Any:
    """Open one model of a source; a quantized base as it was trained on, computing in `dtype` where that is asked."""
    import torch

    planned = (source.plan or {}).get("model") or {}
    attention = planned.get("attn_implementation")
    settings = {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}
    chosen = pick_dtype(dtype, device, folder, source.plan)
    loaded_in = str(planned.get("dtype") or chosen) if quantization else chosen
    if device == "cuda" and not quantization:
        needed = _count_parameters(folder) * BYTES_PER_PARAMETER[chosen]
        device = "auto" if needed > 0.9 * torch.cuda.mem_get_info()[0] else device
    with library_errors(folder):
        model = open_base(
            folder,
            dtype=getattr(torch, loaded_in),
            quantization=quantization,
            device=device,
            trust_remote_code=trusts_remote_code(source),
            **settings,
        )
        if quantization and dtype not in (None, "auto"):
            set_compute_dtype(model, getattr(torch, chosen))
        return model.eval()


def _count_parameters(folder: Path) -> int:
    total = 0
    for tensor in read_tensors(folder).values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
    return total


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
