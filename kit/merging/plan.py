"""What each tensor of the merged model is made of: decided in full, or refused, before any byte is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kit.errors import KitError, Problem
from kit.inspection.adapter import PREFIX, check_size, missing_tensors, unknown_modules
from kit.merging.adapter import (
    rank_and_scale,
    read_sorted_adapter,
    reason_for_peft,
    trained_token_ids,
)
from kit.merging.dequantize import BaseQuantization, quantized_modules
from kit.merging.names import TensorNames, build_on_meta, map_tensor_names
from kit.merging.parts import LoraUpdate, MergePlan, OutputTensor, TensorEdit
from kit.merging.ties import check_resized_vocabulary, resolve_tied_weights, set_config_value
from kit.models.adapters import expected_adapter_keys
from kit.storage.json_files import read_json
from kit.storage.safetensors_header import INDEX, TensorEntry, read_header, read_model_config, shard_files

FLOATS = ("F64", "F32", "F16", "BF16")
BINS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def plan_merge(
    base: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    proven: bool = False,
    trained_on: BaseQuantization | None = None,
    dequantize: bool = False,
) -> MergePlan:
    """Plan a merge; `proven`: the base is known to be the adapter's own. KitError lists all that does not fit.

    trained_on: how the run quantized the base; `dequantize`: merge onto what that left of it.
    """
    config = read_model_config(base)
    shards = _read_base(base, config)
    tensors = {t.name: t for file in shards.values() for t in file}
    adapter = read_sorted_adapter(folder)
    through_peft = reason_for_peft(adapter)
    names = TensorNames({}) if through_peft and not dequantize else map_tensor_names(base, config, tensors)
    plan = MergePlan(base, adapter, config, names, tensors, indexed=(base / INDEX).is_file(), trained_on=trained_on)
    if dequantize and trained_on:
        plan.dequantized = quantized_modules(base, trained_on)
    plan.notes += [names.note] if names.note else []
    plan.through_peft = through_peft or _reason_names_need_peft(plan)
    if plan.through_peft:
        return plan
    if not proven:
        _refuse_deeper_base(plan)
    edits = _plan_edits(plan)
    if missing := _missing_keys(plan):
        raise missing_tensors(folder, missing)
    for parameter in (f"{module}.weight" for module in plan.dequantized):
        edits.setdefault(parameter, TensorEdit()).restore = plan.restores(parameter)
    resolve_tied_weights(plan, edits)
    _lay_out(plan, shards, edits, dtype)
    return plan


def _read_base(base: Path, config: dict[str, Any]) -> dict[str, list[TensorEntry]]:
    files = shard_files(base)
    if not files:
        pickled = next((b for b in BINS if (base / b).is_file()), None)
        raise KitError(
            f"{base} holds {pickled}, a pickle" if pickled else f"{base} has no safetensors",
            fix="use a revision with safetensors, or load the model with transformers and save_pretrained it",
        )
    if config.get("quantization_config"):
        raise KitError(
            f"{base} is stored quantized: adding to it would quantize again",
            where="--base",
            fix="merge into the original, unquantized model",
        )
    shards = {f.name: read_header(f) for f in files}
    seen: dict[str, TensorEntry] = {}
    for tensor in (t for file in shards.values() for t in file):
        check_size(tensor)
        if tensor.name in seen:
            raise KitError(
                f"{tensor.name} is stored twice, in {seen[tensor.name].file} and {tensor.file}",
                fix="fetch the model again",
            )
        seen[tensor.name] = tensor
    if (base / INDEX).is_file():
        missing = [n for n in read_json(base / INDEX)["weight_map"] if n not in seen]
        if missing:
            raise KitError(
                f"{base} lacks {len(missing)} tensors that its index names, {missing[0]} first",
                fix="fetch the model again",
            )
    return shards


def _reason_names_need_peft(plan: MergePlan) -> str:
    """Why the adapter's names do not lead to one stored tensor each; KitError where they lead nowhere at all."""
    names, adapter = plan.names, plan.adapter
    absent = [m for m in [*adapter.lora, *adapter.rows] if names.kind(m) is None]
    if names.kinds is not None:
        absent += [p for p in adapter.full if names.kind(p.rpartition(".")[0]) is None]
    if absent and names.converts:
        return f"transformers renames modules of this model, {absent[0]} among them"
    if absent:
        raise unknown_modules(adapter.folder, absent)
    for module in adapter.lora:
        parameter = f"{module}.weight"
        if parameter in names.fused:
            return f"{parameter} is stored in several parts"
        if names.kind(module) == "other":
            return f"{module} is neither a linear layer nor an embedding"
        if parameter not in names.stored and parameter not in names.tied:
            return f"{parameter} has no stored tensor"
    whole = [*adapter.full, *(f"{module}.weight" for module in sorted(plan.dequantized))]
    return next((f"{p} is stored in several parts" for p in whole if p in names.fused), "")


