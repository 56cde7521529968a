"""`kit why KEY`: the value, where it was set and over what, what it becomes, and which key was meant."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit import api
from kit.cli import verbs as cli
from kit.config import keys
from kit.config.deepspeed.filled_keys import FILLED_KEYS
from kit.errors import DONE, REFUSED, KitError
from kit.explain import why
from kit.explain.key_effects import EFFECTS, RESOLUTIONS
from kit.schema import fields
from kit.storage import run_directory

DOCTOR = "recipe=llama2_7b_lora_zero2_doctor"
ANSWERS = "recipe=llama2_7b_lora_zero2_doctor_answers"
TWO = ("launch=deepspeed", "launch.num_gpus=2")


def place(key: str, file: Path | str) -> str:
    """`folder/file:line` of a key in a file of one level below a section."""
    name = key.rpartition(".")[2]
    path = Path(keys.__file__).parents[2] / file
    lines = path.read_text().splitlines()
    number = next(
        n for n, line in enumerate(lines, 1) if line.lstrip().lstrip('"').startswith((f"{name}:", f'{name}"'))
    )
    folder = {"recipes": "recipe"}.get(path.parent.name, path.parent.name)
    return f"{folder}/{path.name}:{number}"


SFT, ZERO2 = "hydra_conf/trainer/sft.yaml", "ds_configs/zero2.json"
BELOW, ABOVE = "recipes/llama2_7b_lora_zero2_doctor.yaml", "recipes/llama2_7b_lora_zero2_doctor_answers.yaml"
# Overrides, key, value, who sets it, what it is set over (winner first), what it becomes.
TOLD = [
    ([ANSWERS], "trainer.learning_rate", 2e-4, ABOVE, [BELOW, SFT, 2e-5], "SFTConfig(learning_rate=0.0002)"),
    ([ANSWERS, "trainer.learning_rate=1e-5"], "trainer.learning_rate", 1e-5,
     "command line: trainer.learning_rate=1e-5", [ABOVE, BELOW, SFT, 2e-5], "SFTConfig(learning_rate=1e-05)"),
    ([DOCTOR], "trainer.adam_beta2", 0.999, "TRL's SFTConfig: its default", [],
     "SFTConfig(adam_beta2=0.999), by itself"),
    ([DOCTOR], "peft.lora_alpha", 8, BELOW, ["hydra_conf/peft/lora.yaml", 8], "PEFT's LORA config(lora_alpha=8)"),
    ([DOCTOR], "deepspeed.zero_optimization.stage", 2, ZERO2, [0], "ds_config.json: zero_optimization.stage = 2"),
    ([DOCTOR], "deepspeed.gradient_clipping", 0.3, "filled from trainer.max_grad_norm", [ZERO2, 1.0],
     "ds_config.json: gradient_clipping = 0.3, as trainer.max_grad_norm to SFTConfig"),
    ([DOCTOR], "trainer.max_grad_norm", 0.3, BELOW, [SFT, 1.0], "ds_config.json: gradient_clipping = 0.3"),
    ([DOCTOR], "trainer.report_to", "none", "tracking.report_to in tracking/none.yaml:2", ["none"],
     "SFTConfig(report_to=none)"),
    ([DOCTOR, "launch.num_gpus=2"], "trainer.per_device_train_batch_size", 16, BELOW, [SFT, 8],
     "ds_config.json: train_batch_size = 32"),
    (["recipe=quickstart", "global_batch_size=64"], "trainer.gradient_accumulation_steps", 4,
     "global_batch_size / (per_device_train_batch_size x processes)", [SFT, 1],
     "SFTConfig(gradient_accumulation_steps=4)"),
    (["recipe=llama3_1_8b_lora"], "trainer.bf16", True, RESOLUTIONS["trainer.bf16"], [SFT, None],
     "SFTConfig(bf16=true)"),
    (["recipe=llama3_1_8b_lora"], "tokenizer.pad_token", "<|finetune_right_pad_id|>",
     "tokenizer/default.yaml:4, which takes model.pad_token from model/llama3_1_8b_instruct.yaml:3", [None],
     "tokenizer.pad_token = <|finetune_right_pad_id|>"),
    (["recipe=llama3_1_8b_qlora"], "quantization.bnb_4bit_compute_dtype", "bfloat16", "auto: the precision",
     ["hydra_conf/quantization/nf4.yaml", None], "BitsAndBytesConfig(bnb_4bit_compute_dtype=bfloat16)"),
    (["recipe=quickstart"], "quantization.load_in_4bit", False, "transformers' BitsAndBytesConfig: its default", [],
     "nothing: quantization=none"),
    (["recipe=quickstart"], "trainer.output_dir", "the checkpoints folder of the run directory", "the worker sets it",
     [None], "SFTConfig(output_dir=the checkpoints folder of the run directory)"),
    (["recipe=quickstart", "~peft.bias"], "peft.bias", "none", "command line: ~peft.bias",
     ["hydra_conf/peft/lora.yaml", "none"], "PEFT's LORA config(bias=none), by itself"),
    (["recipe=quickstart", "peft.rank_pattern={q_proj: 4}"], "peft.rank_pattern.q_proj", 4,
     "command line: peft.rank_pattern={q_proj: 4}", [], "rank_pattern.q_proj=4"),
    (["recipe=quickstart"], "precision", "float32", "trainer.bf16 and trainer.fp16", [],
     "the dtype of the weights: float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", TOLD, ids=lambda c: f"{c[1]} of {' '.join(c[0])}")
def test_value_origin_chain_and_effect(case):
    overrides, key, value, set_by, over, becomes = case
    told = why.explain_key(key, *overrides)
    assert told["key"] == key and told["value"] == value and not told["refused"]
    files = (".yaml", ".json")
    assert told["set"] == (place(key, set_by) if set_by.endswith(files) else set_by)
    assert len(told["over"]) == len(over)
    for found, expected in zip(told["over"], over, strict=True):
        if isinstance(expected, str) and expected.endswith(files):
            assert found["where"] == place(key, expected)
        else:  # the library's own default is what all the others stand on
            assert found["where"].endswith("default") and found["value"] == expected
    assert any(becomes in line for line in told["becomes"]), told["becomes"]


MEANT = {
    "learning_rate": "trainer.learning_rate",
    "r": "peft.r",
    "load_in_4bit": "quantization.load_in_4bit",
    "stage": "deepspeed.zero_optimization.stage",
    "zero_optimization.stage": "deepspeed.zero_optimization.stage",
    "zero_optimization": "deepspeed.zero_optimization",
    "train_batch_size": "deepspeed.train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "pad_token": "model.pad_token",  # not SFTConfig's, which is the tokenizer's here
    "output_dir": "trainer.output_dir",
    "max_seq_length": "trainer.max_length",
    "lr": "trainer.learning_rate",
    "lora_r": "peft.r",
    "dataset.template.text": "dataset.template.text",
    "peft.target_modules[0]": "peft.target_modules",
}


@pytest.mark.parametrize(("typed", "key"), MEANT.items(), ids=MEANT)
def test_a_bare_name_and_a_deepspeed_key_are_understood(typed, key):
    assert why.explain_key(typed, DOCTOR)["key"] == key


WRONG = {
    "lerning_rate": "trainer.learning_rate",
    "trainer.lerning_rate": "trainer.learning_rate",
    "deepspeed.zero_optimization.stge": "deepspeed.zero_optimization.stage",
    "trainer.warmup_ratio": "trainer.warmup_steps",
    "warmup_ratio": "trainer.warmup_steps",
    "peft.alpha": "peft.lora_alpha",
    "lora_alpa": "peft.lora_alpha",
    "model.nme_or_path": "model.name_or_path",
    "nothing_like_it_at_all": "kit show",
}


@pytest.mark.parametrize(("typed", "hint"), WRONG.items(), ids=WRONG)
def test_an_unknown_key_is_refused_with_the_likeliest(typed, hint, capsys):
    assert cli.run_verb(["why", typed, "recipe=quickstart"]) == REFUSED
    said = capsys.readouterr().err
    assert f"there is no key {typed}" in said and hint in said, said


def test_a_key_that_only_the_overrides_have_is_still_unknown():
    with pytest.raises(KitError, match="did you mean trainer.learning_rate"):
        why.explain_key("trainer.lerning_rate", "recipe=quickstart", "trainer.lerning_rate=1")


def test_a_refused_run_still_answers_and_says_so(capsys):
    args = ["why", "trainer.max_grad_norm", DOCTOR, "deepspeed.gradient_clipping=2", "trainer.lerning_rate=1"]
    assert cli.run_verb(args) == DONE
    said = capsys.readouterr().out
    assert said.startswith("trainer.max_grad_norm = 0.3")
    assert "this run has" in said and "gradient_clipping is 2.0" in said
    told = why.explain_key("model.name_or_path")  # nothing is given at all
    assert told["value"] == "???" and told["becomes"] == []
    assert [p["problem"] for p in told["refused"]][0] == "model.name_or_path is not given"


def test_a_section_lists_its_keys(capsys):
    assert cli.run_verb(["why", "peft", ANSWERS]) == DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["peft.r", "16", place("peft.r", ABOVE)] in lines
    assert {"peft.bias", "peft.lora_dropout", "peft.target_modules"} <= {line[0] for line in lines}


def test_json_has_the_same(capsys):
    assert cli.run_verb(["why", "r", ANSWERS, "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert (told["key"], told["value"], told["class"]) == ("peft.r", 16, "identity")
    assert told["over"][-1] == {"where": "PEFT, LORA: its default", "value": 8}


def test_a_json_of_ones_own_is_in_the_chain(tmp_path: Path):
    mine = tmp_path / "mine.json"
    mine.write_text(
        '{"zero_optimization": {"stage": 2,\n "reduce_bucket_size": "auto"},\n "gradient_clipping": 0.3}\n'
    )
    args = (DOCTOR, f"deepspeed={mine}")
    told = why.explain_key("reduce_bucket_size", *args)
    assert told["value"] == 4096 * 4096 and told["set"] == "filled from model.config.hidden_size"
    assert told["over"][0] == {"where": f"{mine}:2", "value": '"auto"'}
    told = why.explain_key("gradient_clipping", *args)
    assert (told["value"], told["set"]) == (0.3, f"{mine}:3")


def test_a_run_directory(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.use_cpu=true", "peft.r=4", "name=made"]
    run = run_directory.create_run_directory(api.compose(*args)).run_path
    told = why.explain_key("r", run.name)  # a run may be named without runs/
    assert (told["value"], told["set"], told["run"]) == (4, "command line: peft.r=4", str(run))
    assert told["over"] == [
        {"where": "PEFT, LORA: its default", "value": 8}
    ]  # what a plan does not keep is not made up
    assert why.explain_key("model.dtype", str(run))["set"] == RESOLUTIONS["model.dtype"]
    for wrong, said in (
        ([run.name, "peft.r=8"], "is a run"),
        (["quickstart"], "recipe=quickstart"),
        (["no"], "no run"),
    ):
        assert cli.run_verb(["why", "r", *wrong]) == REFUSED
        assert said in capsys.readouterr().err


def test_rules_that_read_a_key_are_named():
    table = [
        SimpleNamespace(id="own", severity="refuse", source="peft", keys=("trainer.fp16", "trainer.bf16")),
        SimpleNamespace(id="section", severity="warn", source="peft", keys=("trainer",)),
        SimpleNamespace(id="deeper", severity="refuse", source="peft", keys=("trainer.bf16.x",)),
        SimpleNamespace(id="like", severity="refuse", source="peft", keys=("trainer.bf",)),
        SimpleNamespace(id="silent", severity="refuse", source="peft"),
    ]
    assert [r["id"] for r in why.rules_reading("trainer.bf16", table)] == ["own", "section", "deeper"]


SHAPE = ("model.config.hidden_size", "model.config.model_type")


def test_the_words_stand_for_keys_that_exist():
    """A key that is renamed upstream or here must not stay in the tables of sentences."""
    known = keys.all_keys()
    filled = [*(f"deepspeed.{k}" for k in FILLED_KEYS), *(s for row in FILLED_KEYS.values() for s in row.sources)]
    for key in [*RESOLUTIONS, *EFFECTS, *filled]:
        schedulers = [t for t in fields.field_tables() if t.startswith("deepspeed.scheduler.")]
        in_scheduler = any(key.rpartition(".")[2] in fields.field_tables()[t] for t in schedulers)
        assert key in known or key in keys.SECTIONS or in_scheduler or key in SHAPE, key
