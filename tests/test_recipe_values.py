"""Recipes say what they promise: the source documents' values, one row each, and the first lines of every file."""

from __future__ import annotations

import re

import pytest

from kit import api
from kit.schema.run_plan import leaves
from kit.system import paths

RECIPES = sorted(f.stem for f in (paths.CONF / "recipe").glob("*.yaml"))

# Every hyper-parameter that a source document states, under the kit's key. Left out: what chose its machine.
SOURCES = {
    # Llama-2 7B on patient-doctor dialogues, with its DeepSpeed JSON (ZeRO-2, 64 = 16 x 1 x 4, Adam 0.9 0.999 1e-8)
    "llama2_7b_lora_zero2_doctor": {
        "peft.r": 8, "peft.lora_alpha": 8, "peft.lora_dropout": 0.05, "peft.bias": "none",
        "peft.task_type": "CAUSAL_LM",
        "peft.target_modules": ["q_proj", "v_proj"],
        "trainer.per_device_train_batch_size": 16, "trainer.gradient_accumulation_steps": 1, "trainer.max_steps": 200,
        "trainer.optim": "adamw_torch", "trainer.learning_rate": 10e-4, "trainer.lr_scheduler_type": "cosine",
        "trainer.warmup_steps": 100, "trainer.max_grad_norm": 0.3, "trainer.max_length": 512, "trainer.bf16": True,
        "trainer.eval_strategy": "steps", "trainer.eval_steps": 100, "trainer.logging_steps": 200,
        "trainer.gradient_checkpointing": True, "trainer.train_sampling_strategy": "random",
        "dataset.template.text": "Description: {Description} Patient: {Patient} Doctor: {Doctor}",
        "dataset.validation_size": 0.1, "dataset.test_size": 0.1, "dataset.seed": 42,
        "tokenizer.pad_token": "<unk>",  # id 0 of Llama-2
        "model.name_or_path": "meta-llama/Llama-2-7b-hf", "world_size": 4, "global_batch_size": 64,
        "deepspeed.zero_optimization.stage": 2, "deepspeed.train_batch_size": 64,
        "deepspeed.train_micro_batch_size_per_gpu": 16, "deepspeed.gradient_accumulation_steps": 1,
        "deepspeed.gradient_clipping": 0.3,  # the source's JSON left it out, and so switched it off
    },
    # ChatGLM with alpaca-lora's trainer; GLM-4 in the place of ChatGLM, q/k/v in that of query_key_value
    "glm4_9b_int8_lora": {
        "peft.r": 8, "peft.lora_alpha": 8, "peft.lora_dropout": 0.05, "peft.task_type": "CAUSAL_LM",
        "peft.target_modules": ["q_proj", "k_proj", "v_proj"],
        "trainer.per_device_train_batch_size": 8, "trainer.gradient_accumulation_steps": 16,
        "trainer.num_train_epochs": 10, "trainer.learning_rate": 3e-4, "trainer.fp16": True,
        "trainer.lr_scheduler_type": "linear", "trainer.logging_steps": 10, "trainer.save_steps": 200,
        "trainer.pad_to_multiple_of": 8, "trainer.gradient_checkpointing": True,
        "quantization.load_in_8bit": True, "quantization.llm_int8_threshold": 6.0, "model.dtype": "float16",
    },
    # OPT-6.7B in 8 bit on English quotations
    "opt_6b7_int8_lora_quotes": {
        "peft.r": 16, "peft.lora_alpha": 32, "peft.lora_dropout": 0.05, "peft.bias": "none",
        "peft.task_type": "CAUSAL_LM", "peft.target_modules": ["q_proj", "v_proj"],
        "trainer.per_device_train_batch_size": 4, "trainer.gradient_accumulation_steps": 4, "trainer.max_steps": 200,
        "trainer.warmup_steps": 100, "trainer.learning_rate": 2e-4, "trainer.lr_scheduler_type": "linear",
        "trainer.fp16": True, "trainer.logging_steps": 1, "trainer.gradient_checkpointing": True,
        "quantization.load_in_8bit": True, "dataset.path": "Abirate/english_quotes", "dataset.columns.text": "quote",
        "model.name_or_path": "facebook/opt-6.7b",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_values_of_the_source(name):
    plan = api.compose(f"recipe={name}", here=False).model_dump()
    found = leaves({k: v for k, v in plan.items() if k not in ("composed", "provenance", "overrides")})
    wrong = {k: (v, found.get(k)) for k, v in SOURCES[name].items() if found.get(k) != v}
    assert not wrong


def test_the_answers_variant_changes_what_it_says():
    plain = api.compose("recipe=llama2_7b_lora_zero2_doctor", here=False)
    right = api.compose("recipe=llama2_7b_lora_zero2_doctor_answers", here=False)
    assert (plain.dataset.format, right.dataset.format) == ("text", "prompt_completion")
    assert right.trainer["completion_only_loss"] is True and right.trainer["max_length"] == 512
    assert right.model == plain.model and right.global_batch_size == plain.global_batch_size


@pytest.mark.parametrize("name", RECIPES)
def test_first_lines(name):
    """The command, the hardware, memory and time; the name's own parts stand in the file."""
    lines = (paths.CONF / "recipe" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert re.match(rf"# kit train recipe={name}( model\.name_or_path=FOLDER)?$", lines[1])
    head = " ".join(line.lstrip("# ") for line in lines[:6] if line.startswith("#"))
    assert re.search(r"Hardware: .+ Expected: .*GB.*(second|minute|hour)", head), head


def test_a_recipe_for_gpus_does_not_start_on_a_machine_without():
    from kit.errors import KitError

    with pytest.raises(KitError, match="1 GPU asked for, this machine shows 0"):
        api.compose("recipe=llama3_1_8b_lora", "model.random_init=true", here=True)
