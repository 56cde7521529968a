"""Nodes that the deepspeed command reaches with ssh: what it needs there, and the environment that must come along.

DeepSpeed hands on PYTHON*, MLFLOW* and NCCL*, and what a file `.deepspeed_env` names. The kit writes such a
file into the run directory and points DS_ENV_FILE to it. Names and values that look like secrets never enter it: it
would be a file, and DeepSpeed puts its lines on a command line that everybody on the node can read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kit.config.nodes import read_hosts
from kit.errors import ENVIRONMENT, KitError, Problem
from kit.launchers.environment import classify
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory
from kit.storage.json_files import atomic_write_text
from kit.system.secrets import is_secret

ENV_FILE = "deepspeed_env"
# What a rank asks its environment for, by the beginning of the name. Devices, paths of a home, and places for
# temporary files are each node's own; TORCH_EXTENSIONS_DIR comes along only where a person has set it.
PASSED_PREFIXES = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "ACCELERATE_", "TRL_", "BNB_", "TORCH",
    "PYTORCH_", "CUDA_HOME", "CUDA_PATH", "CUDA_DEVICE_", "CUDA_LAUNCH_", "NCCL_", "GLOO_", "UCX_", "OMP_", "MKL_",
    "TRITON_", "KIT_", "WANDB_", "MLFLOW_", "TRACKIO_", "DS_", "DO_NOT_TRACK", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
)  # fmt: skip
NEVER_PASSED = ("DS_ENV_FILE", "TRL_LAUNCHER", "TORCHELASTIC_RUN_ID")
DEEPSPEED_PREFIXES = ("PYTHON", "MLFLOW", "MV2", "UCX", "NCCL")  # by DeepSpeed itself, secret or not
PLAIN_VALUE = re.compile(r"[\w@%+=:,./ -]*")  # DeepSpeed puts anything else into double quotes for a shell, unescaped


def write_remote_environment(plan: RunPlan, rank_env: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Write the file and return what the deepspeed command itself needs. `rank_env`: the kit's settings for the ranks.

    The lines of a person's `.deepspeed_env` (home, then working directory) come along as well.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_PREFIXES) and name not in NEVER_PASSED and classify(name) != "cleared"
    }
    user_env = user_environment_lines()
    sent: dict[str, str] = {}
    accelerator = {name: rank_env[name] for name in ("DS_ACCELERATOR",) if name in rank_env}
    for name, value in {**accelerator, **inherited, **user_env}.items():
        if is_secret(name, value):
            say(f"{name} looks like a secret and is not sent to the nodes: log in there, or keep it in a file")
        elif not re.fullmatch(r"[A-Za-z_]\w*", name) or not PLAIN_VALUE.fullmatch(value):
            say(f"{name} is not sent to the nodes: its value has characters that a shell would read")
        else:
            sent[name] = value
    file = plan.run_path / ENV_FILE
    atomic_write_text(file, "".join(f"{name}={value}\n" for name, value in sorted(sent.items())))
    hidden = {k: "" for k, v in os.environ.items() if k.startswith(DEEPSPEED_PREFIXES) and is_secret(k, v)}
    return {"DS_ENV_FILE": str(file), **hidden}


def user_environment_lines() -> dict[str, str]:
    """What is in a `.deepspeed_env` of one's own, which DS_ENV_FILE would hide."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    variables: dict[str, str] = {}
    for file in (Path.home() / name, Path(name)):
        if file.is_file() and os.access(file, os.R_OK):
            for line in file.read_text(errors="replace").splitlines():
                key, equals, value = line.strip().partition("=")
                if equals and not key.startswith("#"):
                    variables[key.strip()] = value.strip().strip("\"'")
    return variables


def selected_hosts(plan: RunPlan) -> list[str]:
    return list(read_hosts(plan.launch))[: int(plan.launch.num_nodes)]


def check_nodes_reachable(plan: RunPlan) -> None:
    """KitError (3) where a node cannot be reached, or lacks the run directory or this Python; all nodes at once."""
    problems = []
    if not shutil.which("pdsh"):
        fix = "apt install pdsh, or launch.no_ssh=true"
        problems.append(Problem("pdsh is not installed", "launch.hostfile", fix))
    for path in (os.getcwd(), str(plan.run_path), sys.executable):
        if not re.fullmatch(r"[\w@%+=:,./-]+", path):
            problems.append(Problem(f"{path!r} goes into a command for other nodes and has a space or a sign in it",
                                    "runs_dir", "a plain path"))  # fmt: skip
    if not problems:
        problems = [p for p in map(probe_problem, start_probes(plan)) if p]
    if problems:
        raise KitError(problems, code=ENVIRONMENT)


def start_probes(plan: RunPlan) -> list[tuple[str, subprocess.Popen[str]]]:
    """One ssh to each node, side by side: does it see the plan, and has it this Python?"""
    asks = f"test -r {plan.run_path / run_directory.PLAN} && echo plan; test -x {sys.executable} && echo python"
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    return [
        (host, subprocess.Popen(["ssh", *options, host, asks], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True))
        for host in selected_hosts(plan)
    ]  # fmt: skip


def probe_problem(probe: tuple[str, subprocess.Popen[str]]) -> Problem | None:
    host, process = probe
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err = err or "no answer within 60 s"
    if "plan" in out and "python" in out:
        return None
    if process.returncode and not out:
        last = (err.strip().splitlines() or ["no answer"])[-1]
        return Problem(f"{host} is not reached with ssh: {last[:200]}", "launch.hostfile",
                       f"`ssh {host} true` must work without a password, or launch.no_ssh=true")  # fmt: skip
    if "plan" not in out:
        return Problem(f"{host} does not see the run directory", "runs_dir", "a folder that all nodes share")
    return Problem(f"{host} has no {sys.executable}", "launch.hostfile", "the same environment on every node")


# ---- stopping: the ranks are on other machines, where this one has no process to signal ----

STOP_FILE = "stop"


def request_remote_stop(run: Path, what: str) -> None:
    """`save`: a checkpoint and an end, as after a signal; `now`: an end. Every rank looks once a second."""
    atomic_write_text(run / run_directory.LOGS / STOP_FILE, what)


def clear_stop_request(run: Path) -> None:
    (run / run_directory.LOGS / STOP_FILE).unlink(missing_ok=True)


def is_stale_stop_request(run: Path) -> bool:
    """Whether the word is of an earlier start, whose ranks have long seen it."""
    try:
        return time.time() - (run / run_directory.LOGS / STOP_FILE).stat().st_mtime > 120
    except OSError:
        return True


def stop_request(run: Path) -> str:
    try:
        return (run / run_directory.LOGS / STOP_FILE).read_text()
    except OSError:
        return ""
