"""Points from what was typed to the key that is meant: bare names, older ones, other tools', misspelt ones."""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from kit.config.data_words import hydra_text
from kit.config.keys import SECTIONS, all_keys, is_owned, renamed_to
from kit.config.provenance import GROUPS
from kit.errors import KitError
from kit.foreign.read import DECISIVE_KEYS, KEYS_OF_FORMAT, TOOLS, detect_format, parse_scalar
from kit.foreign.translate import Translation, known_names, translate_key
from kit.schema import fields
from kit.schema.run_plan import RunInput

SIMPLE = (str, int, float, bool, type(None))
# Words for which no library has a field, as people type them.
COMMON = {"train_batch_size": "trainer.per_device_train_batch_size", "bs": "trainer.per_device_train_batch_size",
          "gpus": "launch.num_gpus", "n_gpus": "launch.num_gpus", "ngpus": "launch.num_gpus",
          "n_gpu": "launch.num_gpus", "nnodes": "launch.num_nodes", "steps": "trainer.max_steps",
          "context_length": "trainer.max_length", "seq_len": "trainer.max_length", "seq_length": "trainer.max_length",
          "max_len": "trainer.max_length", "accumulation_steps": "trainer.gradient_accumulation_steps",
          "per_device_batch_size": "trainer.per_device_train_batch_size", "revision": "model.revision",
          "grad_accum": "trainer.gradient_accumulation_steps", "grad_acc": "trainer.gradient_accumulation_steps",
          "wd": "trainer.weight_decay", "warmup": "trainer.warmup_steps", "base": "model.name_or_path",
          "data": "dataset.path", "data_path": "dataset.path", "train_file": "dataset.path",
          "train_path": "dataset.path", "data_file": "dataset.path", "eval_file": "dataset.eval_path",
          "validation_file": "dataset.eval_path", "val_path": "dataset.eval_path",
          "scheduler": "trainer.lr_scheduler_type",
          "modules": "peft.target_modules", "targets": "peft.target_modules",
          "flash_attention_2": "model.attn_implementation", "use_flash_attention_2": "model.attn_implementation",
          "use_flash_attn": "model.attn_implementation", "template_name": "tokenizer.chat_template"}  # fmt: skip
FLASH = ("flash_attention_2", "use_flash_attention_2", "use_flash_attn")
SWITCHES: dict[str, dict[Any, str]] = {  # words that choose a group, by their value
    "use_lora": {True: "peft=lora", False: "peft=none"},
    "use_qlora": {True: "peft=lora quantization=nf4"},
    "adapter": {"qlora": "peft=lora quantization=nf4"},
    "use_4bit": {True: "quantization=nf4", False: "quantization=none"},
    "use_8bit": {True: "quantization=int8", False: "quantization=none"},
    "load_in_nf4": {True: "quantization=nf4"},
    "bits": {4: "quantization=nf4", 8: "quantization=int8"},
    "zero_stage": {1: "deepspeed=zero1", 2: "deepspeed=zero2", 3: "deepspeed=zero3"},
    "zero": {1: "deepspeed=zero1", 2: "deepspeed=zero2", 3: "deepspeed=zero3"},
    "full_finetune": {True: "peft=none"},
    "full_finetuning": {True: "peft=none"},
}


SECTION_NAMES = {  # what other tools and scripts call our sections
    "trainer": "training train training_args training_arguments trainer_args args sft sft_config hyperparameters",
    "peft": "lora lora_config peft_config adapter adapter_config peft_args lora_args qlora",
    "dataset": "data datasets data_args dataset_args data_config",
    "model": "model_args base base_model model_config model_arguments",
    "quantization": "bnb bnb_config quantization_config quant bitsandbytes",
    "deepspeed": "ds ds_config deepspeed_config zero",
    "launch": "launcher slurm distributed accelerate",
}