def _plan_edits(plan: MergePlan) -> dict[str, TensorEdit]:
    """Edits by parameter name; KitError lists every tensor whose shape does not fit."""
    adapter, problems = plan.adapter, []
    edits: dict[str, TensorEdit] = {}
    for parameter, tensor in adapter.full.items():
        edits[parameter] = TensorEdit(replace=tensor)
        old = _stored_tensor(plan, parameter)
        if old and old.shape != tensor.shape and (old.shape[1:] != tensor.shape[1:] or len(old.shape) != 2):
            problems.append(_shape_problem(parameter, tensor.shape, old.shape))
    for module, parts in adapter.lora.items():
        rank, scale = rank_and_scale(adapter.config, module)
        embedding = "lora_embedding_A" in parts
        a = parts.get("lora_embedding_A" if embedding else "lora_A.weight")
        b = parts.get("lora_embedding_B" if embedding else "lora_B.weight")
        if a is None or b is None:
            absent = "A" if a is None else "B"
            raise missing_tensors(adapter.folder, _missing_keys(plan) or [f"{PREFIX}{module}.lora_{absent}.weight"])
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            problems.append(_shape_problem(f"{module} lora_A/lora_B", f"{a.shape} and {b.shape}", f"rank {rank}"))
            continue
        kind = plan.names.kind(module)
        transposed = embedding or kind == "conv1d"
        transposed = transposed or (kind == "unknown" and bool(adapter.config.get("fan_in_fan_out")))
        edit = edits.setdefault(f"{module}.weight", TensorEdit())
        start = (
            edit.replace
            or _stored_tensor(plan, f"{module}.weight")
            or _stored_tensor(plan, plan.names.tied[f"{module}.weight"])
        )
        change = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if start is None or start.shape != change:
            problems.append(_shape_problem(module, change, start.shape if start else "nothing"))
            continue
        magnitude = parts.get("lora_magnitude_vector")
        if bool(adapter.config.get("use_dora")) != (magnitude is not None):
            problems.append(
                Problem(
                    f"{module}: use_dora and lora_magnitude_vector disagree",
                    str(adapter.folder),
                    "copy the adapter again",
                )
            )
        edit.lora = LoraUpdate(a, b, scale, transposed, magnitude)
        if "lora_B.bias" in parts:
            if _stored_tensor(plan, f"{module}.bias") is None:
                problems.append(
                    Problem(
                        f"{module} has no bias that lora_bias could be merged into",
                        str(plan.base),
                        "give the base that the adapter was trained on with --base",
                    )
                )
            edits.setdefault(f"{module}.bias", TensorEdit()).add = (parts["lora_B.bias"], scale)
    problems += _plan_token_rows(plan, edits)
    if problems:
        raise KitError(problems)
    return edits


def _plan_token_rows(plan: MergePlan, edits: dict[str, TensorEdit]) -> list[Problem]:
    """Add the rows of trained tokens to `edits`; gives those that do not fit."""
    adapter, problems = plan.adapter, []
    for module, tensor in adapter.rows.items():
        edit = edits.setdefault(f"{module}.weight", TensorEdit())
        start = (
            edit.replace
            or _stored_tensor(plan, f"{module}.weight")
            or _stored_tensor(plan, plan.names.tied[f"{module}.weight"])
        )
        indices = trained_token_ids(adapter.config, module)
        if start is None or tensor.shape != (len(indices), *start.shape[1:]):
            problems.append(_shape_problem(module, tensor.shape, start.shape if start else "nothing"))
        elif indices and max(indices) >= start.shape[0]:
            problems.append(
                Problem(
                    f"token {max(indices)} of {module} lies beyond the {start.shape[0]} rows of the base",
                    fix="train with save_embedding_layers=true after resizing the vocabulary",
                )
            )
        edit.rows = (indices, tensor)
    return problems


