"""fields.json is what the installed classes say, and check() refuses what they would choke on, and nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_fields
import pytest

from kit.schema import fields

ROOT = Path(__file__).parents[2]


def test_the_file_is_what_the_generator_writes() -> None:
    """After an upgrade: `python tests/config/make_fields.py`, and read the diff."""
    assert make_fields.TARGET.read_text() == make_fields.dump(make_fields.build())


def test_names_and_defaults_are_the_classes_own() -> None:
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    classes = {"SFTConfig": SFTConfig} | {t.value: c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    for table, cls in classes.items():
        own = {f.name: f for f in dataclasses.fields(cls) if f.init}
        assert fields.field_names(table) == list(own)
        for name, field in own.items():
            if field.default is not dataclasses.MISSING:
                assert fields.field_default(table, name) == make_fields.plain(field.default), f"{table}.{name}"
    assert set(fields.peft_types()) == set(classes) - {"SFTConfig"}
    assert len(fields.field_names("SFTConfig")) == 135
    assert len(fields.field_names("LORA")) == 42 == len(dataclasses.fields(LoraConfig))
    taken = inspect.signature(BitsAndBytesConfig).parameters
    assert fields.field_names("BitsAndBytesConfig") == [n for n in taken if n != "kwargs"]


@pytest.mark.parametrize("table", fields.field_tables())
def test_every_default_is_accepted_and_kept(table: str) -> None:
    values = {
        name: entry["default"]
        for name, entry in fields.field_tables()[table].items()
        if "instead" not in entry and "default" in entry and entry["default"] != "auto"
    }
    problems = [p for p in fields.check_fields(table, values, "x") if p.rule != "missing-key"]
    # DeepSpeed's top-level blocks have no default of their own: None stands for "absent"
    assert problems == [] or table.startswith("deepspeed")
    assert fields.cast_fields(table, values) == values


def test_reading_is_torch_free_and_quick() -> None:
    code = (
        "import sys, time; from kit.schema import fields; t = time.perf_counter()\n"
        "fields.check_fields('SFTConfig', {'learning_rate': 1e-4}); print(time.perf_counter() - t)\n"
        "assert not {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("SFTConfig", {"learning_rate": 1, "logging_steps": 0.1, "max_steps": 2e2, "eval_steps": 5, "seed": 1.0}),
    ("SFTConfig", {"report_to": ["wandb", "tensorboard"], "lr_scheduler_kwargs": {"num_cycles": 1}}),
    ("SFTConfig", {"report_to": "none", "lr_scheduler_kwargs": {"num_cycles": 1}, "max_length": None}),
    ("SFTConfig", {"pad_to_multiple_of": "auto", "packing_strategy": "bfd_split", "save_strategy": "best"}),
    ("SFTConfig", {"pad_to_multiple_of": 8, "gradient_checkpointing": True, "optim": "galore_adamw"}),
    ("SFTConfig", {"optim_target_modules": "all-linear", "optim_args": "rank=64, scale=2", "bf16": "auto"}),
    ("SFTConfig", {"include_num_input_tokens_seen": True, "fsdp": True, "debug": "underflow_overflow"}),
    ("LORA", {"target_modules": "all-linear", "init_lora_weights": "pissa_niter_16", "r": 8.0}),
    ("LORA", {"target_modules": ["q_proj"], "init_lora_weights": False, "rank_pattern": {"q": 4}}),
    ("LORA", {"eva_config": {"rho": 2}, "layers_to_transform": [0, 1], "trainable_token_indices": {"e": [1]}}),
    ("LORA", {"task_type": "CAUSAL_LM", "peft_type": "LORA", "layer_replication": [[0, 4], [2, 5]]}),
    ("IA3", {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}),
    ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6}),
    ("deepspeed", {"zero_optimization": {"stage": 3, "reduce_bucket_size": 2e8, "overlap_comm": None}}),
    ("deepspeed", {"communication_data_type": "FP32", "zero_optimization": {"leaf_module": {"classes": "A"}}}),
]


@pytest.mark.parametrize("table, values", ACCEPTED)
def test_accepted(table: str, values: dict[str, Any]) -> None:
    assert fields.check_fields(table, values, "x", allow_auto={"bf16"}) == []


REFUSED = [
    ("SFTConfig", {"learning_rte": 1}, "learning_rte", "trainer.learning_rate?"),
    ("SFTConfig", {"warmup_ratio": 0.1}, "warmup_ratio", "warmup_steps with a value below 1"),
    ("SFTConfig", {"max_seq_length": 9}, "max_seq_length", "use trainer.max_length"),
    ("SFTConfig", {"evaluation_strategy": "no"}, "evaluation_strategy", "use trainer.eval_strategy"),
    ("SFTConfig", {"tokenizer": "x"}, "tokenizer", "processing_class"),
    ("SFTConfig", {"torch_dtype": "x"}, "torch_dtype", "model.dtype"),
    ("SFTConfig", {"dataset_batch_size": 1}, "dataset_batch_size", "TRL 1 has no such setting"),
    ("SFTConfig", {"learning_rate": "1e-4"}, "learning_rate", "0.0001"),
    ("SFTConfig", {"learning_rate": float("nan")}, "learning_rate", "finite"),
    ("SFTConfig", {"max_steps": "12"}, "max_steps", "12"),
    ("SFTConfig", {"max_steps": 1.5}, "max_steps", "round it"),
    ("SFTConfig", {"max_steps": True}, "max_steps", "a whole number"),
    ("SFTConfig", {"packing": "yes"}, "packing", "write true"),
    ("SFTConfig", {"packing": 1}, "packing", "write true"),
    ("SFTConfig", {"packing": None}, "packing", "true or false"),
    ("SFTConfig", {"seed": "auto"}, "seed", "no library fills"),
    ("SFTConfig", {"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "cosine"),
    ("SFTConfig", {"save_strategy": "epochs"}, "save_strategy", "epoch"),
    ("SFTConfig", {"packing_strategy": "bfd-requeue"}, "packing_strategy", "bfd_split"),
    ("SFTConfig", {"report_to": ["wandbb"]}, "report_to[0]", "wandb"),
    ("SFTConfig", {"per_device_train_batch_size": 0}, "per_device_train_batch_size", ""),
    ("SFTConfig", {"label_names": "x"}, "label_names", "[x]"),
    ("LORA", {"bias": "lora"}, "bias", "lora_only"),
    ("LORA", {"lora_r": 8}, "lora_r", "use trainer.r"),
    ("LORA", {"r": 0}, "r", ""),
    ("LORA", {"init_lora_weights": "pissa_niter_x"}, "init_lora_weights", "pissa"),
    ("LORA", {"target_modules": ["q", 1]}, "target_modules[1]", "text"),
    ("LORA", {"eva_config": {"roh": 2}}, "eva_config.roh", "trainer.eva_config.rho?"),
    ("BitsAndBytesConfig", {"bnb_4bit_quant_type": "nf"}, "bnb_4bit_quant_type", "nf4"),
    ("BitsAndBytesConfig", {"double_quant": True}, "double_quant", "bnb_4bit_use_double_quant"),
]


@pytest.mark.parametrize("table, values, key, fix", REFUSED)
def test_refused_with_key_and_fix(table: str, values: dict[str, Any], key: str, fix: str) -> None:
    problems = fields.check_fields(table, values, "trainer")
    assert [p.where for p in problems] == [f"trainer.{key}"]
    assert f"trainer.{key}" in problems[0].problem
    assert fix in problems[0].fix


def test_cast_makes_the_numbers_upstream_wants() -> None:
    got = fields.cast_fields("SFTConfig", {"max_steps": 2e2, "learning_rate": 1, "logging_steps": 10, "unknown": 1.0})
    assert json.dumps(got) == '{"max_steps": 200, "learning_rate": 1.0, "logging_steps": 10, "unknown": 1.0}'
    assert (
        json.dumps(fields.cast_fields("BitsAndBytesConfig", {"llm_int8_threshold": 6}))
        == '{"llm_int8_threshold": 6.0}'
    )
    nested = fields.cast_fields(
        "deepspeed", {"zero_optimization": {"reduce_bucket_size": 2e8, "leaf_module": {"names": []}}}
    )
    assert json.dumps(nested["zero_optimization"]["reduce_bucket_size"]) == "200000000"


@pytest.mark.parametrize("table, old", [(t, k) for t in fields.RENAMED for k in fields.RENAMED[t]])
def test_rename_hints_are_needed_and_name_keys_that_exist(table: str, old: str) -> None:
    names = fields.field_names("LORA" if table == "peft" else table)
    hint = fields.RENAMED[table][old]
    assert old not in names
    assert hint in names or not hint.isidentifier()