def suggest_override(key: str, value: Any, typed: str | None = None, in_file: bool = False, near: str = "") -> str:
    """Say what to write for a key that is not one of the kit's, `near` or "" where nothing is likely.

    Args:
        key: as it was typed; of a dotted one its last part counts.
        value: what it was set to.
        typed: the value as text of a command line, kept where it is right as it is.
        in_file: the answer is for a YAML file and not for a command line.
        near: the answer where the key stands for nothing else exactly.
    """
    key = re.sub(r"\[\d+\]", "", key.lstrip("+-~"))
    name = key.rpartition(".")[2].replace("-", "_")
    if isinstance(value, dict) and key == name:
        return next(
            (f"the section is called {s}" for s, words in SECTION_NAMES.items() if name in words.split()), near
        )
    if exact := exact_meaning(name, value, typed, in_file) or near:
        return exact
    for cutoff in (0.85, 0.75):
        for close in difflib.get_close_matches(name.lower(), bare_names(), 3, cutoff):
            if meant := exact_meaning(close, value, typed, in_file, sure=False):
                return f"did you mean {meant}?"
    return ""


def exact_meaning(name: str, value: Any, typed: str | None, in_file: bool, sure: bool = True) -> str:
    """Say what a bare name stands for: a field of our sections, its older name, or another tool's key.

    `sure`: also say why there is nothing to set, which of a name that is only like the typed one means little.
    """
    if name in GROUPS:
        return ""
    if choice := SWITCHES.get(name, {}).get(value) if isinstance(value, SIMPLE) else None:
        return choice.replace("=", ": ").replace(" quant", ", quant") if in_file else choice
    entries = all_keys()
    fields_of_name = fields_named(name)
    unset = isinstance(value, str) and value.startswith("$")  # a variable of the shell, of any kind
    own = [k for k in fields_of_name if unset or takes(entries[k], value)]
    if fields_of_name and is_owned(fields_of_name[0]):
        return fields.OWNED_ELSEWHERE[name]
    translation = None if name in COMMON else translate_key(name, value)
    if translation and changes(translation, value):  # bf16 -> bfloat16, load_in_4bit -> quantization=nf4
        return translated(translation, value, typed, in_file)
    near = [COMMON[name]] if name in COMMON else [k for k in own if k.count(".") == 1 and k[:10] != "deepspeed."]
    renamed = [to for section in fields.RENAMED_IN if (to := renamed_to(section, name)) in entries]
    if keys := near or renamed:
        value, typed = ("flash_attention_2", None) if name in FLASH else (value, typed)
        text = written(keys[0], value, typed, in_file)
        if keys[0] == "trainer.per_device_train_batch_size" and keys[0] != f"trainer.{name}":
            return f"{text}, rows of one process at a time; global_batch_size is the rows of one step"
        return f"{text}, or {written(keys[1], value, typed, in_file)}" if len(keys) > 1 else text
    if translation and (translation.values or sure):
        return translated(translation, value, typed, in_file)
    if sure and (words := [w for table in fields.RENAMED_IN.values() if (w := table.get(name))]):
        return words[0]
    if deep := own or fields_of_name:
        return written(deep[0], value, typed, in_file)
    return ""


def changes(translation: Translation, value: Any) -> bool:
    """Tell whether a translation gives another value than was typed, or a choice of a group."""
    values = list(translation.values.values())
    return bool(values) and (values != [value] or "." not in "".join(translation.values))


@cache
def fields_named(name: str) -> list[str]:
    """List the keys whose last part is that name, the likeliest first."""
    matches = [k for k in all_keys() if k.endswith(f".{name}")]
    return sorted(matches, key=lambda k: (is_owned(k), SECTIONS.index(k.split(".")[0]), k.count(".")))


@cache
def bare_names() -> tuple[str, ...]:
    """List every name without its section that can be translated."""
    own = [k.rpartition(".")[2] for k in all_keys() if "." in k and not k.startswith("deepspeed.")]
    older = [n for table in fields.RENAMED_IN.values() for n in table]
    return tuple(dict.fromkeys([*own, *COMMON, *older, *known_names()]))


def takes(entry: dict[str, Any], value: Any) -> bool:
    """Tell whether a field takes a value of that type; what is nobody's value yet suits every field."""
    if "kinds" not in entry:
        return not isinstance(entry.get("default"), dict) or isinstance(value, dict)
    return value in (None, "") or fields.accepts(entry, value) or isinstance(value, str) and "list" in entry["kinds"]