def _shape_problem(what: str, change: object, base: object) -> Problem:
    return Problem(
        f"{what}: the adapter is for {change}, the base has {base}",
        fix="give the base that the adapter was trained on with --base",
    )


def _stored_tensor(plan: MergePlan, parameter: str) -> TensorEntry | None:
    name = plan.names.stored.get(parameter)
    return plan.tensors[name] if name else None


def _refuse_deeper_base(plan: MergePlan) -> None:
    """Refuse a base with whole layers that the adapter does not know, unless it was trained on a choice of layers."""
    config, kinds = plan.adapter.config, plan.names.kinds
    targets = config.get("target_modules")
    if kinds is None or config.get("layers_to_transform") is not None or not targets:
        return
    layer = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
    known: dict[str, set[int]] = {}
    for module in plan.adapter.lora:
        if match := layer.match(module):
            known.setdefault(match[1], set()).add(int(match[2]))
    missing = set()
    for module in kinds:
        match = layer.match(module)
        if not match or match[1] not in known or int(match[2]) <= max(known[match[1]]):
            continue
        fits = re.fullmatch(targets, module) if isinstance(targets, str) else module.split(".")[-1] in targets
        if fits:
            missing.add(f"{match[1]}.{match[2]}")
    if missing:
        raise KitError(
            f"the base has {len(missing)} layers that the adapter does not know: {', '.join(sorted(missing)[:5])}",
            where=f"base {plan.base}",
            fix="give the base that the adapter was trained on with --base",
        )


def _missing_keys(plan: MergePlan) -> set[str]:
    """The tensors that the adapter's config asks for in this base and its file lacks; empty where that is unknown."""
    adapter = plan.adapter.opened
    if plan.names.kinds is None:
        return set()
    return expected_adapter_keys(build_on_meta(plan.base), adapter) - (adapter.tensors or {}).keys()


def _lay_out(
    plan: MergePlan, shards: dict[str, list[TensorEntry]], edits: dict[str, TensorEdit], dtype: str | None
) -> None:
    """Fill plan.shards: the base's files and order, what is new behind its partner or in the last file."""
    by_stored = {plan.names.stored.get(p, p): e for p, e in edits.items()}
    tied = {plan.names.stored.get(o, o): plan.names.stored.get(m, m) for o, m in plan.names.tied.items()}
    for file, tensors in shards.items():
        plan.shards[file] = []
        for t in tensors:
            # A tied matrix that is stored all the same follows its partner.
            edit = by_stored.get(t.name) or (by_stored.get(tied.get(t.name, "")) if _stays_tied(plan) else None)
            plan.shards[file].append(_output_tensor(t.name, t, edit, dtype))
    for parameter, edit in edits.items():
        name = plan.names.stored.get(parameter, parameter)
        if name in plan.tensors:
            continue
        partner = plan.tensors.get(tied.get(name, ""))
        source = edit.replace or partner
        if source is None:
            raise KitError(
                f"{parameter} is in the adapter but neither stored in the base nor tied",
                str(plan.base),
                "give the base that the adapter was trained on with --base",
            )
        file = partner.file.name if partner else list(shards)[-1]
        new = _output_tensor(name, source, edit, dtype)
        if partner:
            new.dtype = _output_dtype(partner.dtype, dtype)
        plan.shards[file].append(new)
    check_resized_vocabulary(plan)
    for o in plan.edited:
        if o.dtype not in FLOATS or o.source.dtype not in FLOATS:
            raise KitError(
                f"{o.name} is stored as {o.source.dtype}: only {', '.join(FLOATS)} can be merged into",
                where=str(plan.base),
                fix="give the original, unquantized base",
            )
    if dtype:
        set_config_value(plan, "torch_dtype" if "torch_dtype" in plan.config else "dtype", dtype)


def _stays_tied(plan: MergePlan) -> bool:
    return "tie_word_embeddings" not in plan.changes


def _output_dtype(stored: str, wanted: str | None) -> str:
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[wanted] if wanted and stored in FLOATS else stored


def _output_tensor(name: str, stored: TensorEntry, edit: TensorEdit | None, dtype: str | None) -> OutputTensor:
    source = edit.replace if edit and edit.replace else stored
    return OutputTensor(name, _output_dtype(stored.dtype, dtype), source.shape, source, edit)
