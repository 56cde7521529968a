"""The rules of the trainer's own settings: schedule, evaluation, saving, data order, packing, the loss.

kit/config/rules/table.py lists them. Where transformers or TRL raise the same, they do it after loading.
"""

from __future__ import annotations

import math
from typing import Any

from kit.config.rules.context import RuleContext, Violations
from kit.schema import fields
from kit.schema.dotted import value_at
from kit.schema.steps import describe_steps, steps_per_epoch
from kit.storage import hub_cache

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


def requeue_weights(run: RuleContext) -> Violations:
    if setting(run, "save_only_model") and run.plan["launch"]["slurm"]:
        yield (
            "a batch job that is queued again goes on from its checkpoint, and save_only_model keeps no optimizer",
            "trainer.save_only_model",
            "trainer.save_only_model=false",
        )


def resume_weights(run: RuleContext) -> Violations:
    if setting(run, "save_only_model") and setting(run, "save_strategy") != "no" and not run.plan["launch"]["slurm"]:
        yield (
            "save_only_model keeps no optimizer: no checkpoint of this run can be resumed, nor can the one that a "
            "signal leaves",
            "trainer.save_only_model",
            "trainer.save_only_model=false, or trainer.save_total_limit=1 for less disk",
        )


def best_steps(run: RuleContext) -> Violations:
    if not setting(run, "load_best_model_at_end") or not setting(run, "eval_strategy") == "steps":
        return
    each, save = run.plan["trainer"].get("eval_steps") or setting(run, "logging_steps"), setting(run, "save_steps")
    if setting(run, "save_strategy") != "steps" or each <= 0 or save <= 0:
        return
    key, steps = "trainer.save_steps", setting(run, "max_steps")
    if (each < 1) != (save < 1):
        share, count = ("eval_steps", "save_steps") if each < 1 else ("save_steps", "eval_steps")
        yield (
            f"load_best_model_at_end: {share} is a share of the steps and {count} a number, so that nobody can say "
            "whether each save falls on an evaluation",
            key,
            f"{key}={each:g}",
        )
    elif (save * 10**6) % (each * 10**6):  # as transformers computes it
        yield (
            f"load_best_model_at_end needs save_steps ({save:g}) to be a multiple of eval_steps ({each:g})",
            key,
            f"{key}={max(1, round(save / each)) * each:g}",
        )
    elif each < 1 and steps > 0 and math.ceil(save * steps) % math.ceil(each * steps):
        yield (
            f"of {steps} steps a save comes every {math.ceil(save * steps)} and an evaluation every "
            f"{math.ceil(each * steps)}: some saves have no figure to be chosen by",
            key,
            f"{key}={each:g}",
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


def eval_turned_off(run: RuleContext) -> Violations:
    if run.plan["trainer"].get("do_eval") is False and evaluates(run) and run.report.chosen("trainer.do_eval"):
        kind = setting(run, "eval_strategy")
        yield (
            f"do_eval=false, which eval_strategy={kind} makes true again",
            "trainer.do_eval",
            "trainer.eval_strategy=no",
        )


def count_rows(run: RuleContext) -> tuple[int, int] | None:
    """Return the rows that are trained on and those held out; None where they are not known before the ranks read."""
    rows, data = run.few_rows, run.plan["dataset"]
    if rows is None or data["on_long_row"] == "split":
        return None
    rows = min(rows, data["limit"] or rows)
    share = data["test_size"] or 0
    held = math.ceil(share * rows) if 0 < share < 1 else int(share)
    return rows - held, held


def rows_of_epoch(run: RuleContext) -> int:
    """Return the rows that the trainer draws in an epoch; 0 where they are not known."""
    counts = count_rows(run)
    if counts is None or setting(run, "packing") or run.plan["dataset"]["streaming"]:
        return 0
    return max(counts[0], 0)


def note_steps(run: RuleContext) -> None:
    """Note how many steps the run takes, where its rows are known."""
    if rows := rows_of_epoch(run):
        trainer = {**run.plan["trainer"], "num_train_epochs": setting(run, "num_train_epochs")}
        run.report.note(describe_steps(rows, trainer, run.world_size))


def incomplete_batches(run: RuleContext) -> Violations:
    """dataloader_drop_last leaves nothing of data that does not fill one batch on each process."""
    counts, key = count_rows(run), "trainer.dataloader_drop_last"
    if counts is None or not setting(run, "dataloader_drop_last"):
        return
    for name, count, size in (
        ("training", counts[0], setting(run, "per_device_train_batch_size")),
        ("held-out", counts[1], setting(run, "per_device_eval_batch_size")),
    ):
        if count and count < size * run.world_size:
            batch = f"{size} rows" + (f" on each of {run.world_size} processes" if run.world_size > 1 else "")
            yield f"dataloader_drop_last drops all {count} {name} rows: a batch takes {batch}", key, f"{key}=false"


SIZE = "per_device_train_batch_size"


def batch_beyond_data(run: RuleContext) -> Violations:
    """A step ends with the epoch: accumulation beyond its rows makes no larger batch."""
    rows = rows_of_epoch(run)
    if setting(run, "gradient_accumulation_steps") == 1 and not run.report.chosen(f"trainer.{SIZE}"):
        return  # the default's batch over a file of a few rows
    asked = setting(run, SIZE) * setting(run, "gradient_accumulation_steps") * run.world_size
    if 0 < rows < asked and steps_per_epoch(rows, run.plan["trainer"], run.world_size) == 1:
        problem = f"a step would take {asked} rows, and an epoch has {rows}: each step takes these, no more"
        yield problem, "trainer.gradient_accumulation_steps", "fewer rows in a step: global_batch_size=8"


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


def no_steps(run: RuleContext) -> Violations:
    """The trainer takes max_steps where it is positive, else the epochs; both without a step end in "done"."""
    steps, epochs = setting(run, "max_steps"), setting(run, "num_train_epochs")
    if steps <= 0 and run.report.chosen("trainer.max_steps") and steps != -1:
        text = f"max_steps={steps} is no number of steps: the run would train {epochs:g} epochs"
        yield text, "trainer.max_steps", "trainer.max_steps=N, or -1 to count in epochs"
    if steps <= 0 and epochs <= 0:
        text = f"num_train_epochs={epochs:g} trains nothing"
        yield text, "trainer.num_train_epochs", "trainer.num_train_epochs=1, or trainer.max_steps=N"


def steps_and_epochs(run: RuleContext) -> Violations:
    steps, epochs = setting(run, "max_steps"), setting(run, "num_train_epochs")
    if steps > 0 and run.report.chosen("trainer.num_train_epochs"):
        text = f"num_train_epochs={epochs:g} is not read: max_steps={steps} ends the run"
        yield text, "trainer.num_train_epochs", "leave one out; trainer.max_steps=-1 counts in epochs"


def split_batches(run: RuleContext) -> Violations:
    given = run.plan["trainer"].get("accelerator_config")
    key = "trainer.accelerator_config"
    if not isinstance(given, dict):
        return
    if given.get("split_batches") and run.world_size > 1:
        micro = setting(run, "per_device_train_batch_size")
        rows = micro * setting(run, "gradient_accumulation_steps")
        yield (
            f"split_batches parts the {micro} rows of per_device_train_batch_size among {run.world_size} processes: "
            f"{rows} rows per step, not {rows * run.world_size}",
            f"{key}.split_batches",
            "leave it out: global_batch_size=N counts the rows of all processes",
        )
    if (value_at(given, "gradient_accumulation_kwargs.num_steps") or 1) != 1:
        fix = "trainer.gradient_accumulation_steps=N"
        yield "num_steps would change gradient_accumulation_steps", f"{key}.gradient_accumulation_kwargs", fix


def batch_varies(run: RuleContext) -> Violations:
    if run.plan["trainer"].get("auto_find_batch_size") and not run.plan["deepspeed"]:
        yield (
            "auto_find_batch_size takes fewer rows per step where memory runs out, and the learning rate stays",
            "trainer.auto_find_batch_size",
            "global_batch_size=N with a smaller trainer.per_device_train_batch_size",
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
    warmup = setting(run, "warmup_steps")
    if warmup > 1 and warmup != int(warmup):
        key = "trainer.warmup_steps"
        yield f"warmup_steps={warmup} is neither whole nor a share", key, f"{key}={round(warmup)}"
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
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if setting(run, name) and not setting(run, "dataloader_num_workers"):
            yield f"{name} is for worker processes, and there are none", f"trainer.{name}", f"remove trainer.{name}"


def activation_offloading(run: RuleContext) -> Violations:
    if not run.surely_on_cpu:
        return
    kwargs = ("activation_checkpointing_kwargs.offload", "gradient_checkpointing_kwargs.offload")
    for key in ("activation_offloading", *kwargs):
        if value_at(run.plan["trainer"], key):
            key = f"trainer.{key}"
            yield "activations are moved from a GPU to the CPU: there is no GPU", key, f"remove {key}"


def router_loss(run: RuleContext) -> Violations:
    coefficient, key = run.plan["trainer"].get("router_aux_loss_coef"), "trainer.router_aux_loss_coef"
    kind = run.base.text.get("model_type")
    if coefficient and kind and kind not in fields.router_logits_types():
        yield f"{kind} returns no router logits, which router_aux_loss_coef weighs", key, f"remove {key}"


def push_to_hub(run: RuleContext) -> Violations:
    if not setting(run, "push_to_hub"):
        return
    key = "trainer.push_to_hub"
    if hub_cache.is_offline():
        yield "push_to_hub, and HF_HUB_OFFLINE is set", key, f"unset HF_HUB_OFFLINE, or {key}=false"
    elif not hub_cache.has_token():
        yield (
            "push_to_hub, and there is no token on this machine",
            key,
            f"hf auth login, export HF_TOKEN, or {key}=false",
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
