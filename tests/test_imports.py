"""What each verb imports, at run time: static contracts follow imports inside functions too, so cli/ needs this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import cli_latency
from soak import make_inputs

from kit.cli import verbs as cli
from kit.errors import DONE, ENVIRONMENT, FAILED, REFUSED

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch transformers trl peft accelerate deepspeed datasets bitsandbytes numpy pandas pyarrow safetensors".split()
)
RECIPES = sorted(f.stem for f in (ROOT / "recipes").glob("*.yaml"))
VERBS = [
    "train",
    "check",
    "plan",
    "data",
    "resume",
    "merge",
    "generate",
    "eval",
    "fetch",
    "convert",
    "watch",
    "doctor",
    "list",
]
VERBS += ["show", "why", "diff", "eject", "import", "launch-node", "compose"]

# Several command lines in one fresh process; the last line it prints: how each ended, and what had been imported then.
PROBE = """
import json, sys
from kit.cli import verbs as cli

answers = []
for argv in json.loads(sys.argv[1]):
    try:
        code = cli.run_verb(argv)
    except SystemExit as stop:
        code = stop.code or 0
    answers.append([code, sorted({name.partition(".")[0] for name in sys.modules})])
print()
print(json.dumps(answers))
"""


def python(code: str, *args: str, cwd: Path) -> str:
    """The last line that a fresh process prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code, *args]
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip().splitlines()[-1]


def answers(lines: list[list[str]], cwd: Path) -> list[tuple[int, set[str]]]:
    return [(code, set(names)) for code, names in json.loads(python(PROBE, json.dumps(lines), cwd=cwd))]


