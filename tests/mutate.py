"""Valid runs with one key changed. A change is refused by name, or found in what the worker hands to the libraries.

Shared by tests/config/test_mutations.py (few) and `soak.py --only honour` (many).
"""

from __future__ import annotations

import copy
import random
import traceback
from dataclasses import replace
from typing import Any

from kit.config.compose import Composed, compose
from kit.config.plan import build_plan
from kit.errors import KitError
from kit.schema import fields
from kit.schema.dotted import set_value, value_at
from kit.schema.run_plan import Dataset, Launch, Model, RunPlan, Tokenizer

OWN = {"model": Model, "dataset": Dataset, "tokenizer": Tokenizer, "launch": Launch}
LIBRARY = {
    "trainer": "SFTConfig", "peft": "LORA", "quantization": "BitsAndBytesConfig", "deepspeed": "deepspeed",
    "deepspeed.zero_optimization": "deepspeed.zero_optimization",
}  # fmt: skip
KINDS = [
    [],
    ["deepspeed=zero2", "launch.num_gpus=2"],
    ["deepspeed=zero3_offload", "launch.num_gpus=2", "trainer.optim=adamw_torch"],
    ["quantization=nf4"],
    ["quantization=int8"],
    ["trainer.packing=true"],
    ["trainer.eval_strategy=steps", "trainer.eval_steps=5", "dataset.test_size=0.1"],
]
ODD = [
    "word",
    "",
    0,
    1,
    -1,
    2,
    7,
    1.5,
    -0.5,
    1e9,
    True,
    False,
    None,
    [],
    ["a"],
    [1, 2],
    {},
    {"a": 1},
    "auto",
    "1",
    "x y",
]
DTYPES = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def valid_runs(base: Any, data: Any) -> list[Composed]:
    """A few kinds of runs on a tiny model, composed once."""
    stock = [f"model.name_or_path={base}", f"dataset.path={data}", "trainer.max_length=128", "trainer.use_cpu=true"]
    return [compose([*stock, *more]) for more in KINDS]


def mutation(rng: random.Random, tree: dict[str, Any]) -> tuple[str, Any]:
    """A dotted key and its new value: a misspelt name, another kind, a number out of range, or something sensible."""
    sections = [s for s in LIBRARY if value_at(tree, s)] + list(OWN)
    section = rng.choice(sections)
    known = fields.field_names(LIBRARY[section]) if section in LIBRARY else list(OWN[section].model_fields)
    key = rng.choice(known)
    if rng.random() < 0.2:
        at = rng.randrange(len(key))
        wrong = key[:at] + key[at + 1 :] if rng.random() < 0.5 else key[:at] + rng.choice("aex_") + key[at:]
        return (f"{section}.{wrong}", 1) if wrong and wrong not in known else (f"{section}.{key}x", 1)
    entry = fields.field_tables()[LIBRARY[section]][key] if section in LIBRARY else {}
    sensible = list(entry.get("choices") or [])
    if entry.get("default") is True or entry.get("default") is False:
        sensible += [not entry["default"]]
    elif isinstance(entry.get("default"), int | float):
        sensible += [entry["default"] * 2, entry["default"] + 1]
    for bound in ("ge", "gt", "le", "lt"):
        if bound in entry:
            sensible += [entry[bound], entry[bound] - 1, entry[bound] + 1]
    value = rng.choice(sensible) if sensible and rng.random() < 0.6 else rng.choice(ODD)
    return f"{section}.{key}", copy.deepcopy(value)


def changed(composed: Composed, key: str, value: Any) -> Composed:
    tree = copy.deepcopy(composed.tree)
    set_value(tree, key, value)
    return replace(composed, tree=tree, provenance={**composed.provenance, key: f"command line: {key}={value}"})


def judge(composed: Composed, key: str, value: Any) -> tuple[str, str]:
    """refused | honoured, or what must not be: unnamed (refused, the key not said), lost, late (a library refuses what
    the kit let through) and crashed; with details."""
    last = key.rpartition(".")[2]
    try:
        plan = build_plan(changed(composed, key, value), here=True)
    except KitError as error:
        said = [f"{p.problem} | {p.where} | {p.fix} [{p.rule}]" for p in error.problems]
        return ("refused" if any(last in line for line in said) else "unnamed"), "\n".join(said)
    except Exception:
        return "crashed", traceback.format_exc()
    try:
        given = handed_over(plan, key)
    except Exception:
        return "late", traceback.format_exc()
    if last in DTYPES or (key == "model.dtype"):
        given = str(given).removeprefix("torch.")
    return ("honoured", "") if same(value, given) else ("lost", f"{key}: {value!r} became {given!r}")


def handed_over(plan: RunPlan, key: str) -> Any:
    """The value that a library (or the kit's own reader of rows) gets for a key; the libraries' objects are built."""
    from trl import SFTConfig

    import kit.training.run as worker
    from kit.models.load import base_load_arguments, load_peft_config
    from kit.models.quantization import bnb_config

    arguments = worker.sft_config_arguments(plan)
    SFTConfig(**{**arguments, "deepspeed": None, "fsdp": None, "fsdp_config": None, "ddp_backend": None})
    adapter, loading = load_peft_config(plan), base_load_arguments(plan)
    section, _, last = key.partition(".")
    if last in ("assistant_only_loss", "completion_only_loss"):  # the rows are prepared with them before TRL sees any
        return plan.trainer.get(last, fields.field_default("SFTConfig", last))
    if section == "trainer":
        return arguments.get(last, fields.field_default("SFTConfig", last))
    if section == "peft":
        return (
            plan.init_from and plan.init_from.model_dump() if last.startswith("init_from") else getattr(adapter, last)
        )
    if section == "quantization":
        return getattr(bnb_config(plan.quantization or {}), last)
    if section == "deepspeed":
        block, _, name = last.rpartition(".")
        alias = fields.field_tables().get(f"deepspeed.{block}", {}).get(name, {}).get("alias", name)
        return value_at(arguments["deepspeed"], f"{block}.{alias}".lstrip("."))  # as transformers reads it
    if key in ("model.dtype", "model.attn_implementation"):
        return loading.get(last)
    return getattr(getattr(plan, section), last)


def same(value: Any, given: Any) -> bool:
    if value == "auto" or value is None or value == {}:  # resolved to something; null and {} leave it to the default
        return True
    if isinstance(given, set | tuple) or isinstance(value, set | tuple):
        return sorted(map(str, value)) == sorted(map(str, given))
    if isinstance(value, int | float) and isinstance(given, int | float):
        return float(value) == float(given)
    if isinstance(value, str) and isinstance(given, int | float):  # the kit's own sections read "1" as YAML would
        return value == str(int(given)) or value == str(given)
    if isinstance(value, dict) and hasattr(given, "__dataclass_fields__"):  # peft makes a class of it
        return all(same(v, getattr(given, k)) for k, v in value.items())
    return value == given or str(value) == str(given) or (not value and not given)
