"""Fills every "auto" of a DeepSpeed JSON before anything is launched, and compares the JSON with the trainer.

DeepSpeed and transformers compare the two only after the model is loaded.
Upstream: transformers integrations/deepspeed.py, accelerate utils/dataclasses.py, deepspeed runtime/config.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kit.config.deepspeed.check import ADAMS, check_deepspeed_json
from kit.config.deepspeed.filled_keys import FILLED_KEYS, TRAINER_SETTINGS
from kit.errors import KitError, Problem
from kit.forecast.memory import Sizes
from kit.schema import fields
from kit.schema.dotted import set_value, value_at

# Under offload accelerate swaps the optimizer for DeepSpeed's CPU version; only these keep their arithmetic, and
# the engine refuses what is neither CPUAdam nor CPULion (accelerate utils/deepspeed.py, deepspeed engine.py).
SURVIVES_OFFLOAD = ("adamw_torch", "adamw_torch_fused", "lion_32bit")

# Other ways to gather and shard under ZeRO-3, with which whole decoder layers have not been tried.
GATHERED_OTHERWISE = (
    "stage3_module_granularity_threshold", "zenflow", "mics_shard_size", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
)  # fmt: skip
LOW_RANK = 10**6  # parameters of an adapter's matrix that every rank may keep
OWN_RATE = ("OneCycle", "LRRangeTest")  # deepspeed runtime/lr_schedules.py: these set the rate, whatever it was


def resolve_deepspeed_json(ds: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Fill the JSON as fill_deepspeed_json does; KitError with all problems where anything is wrong."""
    out, problems = fill_deepspeed_json(ds, **given)
    if problems:
        raise KitError(problems)
    return out


