"""Keys as other tools, older releases and habit write them: each points to the key that is meant, with its value."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kit import api
from kit.cli import verbs as cli
from kit.config.keys import all_keys
from kit.config.pointers import SECTION_NAMES, bare_names, suggest_choice, suggest_override
from kit.errors import REFUSED
from kit.foreign.read import parse_scalar
from kit.schema import fields

EXAMPLES = Path(__file__).parents[1] / "importing"
# What is typed, and the beginning of the answer.
TYPED = {
    "learning_rate=1e-4": "trainer.learning_rate=1e-4", "lora_r=16": "peft.r=16",
    "lr=1e-4": "trainer.learning_rate=1e-4",
    "batch_size=4": "trainer.per_device_train_batch_size=4", "epochs=3": "trainer.num_train_epochs=3",
    "model_name_or_path=a/b": "model.name_or_path=a/b", "cutoff_len=512": "trainer.max_length=512",
    "sequence_len=512": "trainer.max_length=512", "micro_batch_size=2": "trainer.per_device_train_batch_size=2",
    "load_in_4bit=true": "quantization=nf4", "load_in_8bit=True": "quantization=int8",
    "per_device_train_batch_size=4": "trainer.per_device_train_batch_size=4",
    "evaluation_strategy=steps": "trainer.eval_strategy=steps", "warmup_ratio=0.1": "trainer.warmup_steps=0.1",
    "torch_dtype=bf16": "model.dtype=bfloat16", "max_seq_length=64": "trainer.max_length=64",
    "no_cuda=true": "trainer.use_cpu=true", "quantization_bit=4": "quantization=nf4",
    "finetuning_type=full": "peft=none",
    "lora_target=all": "peft.target_modules=all-linear",
    "flash_attn=fa2": "model.attn_implementation=flash_attention_2",
    "val_set_size=0.1": "dataset.test_size=0.1", "num_epochs=2": "trainer.num_train_epochs=2",
    "optimizer=adamw_torch": "trainer.optim=adamw_torch", "sample_packing=true": "trainer.packing=true",
    "dataset_name=a/b": "dataset.path=a/b", "use_peft=true": "peft=lora", "report_to=wandb": "tracking=wandb",
    "num_gpus=4": "launch.num_gpus=4", "nproc_per_node=4": "launch.num_gpus=4", "zero_stage=3": "deepspeed=zero3",
    "output_dir=x": "the run directory holds everything", "hub_token=x": "secrets come from the environment",
    "beta=0.1": "the kit trains SFT alone", "gradient_clipping=1.0": "trainer.max_grad_norm=1.0",
    "use_nested_quant=true": "quantization.bnb_4bit_use_double_quant=true",
    "adapter=qlora": "peft=lora quantization=nf4",
    "learnin_rate=1": "did you mean trainer.learning_rate=1", "lora_drpout=0.1": "did you mean peft.lora_dropout=0.1",
    "trainer.lora_r=8": "peft.r=8", "model.learning_rate=1": "trainer.learning_rate=1", "my_own_thing=1": "",
}  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_the_key_that_is_meant(typed: str):
    key, _, value = typed.partition("=")
    answer = suggest_override(key, parse_scalar(value), value)
    assert answer.startswith(TYPED[typed]) and bool(answer) == bool(TYPED[typed]), answer


def test_every_name_of_a_field_points_to_one_that_exists():
    """Without its section each field of ours is found again; every older and foreign name has an answer."""
    entries, lost = all_keys(), []
    for name in bare_names():
        answer = next(filter(None, (suggest_override(name, v, str(v).lower()) for v in ("x", 1, True))), "")
        key = answer.partition("=")[0]
        known = key in entries or key in SECTION_NAMES or key in ("tracking", "tokenizer") or " " in answer
        if not known and name not in SECTION_NAMES and name not in ("tokenizer", "fsdp", "tracking"):
            lost.append((name, answer))
    assert not lost
    for key, entry in entries.items():
        section, _, name = key.rpartition(".")
        if section == "trainer" and name not in fields.OWNED_ELSEWHERE and "default" in entry and entry["default"]:
            assert f"trainer.{name}" in suggest_override(name, entry["default"]) or name in ("report_to",), key


def test_on_the_command_line(base: Path, chat: Path, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_length=64"]
    for words, fixes in (
        (["learning_rate=1e-4", "lora_r=16"], ["trainer.learning_rate=1e-4", "peft.r=16"]),
        (["--learning_rate", "1e-4", "--lora_r=16"], ["trainer.learning_rate=1e-4", "peft.r=16"]),
        (["-lr", "1e-4", "--num_gpus", "4"], ["trainer.learning_rate=1e-4", "launch.num_gpus=4"]),
        (["--lora_target_modules", "q_proj", "v_proj"], ["peft.target_modules=[q_proj,v_proj]"]),
        (["--bf16", "--trainer.max_steps", "3"], ["trainer.bf16=true", "trainer.max_steps=3"]),
        (["--jsn"], ["did you mean --json"]),
        (["learning_rate", "1e-4"], ["trainer.learning_rate=1e-4"]),
        (["trainer.lora_r=8", "peft.lora_r=8", "trainer.warmup_ratio=0.1"], ["peft.r=8", "trainer.warmup_steps=0.1"]),
        (["model=a/b"], ["model.name_or_path=a/b"]),
        (["peft=qlora"], ["peft=lora quantization=nf4"]),
        (["deepspeed=2"], ["deepspeed=zero2"]),
        (["peft=lokr"], ["peft.peft_type=LOKR"]),
    ):
        for verb in ("check", "train"):
            if verb == "train" and words == ["--jsn"]:
                continue
            assert cli.run_verb([verb, *stock, *words]) == REFUSED, words
            told = capsys.readouterr().err
            assert all(f"fix:   {fix}" in told for fix in fixes), (words, told)
            assert "Traceback" not in told and "usage:" not in told


def test_in_a_file(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Single keys are placed with their lines; a whole file of another tool is for kit import."""
    monkeypatch.chdir(tmp_path)
    flat = "model: qwen3_0b6\nlearning_rate: 1e-4\nlora_r: 16\nload_in_4bit: true\ntraining:\n  max_steps: 3\n"
    Path("flat.yaml").write_text(flat + f"dataset: {chat}\n")
    told = {p.where: p.fix for p in api.check("flat.yaml")}
    assert (
        told["learning_rate in flat.yaml:2"] == "trainer.learning_rate: write `learning_rate: 0.0001` below `trainer:`"
    )
    assert told["lora_r in flat.yaml:3"].startswith("peft.r: ")
    assert told["load_in_4bit in flat.yaml:4"] == "quantization: nf4"
    assert "the section is called trainer" in told.values()
    for name, tool in (
        ("axolotl_qlora.yaml", "Axolotl"), ("llamafactory_lora.yaml", "LLaMA-Factory"), ("trl_lora.yaml", "TRL"),
        ("accelerate_zero2.yaml", "accelerate"),
    ):  # fmt: skip
        shutil.copy(EXAMPLES / name, tmp_path)
        [problem] = api.check(name)
        assert f"{name} is a config of {tool}" == problem.problem and f"kit import {name} " in problem.fix


def test_choices_that_people_type():
    assert suggest_choice("model", "/data/my_model") == "model.name_or_path=/data/my_model"
    assert suggest_choice("quantization", "4bit") == "quantization=nf4" and suggest_choice("model", "llama") == ""
