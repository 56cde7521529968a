"""TRL's and transformers' own arguments: ScriptArguments, DatasetMixtureConfig, ModelConfig and SFTConfig.

Upstream: trl scripts/utils.py, trainer/model_config.py, scripts/sft.py (1.16); transformers training_args.py (5.23).
"""

from __future__ import annotations

from typing import Any

from kit.errors import KitError
from kit.importing.report import Reading
from kit.importing.training_arguments import (
    import_dtype,
    import_training_arguments,
    refuse_remote_code,
    write_trainer_defaults,
)

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


def import_trl(r: Reading) -> None:
    """A TRL or transformers argument file, and `trl sft`'s command line."""
    if str(r.get("task_type", default="CAUSAL_LM")) not in ("CAUSAL_LM", "None") or r.get("reward_model_path"):
        raise KitError("this is not a supervised fine-tuning run", r.name, "the kit trains causal language models")
    import_model(r)
    import_dataset(r)
    import_adapter(r)
    import_quantization(r)
    import_training_arguments(r)
    write_trainer_defaults(r)


def import_model(r: Reading) -> None:
    r.carry_all(MODEL)
    import_revision(r, "model_revision")
    for name in ("dtype", "torch_dtype"):
        if r.has(name) and not r.skip_null(name):
            import_dtype(r, (name,), r.get(name))
    refuse_remote_code(r)
    r.recipe.default("model.dtype", "float32", "TRL loads float32 where no dtype is given")


def import_revision(r: Reading, name: str) -> None:
    if r.has(name) and not r.skip_null(name):
        if r.get(name) == "main":
            r.mark_default((name,), "main is what is loaded")
        else:
            r.carry((name,), "model.revision", r.get(name))


def import_dataset(r: Reading) -> None:
    evaluated = r.get("eval_strategy", default=r.get("evaluation_strategy", default="no"))
    mixture = r.get("datasets")
    if isinstance(mixture, list) and mixture and isinstance(mixture[0], dict):
        for name in ("dataset_name",):
            if r.has(name):
                r.leave((name,), "datasets is given, and TRL reads that", "")
        import_first_of_mixture(r, mixture)
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


def import_first_of_mixture(r: Reading, mixture: list[Any]) -> None:
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


def import_adapter(r: Reading) -> None:
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


def import_quantization(r: Reading) -> None:
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