def imported(code: str, cwd: Path) -> set[str]:
    """Top-level modules that are there after some code."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    return set(json.loads(python(code + tail, cwd=cwd)))


def test_the_verbs_are_these():
    """Scripts and job files name verbs: one goes or changes its name only with a new major version."""
    assert list(cli.VERBS) == VERBS


def test_help_names_every_verb_but_the_internal_one(capsys):
    assert cli.run_verb(["--help"]) == DONE
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [v for v in VERBS if v not in shown] == ["compose"]


SINGLE = {
    "help": (["--help"], DONE),
    "version": (["--version"], DONE),
    "list": (["list"], DONE),
    "list deepspeed": (["list", "deepspeed"], DONE),
    "show recipe": (["show", "quickstart"], DONE),
    "show model": (["show", "model/llama3_1_8b"], DONE),
    "check": (["check", "recipe=quickstart"], DONE),
    "watch refused": (["watch", "no-such-run"], REFUSED),
    "doctor refused": (["doctor", "no-such-run"], REFUSED),
    "check --json": (["check", "recipe=quickstart", "--json"], DONE),
    "check --rules": (["check", "--rules"], DONE),
    "check --explain": (["check", "--explain", "lm-head-target"], DONE),
    "check --deepspeed": (
        ["check", "--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), "model=llama3_1_8b"],
        DONE,
    ),
    "plan": (["plan", "recipe=qwen3_1b7_lora", "hardware=4090"], DONE),
    "plan of what does not fit": (
        ["plan", "recipe=llama3_1_8b_full_zero3", "hardware=2xt4", "launch.num_gpus=2"],
        REFUSED,
    ),
    "data": (["data", "dataset=letters"], DONE),
    "data --json": (["data", "dataset=letters", "--json"], DONE),
    "data --row": (["data", "dataset=letters", "--row", "3", "--file", "letters_train.jsonl"], DONE),
    "train refused": (["train", "recipe=quickstart", "trainer.lerning_rate=1"], REFUSED),
    "train -m refused": (["train", "-m", "recipe=quickstart", "trainer.lerning_rate=1,2"], REFUSED),
    "search refused": (["train", "-m", "hparams_search=optuna", "recipe=quickstart", "peft.q=1,2"], REFUSED),
    "train --cfg job": (["train", "recipe=quickstart", "--cfg", "job"], DONE),
    "resume refused": (["resume", "nothing"], REFUSED),
    "fetch refused": (["fetch", "recipe=quickstart", "trainer.lerning_rate=1"], REFUSED),
    "why": (["why", "learning_rate", "recipe=quickstart"], DONE),
    "why refused": (["why", "lerning_rate", "recipe=quickstart"], REFUSED),
    "diff": (["diff", "quickstart", "recipe=quickstart deepspeed=zero3 launch=deepspeed launch.num_gpus=2"], DONE),
    "eject refused": (["eject", "recipe=quickstart", "trainer.lerning_rate=1"], REFUSED),
    "import": (["import", str(ROOT / "tests" / "importing" / "trl_lora.yaml")], DONE),
    "import refused": (["import", "nothing.yaml"], REFUSED),
    "fetch nothing": (["fetch", "recipe=quickstart"], DONE),
}


@pytest.mark.parametrize("case", SINGLE.values(), ids=SINGLE.keys())
def test_verbs_that_need_no_torch_import_none(case, tmp_path: Path):
    argv, expected = case
    [(code, names)] = answers([argv], tmp_path)
    assert code == expected
    assert not names & set(HEAVY)
    if argv[0] in ("--help", "--version"):
        assert not names & {"hydra", "omegaconf", "pydantic", "yaml"}
    assert [p.name for p in tmp_path.iterdir()] == []


def test_every_recipe_and_every_help(tmp_path: Path):
    """One process: modules only ever come in, so the last look holds for all."""
    lines = [[verb, "--help"] for verb in VERBS]
    lines += [["check", f"recipe={name}"] for name in RECIPES] + [["check", "recipe=quickstart", *OVERRIDDEN]]
    lines += [["eject", "recipe=quickstart", "deepspeed=zero2", "ejected"]]
    found = answers(lines, tmp_path)
    assert [code for code, _ in found] == [DONE] * len(lines)
    assert not found[-1][1] & set(HEAVY)


OVERRIDDEN = ["deepspeed=zero3", "launch=deepspeed", "launch.num_gpus=2", "quantization.load_in_4bit=true"]
OVERRIDDEN += ["quantization.bnb_4bit_quant_storage=bfloat16", "trainer.bf16=true", "trainer.fp16=false"]


def test_the_doctor_sees_torch_without_importing_it(tmp_path: Path):
    """The machine may be found wanting (3); a run may not be there or be one that never started."""
    [(code, names)] = answers([["doctor", "--json"]], tmp_path)
    assert code in (DONE, ENVIRONMENT) and "psutil" in names and not names & {*HEAVY, "hydra", "omegaconf"}


def test_compose_and_resume_of_what_it_made(tmp_path: Path):
    """`kit compose` hashes the weights and writes the run directory; resuming it is refused: no checkpoint."""
    stock = make_inputs(tmp_path / "in")
    compose = ["compose", *stock, "trainer.use_cpu=true", "name=made"]
    [(code, names)] = answers([compose], tmp_path)
    run = next((tmp_path / "runs").iterdir())
    assert code == DONE and not names & set(HEAVY)
    plan = json.loads((run / "plan.json").read_text())
    assert len(plan["base"]["fingerprint"]) == 64
    [(code, names)] = answers([["resume", str(run)]], tmp_path)
    assert code == REFUSED and not names & set(HEAVY)
    [(code, names)] = answers([["watch", str(run), "--once"]], tmp_path)
    assert code == DONE and not names & {*HEAVY, "hydra", "omegaconf"}
    [(code, names)] = answers([["doctor", str(run)]], tmp_path)
    assert code == FAILED and not names & set(HEAVY)


def test_importing_the_package_costs_nothing(tmp_path: Path):
    for module in (
        "kit",
        "kit.worker",
        "kit.system.paths",
        "kit.storage.manifest",
        "kit.storage.safetensors_header",
        "kit.storage.hub_cache",
    ):
        names = imported(f"import {module}", tmp_path)
        assert not names & {*HEAVY, "hydra", "omegaconf", "pydantic", "huggingface_hub"}, module


@pytest.mark.launch
def test_the_training_side_imports_no_hydra(tmp_path: Path):
    """Every module that a rank may import, torch and all; it takes as long as TRL's own import."""
    parts = ["training", "data"]
    found = [f.relative_to(ROOT).with_suffix("") for p in parts for f in sorted((ROOT / "kit" / p).glob("*.py"))]
    modules = [".".join(p.parts) for p in found if p.name not in ("__init__", "build_ops")]
    modules += [
        "kit.worker",
        "kit.merging",
        "kit.evaluation.generate",
        "kit.evaluation.evaluate",
        "kit.storage.run_directory",
    ]
    skip = f"import sys; sys.modules.update(dict.fromkeys({UNUSED[:3]!r})); "  # a plain plan has no use for them
    names = imported(skip + "import deepspeed, " + ", ".join(modules), tmp_path)
    assert not names & {"hydra", "omegaconf"}
    assert {"torch", "trl"} <= names  # else this test looked at nothing


