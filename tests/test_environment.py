"""The environment cannot change a run unseen: every variable that the libraries read stands in a class."""

from __future__ import annotations

import ast
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit import api, worker
from kit.launchers import command, environment
from kit.launchers.environment import classify, clear_environment, clear_ranks, describe_environment

LIBRARIES = ("transformers", "accelerate", "trl", "peft", "deepspeed")
# Folders that no training run imports.
ELSEWHERE = re.compile(r"test_utils|testing_utils|/commands/|autotuning|/benchmarks?/|op_builder/(xpu|npu|hpu|mlu)")
READERS = ("getenv", "parse_flag_from_env", "parse_choice_from_env", "get_int_from_env", "is_env_variable_true",
           "is_env_variable_false")  # fmt: skip
# Read while training, and of no class: where a process runs, and names of the libraries' own making.
UNRECORDED = """USER systemdrive JOB_ID VSCODE_PID DATABRICKS_RUNTIME_VERSION ECS_CONTAINER_METADATA_URI
    TRAINING_JOB_ARN
    SAGEMAKER_JOB_NAME SM_FRAMEWORK_MODULE SM_NUM_CPUS SM_NUM_GPUS AWS_REGION AWS_DEFAULT_REGION AWS_PROFILE
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY OPENREWARD_API_KEY""".split()


def variables_read(source: str) -> set[str]:
    """Names of variables that a module reads from its environment, also those made of a prefix and a rest."""
    tree, constants = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    constants.setdefault(target.id, set()).add(node.value.value)

    def texts(node: ast.expr) -> set[str]:
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else set()
        if isinstance(node, ast.Name):
            return constants.get(node.id, set())
        if isinstance(node, ast.List | ast.Tuple):
            return {text for e in node.elts for text in texts(e)}
        if isinstance(node, ast.BinOp):
            return {a + b for a in texts(node.left) for b in texts(node.right)}
        if isinstance(node, ast.JoinedStr):
            parts = [texts(v.value) if isinstance(v, ast.FormattedValue) else texts(v) for v in node.values]
            names = {""}
            for part in parts:
                names = {a + b for a in names for b in part}
            return names
        return set()

    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            found |= texts(node.slice)
        elif isinstance(node, ast.Compare) and any(ast.unparse(c).endswith("environ") for c in node.comparators):
            found |= texts(node.left)
        elif isinstance(node, ast.Call) and node.args:
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if name in READERS or (owner.endswith("environ") and name in ("get", "pop", "setdefault")):
                found |= texts(node.args[0])
    return {name for name in found if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)}


@pytest.fixture(scope="module")
def libraries() -> dict[str, set[str]]:
    """Variable to the files that read it."""
    readers: dict[str, set[str]] = {}
    for library in LIBRARIES:
        root = Path(find_spec(library).submodule_search_locations[0])
        for file in root.rglob("*.py"):
            source = file.read_text(errors="replace")
            if not ELSEWHERE.search(str(file)) and re.search("environ|getenv|_from_env|env_variable", source):
                for name in variables_read(source):
                    readers.setdefault(name, set()).add(str(file.relative_to(root.parent)))
    return readers


def test_every_variable_that_the_libraries_read_has_a_class(libraries):
    """After an upgrade: does the new one change training? Give it a row of environment.TABLE."""
    assert len(libraries) > 150
    unknown = {n: sorted(f)[:2] for n, f in libraries.items() if classify(n) == "unrecorded" and n not in UNRECORDED}
    assert not unknown


