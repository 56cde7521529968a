"""Translates one key of another tool, as it is typed among the kit's own; `kit import` translates whole files."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from kit.errors import KitError
from kit.foreign import accelerate, axolotl, axolotl_keys, llamafactory, llamafactory_keys, trl
from kit.foreign.read import KEYS_OF_FORMAT, TOOLS
from kit.foreign.report import Reading, Recipe, Source

READERS = {
    "accelerate": accelerate.import_accelerate,
    "launcher": accelerate.import_launcher,
    "environment": accelerate.import_environment,
    "axolotl": axolotl.import_axolotl,
    "llamafactory": llamafactory.import_llamafactory,
    "trl": trl.import_trl,
}
FORMAT_NAMES = ("trl", "accelerate", "axolotl", "llamafactory")
RUN_FORMATS = ("trl", "axolotl", "llamafactory")  # each describes a whole run; one of them at a time
ANY_KEY = ("launcher", "accelerate")  # whose readers have a word for every key
# What a reader must find beside a key, or it passes over the key as one of something that is switched off.
SWITCHED_ON: dict[str, dict[str, Any]] = {
    "trl": {"use_peft": True, "load_in_4bit": True, "eval_strategy": "steps"},
    "llamafactory": {"stage": "sft", "finetuning_type": "lora", "quantization_bit": 4},
    "axolotl": {"adapter": "lora", "val_set_size": 0.1},
    "launcher": {},
    "accelerate": {},
}


@dataclass
class Translation:
    """What a key of another tool means here."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)  # kit key, or a group, to its value
    reason: str = ""  # why there is nothing to set
    fix: str = ""


def translate_key(name: str, value: Any, first: str = "trl") -> Translation | None:
    """Translate a key as the tools read it, the one named `first`; None where none of them knows it."""
    without: Translation | None = None
    for tool in sorted(SWITCHED_ON, key=lambda tool: tool != first):
        beside = SWITCHED_ON[tool]
        recipe = Recipe()
        reading = Reading([Source("command line", tool, {**beside, name: value})], recipe)
        try:
            READERS[tool](reading)
        except KitError as error:  # a preference run, an unknown method: the reader says what can be done
            without = without or Translation(tool, reason=error.problems[0].problem, fix=error.problems[0].fix)
            continue
        entry = reading.entries.get((name,))
        if entry is None:
            continue
        if entry.outcome == "carried" and entry.to:
            groups = {group: choice for group, _, choice in (to.partition("=") for to in entry.to if "=" in to)}
            pairs = groups | {to: recipe.values[to] for to in entry.to if "=" not in to}
            return Translation(TOOLS[tool], pairs)
        if tool not in ANY_KEY:
            without = without or Translation(TOOLS[tool], reason=entry.note, fix=entry.fix)
    return without


@cache
def known_names() -> tuple[str, ...]:
    """List the names of keys that the tools have and that a misspelt one may mean."""
    own = (axolotl_keys.NAMES, llamafactory_keys.NAMES, llamafactory_keys.LORA)
    tables = (trl.MODEL, trl.DATA, trl.LORA, trl.BITS, *own)
    return tuple(dict.fromkeys(n for t in (*tables, *(KEYS_OF_FORMAT[f].split() for f in RUN_FORMATS)) for n in t))