def translated(translation: Translation, value: Any, typed: str | None, in_file: bool) -> str:
    """Write a translation as overrides, or as the reason why nothing is to be set."""
    if translation.values:
        parts = [
            written(key, to, typed if to == value and type(to) is type(value) else None, in_file)
            for key, to in translation.values.items()
        ]
        return (" and " if in_file else " ").join(parts)
    reason = translation.reason.removeprefix("NOT carried: ")
    return f"{translation.fix} ({reason})" if translation.fix else f"leave it out: {reason}"


def written(key: str, value: Any, typed: str | None, in_file: bool) -> str:
    """Write a setting as an override of a command line, or as a place in a YAML file."""
    section, _, name = key.rpartition(".")
    if in_file:
        text = yaml_text(value)
        return f"{key}: write `{name}: {text}` below `{section}:`" if section else f"{key}: {text}"
    return f"{key}={override_text(value) if typed is None else typed}"


def yaml_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def override_text(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{override_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_text, value)) + "]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(value) if re.fullmatch(r"[\w./-]+", str(value)) else hydra_text(str(value))


# What people type for a choice of a group.
CHOICES = {"peft": {"qlora": "peft=lora quantization=nf4", "dora": "peft=lora peft.use_dora=true", "full": "peft=none",
                    "rslora": "peft=lora peft.use_rslora=true", "false": "peft=none", "true": "peft=lora"},
           "quantization": dict.fromkeys(("4bit", "qlora", "4", "bnb_4bit", "fp4", "true"), "quantization=nf4")
           | dict.fromkeys(("8bit", "8", "bnb_8bit", "int8bit"), "quantization=int8") | {"false": "quantization=none"},
           "deepspeed": {f"{word}{stage}": f"deepspeed=zero{stage}" for stage in (1, 2, 3)
                         for word in ("", "stage", "stage_", "ds_z", "zero_", "zero-", "zero_stage")}}  # fmt: skip


def suggest_choice(group: str, value: str) -> str:
    """Say what is meant by a value that is no choice of a group, "" where nothing is likely."""
    value = value.strip("\"'")
    if group in ("model", "tokenizer") and re.search(r"[/.~]", value):
        return f"{group}.name_or_path={value}"
    if group == "peft" and value.upper() in fields.peft_types():
        return f"peft.peft_type={value.upper()}"
    return CHOICES.get(group, {}).get(value.lower(), "")


def suggest_words(key: str, typed: str) -> str:
    """Say what to type for `--key typed`, or for the two words `key typed`; "" where nothing is likely."""
    key = key.lstrip("-").replace("-", "_")
    if key in GROUPS:
        return suggest_choice(key, typed) or f"{key}={typed}"
    if key in all_keys() or key in RunInput.model_fields:
        return f"{key}={typed}"
    return suggest_override(key, parse_scalar(typed), typed)


def refuse_foreign_file(path: Path, content: dict[str, Any]) -> None:
    """Refuse another tool's whole config in the place of a run.yaml: `kit import` reads it."""
    name = None if {"model", "recipe", "defaults"} & set(content) else detect_format(content)
    own = KEYS_OF_FORMAT[name].split() if name else ()
    if not name or not (sum(k in own for k in content) > 2 or set(content) & set(DECISIVE_KEYS.get(name, ()))):
        return
    if name == "deepspeed":
        text, fix = "a DeepSpeed JSON and no run", f"kit check --deepspeed {path}; for a run: deepspeed=FILE.json"
    else:
        text, fix = f"a config of {TOOLS[name]}", f"kit import {path} --out NAME.yaml, then kit check NAME.yaml"
        if pairs := describe_foreign_keys(content, name):
            fix += f". Its keys have other names here: {pairs}"
    raise KitError(f"{path} is {text}", str(path), fix, rule="run-file")


def describe_foreign_keys(content: dict[str, Any], tool: str, limit: int = 6) -> str:
    """Say for the first keys of another tool's file what they are called here."""
    pairs = []
    for name, value in content.items():
        translation = translate_key(name, value, tool) if isinstance(value, SIMPLE) else None
        if translation and translation.values:
            pairs.append(f"{name} is {' and '.join(translation.values)}")
    return ", ".join(pairs[:limit]) + (", ..." if len(pairs) > limit else "")
