"""The rules of schedule, optimizer and best checkpoint: what transformers would refuse after loading, or never say.

kit/config/rules/table.py lists them. What schedules and optimizers take stands in kit/schema/fields.json.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from kit.config.rules.context import RuleContext, Violations
from kit.config.rules.trainer import evaluates, setting
from kit.schema import fields
from kit.schema.dotted import value_at

KWARGS = "trainer.lr_scheduler_kwargs"
FOLLOWS_A_METRIC = ("reduce_lr_on_plateau", "greedy")
DTYPES = {"float32", "float64", "float16", "bfloat16"}
# What SFTTrainer's evaluation returns, without "eval_"; and whether more is better, None where nobody can say.
METRICS: dict[str, bool | None] = {
    "loss": False, "mean_token_accuracy": True, "entropy": None, "num_tokens": None, "runtime": None,
    "samples_per_second": None, "steps_per_second": None,
}  # fmt: skip
# Metrics of a compute_metrics of one's own, by the words in their names.
MORE_IS_BETTER = {"accuracy", "acc", "f1", "precision", "recall", "bleu", "rouge", "rouge1", "rouge2", "rougel", "auc",
                  "match", "em", "score", "reward"}  # fmt: skip
LESS_IS_BETTER = {"loss", "perplexity", "ppl", "error", "wer", "cer", "mse", "mae", "rmse"}


def scheduler_kwargs(run: RuleContext) -> Violations:
    """Compare lr_scheduler_kwargs with the parameters of the function that makes the schedule."""
    kind, given = setting(run, "lr_scheduler_type"), run.plan["trainer"].get("lr_scheduler_kwargs") or {}
    table = f"lr_scheduler_kwargs.{kind}"
    if table not in fields.field_tables() or value_at(run.plan["deepspeed"], "scheduler"):
        return
    if given and not fields.field_tables()[table]:
        yield f"lr_scheduler_type={kind} takes no lr_scheduler_kwargs", KWARGS, f"remove {KWARGS}"
        return
    problems = fields.check_fields(table, given, KWARGS)
    for p in problems:
        yield p.problem, p.where, p.fix
    if not problems:
        yield from schedule_arithmetic(run, kind, given)


def schedule_arithmetic(run: RuleContext, kind: str, given: dict[str, Any]) -> Violations:
    """Yield values that do not fit together, or not with the steps and the learning rate of the run."""
    rate, steps = setting(run, "learning_rate"), setting(run, "max_steps")
    warmup = warmup_count(run)
    if "min_lr_rate" in fields.field_tables()[f"lr_scheduler_kwargs.{kind}"]:
        floor, share = given.get("min_lr"), given.get("min_lr_rate")
        if (floor is None) == (share is None):
            word = "one of min_lr and min_lr_rate" if floor is None else "min_lr or min_lr_rate, not both"
            yield f"lr_scheduler_type={kind} needs {word}", KWARGS, f"'{KWARGS}={{min_lr_rate: 0.1}}'"
    lowest = {"polynomial": ("lr_end", 1e-7), "greedy": ("min_lr", 1e-3)}.get(kind, ("min_lr", 0.0))
    low = given.get(lowest[0])
    low = lowest[1] if low is None else low
    if low > rate or (kind == "polynomial" and low == rate):
        yield (
            f"{kind} ends at {lowest[0]}={low:g}, which is not below learning_rate={rate:g}: it would rise",
            f"{KWARGS}.{lowest[0]}",
            f"{KWARGS}.{lowest[0]}={rate / 10:g}",
        )
    if kind == "greedy" and given.get("max_lr", 1.0) < rate:
        yield f"max_lr is below learning_rate={rate:g}", f"{KWARGS}.max_lr", f"{KWARGS}.max_lr={rate * 10:g}"
    if kind == "polynomial" and 0 < steps <= warmup:
        yield (
            f"polynomial has no step left after {warmup} of warm-up: transformers divides by zero",
            "trainer.warmup_steps",
            "trainer.warmup_steps=0.03",
        )
    if kind == "warmup_stable_decay" and steps > 0:
        stable = given.get("num_stable_steps")
        planned = warmup + given["num_decay_steps"] + (stable or 0)
        if planned > steps or (stable is not None and planned < steps):
            parts = f"{warmup} warm-up + {stable or 0} stable + {given['num_decay_steps']} decay steps"
            yield (
                f"{parts} are {planned}, the run has {steps}",
                KWARGS,
                f"'{KWARGS}={{num_decay_steps: {max(1, (steps - warmup) // 5)}}}': the stable ones are derived",
            )


def warmup_count(run: RuleContext) -> int:
    """Steps of warm-up, where the number of steps is known or no share is meant."""
    warmup, steps = setting(run, "warmup_steps"), setting(run, "max_steps")
    return int(warmup) if warmup >= 1 else math.ceil(warmup * max(steps, 0))


def metric_name(run: RuleContext) -> str | None:
    """The metric that chooses checkpoints and drives a schedule, without "eval_"; None where none does."""
    name = run.plan["trainer"].get("metric_for_best_model")
    if name is None and (
        setting(run, "load_best_model_at_end") or setting(run, "lr_scheduler_type") in FOLLOWS_A_METRIC
    ):
        name = "loss"
    return None if name is None else str(name).removeprefix("eval_")


def more_is_better(name: str) -> bool | None:
    """Whether a larger value is the better one; None where the name does not say."""
    if name in METRICS:
        return METRICS[name]
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    better, worse = bool(words & MORE_IS_BETTER), bool(words & LESS_IS_BETTER)
    return None if better == worse else better


def unknown_metric(run: RuleContext) -> Violations:
    """Evaluation looks the metric up each time, with or without a checkpoint to choose."""
    name, key = metric_name(run), "trainer.metric_for_best_model"
    if name is None or name in METRICS or not evaluates(run) or run.plan["launch"]["script"]:
        return
    close = difflib.get_close_matches(name, METRICS, 1, 0.4)
    fix = f"{key}={close[0] if close else 'loss'}, or a compute_metrics of your own: launch.script=FILE.py"
    yield f"no evaluation returns {name!r}: it returns {', '.join(METRICS)}", key, fix


def metric_direction(run: RuleContext) -> Violations:
    """transformers takes any name that does not end in "loss" for one where more is better."""
    name, given = metric_name(run), run.plan["trainer"].get("greater_is_better")
    if name is None or (better := more_is_better(name)) is None:
        return
    key = "trainer.greater_is_better"
    taken = not name.endswith("loss") if given is None else given
    if taken != better:
        said = f"greater_is_better={str(given).lower()}" if given is not None else "transformers takes more for better"
        yield (
            f"{said}, and a good {name} is {'large' if better else 'small'}: the worst checkpoint would be the best",
            key,
            f"{key}={str(better).lower()}",
        )
    kind, kwargs = setting(run, "lr_scheduler_type"), run.plan["trainer"].get("lr_scheduler_kwargs") or {}
    mode = kwargs.get("mode", "min")
    if kind in FOLLOWS_A_METRIC and mode in ("min", "max") and (mode == "max") != better:
        yield (
            f"{kind} with mode={mode} waits for {name} to get {'larger' if mode == 'max' else 'smaller'}, "
            f"and a good one is {'large' if better else 'small'}",
            f"{KWARGS}.mode",
            f"{KWARGS}.mode={'max' if better else 'min'}",
        )


OPTION_KINDS = {  # what transformers casts the text of an option to: in words, and one that it takes
    "int": ("a whole number", "128"), "float": ("a number", "0.9"), "bool": ("true or false", "true"),
    "true": ("true, for which it takes any text", "true"), "dtype": ("a dtype", "float32"), "str": ("a word", "std"),
}  # fmt: skip


def parse_optim_args(text: str) -> Iterator[tuple[str, str]]:
    """(key, value) of optim_args as transformers parts them; the value is "" where there is no "="."""
    for part in text.replace(" ", "").split(","):
        key, _, value = part.partition("=")
        yield key, value


def optimizer_options(run: RuleContext) -> Violations:
    """Compare optim_args with what the function that makes the optimizer reads of it."""
    text, name, key = run.plan["trainer"].get("optim_args"), setting(run, "optim"), "trainer.optim_args"
    if not text or value_at(run.plan["deepspeed"], "optimizer"):
        return
    options: dict[str, str] = fields.optimizers().get(name, {}).get("options", {})
    if not options:
        yield f"optim={name} reads nothing of optim_args", key, f"remove {key}"
        return
    for option, value in parse_optim_args(text):
        if option not in options:
            close = difflib.get_close_matches(option, options, 1)
            fix = f"did you mean {close[0]}?" if close else f"some of {', '.join(options)}"
            yield f"optim={name} reads no {option!r} of optim_args", key, fix
        elif not is_option(value, options[option]):
            word, example = OPTION_KINDS[options[option]]
            yield f"optim_args: {option} must be {word}, not {value!r}", key, f"{key}='{option}={example}'"


def is_option(value: str, kind: str) -> bool:
    """Whether transformers' cast takes the text of an option, and as what it says."""
    if kind in ("int", "float"):
        try:
            number = int(value) if kind == "int" else float(value)
        except ValueError:
            return False
        return math.isfinite(number)
    words = {"bool": {"true", "false", "1", "0"}, "true": {"true", "1"}, "dtype": DTYPES}
    return value.lower() in words[kind] if kind in words else bool(value)


