"""The libraries' own settings, known without importing them: names, kinds, choices and defaults from fields.json.

Tables: "SFTConfig", one for every peft_type ("LORA", "IA3", ...), "BitsAndBytesConfig", "deepspeed" (its JSON) and
the tables nested in those. `tests/config/make_fields.py` writes the file from the installed classes.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kit.errors import Problem

# Settings of older releases that people still copy -> what to write now. Upstream gives a bare TypeError for them.
RENAMED: dict[str, dict[str, str]] = {
    "SFTConfig": {
        "warmup_ratio": "warmup_steps with a value below 1, e.g. warmup_steps: 0.03 for 3% of the steps",
        "max_seq_length": "max_length",
        "max_seq_len": "max_length",
        "evaluation_strategy": "eval_strategy",
        "tokenizer": "the tokenizer group (the trainer takes processing_class)",
        "torch_dtype": "model.dtype",
        "dtype": "model.dtype",
        "no_cuda": "use_cpu",
        "use_mps_device": "nothing: mps is found by itself",
        "per_gpu_train_batch_size": "per_device_train_batch_size",
        "per_gpu_eval_batch_size": "per_device_eval_batch_size",
        "gradient_clipping": "max_grad_norm",
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "group_by_length": "train_sampling_strategy: group_by_length",
        "include_tokens_per_second": "include_num_input_tokens_seen",
        "dataset_batch_size": "nothing: TRL 1 has no such setting",
        "num_of_sequences": "max_length",
        "chars_per_token": "nothing: TRL 1 has no such setting",
        "neftune_alpha": "neftune_noise_alpha",
        "formatting_func": "dataset columns, or a script named by launch.script",
        "save_safetensors": "nothing: safetensors is the only format",
        "logging_dir": "report_to and the tracker's own settings",
        "overwrite_output_dir": "nothing: every run has a directory of its own",
        "fp16_opt_level": "nothing: Apex is gone; use model.dtype",
        "half_precision_backend": "nothing: Apex is gone; use model.dtype",
        "jit_mode_eval": "torch_compile",
        "push_to_hub_token": "hub_token from the environment (HF_TOKEN)",
        "push_to_hub_model_id": "hub_model_id",
        "include_inputs_for_metrics": "include_for_metrics: [inputs]",
        "eval_packing_strategy": "packing_strategy",
    },
    "peft": {
        "rank": "r",
        "lora_r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target_modules": "target_modules",
        "target_layers": "layers_to_transform",
        "rslora": "use_rslora",
        "dora": "use_dora",
    },
    "BitsAndBytesConfig": {
        "load_in_nf4": "load_in_4bit: true with bnb_4bit_quant_type: nf4",
        "bits": "load_in_4bit or load_in_8bit",
        "quant_type": "bnb_4bit_quant_type",
        "compute_dtype": "bnb_4bit_compute_dtype",
        "double_quant": "bnb_4bit_use_double_quant",
        "bnb_4bit_double_quant": "bnb_4bit_use_double_quant",
    },
    "deepspeed": {
        "zero": "zero_optimization",
        "bfloat": "bf16",
        "bf": "bf16",
        "fp32": "fp16 and bf16 with enabled: false",
        "micro_batch_size": "train_micro_batch_size_per_gpu",
        "max_grad_norm": "gradient_clipping",
        "precision": "fp16 or bf16",
    },
}
RENAMED_IN = {"trainer": RENAMED["SFTConfig"], "peft": RENAMED["peft"], "quantization": RENAMED["BitsAndBytesConfig"]}
OWNED_ELSEWHERE = {  # fields of SFTConfig that another part of the description holds
    "output_dir": "the run directory holds everything: runs_dir=FOLDER, name=NAME",
    "deepspeed": "deepspeed=zero2, or deepspeed=/path/my.json",
    "fsdp": "use the group fsdp",
    "fsdp_config": "use the group fsdp",
    "hub_token": "secrets come from the environment: export HF_TOKEN=...",
    "push_to_hub_token": "secrets come from the environment: export HF_TOKEN=...",
    "resume_from_checkpoint": "kit resume RUN",
    "chat_template_path": "tokenizer.chat_template=NAME or FILE.jinja, with tokenizer.added_tokens=[...]",
    "eos_token": "tokenizer.eos_token=...",
    "pad_token": "tokenizer.pad_token=...",
    "model_init_kwargs.dtype": "model.dtype=...",
}
WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list",
         "dict": "a mapping", "none": "null"}  # fmt: skip
BOUNDS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}
BOOLS = {"true", "false", "yes", "no", "on", "off"}


@cache
def _generated() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def field_tables() -> dict[str, dict[str, dict[str, Any]]]:
    """{table: {field: {kinds, default, choices, patterns, items, table, class, ge, ...}}}, read on first use."""
    return _generated()["tables"]


def optimizers() -> dict[str, dict[str, Any]]:
    """{trainer.optim: {package, pip, options}}: what must be installed for it, and what optim_args may hold."""
    return _generated()["optimizers"]


def router_logits_types() -> list[str]:
    """Model types that can return their router's logits."""
    return _generated()["router_logits"]


