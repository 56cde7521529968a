"""How a key's value comes about and what the libraries get of it, in words: what `kit why` says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kit.config import keys
from kit.config.deepspeed.filled_keys import FILLED_KEYS
from kit.schema import fields
from kit.schema.dotted import value_at
from kit.schema.run_plan import RunPlan

ABSENT: Any = object()
LIBRARY_NAMES = {"SFTConfig": "TRL's SFTConfig", "BitsAndBytesConfig": "transformers' BitsAndBytesConfig",
           "deepspeed": "DeepSpeed"}  # fmt: skip
# How a value comes about that nobody wrote down (kit/config/resolve.py, added_tokens.py).
RESOLUTIONS = {
    "trainer.bf16": "auto: what the hardware is fast at; true but for GPUs without bfloat16 and most CPUs",
    "trainer.fp16": "auto: true only on GPUs that have no bfloat16",
    "trainer.use_cpu": "auto: true where there is no GPU and no number of GPUs is asked for",
    "trainer.activation_checkpointing": "auto: off where a forecast fits the GPU, else as little as fits; else on",
    "trainer.activation_checkpointing_kwargs": "of trainer.activation_checkpointing=auto",
    "trainer.per_device_train_batch_size": "auto: as many of a process's rows (8 without global_batch_size) as fit",
    "trainer.gradient_accumulation_steps": "global_batch_size / (per_device_train_batch_size x processes)",
    "trainer.packing": "auto: on where documents are short against max_length and packed rows make 100 steps an epoch",
    "trainer.use_liger_kernel": "auto: true on GPUs, in 16 bits, where liger-kernel is installed and fits",
    "launch.launcher": "auto: a plain process for one, the deepspeed command with a DeepSpeed config, else torchrun",
    "launch.num_gpus": "auto: one process per GPU that is there, one on a CPU",
    "model.dtype": "auto: the precision; float32 for full fine-tuning in float16 without DeepSpeed",
    "model.attn_implementation": "auto: sdpa_varlen, or flex_varlen for packed rows, where the architecture takes it",
    "dataset.format": "auto: what the columns or the template of the data make",
    "quantization.bnb_4bit_compute_dtype": "auto: the precision",
    "quantization.bnb_4bit_quant_storage": "auto: the precision under ZeRO-3 and FSDP, else uint8",
    "peft.modules_to_save": "tokenizer.added_tokens: the embeddings at both ends are trained",
    "peft.ensure_weight_tying": "tokenizer.added_tokens, and the base ties its embeddings",
    "precision": "trainer.bf16 and trainer.fp16",
    "launch.num_nodes": "auto: the hosts of the hostfile, else 1",
    "rehearsal": "auto: the worker decides, where it trains on GPUs for 200 steps or more",
    "world_size": "launch.num_nodes x launch.num_gpus",
    "global_batch_size": "rows per process x accumulation x processes",
    "name": "the recipe's name, else the model's",
    "tokenizer.pad_token": "model.pad_token",
}
# What the worker does with the keys that are the kit's own (kit/training/, kit/data/load.py, kit/launchers/).
EFFECTS = {
    "model.name_or_path": "AutoModelForCausalLM.from_pretrained({})",
    "model.revision": "AutoModelForCausalLM.from_pretrained(revision={})",
    "model.dtype": "AutoModelForCausalLM.from_pretrained(dtype={})",
    "model.attn_implementation": "AutoModelForCausalLM.from_pretrained(attn_implementation={}); null: its own choice",
    "model.trust_remote_code": "from_pretrained(trust_remote_code={})",
    "model.random_init": "AutoModelForCausalLM.from_config instead of from_pretrained: {}",
    "model.pad_token": "tokenizer.pad_token, where tokenizer.pad_token is not given: {}",
    "model.config": "shape facts for planning, used where config.json is not here",
    "tokenizer.name_or_path": "AutoTokenizer.from_pretrained({}), the model's own where null",
    "tokenizer.revision": "AutoTokenizer.from_pretrained(revision={})",
    "tokenizer.chat_template": "tokenizer.chat_template is read from {}",
    "tokenizer.added_tokens": "tokenizer.add_tokens({}), and resize_token_embeddings where rows are missing",
    "tokenizer": "tokenizer.{name} = {}",
    "dataset.path": "datasets.load_dataset of {}",
    "dataset.test_size": "Dataset.train_test_split holds out {}",
    "dataset.validation_size": "Dataset.train_test_split holds out {}",
    "dataset": "kit/data/load.py reads the rows with {name}={}",
    "launch.num_nodes": "on how many nodes: {}",
    "launch.num_gpus": "how many processes the launcher starts: {}",
    "launch.launcher": "the ranks are started by {}",
    "launch": "kit/launchers starts the ranks with {name}={}",
    "global_batch_size": "trainer.gradient_accumulation_steps is derived from it",
    "runs_dir": "the run directory is made in {}",
    "name": "the run directory is called {}-HASH",
    "rehearsal": "the longest batch, a save, a reload and an evaluation are tried before the first step: {}",
    "prompts": "kit generate asks them; training does not see them",
    "peft.init_from": "the adapter's weights are copied from {} before the first step",
    "peft.init_from_pickle": "whether adapter_model.bin may be read, weights-only: {}",
    "deepspeed.file": "the DeepSpeed JSON is read from {}, deepspeed.* on top",
    "precision": "the autocast of the trainer, and the dtype of the weights: {}",
    "world_size": "WORLD_SIZE={} of the ranks",
}
# What the worker itself hands to SFTConfig (kit/training/run.py).
SET_BY_WORKER = {
    "output_dir": "the checkpoints folder of the run directory",
    "deepspeed": "the resolved DeepSpeed JSON",
    "fsdp": "true where the group fsdp is given",
    "fsdp_config": "the group fsdp",
}


def describe_default(key: str, peft_type: str) -> str:
    section = key.partition(".")[0]
    table = keys.table_of_section(section, peft_type)
    if table is None or key in keys.KIT_KEYS:
        return "the kit's default"
    return f"{LIBRARY_NAMES.get(table, f'PEFT, {table}')}: its default"


def describe_resolution(key: str, written: Any, resolved: Any, literal: str | None) -> str:
    """How the plan came to another value than the composed one; "" where it did not. `literal`: as a file has it."""
    if resolved is ABSENT or resolved == written:
        return ""
    if key.startswith("deepspeed."):
        if literal not in (None, "auto", '"auto"'):
            return ""
        row = FILLED_KEYS.get(key.removeprefix("deepspeed."))
        return f"filled from {' and '.join((row and row.sources) or ['the trainer'])}"
    if written in (ABSENT, None, "auto") or key == "trainer.gradient_accumulation_steps":
        return RESOLUTIONS.get(key, "") if resolved is not None else ""
    if isinstance(resolved, str) and isinstance(written, str) and resolved.endswith(Path(written).name):
        return "the path made absolute"
    return RESOLUTIONS.get(key, "")


def describe_library_effect(
    key: str, value: Any, plan: RunPlan | None, peft_type: str, tree: dict[str, Any]
) -> list[str]:
    """What the libraries are handed, one line each."""
    section, _, name = key.partition(".")
    if value == "???":
        return []
    if plan and name and section in ("peft", "quantization", "fsdp") and not getattr(plan, section):
        return [f"nothing: {section}=none"]
    lines = []
    target = {"trainer": "SFTConfig", "quantization": "BitsAndBytesConfig", "peft": f"PEFT's {peft_type} config"}.get(
        section
    )
    if key in EFFECTS:
        lines.append(EFFECTS[key].format(shorten(value)))
    elif target and name:
        known = SET_BY_WORKER if section == "trainer" else {}
        left_out = plan and name not in known and value_at(plan.model_dump(), key, ABSENT) is ABSENT
        lines.append(f"{target}({name}={shorten(value)})" + (", by itself: the run says nothing" if left_out else ""))
    elif section == "tracking" and name:
        lines.append(f"trainer.{name}={shorten(value)}, where trainer.{name} is not given")
    elif section == "fsdp" and name:
        lines.append(f"SFTConfig(fsdp_config={{{name}: {shorten(value)}}})")
    elif parent := next((k for k in (key.rpartition(".")[0], section) if k in EFFECTS), None):
        lines.append(EFFECTS[parent].format(shorten(value), name=name))
    return lines + describe_deepspeed_effect(key, plan, tree)


def describe_deepspeed_effect(key: str, plan: RunPlan | None, tree: dict[str, Any]) -> list[str]:
    """What stands in the DeepSpeed JSON because of a key."""
    section, _, name = key.partition(".")
    if section == "deepspeed" and name not in ("", "file"):
        if plan is None:
            return ["ds_config.json is not known: the run is refused"]
        value = value_at(plan.deepspeed or {}, name, ABSENT)
        if value is ABSENT:
            return [
                "ds_config.json has no such key: DeepSpeed's default" if plan.deepspeed else "nothing: deepspeed=none"
            ]
        row = FILLED_KEYS.get(name)
        twins = [s for s in row.sources if s.startswith("trainer.")] if row else []
        text = f", as {' and '.join(twins)} to SFTConfig" if twins else ""
        return [f"ds_config.json: {name} = {shorten(value)}{text}"]
    lines = []
    for k, row in FILLED_KEYS.items():
        value = value_at(plan.deepspeed, k, ABSENT) if plan else ABSENT
        # A literal size in the JSON stays; the other keys are checked to agree.
        follows = row.filled_by != "hidden_size" or value_at(tree, f"deepspeed.{k}", ABSENT) in ("auto", ABSENT)
        if key in row.sources and follows and value is not ABSENT:
            lines.append(f"ds_config.json: {k} = {shorten(value)}")
    return lines


def describe_field(key: str, entry: dict[str, Any], peft_type: str) -> str:
    """Kind, range, choices and default of the library's field."""
    owner = fields.OWNED_ELSEWHERE.get(key.removeprefix("trainer.")) if key.startswith("trainer.") else None
    if not entry.get("kinds"):
        return owner or ""
    words = [fields.WORDS.get(k, k) for k in entry["kinds"]]
    bounds = [f"{sign} {entry[name]}" for name, (sign, _) in fields.BOUNDS.items() if name in entry]
    choices = [str(c) for c in entry.get("choices", ())]
    parts = [" or ".join(words), *bounds]
    if choices:
        parts.append("one of " + ", ".join(choices[:12]) + (f" and {len(choices) - 12} more" if choices[12:] else ""))
    table = keys.table_of_section(key.partition(".")[0], peft_type) or ""
    parts.append(f"default {shorten(entry.get('default'))} ({LIBRARY_NAMES.get(table, f'PEFT, {table}')})")
    return "; ".join([*parts, *([owner] if owner else [])])


def shorten(value: Any) -> str:
    """A value as YAML would have it in one line, shortened."""
    if value is ABSENT:
        return "nothing"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= 100 else text[:97] + "..."
