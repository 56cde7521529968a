"""The lines of launch/README.md and the scripts, as they stand there: what they start, and that it can be started."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE
from kit.launchers import supervise
from kit.storage import run_directory

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "launch/README.md").read_text()
LINES = [
    line
    for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.S | re.M)
    for line in block.splitlines()
    if line.startswith(("launch/deepspeed", "launch/torchrun", "launch/node", "kit launch-node"))
]
STUB = """#!{python}
import json, os, sys
print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
"""


@pytest.fixture
def there(base, chat, tmp_path, monkeypatch) -> Path:
    """A folder as the README means it: launch/, a hostfile in it, and a frozen run of two nodes of eight."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    for name in ("kit", "deepspeed", "torchrun"):
        (tmp_path / "bin" / name).write_text(STUB.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    two = ("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=8", "trainer.use_cpu=true")
    plan = api.compose(f"model.name_or_path={base}", f"dataset.path={chat}", "name=quickstart", *two)
    run_directory.create_run_directory(
        plan.model_copy(update={"run_dir": str(tmp_path / "runs" / "quickstart-1a2b3c4d")})
    )
    return tmp_path


def test_the_page_speaks_of_every_script_and_of_no_other():
    scripts = {p.name for p in (ROOT / "launch").glob("*.sh")}
    assert set(re.findall(r"`(?:launch/)?(\w+\.sh)", PAGE)) == scripts
    assert {line.split()[0].removeprefix("launch/") for line in LINES if line.startswith("launch/")} <= scripts
    assert len(LINES) >= 7
    for script in scripts:
        assert (ROOT / "launch" / script).stat().st_mode & 0o111
        assert subprocess.run(["bash", "-n", str(ROOT / "launch" / script)]).returncode == 0


def started(line: str) -> list[str]:
    """The argv that a line comes down to."""
    if line.startswith("kit"):
        return shlex.split(line)
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", LINES)
def test_a_line_starts_what_it_says(line: str, there: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    argv = started(line)
    if argv[:2] == ["kit", "train"]:
        assert cli.run_verb(["check", *argv[2:]]) == DONE, capsys.readouterr().err
    elif argv[:2] == ["kit", "launch-node"]:
        seen = []
        launch = lambda plan, resume=None: seen.append((plan, resume)) or DONE  # noqa: E731
        monkeypatch.setattr("kit.cli.launch_node.launch", launch)
        monkeypatch.setenv("MASTER_ADDR", "gpu-01")
        assert cli.run_verb(argv[1:]) == DONE
        placed = supervise.node.resolve_node(seen[0][0])
        assert (placed.launch.node_rank, placed.launch.master_addr, seen[0][1]) == (1, "gpu-01", None)
        assert placed.launch.master_port == (29500 if "29500" in line else placed.launch.master_port)
    elif argv[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(argv[1:])
        assert (read.module, read.training_script) == (True, "kit.worker")
        world = int(read.nnodes) * int(read.nproc_per_node)
        described(read.training_script_args, world)
    else:
        from deepspeed.launcher.runner import parse_args

        read = parse_args(argv[1:])
        assert (read.module, read.user_script, read.num_gpus) == (True, "kit.worker", 2)
        described(read.user_args, 2)


def batch(start: str) -> str:
    return next(line for line in PAGE.splitlines() if line.startswith(start))


@pytest.mark.parametrize("program", ["sbatch", "qsub"])
def test_a_line_for_a_batch_system(program: str, there: Path):
    """It hands over a script that is there, and the run in the way that the script reads."""
    (there / "bin" / program).write_text(STUB.format(python=sys.executable))
    (there / "bin" / program).chmod(0o755)
    argv = started(batch(program))
    run, script = "/runs/llama3_1_8b_lora-1a2b3c4d", next(w for w in argv if w.startswith("launch/"))
    text = (ROOT / script).read_text()
    assert argv[-1] == run if program == "sbatch" else f"RUN={run}" in argv
    assert ("run=${1:?" if program == "sbatch" else ': "${RUN:?') in text


def test_the_line_for_kubernetes(there: Path):
    """Every name in the manifest is given, and what kubectl reads is a Job of two nodes."""
    line = batch("NAME=")
    given = dict(word.split("=") for word in line.partition(" envsubst")[0].split())
    assert line.endswith("envsubst < launch/kubernetes-job.yaml | kubectl apply -f -")
    made = list(
        yaml.safe_load_all(string.Template((ROOT / "launch/kubernetes-job.yaml").read_text()).substitute(given))
    )
    assert [part["kind"] for part in made] == ["Service", "Job"] and made[1]["spec"]["completions"] == 2


def described(words: list[str], world: int) -> None:
    """What stands behind kit.worker is composed as rank 0 would, or is a frozen plan."""
    if words[-1].endswith("plan.json"):
        assert len(words) == 1
    else:
        assert api.compose(*words, world_size=world).world_size == world


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh")))
def test_a_script_without_words_says_what_it_wants(script: str):
    done = subprocess.run([str(ROOT / "launch" / script)], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and "usage:" in done.stderr


@pytest.mark.parametrize("words", ["deepspeed.sh 2", "torchrun.sh 2", "node.sh run", "node.sh run 1 host"])
def test_a_script_with_too_few_words(words: str):
    script, *rest = words.split()
    done = subprocess.run([str(ROOT / "launch" / script), *rest], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "usage:" in done.stderr


@pytest.mark.parametrize("nodes", [None, "", "nowhere"])
def test_pbs_without_nodes_is_no_success(nodes: str | None, tmp_path: Path):
    (tmp_path / "nodes").write_text("")
    env = {"PATH": os.environ["PATH"], "RUN": "x"}
    if nodes is not None:
        env["PBS_NODEFILE"] = str(tmp_path / (nodes or "nodes"))
    argv = ["bash", str(ROOT / "launch/pbs.sh")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode != 0 and ("names no node" in done.stderr or "a job of PBS" in done.stderr)
