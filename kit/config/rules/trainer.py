"""The rules of the trainer's own settings: schedule, evaluation, saving, data order, packing, the loss.

kit/config/rules/table.py lists them. Where transformers or TRL raise the same, they do it after loading.
"""

from __future__ import annotations

from typing import Any

from kit.config.rules.context import RuleContext, Violations
from kit.schema import fields

FULL_RATE = 1e-4  # above it, training every weight with AdamW commonly diverges or forgets


def setting(run: RuleContext, key: str) -> Any:
    """A trainer setting, or TRL's default for it."""
    value = run.plan["trainer"].get(key)
    return fields.field_default("SFTConfig", key) if value is None else value


def evaluates(run: RuleContext) -> bool:
    return setting(run, "eval_strategy") != "no"


def holds_out(run: RuleContext) -> bool:
    return any(run.plan["dataset"][key] for key in ("eval_path", "eval_split", "test_size"))


def best_model(run: RuleContext) -> Violations:
    if not setting(run, "load_best_model_at_end"):
        return
    evaluated, saved = setting(run, "eval_strategy"), setting(run, "save_strategy")
    if evaluated != saved and saved != "best":
        yield (
            f"load_best_model_at_end needs eval_strategy ({evaluated}) and save_strategy ({saved}) to agree",
            "trainer.load_best_model_at_end",
            f"trainer.eval_strategy={saved}",
        )
    if setting(run, "save_only_model") and run.plan["deepspeed"]:
        yield (
            "save_only_model with load_best_model_at_end does not work under DeepSpeed",
            "trainer.save_only_model",
            "trainer.save_only_model=false",
        )


def best_steps(run: RuleContext) -> Violations:
    if not setting(run, "load_best_model_at_end") or not setting(run, "eval_strategy") == "steps":
        return
    each, save = run.plan["trainer"].get("eval_steps") or setting(run, "logging_steps"), setting(run, "save_steps")
    if setting(run, "save_strategy") == "steps" and each >= 1 and save >= 1 and save % each:
        yield (
            f"load_best_model_at_end needs save_steps ({save:g}) to be a multiple of eval_steps ({each:g})",
            "trainer.save_steps",
            f"trainer.save_steps={max(1, round(save / each)) * each:g}",
        )


def best_metric(run: RuleContext) -> Violations:
    if setting(run, "save_strategy") == "best" and not run.plan["trainer"].get("metric_for_best_model"):
        if not setting(run, "load_best_model_at_end"):
            yield (
                "save_strategy=best does not say what is best",
                "trainer.metric_for_best_model",
                "trainer.metric_for_best_model=loss",
            )


def eval_without_data(run: RuleContext) -> Violations:
    if evaluates(run) and not holds_out(run):
        yield "evaluation is on, but there is no held-out data", "trainer.eval_strategy", "dataset.test_size=0.1"


def eval_never(run: RuleContext) -> Violations:
    t, steps = run.plan["trainer"], setting(run, "max_steps")
    each = t.get("eval_steps") or setting(run, "logging_steps")
    if setting(run, "eval_strategy") == "steps" and 0 < steps < each:
        yield (
            f"the run has {steps} steps and evaluates every {each:g}: never while it trains",
            "trainer.eval_steps",
            f"trainer.eval_steps={max(1, steps // 2)}",
        )


def eval_batch(run: RuleContext) -> Violations:
    train, evaluated = setting(run, "per_device_train_batch_size"), setting(run, "per_device_eval_batch_size")
    scored = evaluates(run) or holds_out(run)  # what is held out is scored at the end in any case
    if scored and evaluated > 4 * train and not run.report.chosen("trainer.per_device_eval_batch_size"):
        yield (
            f"evaluation takes {evaluated} rows at once and training {train}: it may run out of memory first",
            "trainer.per_device_eval_batch_size",
            f"trainer.per_device_eval_batch_size={train}",
        )


def eval_for_schedule(run: RuleContext) -> Violations:
    kind = setting(run, "lr_scheduler_type")
    if kind in ("reduce_lr_on_plateau", "greedy") and not evaluates(run):
        yield (
            f"lr_scheduler_type={kind} follows the evaluation loss, and nothing is evaluated",
            "trainer.lr_scheduler_type",
            "trainer.eval_strategy=steps dataset.test_size=0.1, or another schedule",
        )


