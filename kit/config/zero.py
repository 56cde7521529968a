"""DeepSpeed's JSON without DeepSpeed: read it, check it, and replace every "auto" before anything is launched.

DeepSpeed ignores unknown top-level keys, drops an "auto" that nobody filled, and compares the rest with the trainer
only after the model is loaded. `check` and `resolve` say all of that beforehand.
Upstream: transformers integrations/deepspeed.py, accelerate utils/dataclasses.py, deepspeed runtime/config.py.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kit.config import fields
from kit.errors import KitError, Problem

Dict = dict[str, Any]
# Under offload accelerate swaps the optimizer for DeepSpeed's CPU version; only these keep their arithmetic, and
# the engine refuses what is neither CPUAdam nor CPULion (accelerate utils/deepspeed.py, deepspeed engine.py).
SURVIVES_OFFLOAD = ("adamw_torch", "adamw_torch_fused", "lion_32bit")
ADAMS = ("adam", "adamw")


def load(path: str | Path) -> Dict:
    """One DeepSpeed JSON file. KitError with line and column for bad JSON, and for a key given twice."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise KitError(f"cannot read {path}: {reason}", str(path), "give the path of a DeepSpeed JSON file") from None

    def unique(pairs: list[tuple[str, Any]]) -> Dict:
        seen: Dict = {}
        for key, value in pairs:
            if key in seen:
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
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        fix = "JSON has no comments: remove it" if line.startswith(("//", "#", "/*")) else f"mend: {line[:80]}"
        raise KitError(f"not valid JSON: {error.msg}", place, fix) from None
    except RecursionError:
        raise KitError("not a DeepSpeed JSON: it is nested too deeply", str(path), "check the file") from None
    if not isinstance(data, dict):
        raise KitError("a DeepSpeed JSON is one block of keys", str(path), 'start the file with "{"')
    return data


def check(ds: Mapping[str, Any], where: str = "deepspeed") -> list[Problem]:
    """All that is wrong in the JSON by itself: unknown and old keys, kinds, an "auto" that nobody fills, conflicts."""
    rest = dict(ds)
    problems = []
    if isinstance(rest.get("zero_optimization"), bool):
        key = f"{where}.zero_optimization"
        problems.append(
            Problem(f"{key} must be a block", key, f"{key}.stage={int(rest.pop('zero_optimization'))}", "zero-block")
        )
    elif "zero_optimization" not in rest:
        key = f"{where}.zero_optimization"
        said = f"{key} is missing: accelerate refuses that"
        problems.append(Problem(said, key, f"{key}.stage=2 (or 0, 1, 3)", "zero-block"))
    problems += fields.check("deepspeed", rest, where)
    scheduler = at(rest, "scheduler.type")
    if isinstance(scheduler, str) and f"deepspeed.scheduler.{scheduler}" in fields.tables():
        params = at(rest, "scheduler.params")
        if isinstance(params, Mapping):
            problems += fields.check(f"deepspeed.scheduler.{scheduler}", params, f"{where}.scheduler.params")
    if any(p.rule == "kind" for p in problems):
        return problems  # the rules below compare values
    return problems + [Problem(said, f"{where}.{key}", fix, "deepspeed") for key, said, fix in _conflicts(rest)]


