"""Lists the keys of a DeepSpeed JSON that the trainer's side fills, and what each is filled with.

The one table of DeepSpeed's keys against the trainer's. Upstream: HfTrainerDeepSpeedConfig in transformers
integrations/deepspeed.py, and DeepSpeedPlugin in accelerate utils/dataclasses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class FilledKey:
    """What a key of the JSON is filled with.

    `filled_by`: "trainer", by a setting of the trainer, which a literal must equal; "hidden_size", by a size for this
    width of the model; "constant", always the same; "added", where the run asks for it, with no "auto" in the JSON.
    """

    filled_by: Literal["trainer", "hidden_size", "constant", "added"]
    sources: tuple[str, ...] = ()  # keys of the run
    words: str = ""  # the setting or the formula
    size: Callable[[int], int] | None = None
    constant: Any = None


def by_setting(*names: str, words: str = "", others: tuple[str, ...] = ()) -> FilledKey:
    sources = (*(f"trainer.{name}" for name in names), *others)
    return FilledKey("trainer", sources, words or " and ".join(names))


def by_size(formula: str, compute: Callable[[int], int]) -> FilledKey:
    return FilledKey("hidden_size", ("model.config.hidden_size",), formula, compute)


def by_constant(value: Any) -> FilledKey:
    return FilledKey("constant", constant=value)


ZERO, OPTIMIZER, SCHEDULER = "zero_optimization", "optimizer.params", "scheduler.params"
FILLED_KEYS = {
    "train_micro_batch_size_per_gpu": by_setting("per_device_train_batch_size"),
    "gradient_accumulation_steps": by_setting("gradient_accumulation_steps"),
    "train_batch_size": by_setting(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        words="per_device_train_batch_size x gradient_accumulation_steps x processes",
        others=("launch.num_gpus",),
    ),
    "gradient_clipping": by_setting("max_grad_norm"),
    "bf16.enabled": by_setting("bf16", "bf16_full_eval", words="bf16", others=("precision",)),
    "fp16.enabled": by_setting("fp16", "fp16_full_eval", words="fp16", others=("precision",)),
    f"{OPTIMIZER}.lr": by_setting("learning_rate"),
    f"{OPTIMIZER}.betas": by_setting("adam_beta1", "adam_beta2"),
    f"{OPTIMIZER}.eps": by_setting("adam_epsilon"),
    f"{OPTIMIZER}.weight_decay": by_setting("weight_decay"),
    f"{SCHEDULER}.warmup_max_lr": by_setting("learning_rate"),
    f"{SCHEDULER}.warmup_num_steps": by_setting("warmup_steps"),
    f"{SCHEDULER}.total_num_steps": by_setting("max_steps"),
    "zero_allow_untested_optimizer": FilledKey("added", ("trainer.optim",)),
    "checkpoint.use_node_local_storage": FilledKey("added", ("trainer.save_on_each_node",)),
    f"{ZERO}.leaf_module.classes": FilledKey("added", ("model.config.model_type",)),
    f"{ZERO}.stage3_max_reuse_distance": FilledKey("added", ("model.config.model_type",)),
    f"{ZERO}.stage3_max_live_parameters": FilledKey("added", ("model.config.model_type",)),
    f"{ZERO}.reduce_bucket_size": by_size("hidden_size x hidden_size", lambda width: width * width),
    f"{ZERO}.stage3_prefetch_bucket_size": by_size(
        "int(0.9 x hidden_size x hidden_size)", lambda width: int(0.9 * width * width)
    ),
    f"{ZERO}.stage3_param_persistence_threshold": by_size("10 x hidden_size", lambda width: 10 * width),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": by_constant(False),
    f"{ZERO}.offload_optimizer.device": by_constant("none"),
    f"{ZERO}.offload_param.device": by_constant("none"),
    f"{ZERO}.offload_optimizer.nvme_path": by_constant(None),  # left out, but where the device is nvme
    f"{ZERO}.offload_param.nvme_path": by_constant(None),
    f"{SCHEDULER}.warmup_min_lr": by_constant(0),
}
TRAINER_SETTINGS = {key: row.words for key, row in FILLED_KEYS.items() if row.filled_by == "trainer"}
