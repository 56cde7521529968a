"""The options that scripts of people's own have in common, beside those of TRL and transformers.

alpaca-lora, qlora.py, FastChat, LongLoRA, Chinese-LLaMA-Alpaca, open-instruct and many more: each parses a few words
of its own before TrainingArguments. What such a word means is read from its name, so the report has a line for each.
"""

from __future__ import annotations

import re
from typing import Any

from kit.foreign.report import BOOLEAN_WORDS, Reading

NAMES = {
    "model.name_or_path": "model base_model model_name model_path model_id model_name_or_dir base_model_name_or_path "
    "pretrained_model pretrained_model_name_or_path",
    "tokenizer.name_or_path": "tokenizer_name_or_path tokenizer_name tokenizer_path tokenizer",
    "dataset.path": "data_path dataset dataset_path train_file train_files train_data train_data_path data_file "
    "data_files dataset_id_or_path dataset_id train_file_path dataset_dir_or_path data train_dataset train_path "
    "train_file_dir dataset_dir data_name",
    "dataset.name": "dataset_config_name subset",
    "dataset.eval_path": "validation_file validation_files eval_data_path eval_file eval_data validation_path "
    "validation_file_dir",
    "dataset.limit": "max_train_samples max_samples",
    "trainer.max_length": "model_max_length block_size seq_length cutoff_len max_len",
    "trainer.max_steps": "max_train_steps",
    "trainer.num_train_epochs": "num_epochs epochs",
    "trainer.learning_rate": "lr",
    "trainer.per_device_train_batch_size": "micro_batch_size train_batch_size",
    "trainer.lr_scheduler_type": "lr_scheduler",
    "trainer.warmup_steps": "num_warmup_steps lr_warmup_steps",
    "trainer.gradient_accumulation_steps": "gradient_accumulate_every",
    "trainer.dataset_num_proc": "preprocessing_num_workers",
    "trainer.use_liger_kernel": "use_liger",
    "trainer.gradient_checkpointing": "grad_checkpoint use_gradient_checkpointing",
    "peft.r": "lora_rank lora_dim",
    "peft.target_modules": "trainable lora_target lora_trainable target_modules lora_modules lora_module_name",
    "peft.modules_to_save": "modules_to_save",
    "quantization.bnb_4bit_quant_type": "quant_type",
    "quantization.bnb_4bit_use_double_quant": "double_quant use_double_quant",
    "quantization.bnb_4bit_compute_dtype": "bnb_4bit_compute_dtype",
}
OF_ADAPTERS = ("peft.", "quantization.")  # only read where their switch is on
LISTS = ("peft.target_modules", "peft.modules_to_save")
ADAPTER_SWITCHES = ("use_peft_lora", "use_lora", "q_lora", "qlora", "use_qlora", "lora_enable", "lora", "enable_lora",
                    "peft", "use_adapter")  # fmt: skip
QUANTIZED_LORA = ("q_lora", "qlora", "use_qlora")
BITS = ("bits", "load_in_kbits", "load_in_bits", "kbits", "quantization", "quantization_bits")
ATTENTION = ("use_flash_attn", "flash_attn", "use_flash_attention", "use_flash_attention_2", "use_flash_attn_2")
UNCLEAR = {
    "batch_size": ("rows of a device or of a step, as its code has it",
                   "trainer.per_device_train_batch_size=N, or global_batch_size=N"),
    "source_max_len": ("the length of the prompt alone", "trainer.max_length=N, of prompt and answer together"),
    "target_max_len": ("the length of the answer alone", "trainer.max_length=N, of prompt and answer together"),
    "max_source_length": ("the length of the prompt alone", "trainer.max_length=N, of prompt and answer together"),
    "max_target_length": ("the length of the answer alone", "trainer.max_length=N, of prompt and answer together"),
    "chat_template_format": ("the tokenizer's own template is used", "tokenizer.chat_template=NAME or FILE.jinja"),
}  # fmt: skip


def is_on(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "1", "yes")


def is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool) or value in (0, 1) or str(value).lower() in BOOLEAN_WORDS


def adapter_switches(r: Reading) -> list[str]:
    """The script's own words for an adapter that are given; `peft` may be a block or a path elsewhere."""
    return [name for name in ADAPTER_SWITCHES if name in r.tree and is_switch(r.get(name))]


def trains_adapter(r: Reading) -> bool:
    """Tell whether a script trains an adapter: by its switches, else by the rank that it is given."""
    switches = adapter_switches(r)
    return any(is_on(r.get(s)) for s in switches) or (
        not switches and any(r.get(name) is not None for name in ("lora_rank", "lora_r", "lora_dim"))
    )


def bits_of(r: Reading) -> str | None:
    """The bits that the base is loaded in, by a number: 4, 8, or 16 for none."""
    given = (str(r.get(name)).lower() for name in BITS if name in r.tree)
    return next((value.removesuffix("bit").strip("-_") for value in given if value not in ("none", "")), None)


def import_own_words(r: Reading, adapter: bool, four_bit: bool) -> None:
    """Carry what the names of a script's own options say, where TRL's own name of it is not given."""
    for key, names in NAMES.items():
        known = [name for name in names.split() if r.has(name) and not r.skip_null(name)]
        for name in known:
            value = r.get(name)
            if (key.startswith("peft.") and not adapter) or (key.startswith("quantization.") and not four_bit):
                r.mark_default((name,), "not read: no adapter" if key.startswith("peft.") else "not read: no 4 bits")
            elif isinstance(value, dict | bool) and key.endswith(("path", "name", "length", "steps", ".r")):
                continue  # a block or a switch of that name means something else
            elif key in LISTS:
                r.carry((name,), key, list_of_modules(value), "the script's own option")
            elif key == "trainer.max_length" and value == -1:
                continue
            else:
                r.carry((name,), key, value, "the script's own option")
    if isinstance(splits := r.get("splits"), str | list) and r.has("splits"):
        listed = splits.split(",") if isinstance(splits, str) else [str(split) for split in splits]
        listed = [split.strip() for split in listed] or ["train"]
        train = next((split for split in listed if "train" in split), listed[0])
        r.carry(("splits",), "dataset.split", train, "the one to train on")
        test = next((split for split in listed if "test" in split or "val" in split), None)
        if test and r.get("eval_strategy", default=r.get("evaluation_strategy", default="no")) not in ("no", False):
            r.carry(("splits",), "dataset.eval_split", test)
    for name in ATTENTION:
        if r.has(name):
            if is_on(r.get(name)):
                r.carry((name,), "model.attn_implementation", "flash_attention_2", "the script's own option")
            else:
                r.mark_default((name,), "off")
    r.leave_all(UNCLEAR)


def list_of_modules(value: Any) -> Any:
    words: list[Any] = value if isinstance(value, list) else re.sub(r"[\[\]'\",]", " ", str(value)).split()
    return "all-linear" if words in (["all"], ["all-linear"]) else words