def fill_deepspeed_json(
    ds: Mapping[str, Any],
    *,
    trainer: Mapping[str, Any],
    world_size: int,
    hidden_size: int | None,
    precision: Literal["float32", "bfloat16", "float16"],
    total_steps: int | None = None,
    decoder_layers: Sequence[str] = (),
    sizes: Sizes | None = None,
    chosen: Collection[str] = (),
    where: str = "deepspeed",
) -> tuple[dict[str, Any], list[Problem]]:
    """Fill the JSON as DeepSpeed will get it: no "auto", no disagreement with the trainer, nothing left to defaults.

    `trainer`: SFTConfig values (absent ones have TRL's default); `total_steps`: optimizer steps of the run, where
    they are known; `decoder_layers`: the base's classes, which ZeRO-3 gathers whole where the JSON says nothing of
    leaf modules; `sizes`: of the base and its adapter, by which they are gathered; `chosen`: names of trainer settings
    that the user gave. Returns the JSON with all problems, those of check_deepspeed_json included; unfilled where
    values of the wrong type are among them. Bucket sizes are HF's own formulas, for tiny models too: DeepSpeed sends a
    tensor that is larger than the bucket by itself, so a small bucket costs speed but never correctness.
    """
    problems = check_deepspeed_json(ds, where)
    if any(p.rule not in ("unknown-key", "range", "deepspeed") for p in problems):
        return dict(ds), problems  # nothing can be computed from values of the wrong kind
    out = fields.cast_fields("deepspeed", copy.deepcopy(dict(ds)))
    fill = _Fill(out, trainer, chosen, where, problems)

    fill.copy("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    micro, steps = fill.setting("per_device_train_batch_size"), fill.setting("gradient_accumulation_steps")
    source = f"trainer.{TRAINER_SETTINGS['train_batch_size']} ({micro} x {steps} x {world_size})"
    fill.match("train_batch_size", micro * steps * world_size, source, mend="change one of the three")
    fill.copy("gradient_clipping")
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        on = precision == dtype or trainer.get(f"{name}_full_eval") is True
        mend = f"trainer.{name}={str(not on).lower()}"
        fill.match(f"{name}.enabled", on, f"the precision of the run ({precision})", mend=mend)
    if value_at(out, "fp16.enabled") and value_at(out, "bf16.enabled"):
        text = f"evaluation in another half precision than the run's {precision}"
        fix = "leave fp16_full_eval and bf16_full_eval out"
        problems.append(Problem(text, "trainer.fp16_full_eval", fix, "full-eval"))
    _fill_zero(fill, hidden_size)
    _fill_leaf_modules(fill, decoder_layers)
    if sizes and hidden_size:
        _fill_gathering(fill, sizes, hidden_size)
    _fill_optimizer(fill)
    if "scheduler" in out:
        _fill_scheduler(fill, fill.setting("max_steps") if fill.setting("max_steps") > 0 else total_steps)
    if trainer.get("save_on_each_node"):
        set_value(out, "checkpoint.use_node_local_storage", True)
    if value_at(out, "zero_optimization.compute_grad_norm") is False and out["gradient_clipping"]:
        key = "zero_optimization.compute_grad_norm"
        fill.refuse(key, "clipping needs the gradient norm", "trainer.max_grad_norm=0")
    return _without_auto(out), problems


@dataclass
class _Fill:
    """The JSON being filled (in place), where its values come from, and what was found wrong."""

    out: dict[str, Any]
    trainer: Mapping[str, Any]
    chosen: Collection[str]
    where: str
    problems: list[Problem]

    def setting(self, key: str) -> Any:
        """The trainer's value; TRL's default where it is absent or wrong (then it is reported elsewhere)."""
        value = self.trainer.get(key)
        if value is None or fields.check_fields("SFTConfig", {key: value}):
            return fields.field_default("SFTConfig", key)
        return value

    def refuse(self, key: str, text: str, fix: str, rule: str = "deepspeed") -> None:
        path = f"{self.where}.{key}"
        if all(p.where != path for p in self.problems):
            self.problems.append(Problem(text, path, fix, rule))

    def copy(self, *keys: str, present_only: bool = False) -> None:
        """Put the trainer's value at keys that one setting fills as it is."""
        for key in keys:
            [source] = FILLED_KEYS[key].sources
            self.match(key, self.setting(source.removeprefix("trainer.")), source, present_only=present_only)

    def match(self, key: str, value: Any, source: str, *, present_only: bool = False, mend: str = "") -> None:
        """Put `value` at a dotted key; a literal that is there already must be the same."""
        given = value_at(self.out, key)
        if given is None and present_only:
            return
        if given is not None and given != "auto" and given != value:
            text = f"{self.where}.{key} is {given}, but {source} makes it {value}"
            self.refuse(key, text, f"{self.where}.{key}=auto, or {mend or f'{source}={given}'}", "mismatch")
        set_value(self.out, key, value)


def _fill_zero(fill: _Fill, hidden_size: int | None) -> None:
    """Fill sizes from the model's width (transformers' formulas), and what accelerate fills whatever the run is."""
    auto = {key: row for key, row in FILLED_KEYS.items() if value_at(fill.out, key) == "auto"}
    sizes = {key: row.size for key, row in auto.items() if row.size}
    if sizes and hidden_size is None:
        names = ", ".join(key.rpartition(".")[2] for key in sizes)
        text = f'the width of the model is not known, so "auto" cannot be filled: {names}'
        fix = "model.config.hidden_size=N, fetch the model's config.json, or give numbers for these keys"
        fill.refuse(next(iter(sizes)), text, fix, "hidden-size")
    elif hidden_size is not None:
        for key, compute in sizes.items():
            set_value(fill.out, key, compute(hidden_size))
    for key, row in auto.items():
        if row.filled_by == "constant" and row.constant is not None:
            set_value(fill.out, key, row.constant)
    for name in ("offload_optimizer", "offload_param"):
        block = fill.out["zero_optimization"].get(name)
        if isinstance(block, dict) and block.get("device", "none") != "nvme":
            if block.get("nvme_path") in ("auto", "none"):
                del block["nvme_path"]


def _fill_leaf_modules(fill: _Fill, decoder_layers: Sequence[str]) -> None:
    """Have each decoder layer gathered whole, where the JSON says nothing of leaf modules.

    Module by module, DeepSpeed's Python hooks take longer than the GPUs' work once PEFT has made a module of each
    matrix. Not where parameters lie on NVMe, whose buffers hold `buffer_count` of them, and not where torch.compile or
    another way of gathering is asked for.
    """
    zero = fill.out["zero_optimization"]
    compiled = fill.setting("torch_compile") or value_at(fill.out, "compile.deepcompile")
    if not decoder_layers or zero.get("stage") != 3 or "leaf_module" in zero or compiled:
        return
    if value_at(zero, "offload_param.device") == "nvme" or any(
        zero.get(k, 0) not in (0, 1, -1, None) for k in GATHERED_OTHERWISE
    ):
        return
    zero["leaf_module"] = {"classes": list(decoder_layers)}


def _fill_gathering(fill: _Fill, sizes: Sizes, hidden_size: int) -> None:
    """Have the next layer gathered while one computes, where the JSON says nothing of it, and no low-rank matrix.

    DeepSpeed gathers ahead as long as fewer than `stage3_max_live_parameters` are whole. Embedding and head stay whole
    for most of a step, and by themselves are more than its default of 1e9 in many models: then nothing is gathered
    ahead, whatever the prefetch bucket (partitioned_param_coordinator.py). The hooks of a low-rank matrix cost more
    time than its place is worth.
    """
    zero, layer = fill.out["zero_optimization"], sizes.largest_layer
    if zero.get("stage") != 3 or value_at(zero, "offload_param.device") == "nvme":
        return
    zero.setdefault("stage3_prefetch_bucket_size", layer)
    kept = zero.setdefault("stage3_max_reuse_distance", layer)
    zero.setdefault("stage3_max_live_parameters", int(sizes.ends + kept + 2 * layer))
    whole = sizes.rank * sizes.widest
    zero.setdefault("stage3_param_persistence_threshold", max(whole * (whole <= LOW_RANK), 10 * hidden_size))


def _fill_optimizer(fill: _Fill) -> None:
    """DeepSpeed's optimizer from the trainer, or the permission to use the trainer's own."""
    out, optim = fill.out, fill.setting("optim")
    if "optimizer" not in out:
        if out.get("zero_allow_untested_optimizer") is False:
            fix = "leave it out: transformers sets it for an optimizer of the trainer's"
            text = "zero_allow_untested_optimizer=false refuses every optimizer but DeepSpeed's own"
            fill.refuse("zero_allow_untested_optimizer", text, fix, "optimizer")
        out["zero_allow_untested_optimizer"] = True  # transformers sets it as well
        offloads = value_at(out, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
        if offloads and optim not in SURVIVES_OFFLOAD and out.get("zero_force_ds_cpu_optimizer", True):
            text = f"offload_optimizer replaces trainer.optim={optim} by plain CPU Adam"
            fix = f"trainer.optim=adamw_torch, or {fill.where}.zero_force_ds_cpu_optimizer=false to keep {optim}"
            fill.problems.append(Problem(text, "trainer.optim", fix, "offload-optimizer"))
        return
    if "optim" in fill.chosen or optim != fields.field_default("SFTConfig", "optim"):
        text = f"trainer.optim={optim} would be ignored: {fill.where}.optimizer is given"
        fill.refuse("optimizer", text, f"leave trainer.optim out, or '~{fill.where}.optimizer'", "optimizer")
    other = str(value_at(out, "optimizer.type")).lower() not in ADAMS  # does not take all of these
    betas = [fill.setting("adam_beta1"), fill.setting("adam_beta2")]
    named = "trainer.adam_beta1 and adam_beta2"
    fill.copy("optimizer.params.lr")
    fill.match("optimizer.params.betas", betas, named, present_only=other, mend=f"change {named}")
    fill.copy("optimizer.params.eps", "optimizer.params.weight_decay", present_only=other)


def _fill_scheduler(fill: _Fill, total: int | None) -> None:
    """DeepSpeed's scheduler from the trainer; left out, its warm-up would be 1000 steps and its peak rate 0.001."""
    out, drop = fill.out, f"'~{fill.where}.scheduler' so that trainer.lr_scheduler_type is used"
    for key in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        if key in fill.chosen:
            text = f"trainer.{key} would be ignored: {fill.where}.scheduler is given"
            fill.problems.append(Problem(text, f"trainer.{key}", f"leave it out, or {drop}", "scheduler"))
    kind = value_at(out, "scheduler.type")
    if kind in OWN_RATE and "learning_rate" in fill.chosen:
        text = f"trainer.learning_rate would be ignored: {fill.where}.scheduler is {kind}, which has rates of its own"
        fill.problems.append(Problem(text, "trainer.learning_rate", f"leave it out, or {drop}", "scheduler"))
    table = f"deepspeed.scheduler.{value_at(out, 'scheduler.type')}"
    out["scheduler"]["params"] = fields.cast_fields(table, out["scheduler"].get("params") or {})
    taken = fields.field_names(table)
    if "warmup_max_lr" in taken:
        fill.copy("scheduler.params.warmup_max_lr")
    if "total_num_steps" in taken and total is None:
        text = f"{fill.where}.scheduler needs the number of steps, which is not known before the data is read"
        fill.refuse("scheduler.params.total_num_steps", text, f"trainer.max_steps=N, or {drop}", "scheduler")
    elif "total_num_steps" in taken:
        fill.match("scheduler.params.total_num_steps", total, "trainer.max_steps")
    warmup = fill.setting("warmup_steps")
    if "warmup_num_steps" in taken and 0 < warmup < 1 and total is None:
        text = f"trainer.warmup_steps={warmup} is a share of a number of steps that is not known"
        fill.refuse("scheduler.params.warmup_num_steps", text, f"trainer.max_steps=N, or {drop}", "scheduler")
    elif "warmup_num_steps" in taken:
        steps = int(warmup) if warmup >= 1 else math.ceil((total or 0) * warmup)
        fill.match("scheduler.params.warmup_num_steps", max(1, steps), "trainer.warmup_steps")


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out the "auto" that is DeepSpeed's own word for its default (pipeline.stages, keep_in_fp32_modules)."""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in tree.items() if v != "auto"}
