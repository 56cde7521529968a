"""The rules of the trainer's own settings: schedule, evaluation, saving, data order, packing, the loss.

kit/config/rules/table.py lists them in its table. Where transformers or TRL raise the same, they do it after loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kit.schema import fields

if TYPE_CHECKING:
    from kit.config.rules.table import Facts

Found = Iterator[tuple[str, str, str]]
FULL_RATE = 1e-4  # above it, training every weight with AdamW commonly diverges or forgets


def setting(f: Facts, key: str) -> Any:
    """A trainer setting, or TRL's default for it."""
    value = f.plan["trainer"].get(key)
    return fields.default("SFTConfig", key) if value is None else value


def evaluates(f: Facts) -> bool:
    return setting(f, "eval_strategy") != "no"


def holds_out(f: Facts) -> bool:
    return any(f.plan["dataset"][key] for key in ("eval_path", "eval_split", "test_size"))


def best_model(f: Facts) -> Found:
    if not setting(f, "load_best_model_at_end"):
        return
    evaluated, saved = setting(f, "eval_strategy"), setting(f, "save_strategy")
    if evaluated != saved and saved != "best":
        yield (
            f"load_best_model_at_end needs eval_strategy ({evaluated}) and save_strategy ({saved}) to agree",
            "trainer.load_best_model_at_end",
            f"trainer.eval_strategy={saved}",
        )
    if setting(f, "save_only_model") and f.plan["deepspeed"]:
        yield (
            "save_only_model with load_best_model_at_end does not work under DeepSpeed",
            "trainer.save_only_model",
            "trainer.save_only_model=false",
        )


def best_steps(f: Facts) -> Found:
    if not setting(f, "load_best_model_at_end") or not setting(f, "eval_strategy") == "steps":
        return
    each, save = f.plan["trainer"].get("eval_steps") or setting(f, "logging_steps"), setting(f, "save_steps")
    if setting(f, "save_strategy") == "steps" and each >= 1 and save >= 1 and save % each:
        yield (
            f"load_best_model_at_end needs save_steps ({save:g}) to be a multiple of eval_steps ({each:g})",
            "trainer.save_steps",
            f"trainer.save_steps={max(1, round(save / each)) * each:g}",
        )


def best_metric(f: Facts) -> Found:
    if setting(f, "save_strategy") == "best" and not f.plan["trainer"].get("metric_for_best_model"):
        if not setting(f, "load_best_model_at_end"):
            yield (
                "save_strategy=best does not say what is best",
                "trainer.metric_for_best_model",
                "trainer.metric_for_best_model=loss",
            )


def eval_without_data(f: Facts) -> Found:
    if evaluates(f) and not holds_out(f):
        yield "evaluation is on, but there is no held-out data", "trainer.eval_strategy", "dataset.test_size=0.1"


def eval_never(f: Facts) -> Found:
    t, steps = f.plan["trainer"], setting(f, "max_steps")
    each = t.get("eval_steps") or setting(f, "logging_steps")
    if setting(f, "eval_strategy") == "steps" and 0 < steps < each:
        yield (
            f"the run has {steps} steps and evaluates every {each:g}: never while it trains",
            "trainer.eval_steps",
            f"trainer.eval_steps={max(1, steps // 2)}",
        )


def eval_batch(f: Facts) -> Found:
    train, held = setting(f, "per_device_train_batch_size"), setting(f, "per_device_eval_batch_size")
    scored = evaluates(f) or holds_out(f)  # what is held out is scored at the end in any case
    if scored and held > 4 * train and not f.chosen("trainer.per_device_eval_batch_size"):
        yield (
            f"evaluation takes {held} rows at once and training {train}: it may run out of memory first",
            "trainer.per_device_eval_batch_size",
            f"trainer.per_device_eval_batch_size={train}",
        )


