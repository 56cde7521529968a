"""fsdp_qlora's command line, `python train.py --train_type qlora ...`. Upstream: its train.py (June 2024)."""

from __future__ import annotations

from typing import Any

from kit.errors import KitError
from kit.importing import prompts
from kit.importing.report import Reading, group_file

NAMES = {
    "model_name": "model.name_or_path",
    "batch_size": "trainer.per_device_train_batch_size",
    "context_length": "trainer.max_length",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "num_epochs": "trainer.num_train_epochs",
    "lr": "trainer.learning_rate",
    "seed": "trainer.seed",
    "name": "trainer.run_name",
    "use_activation_cpu_offload": "trainer.activation_offloading",
}
SAME = {
    "verbose": "metrics.jsonl holds every figure",
    "low_memory": "the kit loads its own way",
    "loading_workers": "the kit loads its own way",
    "no_sync": "gradients are joined at the step",
    "save_model": "the adapter is always saved",
    "master_addr": "the launcher's own",
    "project_name": "metrics.jsonl",
    "profiling_output": "not read: profile is off",
    "overwrite_profiling_output": "not read: profile is off",
    "with_stack": "not read: profile is off",
    "with_shapes": "not read: profile is off",
    "export_trace": "not read: profile is off",
    "export_memory_timeline": "not read: profile is off",
    "wait_steps": "not read: profile is off",
    "warmup_steps": "of the profiler",
    "active_steps": "of the profiler",
    "repeat": "of the profiler",
    "profiling_frequency": "of the profiler",
    "n_bits": "for HQQ",
}
LEFT = {
    "output_dir": ("the run directory holds everything", "runs_dir=FOLDER name=NAME"),
    "profile": ("no profiler here", "launch.script=my_train.py"),
    "profile_memory": ("peak memory is in metrics.jsonl", ""),
    "group": ("the environment says it", "export WANDB_RUN_GROUP=..."),
    "entity": ("the environment says it", "export WANDB_ENTITY=..."),
    "llama_pro_path": ("no block expansion here", "--train_type qlora"),
}
DATA: dict[str, dict[str, Any]] = {
    "alpaca": {"path": "yahma/alpaca-cleaned", "template": prompts.ALPACA_TIGHT},
    "alpaca_sample": {"path": "yahma/alpaca-cleaned", "template": prompts.ALPACA_TIGHT},
    "guanaco": {"path": "timdettmers/openassistant-guanaco"},
    "sql": {
        "path": "knowrohit07/know_sql",
        "split": "validation",
        "template": {
            "prompt": "###Context:\n{context}\n###Question:\n{question}\n###Answer:\n",
            "completion": "{answer}",
        },
    },
    "orca_math": {
        "path": "microsoft/orca-math-word-problems-200k",
        "template": {"prompt": "###Question:\n{question}\n###Answer:\n", "completion": "{answer}"},
    },
}
NOTES = {
    "alpaca": prompts.NO_INPUT,
    "alpaca_sample": prompts.NO_INPUT,
    "guanaco": "the loss is on the whole text; fsdp_qlora leaves the first question out of it",
    "sql": "fsdp_qlora shuffles and leaves out the first 1000 rows",
    "orca_math": "the first rows, not shuffled before",
}
PRECISION = {"bf16": ("bf16", "bfloat16"), "fp16_autocast": ("fp16", "float32"), "bf16_autocast": ("bf16", "float32"),
             "bf16_buffers_autocast": ("bf16", "bfloat16"), "fp32": (None, "float32")}  # fmt: skip
WHO = "fsdp_qlora's default"


def read(r: Reading) -> None:
    method(r)
    dataset(r)
    sharding(r)
    precision(r)
    optimizer(r)
    r.table(NAMES)
    r.equal(SAME)
    r.left(LEFT)
    if r.has("world_size"):
        count = r.get("world_size")
        r.carry(("world_size",), "launch.num_gpus", count if isinstance(count, int) and count > 0 else "auto")
    if r.has("master_port"):
        r.carry(("master_port",), "launch.master_port", r.get("master_port"))
    if r.has("log_to"):
        if r.get("log_to") == "wandb":
            r.choose(("log_to",), "tracking", "wandb")
        else:
            r.same(("log_to",), "metrics.jsonl and the console")
    steps(r)
    theirs = {
        "per_device_train_batch_size": 1, "max_length": 512, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "learning_rate": 1.0e-5, "seed": 42,
    }  # fmt: skip
    r.recipe.default("model.name_or_path", "meta-llama/Llama-2-7b-hf", WHO)
    for name, value in theirs.items():
        if group_file("trainer/sft.yaml").get(name) != value:
            r.recipe.default(f"trainer.{name}", value, WHO)
    if "tokenizer.pad_token" not in r.recipe.values:
        r.recipe.notes.append("fsdp_qlora pads with the end token; the kit does not: tokenizer.pad_token=... if asked")


