"""Opening models for inference: one in memory at a time, the adapter laid over the base that is already there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kit.errors import ENVIRONMENT, KitError
from kit.models.sources import ADAPTER_WEIGHTS, DTYPES, EMBEDDINGS, Source, loading, trust
from kit.storage.safetensors_header import read_config, read_header, read_tensors
from kit.system.hardware import cpu_multiplies_bf16

T = TypeVar("T")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def pick_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise KitError("there is no GPU that torch can use", where="device", fix="device=cpu", code=ENVIRONMENT)
    return device


def pick_dtype(asked: str | None, device: str, folder: Path, plan: dict[str, Any] | None) -> str:
    """The dtype to run in: what is asked, else the run's own on a GPU, else what the device is good at."""
    import torch

    if asked and asked != "auto":
        name = DTYPES.get(asked, asked).removeprefix("torch.")
        if name not in BYTES:
            raise KitError(f"dtype {asked!r} is not known", where="dtype", fix="float32, bfloat16 or float16")
        return name
    if device.startswith("cuda"):
        half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return "float32" if (plan or {}).get("precision") == "float32" else half
    config = read_config(folder)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return "bfloat16" if device == "cpu" and stored == "bfloat16" and cpu_multiplies_bf16() else "float32"


def each_model(
    use: Callable[[str, Any], T],
    source: Source,
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
    _no_deepspeed()
    device = pick_device(device)
    results: dict[str, T] = {}
    if {"base", "adapter"} & set(names):
        assert source.base is not None  # resolve() names neither without it
        model = _open(source, source.base, dtype, device, _quantization(source))
        _resize(model, max(len(tokenizer), _rows(model)))
        if "base" in names:
            results["base"] = use("base", model)
        if "adapter" in names:
            model = _with_adapter(model, source.paths["adapter"])
            results["adapter"] = use("adapter", model)
        del model
        _collect()
    for name in names:
        if name in ("base", "adapter"):
            continue
        model = _open(source, source.paths[name], dtype, device, None)
        results[name] = use(name, model)
        del model
        _collect()
    return results


def _open(source: Source, folder: Path, dtype: str | None, device: str, quantization: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    chosen = pick_dtype(dtype, device, folder, source.plan)
    attention = ((source.plan or {}).get("model") or {}).get("attn_implementation")
    extra: dict[str, Any] = {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}
    placed = False
    if quantization is not None:
        extra |= {"quantization_config": quantization, "device_map": {"": device}}
        placed = True
    elif device == "cuda" and _parameters(folder) * BYTES[chosen] > 0.9 * torch.cuda.mem_get_info()[0]:
        extra["device_map"] = "auto"  # over the GPUs, then host memory
        placed = True
    with loading(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, chosen),
            trust_remote_code=trust(source),
            output_loading_info=True,
            **extra,
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:  # transformers fills these with random numbers and goes on
            raise KitError(
                f"{folder} lacks {len(missing)} tensors of a {type(model).__name__}, the first {missing[0]}",
                where=str(folder),
                fix="give a complete causal language model",
            )
        return (model if placed else model.to(device)).eval()


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    tensors = {t.name: t.shape for t in read_header(folder / ADAPTER_WEIGHTS)}
    rows = {s[0] for n, s in tensors.items() if n.endswith(".weight") and n.split(".")[-2] in EMBEDDINGS}
    if len(rows) == 1 and not (rows & {_rows(model)}):
        _resize(model, rows.pop())
    with loading(folder):
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        missing = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)) - set(tensors)
        if missing:  # PEFT warns and leaves them at their initial values
            raise KitError(
                f"the adapter lacks {len(missing)} tensors that its config asks for, the first {min(missing)}",
                where=str(folder),
            )
    return wrapped.eval()


def _quantization(source: Source) -> Any:
    fields = (source.plan or {}).get("quantization")
    if not fields:
        return None
    from transformers import BitsAndBytesConfig

    known = {k: v for k, v in fields.items() if k != "quant_method" and v is not None}
    with loading(source.folder):
        config = BitsAndBytesConfig(**known)
        import bitsandbytes  # noqa: F401 - absent, it would fail half-way through loading

        return config


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _resize(model: Any, rows: int) -> None:
    if rows != _rows(model):
        import torch

        torch.manual_seed(0)  # new rows are drawn around the mean of the old ones
        model.resize_token_embeddings(rows)


def _parameters(folder: Path) -> int:
    total = 0
    for tensor in read_tensors(folder).values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
    return total


def _no_deepspeed() -> None:
    """Forget a ZeRO-3 setting left by training in this process, which would load every weight with shape (0,)."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()


def _collect() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