def warmup_longer(run: RuleContext) -> Violations:
    warmup, steps = setting(run, "warmup_steps"), setting(run, "max_steps")
    if 0 < steps < warmup and setting(run, "lr_scheduler_type") != "constant":
        yield (
            f"warmup_steps={warmup:g} is more than the {steps} steps of the run: the learning rate is never reached",
            "trainer.warmup_steps",
            "trainer.warmup_steps=0.03 (a share of the steps)",
        )


def warmup_half(run: RuleContext) -> Violations:
    warmup, steps = setting(run, "warmup_steps"), setting(run, "max_steps")
    share = warmup if warmup < 1 else warmup / steps if steps > 0 else 0
    if 0.3 <= share <= 1 and setting(run, "lr_scheduler_type") != "constant":
        yield (
            f"{share:.0%} of the steps are warm-up",
            "trainer.warmup_steps",
            "trainer.warmup_steps=0.03 is usual for an adapter",
        )


def warmup_unused(run: RuleContext) -> Violations:
    if setting(run, "warmup_steps") and setting(run, "lr_scheduler_type") == "constant":
        yield (
            "lr_scheduler_type=constant has no warm-up: warmup_steps is not read",
            "trainer.warmup_steps",
            "trainer.lr_scheduler_type=constant_with_warmup",
        )


def full_learning_rate(run: RuleContext) -> Violations:
    rate = setting(run, "learning_rate")
    if not run.plan["peft"] and rate > FULL_RATE and not run.plan["model"]["random_init"]:
        yield (
            f"learning_rate={rate:g} is an adapter's: training every weight with it tends to destroy the base",
            "trainer.learning_rate",
            "trainer.learning_rate=1.0e-5",
        )


def step_counts(run: RuleContext) -> Violations:
    for key, strategy in (("logging_steps", "logging_strategy"), ("eval_steps", "eval_strategy"),
                          ("save_steps", "save_strategy")):  # fmt: skip
        value = run.plan["trainer"].get(key)
        if value is None or setting(run, strategy) != "steps":
            continue
        if value > 1 and value != int(value):
            yield f"{key}={value} is neither whole nor a share", f"trainer.{key}", f"trainer.{key}={round(value)}"
        elif value < 0 or (value == 0 and key != "eval_steps"):
            yield f"{key}={value:g} with {strategy}=steps", f"trainer.{key}", f"trainer.{strategy}=no, or a number"