def method(r: Reading) -> None:
    kind = r.get("train_type", default="qlora")
    methods = {"qlora": ("lora", True), "custom_qlora": ("lora", True), "bnb_dora": ("lora", True),
               "lora": ("lora", False), "custom_lora": ("lora", False), "full": ("none", False)}  # fmt: skip
    if kind not in methods:
        what = "HQQ" if "hqq" in str(kind) else "block expansion" if "pro" in str(kind) else "such a method"
        raise KitError(f"the kit has no {what}", f"{r.name}: train_type {kind}", "--train_type qlora, or bnb_dora")
    group, bits = methods[kind]
    if r.has("train_type"):
        r.choose(("train_type",), "peft", group)
        if bits:
            r.choose(("train_type",), "quantization", "nf4")
        if kind == "bnb_dora":
            r.carry(("train_type",), "peft.use_dora", True)
    else:
        r.recipe.groups.update(peft="lora", quantization="nf4")
        r.recipe.theirs["quantization=nf4"] = WHO
    names = {"lora_rank": "peft.r", "lora_alpha": "peft.lora_alpha", "lora_dropout": "peft.lora_dropout"}
    if group == "none":
        r.equal(dict.fromkeys([*names, "lora_target_modules"], "not read: train_type is full"))
        return
    r.table(names)
    for name, value in (("r", 64), ("lora_alpha", 16), ("lora_dropout", 0.1)):
        r.recipe.default(f"peft.{name}", value, WHO)
    all_of_theirs = ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
    if r.has("lora_target_modules"):
        asked = str(r.get("lora_target_modules")).lower()
        named: Any = {"all": all_of_theirs, "default": None}.get(asked, r.get("lora_target_modules"))
        r.carry(
            ("lora_target_modules",), "peft.target_modules", named, "all leaves o_proj out" if asked == "all" else ""
        )
    else:
        r.recipe.default("peft.target_modules", all_of_theirs, f"{WHO}, without o_proj")


def dataset(r: Reading) -> None:
    name = str(r.get("dataset", default="alpaca_sample"))
    if name not in DATA:
        if r.has("dataset"):
            r.leave(("dataset",), f"{name} is made inside fsdp_qlora's script", "dataset.path=FILE")
        r.equal({"dataset_samples": "of that data"})
        return
    for key, value in DATA[name].items():
        if r.has("dataset") or ("dataset",) in r.entries:
            r.carry(("dataset",), f"dataset.{key}", value, NOTES.get(name, ""))
        else:
            r.recipe.default(f"dataset.{key}", value, WHO)
    limited = name in ("alpaca_sample", "orca_math")
    if r.has("dataset_samples"):
        if limited:
            r.carry(("dataset_samples",), "dataset.limit", r.get("dataset_samples"))
        else:
            r.same(("dataset_samples",), f"not read for {name}")
    elif limited:
        r.recipe.default("dataset.limit", 512, WHO)