def eval_for_schedule(f: Facts) -> Found:
    kind = setting(f, "lr_scheduler_type")
    if kind in ("reduce_lr_on_plateau", "greedy") and not evaluates(f):
        yield (
            f"lr_scheduler_type={kind} follows the evaluation loss, and nothing is evaluated",
            "trainer.lr_scheduler_type",
            "trainer.eval_strategy=steps dataset.test_size=0.1, or another schedule",
        )


def warmup_longer(f: Facts) -> Found:
    warmup, steps = setting(f, "warmup_steps"), setting(f, "max_steps")
    if 0 < steps < warmup and setting(f, "lr_scheduler_type") != "constant":
        yield (
            f"warmup_steps={warmup:g} is more than the {steps} steps of the run: the learning rate is never reached",
            "trainer.warmup_steps",
            "trainer.warmup_steps=0.03 (a share of the steps)",
        )


def warmup_half(f: Facts) -> Found:
    warmup, steps = setting(f, "warmup_steps"), setting(f, "max_steps")
    share = warmup if warmup < 1 else warmup / steps if steps > 0 else 0
    if 0.3 <= share <= 1 and setting(f, "lr_scheduler_type") != "constant":
        yield (
            f"{share:.0%} of the steps are warm-up",
            "trainer.warmup_steps",
            "trainer.warmup_steps=0.03 is usual for an adapter",
        )


def warmup_unused(f: Facts) -> Found:
    if setting(f, "warmup_steps") and setting(f, "lr_scheduler_type") == "constant":
        yield (
            "lr_scheduler_type=constant has no warm-up: warmup_steps is not read",
            "trainer.warmup_steps",
            "trainer.lr_scheduler_type=constant_with_warmup",
        )


def full_learning_rate(f: Facts) -> Found:
    rate = setting(f, "learning_rate")
    if not f.plan["peft"] and rate > FULL_RATE and not f.plan["model"]["random_init"]:
        yield (
            f"learning_rate={rate:g} is an adapter's: training every weight with it tends to destroy the base",
            "trainer.learning_rate",
            "trainer.learning_rate=1.0e-5",
        )


def step_counts(f: Facts) -> Found:
    for key, strategy in (("logging_steps", "logging_strategy"), ("eval_steps", "eval_strategy"),
                          ("save_steps", "save_strategy")):  # fmt: skip
        value = f.plan["trainer"].get(key)
        if value is None or setting(f, strategy) != "steps":
            continue
        if value > 1 and value != int(value):
            yield f"{key}={value} is neither whole nor a share", f"trainer.{key}", f"trainer.{key}={round(value)}"
        elif value < 0 or (value == 0 and key != "eval_steps"):
            yield f"{key}={value:g} with {strategy}=steps", f"trainer.{key}", f"trainer.{strategy}=no, or a number"


def prefetch(f: Facts) -> Found:
    t = f.plan["trainer"]
    if t.get("dataloader_prefetch_factor") is not None and not setting(f, "dataloader_num_workers"):
        yield (
            "dataloader_prefetch_factor is for worker processes, and there are none",
            "trainer.dataloader_prefetch_factor",
            "trainer.dataloader_num_workers=2",
        )


def empty_cache(f: Facts) -> Found:
    each = f.plan["trainer"].get("torch_empty_cache_steps")
    if each is not None and each < 1:
        key = "trainer.torch_empty_cache_steps"
        yield f"torch_empty_cache_steps={each} is no number of steps", key, "leave it out, or a number from 1"


def find_batch_size(f: Facts) -> Found:
    if f.plan["trainer"].get("auto_find_batch_size") and f.plan["deepspeed"]:
        yield (
            "auto_find_batch_size cannot restart a DeepSpeed engine",
            "trainer.auto_find_batch_size",
            "set trainer.per_device_train_batch_size",
        )


def parallelism(f: Facts) -> Found:
    if f.plan["trainer"].get("parallelism_config"):
        yield (
            "parallelism_config is an object of accelerate's: a mapping ends in an AttributeError after loading",
            "trainer.parallelism_config",
            "leave it out: deepspeed=zero3 shards the model over the processes",
        )