LOW_RANK = ("galore", "apollo")


def optimizer_targets(run: RuleContext) -> Violations:
    """GaLore and APOLLO project the gradients of the linear layers that optim_target_modules names."""
    name, targets, key = (
        setting(run, "optim"),
        run.plan["trainer"].get("optim_target_modules"),
        "trainer.optim_target_modules",
    )
    low_rank = name.startswith(LOW_RANK)
    if targets is not None and not low_rank:
        yield f"optim={name} does not read optim_target_modules", key, f"remove {key}, or trainer.optim=galore_adamw"
    elif low_rank and not targets:
        yield f"optim={name} needs the linear layers that it projects", key, f"{key}=all-linear"
    elif low_rank and run.base.modules is not None:
        names = [m for m in run.base.modules if not m.endswith(("norm", "embed_tokens"))]
        if not any(matches_target(targets, m) for m in names):
            yield f"no linear layer of the base is named {targets}", key, f"{key}=all-linear"


def matches_target(targets: Any, module: str) -> bool:
    """As transformers' check_target_module_exists: one expression for a whole name, or a list of parts of names."""
    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        return True
    try:
        if isinstance(targets, str):
            return bool(re.fullmatch(targets, module))
        return any(t in module or re.fullmatch(t, module) for t in targets if isinstance(t, str) and t)
    except re.error:
        return False