def test_the_scan_sees_every_way_of_reading(libraries):
    seen = """
prefix = "ACCELERATE_X_"
prefix = "FSDP_X_"
a = os.environ.get(prefix + "ONE", "no")
b = parse_flag_from_env(f"{prefix}TWO")
c = get_int_from_env(["THREE_A", "THREE_B"], 1)
d = "FOUR" in os.environ
e = environ["FIVE"]
f = os.getenv("SIX")
"""
    assert variables_read(seen) == {"ACCELERATE_X_ONE", "FSDP_X_ONE", "ACCELERATE_X_TWO", "FSDP_X_TWO", "THREE_A",
                                    "THREE_B", "FOUR", "FIVE", "SIX"}  # fmt: skip
    # What is known to change training, and by which class each was found out.
    for name in (
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "ACCELERATE_DYNAMO_BACKEND",
        "FSDP_VERSION",
        "DS_ACCELERATOR",
        "PARALLELISM_CONFIG_TP_SIZE",
    ):
        assert name in libraries and classify(name) == "cleared", name
    for name in ("DS_SKIP_CUDA_CHECK", "HF_HUB_OFFLINE", "WANDB_PROJECT", "CUDA_VISIBLE_DEVICES"):
        assert classify(name) == "passed", name
    assert classify("NCCL_ALGO") == classify("FLASH_ATTENTION_DETERMINISTIC") == "numeric"
    assert classify("https_proxy") == classify("NO_PROXY") == "passed" and classify("HOME") == "unrecorded"


@pytest.fixture
def plan(base: Path, chat: Path, tmp_path: Path):
    places = (f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path}")
    return api.compose(*places, "trainer.use_cpu=true", "trainer.bf16=false")


def test_cleared_said_and_recorded(plan):
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "DS_ACCELERATOR": "cpu", "FSDP_VERSION": "2", "HOME": "/h",
           "ACCELERATE_HUB_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz", "NVIDIA_TF32_OVERRIDE": "0",
           "HF_TOKEN": "secret-1",
           "NCCL_DEBUG": "INFO", "HTTPS_PROXY": "http://me:password@proxy", "RANK": "0"}  # fmt: skip
    cleared = clear_environment(env, {"DS_ACCELERATOR": "cpu"})
    assert set(env) == {"HOME", "NVIDIA_TF32_OVERRIDE", "HF_TOKEN", "NCCL_DEBUG", "HTTPS_PROXY", "RANK"}
    assert "DS_ACCELERATOR" not in cleared  # the kit sets it to the same
    record = environment.record_environment(env, cleared)
    assert record["numeric_environment"] == {"NVIDIA_TF32_OVERRIDE": "0"} and record["passed"]["NCCL_DEBUG"] == "INFO"
    lines = describe_environment(plan, cleared, record["numeric_environment"])
    assert "cleared ACCELERATE_MIXED_PRECISION=bf16 (the plan says float32)" in lines
    assert "cleared FSDP_VERSION=2 (the plan says no FSDP)" in lines and "NVIDIA_TF32_OVERRIDE=0" in lines[-1]
    for secret in ("hf_abc", "secret-1", "password"):
        assert secret not in json.dumps(record) + "".join(lines)
    many = describe_environment(plan, {f"FSDP_{n}": "1" for n in range(30)}, {})
    assert len(many) == 9 and many[-1] == "cleared 22 more of this kind"


def test_ranks_that_a_shell_has_left():
    env = {"WORLD_SIZE": "2", "RANK": "0", "SLURM_NTASKS": "2"}
    assert clear_ranks(env, {}) == {"WORLD_SIZE": "2"} and env == {"SLURM_NTASKS": "2"}
    assert clear_ranks({"WORLD_SIZE": "1", "RANK": "0"}, {}) == {}


def test_every_rank_passes_the_door(plan, monkeypatch: pytest.MonkeyPatch, capsys):
    """What a launcher of any kind left is gone before torch is imported; rank 0 says it, the others log it."""
    for name in [name for name in os.environ if classify(name) == "cleared"]:  # set by another test
        monkeypatch.delenv(name)
    for name, value in command.rank_environment(plan).items():
        monkeypatch.setenv(name, value)  # put back after the test
    for rank in (0, 1):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        worker.prepare_process(plan, rank).close()
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert "cleared ACCELERATE_MIXED_PRECISION" in (plan.run_path / "logs" / "rank1.log").read_text()
    worker.print_environment(plan)
    assert "variables cleared ACCELERATE_MIXED_PRECISION=bf16 (the plan says float32)" in capsys.readouterr().out
    record = json.loads((plan.run_path / environment.FILE).read_text())
    assert record["cleared"] == {"ACCELERATE_MIXED_PRECISION": "bf16"}
