"""Reads a DeepSpeed JSON and checks it by itself, without DeepSpeed.

DeepSpeed ignores unknown top-level keys and drops an "auto" that nobody filled; here that is said beforehand.
Upstream: deepspeed runtime/config.py and zero/config.py.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kit.errors import KitError, Problem
from kit.schema import fields
from kit.schema.dotted import value_at

ADAMS = ("adam", "adamw")
UNUSABLE = ("kind", "choice", "auto")  # rules that leave no value to compare


def load_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """One DeepSpeed JSON file. KitError with line and column for bad JSON, and for a key given twice."""
    return parse_deepspeed_json(read_deepspeed_text(path), path)


def read_deepspeed_text(path: str | Path) -> str:
    """The file's text with its own line ends, without a byte order mark; KitError where it is not to be had."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise KitError(f"cannot read {path}: {reason}", str(path), "give the path of a DeepSpeed JSON file") from None


def parse_deepspeed_json(text: str, path: str | Path, twice: bool = False) -> dict[str, Any]:
    """The block of a DeepSpeed JSON; `twice`: a key may be given twice (the last one counts, as elsewhere)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and not twice:
                lines = [str(n) for n, line in enumerate(text.splitlines(), 1) if f'"{key}"' in line]
                place = f"{path} lines {', '.join(lines)}"
                raise KitError(f"the key {key!r} is given twice in one block", place, "keep one of them")
            seen[key] = value
        return seen

    def refuse(constant: str) -> float:
        raise KitError(f"{constant} is not JSON", str(path), "give a finite number")

    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = f"{path} line {error.lineno} column {error.colno}"
        lines = text.splitlines()[error.lineno - 1 : error.lineno] or [""]
        comment = lines[0].strip().startswith(("//", "#", "/*"))
        fix = "JSON has no comments: remove it" if comment else f"mend: {lines[0].strip()[:80]}"
        raise KitError(f"not valid JSON: {error.msg}", place, fix) from None
    except RecursionError:
        raise KitError("not a DeepSpeed JSON: it is nested too deeply", str(path), "check the file") from None
    except ValueError:  # a whole number of more digits than Python reads
        raise KitError("not a DeepSpeed JSON: a number has too many digits", str(path), "check the file") from None
    if not isinstance(data, dict):
        raise KitError("a DeepSpeed JSON is one block of keys", str(path), 'start the file with "{"')
    return data


def check_deepspeed_json(ds: Mapping[str, Any], where: str = "deepspeed") -> list[Problem]:
    """All that is wrong in the JSON by itself: unknown and old keys, kinds, an "auto" that nobody fills, conflicts."""
    rest = dict(ds)
    problems = []
    if isinstance(rest.get("zero_optimization"), bool):
        key = f"{where}.zero_optimization"
        stage = int(rest.pop("zero_optimization"))
        problems.append(Problem(f"{key} must be a block", key, f"{key}.stage={stage}", "zero-block"))
    elif "zero_optimization" not in rest:
        key = f"{where}.zero_optimization"
        fix = f"{key}.stage=2 (or 0, 1, 3)"
        problems.append(Problem(f"{key} is missing: accelerate refuses that", key, fix, "zero-block"))
    for key in [k for k in rest if is_comment(k)]:
        del rest[key]
    problems += fields.check_fields("deepspeed", rest, where)
    for block, table in typed_params(rest).items():
        reported = {p.where for p in problems}
        problems += [
            p for p in fields.check_fields(table, value_at(rest, block), f"{where}.{block}") if p.where not in reported
        ]
    reported = {p.where for p in problems}
    problems += [p for p in _unfilled("deepspeed", rest, where, typed_params(rest)) if p.where not in reported]
    wrong = {re.sub(r"\[\d+\].*", "", p.where).removeprefix(f"{where}.") for p in problems if p.rule in UNUSABLE}
    if wrong & {"zero_optimization", "zero_optimization.stage"} or isinstance(ds.get("zero_optimization"), bool):
        return problems  # most of the rules below ask for the stage
    usable = copy.deepcopy(rest)
    for key in wrong:
        parent, _, last = key.rpartition(".")
        holder = value_at(usable, parent) if parent else usable
        if isinstance(holder, dict):
            holder.pop(last, None)
    return problems + [Problem(text, f"{where}.{key}", fix, "deepspeed") for key, text, fix in _conflicts(usable)]


def is_comment(key: Any) -> bool:
    """Tell whether a key at the top level is a remark: JSON has no comments, and DeepSpeed reads no such key."""
    return bool(re.match(r"_|//|#|\$schema$|(doc|desc|description|notes?|comments?)\d*$", str(key), re.IGNORECASE))


def use_aliases(values: Any, table: str = "deepspeed") -> Any:
    """Name each key as transformers reads it; DeepSpeed also takes its own field names, without `stage3_`."""
    if not isinstance(values, Mapping):
        return values
    known = fields.field_tables()[table]
    named = {}
    for key, value in values.items():
        entry = known.get(key, {})
        alias = entry.get("alias", key)
        inner = use_aliases(value, entry["table"]) if "table" in entry else value
        named[key if alias in values else alias] = inner
    return named


def typed_params(ds: Mapping[str, Any]) -> dict[str, str]:
    """{dotted block: table} of the params of an optimizer and a scheduler whose type has a table of its own."""
    blocks = {}
    for name in ("optimizer", "scheduler"):
        kind = value_at(ds, f"{name}.type")
        if isinstance(kind, str) and isinstance(value_at(ds, f"{name}.params"), Mapping):
            table = f"deepspeed.{name}.{'adam' if name == 'optimizer' and kind.lower() in ADAMS else kind}"
            if table in fields.field_tables():
                blocks[f"{name}.params"] = table
    return blocks


def _unfilled(table: str | None, values: Mapping[str, Any], where: str, typed: Mapping[str, str]) -> Iterator[Problem]:
    """Every "auto" that is text to DeepSpeed's reader: nobody fills it, and no kind tells."""
    known = fields.field_tables()[table] if table else {}
    for key, value in values.items():
        path, entry = f"{where}.{key}", known.get(key, {})
        if "instead" in entry:  # said already
            continue
        if isinstance(value, Mapping):
            inner = next((t for block, t in typed.items() if path.endswith(f".{block}")), entry.get("table"))
            yield from _unfilled(inner, value, path, typed)
        elif value == "auto" and isinstance(value, str) and not accepts_auto(entry):
            yield Problem(f'nobody fills the "auto" of {path}', path, "give a value or leave the key out", "auto")


