"""Fixed prompts through base + adapter and through the merged model: do they answer alike?"""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path
from typing import Any

from kit.errors import FAILED, KitError
from kit.merging.dequantize import restore_by_bitsandbytes
from kit.merging.parts import MergePlan
from kit.merging.stream import map_in_threads, torch_dtype
from kit.models.adapters import attach_adapter
from kit.models.open import architecture_class, open_base
from kit.models.quantization import set_compute_dtype
from kit.storage.safetensors_header import read_model_config, read_tensors

# Logits of two models with equal weights are equal; the few neighbours above move them by up to 2.3e-4 of their spread
# (measured: 16-bit, 512 wide, odd scales), a factor wrong by 1 % on an adapter that changes weights by 3 % by 7e-3.
LOGITS = 2e-3  # largest difference from base + adapter rounded once, in standard deviations of the logits
# Rounding itself moves logits: it is reported, and judged only where the rounded sum is not at hand to compare with.
ROUNDED = {"F32": 1e-3, "F64": 1e-3, "F16": 0.3, "BF16": 1.0}  # largest difference from base + adapter unrounded
PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Question: What is 12 * 7?\nAnswer:")


def check_logits(out: Path, plan: MergePlan, prompts: list[str] | None, whole: bool) -> dict[str, Any]:
    """Run prompts through base + adapter, through the same rounded once, and through the merged model.

    One model at a time. `whole`: in float32; else in the base's dtype, where only the looser of the limits applies.
    The base is the one that was merged onto. For a run over a quantized base, `as_trained` holds the difference from
    that base + adapter, which no limit judges.
    """
    import torch

    merged = read_tensors(out)
    dtypes = [t.dtype for t in merged.values() if t.dtype in ROUNDED]
    kept = max(set(dtypes), key=dtypes.count)
    dtype = torch.float32 if whole else torch_dtype(kept)
    tokens = make_prompts(out, read_model_config(out), prompts)
    device = _pick_device(merged, dtype)
    model = attach_adapter(load_merge_base(plan, dtype, device), plan.adapter.opened).to(dtype)
    trained = _logits(model, tokens)
    once = None
    if whole:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model.merge_and_unload()
        for name, parameter in model.named_parameters():
            stored_as = merged[name].dtype if name in merged else kept
            parameter.data = parameter.data.to(torch_dtype(stored_as)).to(dtype)
        once = None if _peft_merges_ties_otherwise(plan, out) else _logits(model, tokens)
    del model
    gc.collect()
    model = load_checked_model(out, dtype, device)
    merged_logits = _logits(model, tokens)
    del model
    gc.collect()
    spread = float(torch.cat([t.flatten() for t in trained]).std()) or 1.0
    result = {
        "prompts": len(tokens),
        "tokens": sum(t.shape[-1] for t in tokens),
        "computed_in": str(dtype).removeprefix("torch."),
        "computed_on": device,
        **_logit_difference(trained, merged_logits),
        "logits_std": spread,
        "tolerance": ROUNDED[kept] * spread,
    }
    if once is not None:
        exact = max(float((a - b).abs().max()) for a, b in zip(once, merged_logits, strict=True))
        result |= {"max_difference_from_rounded": exact, "tolerance_from_rounded": LOGITS * spread}
    _refuse_different_logits(result, kept, out)
    if plan.trained_on:
        as_trained = _logits(load_as_trained(plan, device), tokens)
        result["as_trained"] = _logit_difference(as_trained, merged_logits) | {"logits_std": spread}
    return result


def _refuse_different_logits(result: dict[str, Any], kept: str, out: Path) -> None:
    """KitError (4) where the logits lie further apart than storing the weights in the dtype `kept` explains."""
    limit = LOGITS * result["logits_std"]
    exact = result.get("max_difference_from_rounded")
    differs = result["max_difference"] > result["tolerance"]
    if exact is not None:
        differs = exact > limit or (differs and kept in ("F32", "F64"))
    if differs or not math.isfinite(result["max_difference"]):
        raise KitError(
            f"the merged model does not answer as base + adapter do: logits differ by {result['max_difference']:.3g} "
            f"(allowed {result['tolerance']:.3g}), from the rounded sum by {exact or 0:.3g} (allowed {limit:.3g})",
            where=str(out),
            fix="nothing was published; merge again, and report it if it stays",
            code=FAILED,
        )


def _logit_difference(a: list[Any], b: list[Any]) -> dict[str, float]:
    """How far two models' logits lie apart. A NaN is the largest difference."""
    import torch

    difference = torch.cat([(x - y).abs().flatten() for x, y in zip(a, b, strict=True)])
    agree = torch.cat([(x.argmax(-1) == y.argmax(-1)).flatten() for x, y in zip(a, b, strict=True)])
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "argmax_agreement": float(agree.float().mean()),
    }


def _peft_merges_ties_otherwise(plan: MergePlan, out: Path) -> bool:
    """Whether peft's own merge is not what was trained: it adds LoRA on tied matrices to both ends, or twice."""
    key = "tie_word_embeddings"
    ends = {p.removesuffix(".weight") for pair in plan.names.tied.items() for p in pair}
    return bool(ends & plan.adapter.lora.keys()) or read_model_config(plan.base).get(key) != read_model_config(
        out
    ).get(key)


def make_prompts(out: Path, config: dict[str, Any], prompts: list[str] | None) -> list[Any]:
    """Token ids of the prompts, one row each; ids from a fixed seed where the model has no tokenizer."""
    import torch

    text = config.get("text_config") or config
    size = int(text.get("vocab_size") or config.get("vocab_size") or 100)
    if any((out / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(out)
        rows = [tokenizer(p).input_ids for p in prompts or PROMPTS]
        return [torch.tensor([[min(i, size - 1) for i in row]]) for row in rows if row]
    return [torch.randint(size, (2, 32), generator=torch.Generator().manual_seed(0))]


def _pick_device(tensors: dict[str, Any], dtype: Any) -> str:
    """The GPU where a model of these tensors in `dtype` leaves half of its free memory, else the CPU."""
    import torch

    needed = sum(math.prod(t.shape) for t in tensors.values()) * dtype.itemsize
    return "cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2 * needed else "cpu"


def load_checked_model(
    folder: Path, dtype: Any, device: str = "cpu", quantization: dict[str, Any] | None = None
) -> Any:
    """A model in evaluation mode, of the class that its config names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    model_class = architecture_class(config)
    settings = {"device": device, "quantization": quantization, "model_class": model_class, "config": config}
    return open_base(folder, dtype=dtype, **settings).eval()


def load_merge_base(plan: MergePlan, dtype: Any, device: str = "cpu") -> Any:
    """The base that a plan merges onto: as it is stored, or with what quantizing left of its linear layers."""
    model = load_checked_model(plan.base, dtype)

    def restore(module: str) -> None:
        weight = model.get_submodule(module).weight
        how = plan.restores(f"{module}.weight")
        assert how is not None
        weight.data = restore_by_bitsandbytes(weight.data, *how).to(dtype).contiguous()

    map_in_threads(restore, plan.dequantized)
    return model.to(device)


def load_as_trained(plan: MergePlan, device: str) -> Any:
    """Quantized base + adapter as the run had them, the arithmetic in float32."""
    import torch

    assert plan.trained_on is not None
    model = load_checked_model(plan.base, getattr(torch, plan.trained_on.dtype), device, plan.trained_on.fields)
    return set_compute_dtype(attach_adapter(model, plan.adapter.opened), torch.float32).eval()


def _logits(model: Any, tokens: list[Any]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [model(input_ids=ids.to(model.device)).logits.float().cpu() for ids in tokens]