def _conflicts(ds: Dict) -> Iterator[tuple[str, str, str]]:
    """(key, problem, fix) for keys that do not go together; each stands in DeepSpeed's validators or engine."""
    zero: Dict = dict(ds.get("zero_optimization") or {})
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
    if zero.get("compute_grad_norm") is False and stage not in (1, 2):
        yield f"{z}.compute_grad_norm", "compute_grad_norm=false needs stage 1 or 2", "compute_grad_norm=true"
    if zero.get("compute_grad_norm") is False and ds.get("gradient_clipping", "auto") not in (0, "auto"):
        yield f"{z}.compute_grad_norm", "clipping needs the gradient norm", "gradient_clipping=0"
    if zero.get("elastic_checkpoint") and stage == 3:
        yield f"{z}.elastic_checkpoint", "stage 3 has no elastic checkpoints", "remove it"
    if zero.get("legacy_stage1"):
        yield f"{z}.legacy_stage1", "the engine refuses legacy_stage1", "remove it"
    for what in ("fp16", "bf16"):
        block = dict(ds.get(what) or {})
        if block.get(f"{what}_master_weights_and_grads") and stage == 0:
            yield f"{what}.{what}_master_weights_and_grads", "it needs ZeRO 1, 2 or 3", "zero_optimization.stage=1"
    if at(ds, "bf16.bf16_optimizer_states") and not at(ds, "bf16.bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states", "it needs bf16_master_weights_and_grads", "set both"
    if at(ds, "fp16.enabled") is True and at(ds, "bf16.enabled") is True:
        yield "fp16.enabled", "fp16 and bf16 cannot both be enabled", 'set both to "auto"'
    no_sum = stage == 3 or zero.get("zenflow") or at(ds, "compile.deepcompile")
    if no_sum and str(ds.get("gradient_allreduce_op")).lower() == "sum":
        yield "gradient_allreduce_op", "sum is not for stage 3, ZenFlow or DeepCompile", "gradient_allreduce_op=mean"
    if (ds.get("sequence_parallel_size") or 1) != 1:
        yield ("sequence_parallel_size", "with transformers, sequence parallelism is accelerate's to set up",
               "remove it and use trainer.parallelism_config")  # fmt: skip


def resolve(
    ds: Mapping[str, Any],
    *,
    trainer: Mapping[str, Any],
    world_size: int,
    hidden_size: int | None,
    precision: Literal["float32", "bfloat16", "float16"],
    total_steps: int | None = None,
    chosen: Collection[str] = (),
    where: str = "deepspeed",
) -> Dict:
    """The JSON as DeepSpeed will get it: no "auto", nothing that disagrees with the trainer, nothing left to defaults.

    `trainer`: SFTConfig values (absent ones have TRL's default); `total_steps`: optimizer steps of the run, where
    they are known; `chosen`: names of trainer settings that the user gave. Raises KitError with all problems,
    those of `check` included. Bucket sizes are HF's own formulas, for tiny models too: DeepSpeed sends a tensor
    that is larger than the bucket by itself, so a small bucket costs speed but never correctness.
    """
    problems = check(ds, where)
    if any(p.rule not in ("unknown-key", "range", "deepspeed") for p in problems):
        raise KitError(problems)  # nothing can be computed from values of the wrong kind
    out = fields.cast("deepspeed", copy.deepcopy(dict(ds)))
    fill = _Fill(out, trainer, chosen, where, problems)

    micro, steps = fill.setting("per_device_train_batch_size"), fill.setting("gradient_accumulation_steps")
    fill.match("train_micro_batch_size_per_gpu", micro, "trainer.per_device_train_batch_size")
    fill.match("gradient_accumulation_steps", steps, "trainer.gradient_accumulation_steps")
    product = "trainer.per_device_train_batch_size x gradient_accumulation_steps x processes"
    source = f"{product} ({micro} x {steps} x {world_size})"
    fill.match("train_batch_size", micro * steps * world_size, source, mend="change one of the three")
    fill.match("gradient_clipping", fill.setting("max_grad_norm"), "trainer.max_grad_norm")
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        on = precision == dtype or trainer.get(f"{name}_full_eval") is True
        mend = f"trainer.{name}={str(not on).lower()}"
        fill.match(f"{name}.enabled", on, f"the precision of the run ({precision})", mend=mend)
    if at(out, "fp16.enabled") and at(out, "bf16.enabled"):
        said = f"evaluation in another half precision than the run's {precision}"
        fix = "leave fp16_full_eval and bf16_full_eval out"
        problems.append(Problem(said, "trainer.fp16_full_eval", fix, "full-eval"))
    _fill_zero(fill, hidden_size)
    _fill_optimizer(fill)
    if "scheduler" in out:
        _fill_scheduler(fill, fill.setting("max_steps") if fill.setting("max_steps") > 0 else total_steps)
    if trainer.get("save_on_each_node"):
        put(out, "checkpoint.use_node_local_storage", True)
    if at(out, "zero_optimization.compute_grad_norm") is False and out["gradient_clipping"]:
        key = "zero_optimization.compute_grad_norm"
        fill.refuse(key, "clipping needs the gradient norm", "trainer.max_grad_norm=0")
    if problems:
        raise KitError(problems)
    return _without_auto(out)


@dataclass
class _Fill:
    """The JSON being filled (in place), where its values come from, and what was found wrong."""

    out: Dict
    trainer: Mapping[str, Any]
    chosen: Collection[str]
    where: str
    problems: list[Problem]

    def setting(self, key: str) -> Any:
        """The trainer's value; TRL's default where it is absent or wrong (then it is reported elsewhere)."""
        value = self.trainer.get(key)
        if value is None or fields.check("SFTConfig", {key: value}):
            return fields.default("SFTConfig", key)
        return value

    def refuse(self, key: str, said: str, fix: str, rule: str = "deepspeed") -> None:
        path = f"{self.where}.{key}"
        if all(p.where != path for p in self.problems):
            self.problems.append(Problem(said, path, fix, rule))

    def match(self, key: str, value: Any, source: str, *, present_only: bool = False, mend: str = "") -> None:
        """Put `value` at a dotted key; a literal that is there already must be the same."""
        given = at(self.out, key)
        if given is None and present_only:
            return
        if given is not None and given != "auto" and given != value:
            said = f"{self.where}.{key} is {given}, but {source} makes it {value}"
            self.refuse(key, said, f"{self.where}.{key}=auto, or {mend or f'{source}={given}'}", "mismatch")
        put(self.out, key, value)


def _fill_zero(fill: _Fill, hidden_size: int | None) -> None:
    """Bucket sizes from the model's width (transformers' formulas) and what accelerate fills."""
    zero = fill.out["zero_optimization"]
    sized = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    asked = [key for key in sized if zero.get(key) == "auto"]
    if asked and hidden_size is None:
        said = f'the width of the model is not known, so "auto" cannot be filled: {", ".join(asked)}'
        fix = "model.config.hidden_size=N, fetch the model's config.json, or give numbers for these keys"
        fill.refuse(f"zero_optimization.{asked[0]}", said, fix, "hidden-size")
    elif hidden_size is not None:
        square = hidden_size * hidden_size
        for key, value in zip(sized, (square, int(0.9 * square), 10 * hidden_size), strict=True):
            if key in asked:
                zero[key] = value
    if zero.get("stage3_gather_16bit_weights_on_model_save") == "auto":
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name)
        if not isinstance(block, dict):
            continue
        if block.get("device") == "auto":
            block["device"] = "none"
        if block.get("device", "none") != "nvme" and block.get("nvme_path") in ("auto", "none"):
            del block["nvme_path"]