def accepts_auto(entry: Mapping[str, Any]) -> bool:
    """Whether "auto" is a value here: filled by transformers or accelerate, or DeepSpeed's own word."""
    return bool(entry.get("auto")) or "auto" in entry.get("choices", ()) or entry.get("default") == "auto"


def _conflicts(ds: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (key, problem, fix) of keys that do not go together, as DeepSpeed's validators and engine have it."""
    zero: dict[str, Any] = dict(ds.get("zero_optimization") or {})
    yield from _offload_conflicts(zero)
    yield from _zero_conflicts(ds, zero)
    yield from _precision_conflicts(ds, zero)
    no_sum = zero.get("stage", 0) == 3 or zero.get("zenflow") or value_at(ds, "compile.deepcompile")
    if no_sum and str(ds.get("gradient_allreduce_op")).lower() == "sum":
        yield "gradient_allreduce_op", "sum is not for stage 3, ZenFlow or DeepCompile", "gradient_allreduce_op=mean"
    if value_at(ds, "tensor_parallel.dtype") is not None:
        yield "tensor_parallel.dtype", "it takes a torch.dtype, which no JSON holds: DeepSpeed refuses it", "remove it"
    if (ds.get("sequence_parallel_size") or 1) != 1:
        yield ("sequence_parallel_size", "with transformers, sequence parallelism is accelerate's to set up",
               "remove it")  # fmt: skip


def _offload_conflicts(zero: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    stage = zero.get("stage", 0)
    optimizer, param = (dict(zero.get(f"offload_{what}") or {}) for what in ("optimizer", "param"))
    z = "zero_optimization"
    if param.get("device", "none") not in ("none", "auto") and stage != 3:
        yield f"{z}.offload_param", f"stage {stage} does not read offload_param", "zero_optimization.stage=3"
    if optimizer.get("device", "none") not in ("none", "auto") and stage == 0:
        yield f"{z}.offload_optimizer", "stage 0 does not read offload_optimizer", "zero_optimization.stage=2"
    if optimizer.get("device") == "nvme" and stage in (1, 2):
        yield (f"{z}.offload_optimizer.device", f"stage {stage} offloads to the CPU, not to NVMe",
               "device=cpu, or zero_optimization.stage=3")  # fmt: skip
    for name, block in (("offload_optimizer", optimizer), ("offload_param", param)):
        if block.get("device") == "nvme" and block.get("nvme_path") in (None, "", "none", "auto"):
            yield f"{z}.{name}.nvme_path", f"{name} to NVMe needs nvme_path", "give a folder on a local NVMe disk"
    if optimizer.get("ratio", 1.0) < 1 and stage != 3:
        yield f"{z}.offload_optimizer.ratio", "a ratio below 1 needs stage 3", "zero_optimization.stage=3, or ratio=1"
    if optimizer.get("super_offload") and stage != 3:
        yield f"{z}.offload_optimizer.super_offload", "super_offload needs stage 3", "zero_optimization.stage=3"


def _zero_conflicts(ds: dict[str, Any], zero: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    stage, z = zero.get("stage", 0), "zero_optimization"
    for name, entry in fields.field_tables()["deepspeed.zero_optimization"].items():
        if (alias := entry.get("alias")) and name in zero and zero.get(alias, zero[name]) != zero[name]:
            yield f"{z}.{name}", f"{name} and {alias} are one setting with two values", "keep one of them"
    if zero.get("compute_grad_norm") is False and stage not in (1, 2):
        yield f"{z}.compute_grad_norm", "compute_grad_norm=false needs stage 1 or 2", "compute_grad_norm=true"
    if zero.get("compute_grad_norm") is False and ds.get("gradient_clipping", "auto") not in (0, "auto"):
        yield f"{z}.compute_grad_norm", "clipping needs the gradient norm", "gradient_clipping=0"
    if zero.get("elastic_checkpoint") and stage == 3:
        yield f"{z}.elastic_checkpoint", "stage 3 has no elastic checkpoints", "remove it"
    if zero.get("legacy_stage1"):
        yield f"{z}.legacy_stage1", "the engine refuses legacy_stage1", "remove it"


def _precision_conflicts(ds: dict[str, Any], zero: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for what in ("fp16", "bf16"):
        block = dict(ds.get(what) or {})
        if block.get(f"{what}_master_weights_and_grads") and zero.get("stage", 0) == 0:
            yield f"{what}.{what}_master_weights_and_grads", "it needs ZeRO 1, 2 or 3", "zero_optimization.stage=1"
    if value_at(ds, "fp16.enabled") in (True, "auto") and not value_at(ds, "fp16.loss_scale"):
        for name in ("loss_scale_window", "min_loss_scale"):
            number = value_at(ds, f"fp16.{name}")
            if isinstance(number, int) and number <= 0:
                yield f"fp16.{name}", f"{name} must be above 0 while the loss scale is dynamic", f"fp16.{name}=1"
    if value_at(ds, "bf16.bf16_optimizer_states") and not value_at(ds, "bf16.bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states", "it needs bf16_master_weights_and_grads", "set both"
    if value_at(ds, "fp16.enabled") is True and value_at(ds, "bf16.enabled") is True:
        yield "fp16.enabled", "fp16 and bf16 cannot both be enabled", 'set both to "auto"'
