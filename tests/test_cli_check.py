"""`kit check` and the refusals of `kit train`: every problem at once, with the key, where it was set and the fix."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows

from kit import api
from kit.cli import verbs as cli
from kit.config.rules.table import RULES
from kit.errors import DONE, ENVIRONMENT, FAILED, REFUSED

IDS = {rule.id for rule in RULES}


@pytest.fixture
def run(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`kit check` with a valid model and data set, and more overrides; (exit code, problems)."""
    monkeypatch.chdir(tmp_path)

    def check(*overrides: str):
        given = {o.partition("=")[0] for o in overrides}
        stock = [f"model.name_or_path={base}", f"dataset.path={chat}"]
        args = [s for s in stock if s.partition("=")[0] not in given]
        return api.check(*args, *overrides)

    return check


def test_a_terminal_without_the_letter(tmp_path: Path):
    """The value is shown in another way; that is no reason for a traceback."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    argv = [sys.executable, "-m", "kit", "why", "prompts", "recipe=quickstart", 'prompts=["é"]']
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == DONE and r"\xe9" in done.stdout, done.stderr


def assert_refused(problems, key: str, *words: str) -> None:
    text = "\n".join(map(str, problems))
    assert problems, "was not refused"
    assert any(key in p.where or key in p.problem for p in problems), text
    assert all(p.rule in IDS and p.fix for p in problems), text
    for word in words:
        assert word in text, text


VALID = [
    [],
    ["deepspeed=zero1"],
    ["deepspeed=zero2", "deepspeed.zero_optimization.reduce_bucket_size=2e8"],
    # A key that the file lacks: no + needed.
    ["deepspeed=zero2", "deepspeed.zero_optimization.ignore_unused_parameters=false"],
    ["deepspeed=zero3_offload", "launch.num_gpus=8"],
    ["deepspeed=zero3_nvme", "deepspeed.zero_optimization.offload_optimizer.nvme_path=/x"],
    ["peft=none"],
    ["peft.use_dora=true", "peft.target_modules=[q_proj,v_proj]", "peft.rank_pattern={q_proj:4}"],
    ["trainer.eval_strategy=steps", "trainer.eval_steps=5", "dataset.test_size=0.1"],
    ["trainer.bf16=true", "trainer.use_cpu=true"],
    ["global_batch_size=32", "trainer.per_device_train_batch_size=4"],
    ["+trainer.weight_decay=0.1", "++trainer.adam_beta2=0.95"],
    ["trainer.lr_scheduler_kwargs={min_lr: 1.0e-6}", "trainer.lr_scheduler_type=cosine_with_min_lr"],
]


@pytest.mark.parametrize("overrides", VALID, ids=lambda o: " ".join(o) or "defaults")
def test_valid_runs_pass(run, overrides):
    assert run(*overrides) == []


REFUSED_RUNS = [
    (["trainer.learning_rat=1"], "trainer.learning_rat", "did you mean", "learning_rate"),
    (["lauch.num_gpus=2"], "lauch", "did you mean launch"),
    (["dataset.pth=x"], "dataset.pth", "did you mean dataset.path"),
    (["peft.lora_alpa=8"], "peft.lora_alpa", "lora_alpha"),
    (["quantization.load_in_4bits=true"], "quantization.load_in_4bits", "load_in_4bit"),
    (["deepspeed=zero2", "deepspeed.zero_optimisation.stage=2"], "zero_optimisation", "zero_optimization"),
    (["deepspeed=zero2", "deepspeed.gradient_cliping=1"], "gradient_cliping", "gradient_clipping"),
    (
        ["deepspeed=zero2", "deepspeed.zero_optimization.reduce_bucket=1"],
        "zero_optimization.reduce_bucket",
        "did you mean",
    ),
    (["deepspeed=zero3", "deepspeed.zero_optimization.offload_param.devise=cpu"], "offload_param.devise", "device"),
    (["trainer.learning_rate=fast"], "trainer.learning_rate"),
    (["trainer.max_steps=1.5"], "trainer.max_steps"),
    (["trainer.packing=maybe"], "trainer.packing"),
    (["launch.num_gpus=many"], "launch.num_gpus"),
    (["deepspeed=zero2", "deepspeed.zero_optimization.overlap_comm=7"], "overlap_comm"),
    (["dataset.path=nothing.jsonl"], "dataset.path", "nothing.jsonl"),
    (["dataset.columns.text=body"], "dataset.columns", "messages"),
    (["peft.target_modules=[q_prj]"], "peft.target_modules", "q_prj", "q_proj"),
    (["peft.target_modules=.*nothing.*"], "peft.target_modules"),
    (["peft.target_modules=[q_proj,lm_head]"], "peft.target_modules", "lm_head", "modules_to_save"),
    (["global_batch_size=30", "trainer.per_device_train_batch_size=8"], "global_batch_size", "30"),
    (["trainer.per_device_train_batch_size=0"], "per_device_train_batch_size"),
    (["deepspeed=zero2", "deepspeed.zero_optimization.offload_param.device=cpu"], "offload_param", "3"),
    (["trainer.fp16=true", "trainer.bf16=true"], "trainer.fp16", "bf16"),
    (["trainer.fp16=true", "trainer.use_cpu=true"], "trainer.fp16", "GPU"),
    (["deepspeed=zero2", "fsdp.fsdp_version=2"], "fsdp", "deepspeed=none"),
    (["model.name_or_path=./nothing"], "model.name_or_path", "nothing"),
    (["model.name_or_path=."], "model.name_or_path", "config.json"),
    (["trainer.output_dir=x"], "trainer.output_dir", "runs_dir"),
    (["trainer.warmup_ratio=0.1"], "trainer.warmup_ratio", "warmup_steps"),
    (["trainer.max_seq_length=5"], "trainer.max_seq_length", "max_length"),
    (["deepspeed=zero9"], "deepspeed", "zero9", "zero3"),
    (["deepspeed=zero2", "trainer.max_grad_norm=0.3", "deepspeed.gradient_clipping=1.0"], "gradient_clipping", "0.3"),
    (["deepspeed=zero2", "deepspeed.train_batch_size=64"], "train_batch_size", "64"),
    (["trainer.load_best_model_at_end=true"], "load_best_model_at_end", "eval_strategy"),
    (["trainer.eval_strategy=steps"], "eval_strategy", "test_size"),
    (["trainer.model_init_kwargs={device_map: auto}"], "device_map"),
    (["launch=local", "launch.num_gpus=2"], "launch.num_gpus", "deepspeed"),
    (["trainer.completion_only_loss=true"], "completion_only_loss", "messages"),
    (["trainer.hub_token=abc"], "trainer.hub_token", "HF_TOKEN"),
    (["tracking.hub_token=abc"], "tracking.hub_token", "HF_TOKEN"),
    (["tracking.bogus=1"], "tracking.bogus"),
    (["name=../up"], "name"),
    (["peft=none", "peft.r=4"], "peft.r", "peft=lora"),
]


@pytest.mark.parametrize("case", REFUSED_RUNS, ids=lambda c: " ".join(c[0]))
def test_wrong_runs_are_refused(run, case):
    overrides, key, *words = case
    assert_refused(run(*overrides), key, *words)


def test_all_problems_come_at_once(run):
    problems = run("trainer.lerning_rate=1", "peft.rr=1", "launch.nm_gpus=1", "deepspeed=zero2", "deepspeed.stage=2")
    assert len(problems) >= 4
    assert all("command line" in p.where for p in problems), problems


def test_data_that_cannot_train(run, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert_refused(run(f"dataset.path={empty}"), "dataset.path", "no rows")
    other = write_rows(tmp_path / "other.jsonl", [{"ask": "a", "say": "b"}])
    assert_refused(run(f"dataset.path={other}"), "dataset.columns", "ask", "say")
    mapped = run(f"dataset.path={other}", "dataset.columns.prompt=ask", "dataset.columns.completion=say")
    assert mapped == []
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"\n')
    assert_refused(run(f"dataset.path={broken}"), "dataset.path", "broken.jsonl row 1: not JSON")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert_refused(run(f"dataset.path={binary}"), "dataset.path")


def test_models_that_are_none(run, base, tmp_path):
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    (pickle / "config.json").write_text((base / "config.json").read_text())
    (pickle / "pytorch_model.bin").write_bytes(b"x")
    assert_refused(run(f"model.name_or_path={pickle}"), "model.name_or_path", "safetensors")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((base / "config.json").read_text())
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-10])
    assert_refused(run(f"model.name_or_path={cut}"), "model.name_or_path", "cut short")
    (cut / "model.safetensors").write_bytes(struct.pack("<Q", 10**15))
    assert run(f"model.name_or_path={cut}")
    (cut / "config.json").write_text("{")
    assert run(f"model.name_or_path={cut}")


def test_deepspeed_files_of_ones_own(run, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}')
    assert run(f"deepspeed={mine}") == []
    assert run(f"deepspeed.file={mine}", "deepspeed.zero_optimization.stage=1") == []
    mine.write_text('{"zero_optimization": {"stage": 2, "stge": 1}, "zero_optimisation": {}}')
    assert_refused(run(f"deepspeed={mine}"), "zero_optimization.stge", "zero_optimisation")
    mine.write_text('{"zero_optimization": ')
    assert_refused(run(f"deepspeed={mine}"), "mine.json")
    assert_refused(run("deepspeed.file=/no/such.json"), "such.json")
    mine.write_text('{\n "gradient_cliping": 1,\n "zero_optimization": {"stage": 7}\n}')
    places = [p.where for p in run(f"deepspeed={mine}")]  # the person's own file and line, not the group's
    assert sorted(places) == [
        f"deepspeed.gradient_cliping in {mine}:2",
        f"deepspeed.zero_optimization.stage in {mine}:3",
    ]
    assert all("command line" in p.where for p in run(f"deepspeed={mine}", "deepspeed.gradient_cliping=2")[:1])


def test_a_recipe_of_ones_own(base, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"deepspeed: zero2\npeft: none\nmodel:\n  name_or_path: {base}\n"
        f"dataset:\n  path: {chat}\ntrainer:\n  max_steps: 7\n"
    )
    plan = api.compose(str(mine), "trainer.learning_rate=0.5")
    assert (plan.zero_stage, plan.peft, plan.trainer["max_steps"], plan.name) == (2, None, 7, "mine")
    assert plan.provenance["trainer.max_steps"] == f"{mine}:8"
    assert plan.provenance["trainer.learning_rate"] == "command line: trainer.learning_rate=0.5"
    mine.write_text(mine.read_text() + "  lerning_rate: 1\n")
    assert_refused(api.check(str(mine)), "lerning_rate", f"{mine}:9", "learning_rate")
    # a folder of recipes and groups
    folder = tmp_path / "conf"
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe" / "ours.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /deepspeed: zero3\n"
        f"model:\n  name_or_path: {base}\ndataset:\n  path: {chat}\n"
    )
    assert api.compose("recipe=ours", config_dir=str(folder)).zero_stage == 3
    assert_refused(api.check("recipe=our"), "recipe", "quickstart")
    assert_refused(api.check(str(tmp_path / "none.yaml")), "none.yaml")


def test_the_command(base, chat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}"]
    assert cli.run_verb(["check", *stock, "--json"]) == DONE
    answer = json.loads(capsys.readouterr().out)
    assert answer["valid"] and answer["plan"]["trainer"]["max_length"] == 1024
    assert cli.run_verb(["check", *stock, "trainer.x=1", "--json"]) == REFUSED
    assert json.loads(capsys.readouterr().out)["problems"][0]["where"] == "command line: trainer.x=1"
    assert cli.run_verb(["train", *stock, "trainer.x=1"]) == REFUSED
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert cli.run_verb(["chek"]) == REFUSED
    assert "kit check" in capsys.readouterr().err
    assert cli.run_verb(["check", "recipe=quickstart", "foo"]) == REFUSED
    assert cli.run_verb(["list"]) == DONE
    assert "quickstart" in capsys.readouterr().out


def test_auto_is_nowhere_in_a_plan(base, chat, tmp_path, monkeypatch):
    """Every "auto" is resolved before launch: in the DeepSpeed JSON, the trainer and the launch section."""
    monkeypatch.chdir(tmp_path)
    for engine in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"):
        plan = api.compose(
            f"model.name_or_path={base}", f"dataset.path={chat}", f"deepspeed={engine}", "launch.num_gpus=4"
        )
        dumped = plan.model_dump(include={"model", "dataset", "deepspeed", "trainer", "launch", "peft"})
        assert '"auto"' not in json.dumps(dumped), engine
        assert plan.deepspeed["train_batch_size"] == plan.global_batch_size == 32


def test_hash_covers_identity_keys_only(base, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "global_batch_size=16", "trainer.bf16=false"]

    def digest(*more: str) -> str:
        return api.compose(*stock, *more).hash

    same = digest()
    assert digest("trainer.per_device_train_batch_size=4") == same  # machine: the accumulation makes up for it
    assert digest("trainer.save_steps=7", "trainer.max_steps=9") == same  # extendable
    assert digest("launch.num_gpus=2", "launch=torchrun") == same
    assert digest("trainer.learning_rate=0.1") != same
    assert digest("peft.r=4") != same
    assert digest("trainer.seed=1") != same
    assert digest("global_batch_size=32") != same


@pytest.mark.parametrize("verb", [["check", "recipe=quickstart"], ["list"]], ids=["ends at once", "ends as others do"])
def test_output_that_cannot_be_written_is_told(verb, tmp_path: Path):
    """A full disk: the reason and code 3; a reader that has gone: no word. Never a traceback."""
    argv = [sys.executable, "-m", "kit", *verb]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == ENVIRONMENT and "No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert done.returncode == FAILED and done.stderr == ""
