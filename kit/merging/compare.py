"""Proves a merged model equal to base + adapter, with peft's own layers as the other opinion.

Two checks. `tensors`: a band of rows of every module the adapter names goes through a peft LoRA layer in float32 and
must round to what was written; tensors the adapter does not name must be the base's bytes. `logits`: fixed prompts
through base + adapter, and through the merged model, both computed in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.errors import FAILED, KitError
from kit.merging.adapter import SortedAdapter, read_tensor_bytes, trained_token_ids
from kit.merging.dequantize import BaseQuantization, restore_by_bitsandbytes
from kit.merging.logits import check_logits
from kit.merging.parts import MergePlan
from kit.merging.plan import plan_merge
from kit.merging.stream import map_in_threads, torch_dtype
from kit.storage.safetensors_header import TensorEntry, read_model_config, read_tensors

AGAIN = "merge again into another folder: --out FOLDER"

BAND = 64  # rows of each module that are computed again
EDGE = 4096  # bytes of each untouched tensor that are compared at its start, middle and end
# A value may be the neighbour of the expected one where another order of float32 sums moved it across a rounding
# border. In 16-bit formats that happens to a few values in 100,000; a factor wrong by 1 % moves more than 1 in 1000
# as soon as the adapter changes the weights by 0.1 %.
NEIGHBOURS = 5e-4
SLACK = 8 * 2.0**-23  # float32 sums: times the largest weight of the band
SMALL = 2_000_000_000  # bytes of a base below which logits are compared by default


def verify_merge(
    out: Path,
    base: Path,
    adapter: Path,
    prompts: list[str] | None = None,
    how: str = "auto",
    *,
    trained_on: BaseQuantization | None = None,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Figures of the comparison; `how`: tensors | logits (which includes tensors) | auto (logits below 2 GB).

    The base is the stored one, or with `dequantize` what quantizing left of it. Where the run was `trained_on` a
    quantized base, the logits check also says how far the merged model is from the two that were trained together.
    KitError (4) where the merged model is not what base + adapter are.
    """
    out, base, adapter = Path(out), Path(base), Path(adapter)
    stored = read_tensors(base)
    size = sum(t.end - t.start for t in stored.values())
    own_code = bool(read_model_config(base).get("auto_map"))
    result: dict[str, Any] = {}
    plan = plan_merge(base, adapter, proven=True, trained_on=trained_on, dequantize=dequantize)
    if not plan.through_peft:
        result["tensors"] = check_tensors(out, plan, stored)
    if how == "logits" or (how == "auto" and size < SMALL and not own_code):
        result["logits"] = check_logits(out, plan, prompts, whole=size < SMALL)
    if not result:
        result["none"] = {"reason": "neither check applies to this adapter and base; choose verify='logits'"}
    return result


def check_tensors(out: Path, plan: MergePlan, stored: dict[str, TensorEntry]) -> dict[str, Any]:
    """Compare every module that the adapter names or that was dequantized, and the edges of every other tensor."""
    import torch
    from safetensors import safe_open

    adapter, names = plan.adapter, plan.names
    merged = read_tensors(out)
    with safe_open(adapter.opened.weights, "pt") as weights:

        def compare(parameter: str) -> tuple[str, int, int]:
            name = names.stored.get(parameter, parameter)
            if name not in merged:
                name = names.stored.get(names.tied.get(parameter, ""), name)
            if name not in merged:
                raise KitError(f"{parameter} is not in the merged model", str(out), AGAIN, code=FAILED)
            start = stored.get(name) or stored.get(names.stored.get(names.tied.get(parameter, ""), ""))
            with torch.no_grad():  # a thread's own setting
                band, expected = _expected_rows(plan, weights, parameter, start)
                written = _read_rows(merged[name], band).to(expected.dtype)
                return name, expected.numel(), _count_neighbours(name, expected, written, merged[name].dtype)

        compared = map_in_threads(compare, _changed_parameters(plan))
    named = {name for name, _, _ in compared}
    if lost := sorted(stored.keys() - merged.keys()):
        raise KitError(f"{lost[0]} is not in the merged model", str(out), AGAIN, code=FAILED)
    untouched = [n for n in stored if n not in named and n not in names.tied]
    for name in untouched:
        _require_same_edges(stored[name], merged[name])
    for other, main in names.tied.items():  # one end of a tie that was cut, left as the base had it
        if other in merged and other not in stored and other not in named and main not in adapter.full:
            _require_same_edges(stored[names.stored[main]], merged[other])
    return {
        "named_by_the_adapter": len(compared),
        "values": sum(values for _, values, _ in compared),
        "neighbouring_values": sum(neighbours for _, _, neighbours in compared),
        "tolerance": NEIGHBOURS,
        "untouched": len(untouched),
    }