def optimizer_layout(run: RuleContext) -> Violations:
    """Optimizers that step parameter by parameter, or look at whole matrices, which ZeRO keeps as flat parts."""
    name, key = setting(run, "optim"), "trainer.optim"
    fix = "trainer.optim=adamw_torch"
    layerwise = name.endswith("_layerwise")
    if run.plan["deepspeed"] and not value_at(run.plan["deepspeed"], "optimizer"):
        if name.startswith(LOW_RANK) or name in ("lomo", "adalomo") or name.startswith("schedule_free"):
            yield f"{name} does not work over DeepSpeed's flat partitions", key, f"{fix}, or deepspeed=none"
    elif layerwise and run.world_size > 1:
        yield f"{name} steps in the backward pass, which several processes do not share", key, fix
    if layerwise and setting(run, "gradient_accumulation_steps") != 1:
        accumulation = "trainer.gradient_accumulation_steps"
        yield f"{name} steps in every backward pass: it accumulates nothing", accumulation, f"{accumulation}=1"


def step_size(run: RuleContext) -> Violations:
    """AdamW takes learning_rate x weight_decay of each weight away in a step; clipping leaves max_grad_norm."""
    rate, decay = setting(run, "learning_rate"), setting(run, "weight_decay")
    if rate * decay >= 1:
        yield (
            f"learning_rate={rate:g} x weight_decay={decay:g} takes the whole weight away in a step",
            "trainer.weight_decay",
            "trainer.weight_decay=0.01",
        )
    norm, key = setting(run, "max_grad_norm"), "trainer.max_grad_norm"
    if 0 < norm < 1e-6:
        yield f"max_grad_norm={norm:g} leaves nothing of a gradient", key, f"{key}=1.0, or 0 for no clipping"