UNUSED = ["wandb", "mlflow", "bitsandbytes", "deepspeed"]
NEEDED = {
    "nothing": ({}, []),
    "a tracker": ({"trainer": {"report_to": "wandb"}}, ["wandb"]),
    "DeepSpeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, ["deepspeed"]),
    "a monitor of DeepSpeed": ({"deepspeed": {"wandb": {"enabled": True}}}, ["wandb", "deepspeed"]),
    "quantized": ({"quantization": {"load_in_4bit": True}}, ["bitsandbytes"]),
    "8-bit optimizer": ({"trainer": {"optim": "adamw_bnb_8bit"}}, ["bitsandbytes"]),
    "loftq": ({"peft": {"init_lora_weights": "loftq"}}, ["bitsandbytes"]),
    "stored quantized": ({"model": {"name_or_path": "stored"}}, ["bitsandbytes"]),
    "not here": ({"model": {"name_or_path": "no/such-model"}}, ["bitsandbytes"]),
    "code of the base's own": ({"model": {"trust_remote_code": True}}, UNUSED),
}


@pytest.mark.parametrize("case", NEEDED)
def test_a_rank_imports_no_package_that_its_plan_does_not_need(case: str, tmp_path: Path, monkeypatch):
    from kit import api
    from kit.schema.run_plan import RunPlan
    from kit.training.unused_packages import skip_unused_packages, unused_packages

    changes, needed = NEEDED[case]
    plan = api.compose(*make_inputs(tmp_path / "in"))
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    monkeypatch.chdir(tmp_path)
    sections = plan.model_dump(mode="json")
    plan = RunPlan.model_validate(sections | {k: {**(sections[k] or {}), **v} for k, v in changes.items()})
    assert sorted({*UNUSED} - {*unused_packages(plan)}) == sorted(needed)
    for name in UNUSED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    skip_unused_packages(plan)
    assert {n for n in UNUSED if n in sys.modules} == {*UNUSED} - {*needed}
    for name in UNUSED:
        sys.modules.pop(name, None)  # the other tests of this process may need it


def test_a_check_loads_little_beyond_its_floor(tmp_path: Path):
    """By modules, which do not depend on how busy the machine is; tests/benchmarks/cli_latency.py measures seconds."""
    floor = cli_latency.FLOOR.replace("sys.argv[1]", repr(str(ROOT))).replace("sys.argv[2]", "'quickstart'")
    tail = "\nimport sys; print(len(sys.modules))"
    below = int(python(floor + tail, cwd=tmp_path))
    check = "from kit.cli import verbs as cli; assert cli.run_verb(['check', 'recipe=quickstart']) == 0"
    above = int(python(check + tail, cwd=tmp_path))
    assert above <= 1.35 * below, (above, below)