def _changed_parameters(plan: MergePlan) -> list[str]:
    """Every parameter that the adapter names, by its own keys, or that starts from a dequantized weight."""
    adapter = plan.adapter
    parameters = dict.fromkeys(adapter.full)
    for module, parts in adapter.lora.items():
        parameters[f"{module}.weight"] = None
        if "lora_B.bias" in parts:
            parameters[f"{module}.bias"] = None
    parameters.update(dict.fromkeys(f"{module}.weight" for module in [*adapter.rows, *sorted(plan.dequantized)]))
    return list(parameters)


def _expected_rows(plan: MergePlan, weights: Any, parameter: str, start: TensorEntry | None) -> tuple[slice, Any]:
    """Which rows, and what base + adapter hold there in float32, by a peft layer (and by bitsandbytes)."""
    import torch

    adapter, names = plan.adapter, plan.names
    module = parameter.rpartition(".")[0]
    parts = adapter.lora.get(module, {})
    source = adapter.full.get(parameter, start)
    if source is None:
        raise KitError(f"the base has no {parameter}", "--base", "name the base of the adapter", code=FAILED)
    rows = source.shape[0]
    dora = "lora_magnitude_vector" in parts
    kind = "embedding" if "lora_embedding_A" in parts else names.kind(module)
    if kind == "unknown":
        kind = "conv1d" if adapter.config.get("fan_in_fan_out") else "linear"
    whole = dora and kind != "linear"  # these norms run over all rows
    size = rows if whole or len(source.shape) < 2 else min(BAND, rows)
    first = sum(parameter.encode()) % (rows - size + 1)
    band = slice(first, first + size)
    restore = plan.restores(parameter) if parameter not in adapter.full else None
    if restore:
        value = restore_by_bitsandbytes(_read_rows(source, slice(0, rows)), *restore)[band].clone()
    else:
        value = _read_rows(source, band)
    if parts and parameter.endswith(".bias") and "lora_B.bias" not in parts:
        pass
    elif parts and parameter.endswith(".bias"):
        _, value = _merge_rows_by_peft(adapter, weights, module, kind, torch.zeros(1), band, value)
    elif parts:
        value, _ = _merge_rows_by_peft(adapter, weights, module, kind, value, band, None)
    if module in adapter.rows and parameter.endswith(".weight"):
        new = weights.get_tensor(adapter.rows[module].name)
        for row, index in enumerate(trained_token_ids(adapter.config, module)):
            if band.start <= index < band.stop:
                value[index - band.start] = new[row].to(value.dtype)
    return band, value


