"""TRL's and transformers' own arguments: ScriptArguments, DatasetMixtureConfig, ModelConfig and SFTConfig.

Upstream: trl scripts/utils.py, trainer/model_config.py, scripts/sft.py (1.16); transformers training_args.py (5.23).
"""

from __future__ import annotations

from typing import Any

from kit.config.sections import OWNED
from kit.errors import KitError
from kit.importing import sharding
from kit.importing.report import Reading, same_value
from kit.schema import fields

MODEL = {
    "model_name_or_path": "model.name_or_path",
    "attn_implementation": "model.attn_implementation",
}
DATA = {"dataset_config": "dataset.name", "dataset_streaming": "dataset.streaming"}
LORA = {
    "lora_r": "peft.r",
    "lora_alpha": "peft.lora_alpha",
    "lora_dropout": "peft.lora_dropout",
    "lora_target_parameters": "peft.target_parameters",
    "lora_modules_to_save": "peft.modules_to_save",
    "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora",
}
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": None}
BITS = {
    "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage": "quantization.bnb_4bit_quant_storage",
}
EVERY_RUN = "every run has a directory of its own"
NOTHING = {  # keys of older releases that need nothing any more
    "overwrite_output_dir": EVERY_RUN,
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
UNREAD = {  # known, without a counterpart
    "ignore_bias_buffers": ("the launcher's find_unused handling is TRL's own", "a script of yours: launch.script"),
    "do_predict": ("predictions are a verb here", "kit generate RUN, kit eval RUN"),
    "logging_dir": ("trackers write into the run directory", "tracking=tensorboard"),
    "fp16_opt_level": ("Apex is gone", "trainer.fp16=true"),
    "jit_mode_eval": ("transformers has no such setting any more", "trainer.torch_compile=true"),
    "formatting_func": ("a config names no code here", "dataset.columns, dataset.template, or launch.script"),
    "dataset_dir": ("a folder of data is dataset.path itself", "dataset.path=FOLDER"),
}


def read(r: Reading) -> None:
    """A TRL or transformers argument file, and `trl sft`'s command line."""
    if str(r.get("task_type", default="CAUSAL_LM")) not in ("CAUSAL_LM", "None") or r.get("reward_model_path"):
        raise KitError("this is not a supervised fine-tuning run", r.name, "the kit trains causal language models")
    model(r)
    dataset(r)
    adapter(r)
    quantization(r)
    training_arguments(r)
    defaults(r)


def model(r: Reading) -> None:
    r.carry_all(MODEL)
    revision(r, "model_revision")
    for name in ("dtype", "torch_dtype"):
        if r.has(name) and not r.skip_null(name):
            dtype(r, (name,), r.get(name))
    remote_code(r)
    r.recipe.default("model.dtype", "float32", "TRL loads float32 where no dtype is given")


def revision(r: Reading, name: str) -> None:
    if r.has(name) and not r.skip_null(name):
        if r.get(name) == "main":
            r.mark_default((name,), "main is what is loaded")
        else:
            r.carry((name,), "model.revision", r.get(name))


def dtype(r: Reading, path: tuple[str | int, ...], value: Any) -> None:
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
    name = short.get(str(value), str(value).removeprefix("torch."))
    if name == "auto":
        r.carry(path, "model.dtype", "auto", "auto is the run's precision here, the checkpoint's dtype there")
    elif name in ("float32", "bfloat16", "float16"):
        r.carry(path, "model.dtype", name)
    else:
        r.leave(path, f"no dtype that weights are loaded in: {name}", "model.dtype=bfloat16")


def remote_code(r: Reading, name: str = "trust_remote_code") -> None:
    """A file must not switch on remote code: a person does, on the command line."""
    if r.has(name):
        if r.get(name) in (True, "true", "True", 1):
            r.leave((name,), "a file must not switch on remote code", "model.trust_remote_code=true when you start it")
        else:
            r.mark_default((name,), "off, as here")


def dataset(r: Reading) -> None:
    evaluated = r.get("eval_strategy", default=r.get("evaluation_strategy", default="no"))
    mixture = r.get("datasets")
    if isinstance(mixture, list) and mixture and isinstance(mixture[0], dict):
        for name in ("dataset_name",):
            if r.has(name):
                r.leave((name,), "datasets is given, and TRL reads that", "")
        first_of_mixture(r, mixture)
    elif r.has("dataset_name") and not r.skip_null("dataset_name"):
        r.carry(("dataset_name",), "dataset.path", r.get("dataset_name"))
    r.carry_all(DATA)
    if r.has("streaming"):
        r.carry(("streaming",), "dataset.streaming", r.get("streaming"))
    if r.has("test_split_size") and not r.skip_null("test_split_size"):
        r.carry(("test_split_size",), "dataset.test_size", r.get("test_split_size"))
    if r.has("dataset_train_split"):
        r.carry(("dataset_train_split",), "dataset.split", r.get("dataset_train_split") or "train")
    on = evaluated not in ("no", False, None)
    if r.has("dataset_test_split"):
        if not on:
            r.mark_default(("dataset_test_split",), "not read: nothing is evaluated")
        elif "dataset.test_size" in r.recipe.values:
            r.mark_default(("dataset_test_split",), "the rows held out serve")
        else:
            r.carry(("dataset_test_split",), "dataset.eval_split", r.get("dataset_test_split"))
    elif on and "dataset.test_size" not in r.recipe.values:
        r.recipe.default("dataset.eval_split", "test", "TRL evaluates on the split named test")
    text = r.get("dataset_text_field")
    if r.has("dataset_text_field") and not r.skip_null("dataset_text_field"):
        if text == "text":
            r.mark_default(("dataset_text_field",), "the column text is found by itself")
        else:
            r.carry(("dataset_text_field",), "dataset.columns.text", text)


def first_of_mixture(r: Reading, mixture: list[Any]) -> None:
    """The kit trains on one data set; the first is carried, the others are named."""
    head: tuple[str | int, ...] = ("datasets", 0)
    place, files = mixture[0].get("path"), mixture[0].get("data_files")
    if place in ("json", "csv", "parquet", "text") and isinstance(files, str):
        r.mark_default((*head, "path"), "the suffix of the file says it")
        r.carry((*head, "data_files"), "dataset.path", files)
    elif "path" in mixture[0]:
        r.carry((*head, "path"), "dataset.path", place)
    r.carry_all({"name": "dataset.name", "split": "dataset.split"}, *head)
    if r.has(*head, "columns"):
        r.mark_default((*head, "columns"), "only the columns that training needs are kept")
    if r.has(*head, "fraction") and len(mixture) == 1:
        r.mark_default((*head, "fraction"), "a share of one data set is all of it")
    for number in range(1, len(mixture)):
        if r.has("datasets", number):
            r.leave(("datasets", number), "the kit trains on one data set", "join the files in one folder")


def adapter(r: Reading) -> None:
    used = r.get("use_peft", default=False)
    on = used is True or str(used).lower() in ("true", "1", "yes")
    if r.has("use_peft"):
        if on:
            r.choose_group(("use_peft",), "peft", "lora")
        else:
            r.choose_group(("use_peft",), "peft", "none")
    elif not any(k.startswith("lora_") for k in r.tree if isinstance(k, str)) or not on:
        r.recipe.groups.setdefault("peft", "none")
        r.recipe.their_defaults["peft=none"] = "TRL trains every weight where use_peft is not given"
    if not on:
        r.mark_defaults(dict.fromkeys([*LORA, "lora_target_modules", "lora_task_type"], "not read: use_peft is off"))
        return
    r.carry_all(LORA)
    if r.has("lora_target_modules") and not r.skip_null("lora_target_modules"):
        named = r.get("lora_target_modules")
        named = named[0] if isinstance(named, list) and len(named) == 1 and named[0] == "all-linear" else named
        r.carry(("lora_target_modules",), "peft.target_modules", named)
    if r.has("lora_task_type"):
        if r.get("lora_task_type") in ("CAUSAL_LM", None):
            r.mark_default(("lora_task_type",), "the kit trains causal language models")
        else:
            r.leave(("lora_task_type",), "the kit trains causal language models", "")
    for name, value in LORA_DEFAULTS.items():
        r.recipe.default(f"peft.{name}", value, "TRL's default")


def quantization(r: Reading) -> None:
    four, eight = (r.get(k) in (True, "true", "True", 1) for k in ("load_in_4bit", "load_in_8bit"))
    for name, on, group in (("load_in_4bit", four, "nf4"), ("load_in_8bit", eight and not four, "int8")):
        if r.has(name):
            if on:
                r.choose_group((name,), "quantization", group)
            else:
                r.mark_default((name,), "off, as here" if not r.get(name) else "load_in_4bit is read first")
    if not four:
        r.mark_defaults(dict.fromkeys(BITS, "not read: load_in_4bit is off"))
        return
    r.carry_all(BITS)
    r.recipe.default("quantization.bnb_4bit_use_double_quant", False, "TRL's default")


def training_arguments(r: Reading, skip: tuple[str, ...] = ()) -> None:
    """Every field of SFTConfig and TrainingArguments, older names included."""
    strategy_words(r)
    r.mark_defaults(NOTHING)
    r.leave_all(UNREAD)
    older_names(r)
    reports(r)
    sharding.read(r)
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
        init_kwargs(r)
    remote_code(r)
    names = set(fields.names("SFTConfig"))
    for name in [n for n in r.tree if isinstance(n, str) and n in names and n not in OWNED and n not in skip]:
        if not r.has(name):
            continue
        value = r.get(name)
        if value is None and fields.default("SFTConfig", name) is not None:
            r.mark_default((name,), "null: nothing is set")
        elif name in ("do_eval", "do_train"):
            r.mark_default((name,), "eval_strategy says it")
        else:
            r.carry((name,), f"trainer.{name}", value)


def strategy_words(r: Reading) -> None:
    """YAML reads an unquoted no as false."""
    for name in ("eval_strategy", "save_strategy", "logging_strategy", "evaluation_strategy"):
        if r.has(name) and isinstance(r.get(name), bool):
            new = "eval_strategy" if name == "evaluation_strategy" else name
            r.carry((name,), f"trainer.{new}", "no" if r.get(name) is False else "steps")


def older_names(r: Reading) -> None:
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


def reports(r: Reading, *path: str | int) -> None:
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


def init_kwargs(r: Reading) -> None:
    block_key = "model_init_kwargs"
    for name in ("dtype", "torch_dtype"):
        if r.has(block_key, name) and not r.skip_null(block_key, name):
            dtype(r, (block_key, name), r.get(block_key, name))
    r.carry_all({"attn_implementation": "model.attn_implementation", "revision": "model.revision"}, block_key)
    for name in list(r.get(block_key)):
        if r.has(block_key, name) and not r.skip_null(block_key, name):
            if name == "trust_remote_code":
                r.leave((block_key, name), "a file must not switch on remote code", "model.trust_remote_code=true")
            elif name == "use_cache":
                r.mark_default((block_key, name), "off while training")
            else:
                r.carry((block_key, name), f"trainer.model_init_kwargs.{name}", r.get(block_key, name))


def defaults(r: Reading, changed: dict[str, Any] | None = None, who: str = "TRL") -> None:
    """What the foreign trainer does where nothing is said and the kit's own groups do otherwise."""
    from kit.importing.report import group_file

    kept = ("bf16", "fp16", "use_cpu", "logging_nan_inf_filter")  # what the hardware is fast at; a NaN is never hidden
    for name, ours in group_file("trainer/sft.yaml").items():
        if name not in kept:
            value = (changed or {}).get(name, fields.default("SFTConfig", name))
            if not same_value(value, ours):
                r.recipe.default(f"trainer.{name}", value, f"{who}'s default")
    for name, value in (changed or {}).items():
        r.recipe.default(f"trainer.{name}", value, f"{who}'s default")