def _fill_optimizer(fill: _Fill) -> None:
    """DeepSpeed's optimizer from the trainer, or the permission to use the trainer's own."""
    out, optim = fill.out, fill.setting("optim")
    if "optimizer" not in out:
        out["zero_allow_untested_optimizer"] = True  # transformers sets it as well
        offloads = at(out, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
        if offloads and optim not in SURVIVES_OFFLOAD and out.get("zero_force_ds_cpu_optimizer", True):
            said = f"offload_optimizer replaces trainer.optim={optim} by plain CPU Adam"
            fix = f"trainer.optim=adamw_torch, or {fill.where}.zero_force_ds_cpu_optimizer=false to keep {optim}"
            fill.problems.append(Problem(said, "trainer.optim", fix, "offload-optimizer"))
        return
    if "optim" in fill.chosen or optim != fields.default("SFTConfig", "optim"):
        said = f"trainer.optim={optim} would be ignored: {fill.where}.optimizer is given"
        fill.refuse("optimizer", said, f"leave trainer.optim out, or '~{fill.where}.optimizer'", "optimizer")
    other = str(at(out, "optimizer.type")).lower() not in ADAMS  # does not take all of these
    betas = [fill.setting("adam_beta1"), fill.setting("adam_beta2")]
    named = "trainer.adam_beta1 and adam_beta2"
    fill.match("optimizer.params.lr", fill.setting("learning_rate"), "trainer.learning_rate")
    fill.match("optimizer.params.betas", betas, named, present_only=other, mend=f"change {named}")
    for key, source in (("eps", "adam_epsilon"), ("weight_decay", "weight_decay")):
        fill.match(f"optimizer.params.{key}", fill.setting(source), f"trainer.{source}", present_only=other)


def _fill_scheduler(fill: _Fill, total: int | None) -> None:
    """DeepSpeed's scheduler from the trainer; left out, its warm-up would be 1000 steps and its peak rate 0.001."""
    out, drop = fill.out, f"'~{fill.where}.scheduler' so that trainer.lr_scheduler_type is used"
    if "lr_scheduler_type" in fill.chosen:
        said = f"trainer.lr_scheduler_type would be ignored: {fill.where}.scheduler is given"
        fill.refuse("scheduler", said, drop, "scheduler")
    table = f"deepspeed.scheduler.{at(out, 'scheduler.type')}"
    out["scheduler"]["params"] = fields.cast(table, out["scheduler"].get("params") or {})
    taken = fields.names(table)
    if at(out, "scheduler.params.warmup_min_lr") == "auto":
        put(out, "scheduler.params.warmup_min_lr", 0)
    if "warmup_max_lr" in taken:
        fill.match("scheduler.params.warmup_max_lr", fill.setting("learning_rate"), "trainer.learning_rate")
    if "total_num_steps" in taken and total is None:
        said = f"{fill.where}.scheduler needs the number of steps, which is not known before the data is read"
        fill.refuse("scheduler.params.total_num_steps", said, f"trainer.max_steps=N, or {drop}", "scheduler")
    elif "total_num_steps" in taken:
        fill.match("scheduler.params.total_num_steps", total, "trainer.max_steps")
    warmup = fill.setting("warmup_steps")
    if "warmup_num_steps" in taken and 0 < warmup < 1 and total is None:
        said = f"trainer.warmup_steps={warmup} is a share of a number of steps that is not known"
        fill.refuse("scheduler.params.warmup_num_steps", said, f"trainer.max_steps=N, or {drop}", "scheduler")
    elif "warmup_num_steps" in taken:
        steps = int(warmup) if warmup >= 1 else math.ceil((total or 0) * warmup)
        fill.match("scheduler.params.warmup_num_steps", max(1, steps), "trainer.warmup_steps")


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key, None where any part is absent."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def put(tree: Dict, key: str, value: Any) -> None:
    """Set a dotted key, making the blocks on the way."""
    *blocks, last = key.split(".")
    for part in blocks:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _without_auto(tree: Dict) -> Dict:
    """Leave out the "auto" that is DeepSpeed's own word for its default (pipeline.stages, keep_in_fp32_modules)."""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in tree.items() if v != "auto"}
