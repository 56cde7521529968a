"""The fields of TRL's SFTConfig and transformers' TrainingArguments, older names included.

Upstream: trl trainer/sft_config.py (1.16); transformers training_args.py (5.23).
"""

from __future__ import annotations

from typing import Any

from kit.foreign import sharding
from kit.foreign.report import Reading, read_group_file, same_value
from kit.schema import fields

OBSOLETE = {  # keys of older releases that need nothing any more
    "overwrite_output_dir": "every run has a directory of its own",
    "save_safetensors": "safetensors is the only format",
    "use_mps_device": "mps is found by itself",
    "half_precision_backend": "there is one backend",
    "do_train": "kit train trains",
    "local_rank": "the launcher gives every rank its number",
    "disable_tqdm": "a bar on a terminal, a line elsewhere",
    "log_level": "the kit's console has one level",
    "log_level_replica": "the kit's console has one level",
    "ddp_backend": "gloo on CPUs, nccl on GPUs",
    "dataset_batch_size": "TRL 1 has no such setting",
    "_n_gpu": "launch.num_gpus counts processes",
}
NO_COUNTERPART = {  # known, without a counterpart
    "ignore_bias_buffers": ("the launcher's find_unused handling is TRL's own", "a script of yours: launch.script"),
    "do_predict": ("predictions are a verb here", "kit generate RUN, kit eval RUN"),
    "logging_dir": ("trackers write into the run directory", "tracking=tensorboard"),
    "fp16_opt_level": ("Apex is gone", "trainer.fp16=true"),
    "jit_mode_eval": ("transformers has no such setting any more", "trainer.torch_compile=true"),
    "formatting_func": ("a config names no code here", "dataset.columns, dataset.template, or launch.script"),
    "dataset_dir": ("a folder of data is dataset.path itself", "dataset.path=FOLDER"),
}


def import_dtype(r: Reading, path: tuple[str | int, ...], value: Any) -> None:
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
    name = short.get(str(value), str(value).removeprefix("torch."))
    if name == "auto":
        r.carry(path, "model.dtype", "auto", "auto is the run's precision here, the checkpoint's dtype there")
    elif name in ("float32", "bfloat16", "float16"):
        r.carry(path, "model.dtype", name)
    else:
        r.leave(path, f"no dtype that weights are loaded in: {name}", "model.dtype=bfloat16")


def refuse_remote_code(r: Reading, name: str = "trust_remote_code") -> None:
    """A file must not switch on remote code: a person does, on the command line."""
    if r.has(name):
        if r.get(name) in (True, "true", "True", 1):
            r.leave((name,), "a file must not switch on remote code", "model.trust_remote_code=true when you start it")
        else:
            r.mark_default((name,), "off, as here")


def import_training_arguments(r: Reading, skip: tuple[str, ...] = (), only: set[str] | None = None) -> None:
    """Carry the fields of SFTConfig and TrainingArguments, older names included; `only`: those that the tool reads."""
    import_strategies(r)
    r.mark_defaults(OBSOLETE)
    r.leave_all(NO_COUNTERPART)
    import_older_names(r)
    import_report_to(r)
    sharding.import_sharding(r)
    for name in ("output_dir", "logging_dir"):
        if r.has(name) and not r.skip_null(name):
            r.leave((name,), "the run directory holds everything", "runs_dir=FOLDER name=NAME")
    tokens = {"chat_template_path": "tokenizer.chat_template", "eos_token": "tokenizer.eos_token",
              "pad_token": "tokenizer.pad_token"}  # fmt: skip
    r.carry_all(tokens)
    if r.has("resume_from_checkpoint") and not r.skip_null("resume_from_checkpoint"):
        if r.get("resume_from_checkpoint") is False:
            r.mark_default(("resume_from_checkpoint",), "a new run")
        else:
            r.leave(
                ("resume_from_checkpoint",), "another tool's checkpoint cannot be continued", "peft.init_from=ADAPTER"
            )
    if isinstance(r.get("model_init_kwargs"), dict):
        import_model_init_kwargs(r)
    refuse_remote_code(r)
    names = set(fields.field_names("SFTConfig"))
    for name in [
        n for n in r.tree if isinstance(n, str) and n in names and n not in fields.OWNED_ELSEWHERE and n not in skip
    ]:
        if not r.has(name):
            continue
        value = r.get(name)
        if only is not None and name not in only:
            r.leave(
                (name,),
                f"{r.format} has no such key and passes it over",
                f"trainer.{name}=... here, where it is meant",
            )
        elif value is None and fields.field_default("SFTConfig", name) is not None:
            r.mark_default((name,), "null: nothing is set")
        elif name in ("do_eval", "do_train"):
            r.mark_default((name,), "eval_strategy says it")
        else:
            r.carry((name,), f"trainer.{name}", value)