def _merge_rows_by_peft(
    adapter: SortedAdapter, weights: Any, module: str, kind: str | None, weight: Any, band: slice, bias: Any
) -> tuple[Any, Any]:
    """Merge a band of rows in a peft layer of just that size; gives weight and bias after it."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import layer as lora_layers
    from peft.utils.other import get_pattern_key
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    parts = {k: weights.get_tensor(t.name).float() for k, t in adapter.lora[module].items()}
    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.init_lora_weights = False
    config.fan_in_fan_out = kind == "conv1d"
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    a: Any = parts.get("lora_A.weight", parts.get("lora_embedding_A"))
    b: Any = parts.get("lora_B.weight", parts.get("lora_embedding_B"))
    holder: Any
    layer: Any
    if bias is not None:  # the bias needs no weight: one column stands for it
        a, weight = a[:, :1], torch.zeros(b.shape[0], 1) if kind == "linear" else torch.zeros(1, b.shape[0])
    elif kind == "linear":
        b = b[band]
    else:
        a = a[:, band]
    if kind == "embedding":
        config.lora_bias = False
        holder = nn.Embedding(*weight.shape)
        layer = lora_layers.Embedding(holder, "default", config, r=r, lora_alpha=alpha)
        layer.lora_embedding_A["default"].copy_(a)
        layer.lora_embedding_B["default"].copy_(b)
    else:
        config.lora_bias = bias is not None
        if kind == "conv1d":
            holder = Conv1D(weight.shape[1], weight.shape[0])
        else:
            holder = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer = lora_layers.Linear(holder, "default", config, r=r, lora_alpha=alpha)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    holder.weight.data = weight.clone()
    if bias is not None:
        holder.bias.data = bias.clone()
        layer.lora_B["default"].bias.copy_(parts["lora_B.bias"])
    if "lora_magnitude_vector" in parts:
        magnitude = parts["lora_magnitude_vector"]
        if bias is not None:
            magnitude = magnitude.new_ones(b.shape[0])
        elif kind == "linear":
            magnitude = magnitude[band]
        layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude)
    layer.merge(safe_merge=bias is None)
    return holder.weight.data, None if bias is None else holder.bias.data


def _read_rows(tensor: TensorEntry, band: slice) -> Any:
    """Rows of a stored tensor in float32 (float64 stays)."""
    import torch

    dtype = torch_dtype(tensor.dtype)
    if not tensor.shape or tensor.shape[0] == 0:
        return torch.frombuffer(read_tensor_bytes(tensor), dtype=dtype).clone()
    row = (tensor.end - tensor.start) // tensor.shape[0]
    data = read_tensor_bytes(tensor, band.start * row, band.stop * row)
    flat = torch.frombuffer(data, dtype=dtype)
    flat = flat if dtype is torch.float64 else flat.float()
    return flat.reshape(band.stop - band.start, *tensor.shape[1:])


def _count_neighbours(name: str, expected: Any, written: Any, stored: str) -> int:
    """How many values are a neighbour of the expected one; KitError where one is further off or too many are."""
    import torch

    dtype = torch_dtype(stored)
    rounded = expected.to(dtype).to(expected.dtype)
    error = (written - rounded).abs()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    near = error <= torch.finfo(dtype).eps * expected.abs() + SLACK * largest
    # In float32 a neighbour is nothing to count: sums in another order end there all the time.
    off = int((error > SLACK * largest).sum()) if dtype.itemsize < 4 else 0
    if bool(near.all()) and off <= max(3, NEIGHBOURS * expected.numel()):
        return off
    raise KitError(
        f"{name} is not base + adapter: {off} of {expected.numel()} values compared are off, "
        f"the largest by {float(error.max()):.3g} where weights reach {largest:.3g}",
        fix="nothing was published; merge again, and report it if it stays",
        code=FAILED,
    )


def _require_same_edges(base: TensorEntry, merged: TensorEntry) -> None:
    size = base.end - base.start
    if base.dtype == merged.dtype:
        middle = size // 2
        spans = [(0, min(EDGE, size)), (middle, min(middle + EDGE, size)), (max(0, size - EDGE), size)]
        same = merged.end - merged.start == size and all(
            read_tensor_bytes(base, *s) == read_tensor_bytes(merged, *s) for s in spans
        )
    else:
        rows = slice(0, min(1, base.shape[0]) if base.shape else 0)
        want, have = _read_rows(base, rows), _read_rows(merged, rows)
        same = bool((want.to(torch_dtype(merged.dtype)).to(have.dtype) == have).all())
    if not same:
        problem = f"{merged.name} is not the base's, though no adapter names it"
        raise KitError(problem, str(merged.file), AGAIN, code=FAILED)