def prefetch(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    if t.get("dataloader_prefetch_factor") is not None and not setting(run, "dataloader_num_workers"):
        yield (
            "dataloader_prefetch_factor is for worker processes, and there are none",
            "trainer.dataloader_prefetch_factor",
            "trainer.dataloader_num_workers=2",
        )


def empty_cache(run: RuleContext) -> Violations:
    each = run.plan["trainer"].get("torch_empty_cache_steps")
    if each is not None and each < 1:
        key = "trainer.torch_empty_cache_steps"
        yield f"torch_empty_cache_steps={each} is no number of steps", key, "leave it out, or a number from 1"


def find_batch_size(run: RuleContext) -> Violations:
    if run.plan["trainer"].get("auto_find_batch_size") and run.plan["deepspeed"]:
        yield (
            "auto_find_batch_size cannot restart a DeepSpeed engine",
            "trainer.auto_find_batch_size",
            "set trainer.per_device_train_batch_size",
        )


def parallelism(run: RuleContext) -> Violations:
    if run.plan["trainer"].get("parallelism_config"):
        yield (
            "parallelism_config is an object of accelerate's: a mapping ends in an AttributeError after loading",
            "trainer.parallelism_config",
            "leave it out: deepspeed=zero3 shards the model over the processes",
        )


def stream_length(run: RuleContext) -> Violations:
    if run.plan["dataset"]["streaming"] and setting(run, "max_steps") <= 0:
        yield (
            "a stream (dataset.streaming) has no length: the number of steps is not known",
            "trainer.max_steps",
            "trainer.max_steps=N",
        )


def stream_split(run: RuleContext) -> Violations:
    if run.plan["dataset"]["streaming"] and run.plan["dataset"]["test_size"]:
        yield (
            "a stream (dataset.streaming) cannot be split",
            "dataset.test_size",
            "dataset.eval_path=FILE, or dataset.eval_split=NAME",
        )


ANSWERS = "trainer.assistant_only_loss"


def grouping(run: RuleContext) -> Violations:
    kind = setting(run, "train_sampling_strategy")
    if kind == "random":
        return
    key, fix = "trainer.train_sampling_strategy", "trainer.train_sampling_strategy=random"
    if run.plan["dataset"]["streaming"]:
        yield f"a stream comes in its own order: train_sampling_strategy={kind} is not read", key, fix
    elif kind == "group_by_length" and setting(run, "packing"):
        yield "packed rows are all of one length: group_by_length only takes away the shuffling", key, fix


def packing_wrapped(run: RuleContext) -> Violations:
    if setting(run, "packing") and setting(run, "packing_strategy") == "wrapped":
        yield (
            "packing_strategy=wrapped lets documents attend to each other",
            "trainer.packing_strategy",
            "trainer.packing_strategy=bfd",
        )


def packing_length(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    packs = setting(run, "packing") or (evaluates(run) and t.get("eval_packing"))
    if packs and "max_length" in t and t["max_length"] is None:
        yield (
            "packing fills rows up to max_length, and max_length=null",
            "trainer.max_length",
            "trainer.max_length=2048",
        )


def padding_free(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    if t.get("padding_free") and not setting(run, "packing") and t.get("max_length", 1024) is not None:
        yield (
            "padding_free without packing does not keep to max_length",
            "trainer.padding_free",
            "trainer.packing=true, or trainer.max_length=null",
        )


def loss_mask(run: RuleContext) -> Violations:
    """Whether train_on and TRL's two settings say one thing, and one that the rows can have."""
    t, train_on = run.plan["trainer"], run.plan["dataset"].get("train_on")
    answers, completion = t.get("assistant_only_loss"), t.get("completion_only_loss")
    key = "dataset.train_on"
    if train_on is not None:
        by_turns = train_on.endswith("_turns") or train_on == "last_turn"
        if (answers and not by_turns) or (answers is False and by_turns and run.report.chosen(ANSWERS)):
            yield f"train_on={train_on} and assistant_only_loss={answers} contradict each other", key, "leave one out"
        if (completion and train_on != "completion") or (completion is False and train_on == "completion"):
            text = f"train_on={train_on} and completion_only_loss={completion} contradict each other"
            yield text, key, "leave one out"
        if by_turns and run.chats is False:
            yield f"train_on={train_on} needs chats, these rows are {run.row_kind or 'text'}", key, f"{key}=everything"
        if train_on == "completion" and run.row_kind not in (None, "prompt_completion"):
            fix = f"{key}=assistant_turns" if run.chats else f"{key}=everything"
            yield f"train_on=completion needs prompt and completion, these rows are {run.row_kind}", key, fix
        return
    if answers and run.chats is False:
        text = f"assistant_only_loss needs chats, these rows are {run.row_kind or 'text'}"
        yield text, ANSWERS, f"{ANSWERS}=false"
    if completion and run.row_kind not in (None, "prompt_completion"):
        text = f"completion_only_loss needs prompt and completion, these rows are {run.row_kind}"
        yield text, "trainer.completion_only_loss", "trainer.completion_only_loss=null"


def neftune(run: RuleContext) -> Violations:
    alpha = run.plan["trainer"].get("neftune_noise_alpha")
    if alpha is not None and alpha < 0:
        key = "trainer.neftune_noise_alpha"
        yield f"neftune_noise_alpha={alpha:g} is no width of noise", key, f"{key}=5 (the paper's), or leave it out"


def liger_loss(run: RuleContext) -> Violations:
    t = run.plan["trainer"]
    if t.get("use_liger_kernel") and (t.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        yield (
            "Liger's fused loss replaces the forward that TRL has fused its own loss into",
            "trainer.liger_kernel_config.fused_linear_cross_entropy",
            "leave it out",
        )


def device_map(run: RuleContext) -> Violations:
    if (run.plan["trainer"].get("model_init_kwargs") or {}).get("device_map") is not None:
        yield (
            "device_map places layers for inference; training places the model itself",
            "trainer.model_init_kwargs.device_map",
            "remove it",
        )


def trust_remote_code(run: RuleContext) -> Violations:
    for key, value in (("model.trust_remote_code", run.plan["model"]["trust_remote_code"]),
                       ("trainer.trust_remote_code", run.plan["trainer"].get("trust_remote_code"))):  # fmt: skip
        if value and not run.report.set_by(key).startswith("command line"):
            yield "a file must not switch on remote code", key, f"say it yourself, on the command line: {key}=true"