def sharding(r: Reading) -> None:
    """Their script shards by FSDP 1 in every process; here that is the group fsdp."""
    strategy = str(r.get("sharding_strategy", default="full_shard"))
    known = ("full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op")
    if r.has("sharding_strategy"):
        if strategy == "ddp":
            r.carry(("sharding_strategy",), "launch.launcher", "torchrun", "plain data parallelism")
        elif strategy in known[:2]:
            r.carry(("sharding_strategy",), "fsdp.reshard_after_forward", strategy == "full_shard", "FSDP 2")
        else:
            r.leave(("sharding_strategy",), f"FSDP 2 has no {strategy}", "fsdp.reshard_after_forward=true")
    if strategy == "ddp":
        if r.has("use_cpu_offload"):
            r.same(("use_cpu_offload",), "not read with ddp")
    else:
        r.recipe.default("fsdp.version", 2, "fsdp_qlora shards by FSDP")
        r.recipe.default("fsdp.auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "fsdp_qlora shards by FSDP")
        r.recipe.default("fsdp.reshard_after_forward", True, WHO)
        if r.has("use_cpu_offload"):
            r.carry(("use_cpu_offload",), "fsdp.cpu_offload", r.get("use_cpu_offload"))
        r.recipe.default("fsdp.cpu_offload", True, WHO)
    if r.has("use_gradient_checkpointing"):
        r.carry(("use_gradient_checkpointing",), "trainer.gradient_checkpointing", r.get("use_gradient_checkpointing"))
    if r.has("reentrant_checkpointing"):
        value = {"use_reentrant": r.get("reentrant_checkpointing")}
        r.carry(("reentrant_checkpointing",), "trainer.gradient_checkpointing_kwargs", value)


def precision(r: Reading) -> None:
    name = str(r.get("precision", default="bf16"))
    if name not in PRECISION:
        raise KitError(f"precision {name} is not one of fsdp_qlora's", r.name, ", ".join(PRECISION))
    flag, weights = PRECISION[name]
    for one in ("bf16", "fp16"):
        if r.has("precision") or ("precision",) in r.entries:
            r.carry(("precision",), f"trainer.{one}", one == flag)
        else:
            r.recipe.default(f"trainer.{one}", one == flag, WHO)
    if ("precision",) in r.entries:
        r.carry(("precision",), "model.dtype", weights)
    else:
        r.recipe.default("model.dtype", weights, WHO)


def optimizer(r: Reading) -> None:
    asked = str(r.get("optimizer", default="adamw"))
    names = {"adamw": "adamw_torch", "fused_adamw": "adamw_torch_fused", "adam": "adamw_torch",
             "fused_adam": "adamw_torch_fused", "sgd": "sgd"}  # fmt: skip
    decays = asked in ("adamw", "fused_adamw")
    if r.has("optimizer"):
        if asked in names:
            r.carry(("optimizer",), "trainer.optim", names[asked])
        else:
            r.leave(("optimizer",), f"transformers has no optimizer {asked}", "trainer.optim=adamw_torch_fused")
    else:
        r.recipe.default("trainer.optim", "adamw_torch", WHO)
    if r.has("wd"):
        if decays:
            r.carry(("wd",), "trainer.weight_decay", r.get("wd"))
        else:
            r.same(("wd",), f"not read with {asked}")
    if decays:
        for name, value in (("weight_decay", 0.1), ("adam_beta2", 0.95), ("adam_epsilon", 1.0e-5)):
            r.recipe.default(f"trainer.{name}", value, WHO if name == "weight_decay" else "fixed in fsdp_qlora")
    clip = r.get("apply_gradient_clipping") is True
    if r.has("apply_gradient_clipping"):
        r.carry(
            ("apply_gradient_clipping",), "trainer.max_grad_norm", r.get("grad_norm", default=0.3) if clip else 0.0
        )
    if r.has("grad_norm"):
        r.same(("grad_norm",), "apply_gradient_clipping says it" if clip else "not read: no clipping")
    r.recipe.default("trainer.max_grad_norm", 0.0, f"{WHO}: no clipping")
    schedule = str(r.get("lr_scheduler", default="constant"))
    schedules: dict[str, dict[str, Any]] = {
        "constant": {"lr_scheduler_type": "constant"},
        "linear": {"lr_scheduler_type": "linear", "warmup_steps": 0.1},
        "cosine": {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0.1,
                   "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    }  # fmt: skip
    made = schedules.get(schedule, {})
    if r.has("lr_scheduler"):
        if not made:
            r.leave(("lr_scheduler",), f"{schedule} is not one of fsdp_qlora's", "trainer.lr_scheduler_type=cosine")
        for name, given in made.items():
            r.carry(("lr_scheduler",), f"trainer.{name}", given)
    else:
        r.recipe.default("trainer.lr_scheduler_type", "constant", WHO)


def steps(r: Reading) -> None:
    """Their max_steps counts batches of each epoch."""
    if not r.has("max_steps"):
        return
    batches, gathered = r.get("max_steps"), r.get("gradient_accumulation_steps", default=1)
    if not isinstance(batches, int) or batches < 0:
        r.same(("max_steps",), "the epochs say it")
    elif r.get("num_epochs", default=1) == 1 and isinstance(gathered, int) and gathered > 0:
        note = f"{batches} batches" if gathered > 1 else ""
        r.carry(("max_steps",), "trainer.max_steps", max(batches // gathered, 1), note)
    else:
        r.leave(("max_steps",), "batches of each epoch there, steps of the run here", "trainer.max_steps=N")