def import_strategies(r: Reading) -> None:
    """YAML reads an unquoted no as false."""
    for name in ("eval_strategy", "save_strategy", "logging_strategy", "evaluation_strategy"):
        if r.has(name) and isinstance(r.get(name), bool):
            new = "eval_strategy" if name == "evaluation_strategy" else name
            r.carry((name,), f"trainer.{new}", "no" if r.get(name) is False else "steps")


def import_older_names(r: Reading) -> None:
    if r.has("warmup_ratio") and not r.skip_null("warmup_ratio"):
        ratio, steps = r.get("warmup_ratio"), r.get("warmup_steps")
        if isinstance(steps, int | float) and steps > 0:
            r.mark_default(("warmup_ratio",), "not read: warmup_steps is given")
        else:
            r.carry(("warmup_ratio",), "trainer.warmup_steps", ratio, "a value below 1 is a share of all steps")
            if r.has("warmup_steps"):
                r.mark_default(("warmup_steps",), "0: warmup_ratio says it")
    renamed = {"max_seq_length": "max_length", "max_seq_len": "max_length", "evaluation_strategy": "eval_strategy",
               "no_cuda": "use_cpu", "per_gpu_train_batch_size": "per_device_train_batch_size",
               "per_gpu_eval_batch_size": "per_device_eval_batch_size", "neftune_alpha": "neftune_noise_alpha",
               "include_tokens_per_second": "include_num_input_tokens_seen",
               "push_to_hub_model_id": "hub_model_id"}  # fmt: skip
    r.carry_all({old: f"trainer.{new}" for old, new in renamed.items()})
    if r.has("group_by_length"):
        if r.get("group_by_length") in (True, "true", "True"):
            r.carry(("group_by_length",), "trainer.train_sampling_strategy", "group_by_length")
        else:
            r.mark_default(("group_by_length",), "off, as here")


def import_report_to(r: Reading, *path: str | int) -> None:
    path = path or ("report_to",)
    if not r.has(*path):
        return
    value = r.get(*path)
    names = [str(n) for n in (value if isinstance(value, list) else [value]) if n not in ("none", None, "")]
    if not names:
        r.mark_default(path, "no tracker, as here")
    elif "all" in names:
        r.leave(path, "all reports to whatever happens to be installed", "tracking=tensorboard, or another by name")
    elif len(names) == 1 and names[0] in ("wandb", "tensorboard", "mlflow", "trackio"):
        r.choose_group(path, "tracking", names[0])
    else:
        r.carry(path, "trainer.report_to", names)


def import_model_init_kwargs(r: Reading) -> None:
    block_key = "model_init_kwargs"
    for name in ("dtype", "torch_dtype"):
        if r.has(block_key, name) and not r.skip_null(block_key, name):
            import_dtype(r, (block_key, name), r.get(block_key, name))
    r.carry_all({"attn_implementation": "model.attn_implementation", "revision": "model.revision"}, block_key)
    for name in list(r.get(block_key)):
        if r.has(block_key, name) and not r.skip_null(block_key, name):
            if name == "trust_remote_code":
                r.leave((block_key, name), "a file must not switch on remote code", "model.trust_remote_code=true")
            elif name == "use_cache":
                r.mark_default((block_key, name), "off while training")
            else:
                r.carry((block_key, name), f"trainer.model_init_kwargs.{name}", r.get(block_key, name))


def write_trainer_defaults(r: Reading, changed: dict[str, Any] | None = None, who: str = "TRL") -> None:
    """What the foreign trainer does where nothing is said and the kit's own groups do otherwise."""
    kept = ("bf16", "fp16", "use_cpu", "logging_nan_inf_filter")  # what the hardware is fast at; a NaN is never hidden
    for name, ours in read_group_file("trainer/sft.yaml").items():
        if name not in kept:
            value = (changed or {}).get(name, fields.field_default("SFTConfig", name))
            if not same_value(value, ours):
                r.recipe.default(f"trainer.{name}", value, f"{who}'s default")
    for name, value in (changed or {}).items():
        r.recipe.default(f"trainer.{name}", value, f"{who}'s default")