def field_names(table: str) -> list[str]:
    """The fields of one table that may be set, in upstream's order."""
    return [name for name, entry in field_tables()[table].items() if "instead" not in entry]


def field_default(table: str, key: str) -> Any:
    """Upstream's default. Raises KeyError for an unknown table or key, and None for a field that must be given."""
    return field_tables()[table][key].get("default")


def peft_types() -> list[str]:
    """The PEFT methods that have a table, e.g. LORA, ADALORA, IA3."""
    return [name for name, table in field_tables().items() if "peft_type" in table]


def check_fields(
    table: str, values: Mapping[str, Any], where: str = "", allow_auto: Collection[str] = frozenset()
) -> list[Problem]:
    """Every unknown key, wrong kind, bad choice and number out of range in `values`, nested tables included.

    `where` is the dotted name of `values`; `allow_auto` names further keys whose value may be "auto".
    """
    problems: list[Problem] = []
    known = field_tables()[table]
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            problems.append(unknown_field(table, str(key), where))
        elif "instead" in known[key]:
            problems.append(_replaced(known[key], path))
        elif not (value == "auto" and isinstance(value, str) and (known[key].get("auto") or key in allow_auto)):
            problems += _check_value(known[key], value, path)
    for key, entry in known.items():
        if entry.get("required") and key not in values:
            path = f"{where}.{key}" if where else key
            problems.append(Problem(f"{path} is missing", path, f"give {_wanted(entry)}", "missing-key"))
    return problems