def stream_length(f: Facts) -> Found:
    if f.plan["dataset"]["streaming"] and setting(f, "max_steps") <= 0:
        yield (
            "a stream (dataset.streaming) has no length: the number of steps is not known",
            "trainer.max_steps",
            "trainer.max_steps=N",
        )


def stream_split(f: Facts) -> Found:
    if f.plan["dataset"]["streaming"] and f.plan["dataset"]["test_size"]:
        yield (
            "a stream (dataset.streaming) cannot be split",
            "dataset.test_size",
            "dataset.eval_path=FILE, or dataset.eval_split=NAME",
        )


def grouping(f: Facts) -> Found:
    kind = setting(f, "train_sampling_strategy")
    if kind == "random":
        return
    key, fix = "trainer.train_sampling_strategy", "trainer.train_sampling_strategy=random"
    if f.plan["dataset"]["streaming"]:
        yield f"a stream comes in its own order: train_sampling_strategy={kind} is not read", key, fix
    elif kind == "group_by_length" and setting(f, "packing"):
        yield "packed rows are all of one length: group_by_length only takes away the shuffling", key, fix


def packing_wrapped(f: Facts) -> Found:
    if setting(f, "packing") and setting(f, "packing_strategy") == "wrapped":
        yield (
            "packing_strategy=wrapped lets documents attend to each other",
            "trainer.packing_strategy",
            "trainer.packing_strategy=bfd",
        )


def packing_length(f: Facts) -> Found:
    t = f.plan["trainer"]
    packs = setting(f, "packing") or (evaluates(f) and t.get("eval_packing"))
    if packs and "max_length" in t and t["max_length"] is None:
        yield (
            "packing fills rows up to max_length, and max_length=null",
            "trainer.max_length",
            "trainer.max_length=2048",
        )


def padding_free(f: Facts) -> Found:
    t = f.plan["trainer"]
    if t.get("padding_free") and not setting(f, "packing") and t.get("max_length", 1024) is not None:
        yield (
            "padding_free without packing does not keep to max_length",
            "trainer.padding_free",
            "trainer.packing=true, or trainer.max_length=null",
        )


def loss_mask(f: Facts) -> Found:
    t = f.plan["trainer"]
    if t.get("assistant_only_loss") and f.columns_format not in (None, "messages"):
        yield (
            f"assistant_only_loss needs chat data, this is {f.columns_format}",
            "trainer.assistant_only_loss",
            "trainer.assistant_only_loss=false",
        )
    if t.get("completion_only_loss") and f.columns_format not in (None, "prompt_completion"):
        yield (
            f"completion_only_loss needs prompt and completion, this is {f.columns_format}",
            "trainer.completion_only_loss",
            "trainer.completion_only_loss=null",
        )


def neftune(f: Facts) -> Found:
    alpha = f.plan["trainer"].get("neftune_noise_alpha")
    if alpha is not None and alpha < 0:
        key = "trainer.neftune_noise_alpha"
        yield f"neftune_noise_alpha={alpha:g} is no width of noise", key, f"{key}=5 (the paper's), or leave it out"


def liger_loss(f: Facts) -> Found:
    t = f.plan["trainer"]
    if t.get("use_liger_kernel") and (t.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        yield (
            "Liger's fused loss replaces the forward that TRL has fused its own loss into",
            "trainer.liger_kernel_config.fused_linear_cross_entropy",
            "leave it out",
        )


def device_map(f: Facts) -> Found:
    if (f.plan["trainer"].get("model_init_kwargs") or {}).get("device_map") is not None:
        yield (
            "device_map places layers for inference; training places the model itself",
            "trainer.model_init_kwargs.device_map",
            "remove it",
        )


def trust_remote_code(f: Facts) -> Found:
    for key, value in (("model.trust_remote_code", f.plan["model"]["trust_remote_code"]),
                       ("trainer.trust_remote_code", f.plan["trainer"].get("trust_remote_code"))):  # fmt: skip
        if value and not f.set_by(key).startswith("command line"):
            yield "a file must not switch on remote code", key, f"say it yourself, on the command line: {key}=true"
