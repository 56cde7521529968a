"""Every key that a run can set, by its dotted name, and the one that was meant where another was typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from kit.errors import KitError
from kit.schema import fields
from kit.schema.run_plan import RunInput, Strict, leaves

# Where a bare name stands in several sections, the first of these is meant.
SECTIONS = "trainer peft quantization model tokenizer dataset launch tracking deepspeed fsdp hparams_search".split()
TABLES = {"trainer": "SFTConfig", "quantization": "BitsAndBytesConfig", "deepspeed": "deepspeed"}
KIT_KEYS: dict[str, dict[str, Any]] = {  # keys of the kit's own inside the libraries' sections
    "peft.init_from": {"default": None},
    "peft.init_from_pickle": {"default": False},
    "deepspeed.file": {"default": None},
}
PLAN_KEYS = ("precision", "world_size")  # of the plan alone: nothing sets them directly


def table_of_section(section: str, peft_type: str = "LORA") -> str | None:
    """The library's table behind a section, None for the kit's own."""
    if section == "peft":
        return peft_type if peft_type in fields.field_tables() else "LORA"
    return TABLES.get(section)


def all_keys(peft_type: str = "LORA") -> dict[str, dict[str, Any]]:
    """Dotted key to its entry in the field tables; for the kit's own keys an entry with the default alone."""
    entries: dict[str, dict[str, Any]] = {}
    for section, field in RunInput.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Strict):
            for name, inner in kind.model_fields.items():
                entries[f"{section}.{name}"] = default_entry(inner)
        elif section not in SECTIONS:
            entries[section] = default_entry(field)
    for section in ("trainer", "peft", "quantization", "deepspeed"):
        add_table(str(table_of_section(section, peft_type)), section, entries)
    return {**entries, **KIT_KEYS, **{key: {} for key in PLAN_KEYS}}


def default_entry(field: Any) -> dict[str, Any]:
    default = field.get_default(call_default_factory=True)
    return {"default": None if default is PydanticUndefined else default}


def add_table(table: str, prefix: str, entries: dict[str, dict[str, Any]]) -> None:
    for name, entry in fields.field_tables()[table].items():
        if "instead" not in entry:
            entries[f"{prefix}.{name}"] = entry
            if entry.get("table"):
                add_table(entry["table"], f"{prefix}.{name}", entries)


def find_keys(typed: str, tree: Mapping[str, Any], peft_type: str = "LORA") -> list[str]:
    """The keys that a word can mean, the likeliest first: dotted, a DeepSpeed key, or a bare field name.

    KitError with the likeliest intention where there is none.
    """
    key = re.sub(r"\[\d+\]$", "", typed.strip())
    entries = all_keys(peft_type)
    here = {".".join(k.split(".")[:n]) for k in leaves(dict(tree)) for n in range(1, k.count(".") + 2)}
    if key in entries or key in here and not is_misspelt(key, peft_type) or key in SECTIONS:
        return [key]
    if key.split(".")[0] in fields.field_tables()["deepspeed"] and (f"deepspeed.{key}" in entries):
        others = [f"trainer.{key}"] if f"trainer.{key}" in entries else []
        return [*others, f"deepspeed.{key}"]
    parents = [k for k in entries if key.startswith(k + ".") and "dict" in entries[k].get("kinds", ["dict"])]
    if any(not entries[k].get("table") and isinstance(entries[k].get("default"), dict | None) for k in parents):
        return [key]  # a table that is open: a chat template's columns, a pattern by layers
    matches = [k for k in entries if k.endswith(f".{key}")]
    matches.sort(key=lambda k: (is_owned(k), SECTIONS.index(k.split(".")[0]), k.count(".")))
    matches = [
        k for k in [renamed_to("trainer", key), renamed_to("peft", key)] if k in entries and k not in matches
    ] + matches
    if matches:
        return matches
    if owned := [k for k in fields.OWNED_ELSEWHERE if key in (k, f"trainer.{k}")]:
        return [f"trainer.{owned[0]}"]
    raise unknown_key_error(key, entries, peft_type)


def is_owned(key: str) -> bool:
    """Tell whether a field of SFTConfig is set by another section."""
    return key.removeprefix("trainer.") in fields.OWNED_ELSEWHERE


def renamed_to(section: str, name: str) -> str:
    """The key that an older release of the library called `name`, "" where there is none."""
    table = "peft" if section == "peft" else str(TABLES[section])
    to = fields.RENAMED.get(table, {}).get(name, "")
    return to if to.startswith(tuple(f"{s}." for s in SECTIONS)) or not to else f"{section}.{to}"


def is_misspelt(key: str, peft_type: str) -> bool:
    """Whether a key that is in the tree is one that no library has."""
    section, _, name = key.partition(".")
    table = table_of_section(section, peft_type)
    return bool(table and name and name.split(".")[0] not in fields.field_names(table))


def unknown_key_error(key: str, entries: Mapping[str, Any], peft_type: str) -> KitError:
    section, _, name = key.rpartition(".")
    for owner in [section] if section else [*TABLES, "peft"]:
        if owner in (*TABLES, "peft") and (to := renamed_to(owner, name)):
            return KitError(f"there is no key {key}", key, f"kit why {to}" if to in entries else f"it is now {to}")
    tails = {
        k.rpartition(".")[2]: k for k in sorted(entries, key=lambda k: (k.startswith("deepspeed."), k), reverse=True)
    }
    for cutoff in (0.8, 0.6):
        close = difflib.get_close_matches(key, entries, 2, cutoff) if section else []
        close += [tails[t] for t in difflib.get_close_matches(name, tails, 2, cutoff) if tails[t] not in close]
        if close:
            break
    fix = f"did you mean {' or '.join(close[:3])}?" if close else "the keys are the libraries' own: kit show RECIPE"
    return KitError(f"there is no key {key}", key, fix)