def cast_fields(table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as upstream wants to see them: 2e8 -> 200000000 for whole numbers, 1 -> 1.0 where the default
    is a float (bitsandbytes refuses an int there). Keys and kinds that are not known stay as they are."""
    known = field_tables()[table]
    return {key: _cast_value(known[key], value) if key in known else value for key, value in values.items()}


def unknown_field(table: str, key: str, where: str) -> Problem:
    """The problem for a key that `table` does not have, with the likeliest intention."""
    path = f"{where}.{key}" if where else key
    renamed = RENAMED.get("peft" if table in peft_types() else table, {})
    given = field_names(table)
    if key in renamed:
        own = f"{where}." if where and renamed[key] in given else ""
        return Problem(f"unknown key {path}", path, f"use {own}{renamed[key]}", "renamed-key")
    if table.startswith("deepspeed") and (place := place_of_key(key)):
        return Problem(f"unknown key {path}", path, describe_place(place, key, path), "unknown-key")
    folded = {name.lower(): name for name in given}
    close = [folded[c] for c in difflib.get_close_matches(key.lower().replace("-", "_"), folded, 3, 0.6)]
    if close:
        fix = "did you mean " + " or ".join(f"{where}.{c}" if where else c for c in close) + "?"
    elif table == "deepspeed":
        fix = "remove it: DeepSpeed passes over it without a word"
    else:
        fix = f"remove it; the keys are {', '.join(given)}" if len(given) <= 20 else "remove it"
    return Problem(f"unknown key {path}", path, fix, "unknown-key")


@cache
def deepspeed_places() -> dict[str, list[tuple[str, str]]]:
    """Map each key of a DeepSpeed JSON to its blocks: (dotted name, "" for the top level; table), outer ones first."""
    places: dict[str, list[tuple[str, str]]] = {}
    pending = [("", "deepspeed")]
    for block, table in pending:
        for name, entry in field_tables()[table].items():
            if "instead" not in entry:
                places.setdefault(name, []).append((block, table))
            if inner := entry.get("table"):
                pending.append((f"{block}.{name}".lstrip("."), inner))
    return places


def place_of_key(key: str) -> tuple[str, str] | None:
    """Return the one block of a DeepSpeed JSON that has a key, (its dotted name, its table); ZeRO's goes first."""
    places = deepspeed_places().get(key, [])
    zero = [p for p in places if p[0] == "zero_optimization"]
    return (zero or places)[0] if zero or len(places) == 1 else None


def describe_place(place: tuple[str, str], key: str, path: str) -> str:
    """Say where a key of a DeepSpeed JSON belongs that stands at `path`."""
    if path.endswith(f"bf16.{key}") and place[0] == "fp16":
        return "remove it: it scales the loss of fp16, and bfloat16 needs no loss scaling"
    root = "deepspeed." if path.startswith("deepspeed.") else ""
    return (
        f"it belongs in {place[0]}: {root}{place[0]}.{key}"
        if place[0]
        else f"it belongs at the top level: {root}{key}"
    )


def _replaced(entry: dict[str, Any], path: str) -> Problem:
    state = "was removed from DeepSpeed" if entry.get("removed") else "is an old name"
    fix = f"use {entry['instead']}" if entry["instead"] else "remove it"
    return Problem(f"{path} {state}", path, fix, "removed-key" if entry.get("removed") else "renamed-key")


def _kind(value: Any) -> str:
    if value is None:
        return "none"
    for kind, types in (("bool", bool), ("int", int), ("float", float), ("str", str), ("list", list | tuple)):
        if isinstance(value, types):
            return kind
    return "dict" if isinstance(value, Mapping) else type(value).__name__


def accepts(entry: dict[str, Any], value: Any) -> bool:
    kind, wanted = _kind(value), entry["kinds"]
    if kind in wanted or (kind == "none" and entry.get("default", "") is None):
        return True
    if kind == "int":
        return "float" in wanted
    return kind == "float" and "int" in wanted and value.is_integer()


def _check_value(entry: dict[str, Any], value: Any, path: str) -> list[Problem]:
    if not accepts(entry, value):
        return [Problem(f"{path} must be {_wanted(entry)}, not {value!r}", path, _kind_fix(entry, value), "kind")]
    if isinstance(value, float) and not math.isfinite(value):
        return [Problem(f"{path} is {value}", path, "give a finite number", "range")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _check_number(entry, value, path)
    if isinstance(value, str) and "choices" in entry:
        return _check_choice(entry, value, path)
    if isinstance(value, list | tuple) and "items" in entry:
        return [p for i, item in enumerate(value) for p in _check_value(entry["items"], item, f"{path}[{i}]")]
    if isinstance(value, Mapping) and "table" in entry:
        if entry.get("open"):  # further keys are somebody else's, e.g. the parameters of any optimizer
            value = {k: v for k, v in value.items() if k in field_tables()[entry["table"]]}
        return check_fields(entry["table"], value, path)
    return []


def _check_number(entry: dict[str, Any], value: float, path: str) -> list[Problem]:
    if (numbers := [c for c in entry.get("choices", ()) if isinstance(c, int)]) and value not in numbers:
        return [Problem(f"{path} must be one of {_join(numbers)}, not {value}", path, "give one of them", "choice")]
    for bound, (sign, holds) in BOUNDS.items():
        if bound in entry and not holds(value, entry[bound]):
            return [Problem(f"{path} must be {sign} {entry[bound]}, not {value}", path, "give such a number", "range")]
    return []


def _check_choice(entry: dict[str, Any], value: str, path: str) -> list[Problem]:
    words = [c for c in entry["choices"] if isinstance(c, str)]
    fold = str.lower if entry.get("fold") else str
    if not words or fold(value) in map(fold, words) or any(re.fullmatch(p, value) for p in entry.get("patterns", ())):
        return []
    close = [w for w in words if w.startswith(value.lower())][:2] or difflib.get_close_matches(value.lower(), words, 2)
    text = [f"did you mean {' or '.join(close)}?"] if close else []
    if not close and {"bool", "int", "float"} & set(entry["kinds"]):
        text.append(_kind_fix(entry, value) + ";")
    return [Problem(f"{path} does not take {value!r}", path, " ".join([*text, "choices:", _join(words)]), "choice")]


def _wanted(entry: dict[str, Any]) -> str:
    words = [WORDS[k] for k in ("bool", "int", "float", "str", "list", "dict", "none") if k in entry["kinds"]]
    if "float" in entry["kinds"] and "int" in entry["kinds"]:
        words.remove(WORDS["int"])
    return " or ".join(words)


def _kind_fix(entry: dict[str, Any], value: Any) -> str:
    """What to write instead of a value of the wrong kind."""
    wanted = entry["kinds"]
    if value == "auto" and "alias" in entry:
        return f'name it {entry["alias"]}: under this name nobody fills "auto"'
    if isinstance(value, str) and value == "auto":
        return 'no library fills "auto" here: give a value or leave the key out'
    if isinstance(value, str) and {"int", "float"} & set(wanted):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            whole = value.lstrip("+-").isdigit()
            return f"write the number without quotes: {int(value) if whole else number}"
    if isinstance(value, str) and "bool" in wanted and value.lower() in BOOLS:
        return f"write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'} without quotes"
    if isinstance(value, int) and not isinstance(value, bool) and wanted == ["bool"] and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if isinstance(value, float) and "int" in wanted:
        return f"round it: {round_up_from_zero(value)}" if math.isfinite(value) else "give a finite number"
    if "list" in wanted and isinstance(value, str):
        return f"write a list: [{value}]"
    return f"give {_wanted(entry)}"


def round_up_from_zero(value: float) -> int:
    """Round a number; one above 0 never becomes 0, which switches off what it sizes (fp16.min_loss_scale: 0.5)."""
    return max(1, round(value)) if value > 0 else round(value)


def _cast_value(entry: dict[str, Any], value: Any) -> Any:
    kinds = entry["kinds"]
    if isinstance(value, float) and "int" in kinds and "float" not in kinds and value.is_integer():
        return int(value)
    if type(value) is int and "int" not in kinds and "float" in kinds and isinstance(entry.get("default"), float):
        return float(value)
    if isinstance(value, Mapping):
        return cast_fields(entry["table"], value) if "table" in entry else dict(value)
    if isinstance(value, list | tuple):
        return [_cast_value(entry["items"], item) for item in value] if "items" in entry else list(value)
    return value


def _join(words: Collection[Any]) -> str:
    return ", ".join(str(w) for w in words)
