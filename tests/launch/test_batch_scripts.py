"""launch/kubernetes-job.yaml and launch/pbs.sh: their commands and environments, run here."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kit.launchers.command import free_port
from launch import harness

SETTINGS = {"NAME": "doctor", "IMAGE": "registry/kit:1", "CLAIM": "runs", "NODES": "2", "GPUS": "8", "TRIES": "10"}
FEW = ["trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false"]
# pbsdsh starts its words on another node, without the environment of the job.
PBSDSH = """#!/bin/bash
[ "$1" = -n ] && [ "$3" = -- ] || exit 9
echo "$2" >> "{notes}"
shift 3
exec env -i HOME="$HOME" HF_HUB_OFFLINE=1 "$@"
"""


def manifests(**settings: str) -> list[dict]:
    text = (harness.ROOT / "launch" / "kubernetes-job.yaml").read_text()
    return list(yaml.safe_load_all(string.Template(text).substitute(SETTINGS | settings)))  # as envsubst does


def test_the_manifest_names_each_node():
    service, made = manifests(RUN="/runs/x")
    spec = made["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert env == {"NNODES": "2", "MASTER_ADDR": "doctor-0.doctor", "MASTER_PORT": "29500"}
    # a pod's name in DNS: the service's selector and the subdomain must both be the job's name
    assert service["spec"]["selector"] == {"job-name": "doctor"} and service["metadata"]["name"] == pod["subdomain"]
    assert container["command"] == ["python3", "-m", "kit", "launch-node", "/runs/x", "--resume", "newest"]
    assert "hostIPC" not in pod and "TOKEN" not in json.dumps(made)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory, base: Path, chat: Path) -> Callable[[str], Path]:
    def make(name: str, *more: str) -> Path:
        """The directory of a frozen run."""
        work = tmp_path_factory.mktemp(name)
        made = harness.kit("compose", *harness.overrides(base, chat, work / "runs", *FEW, *more), cwd=work)
        assert made.returncode == 0, made.stderr
        return Path(json.loads(made.stdout)["plan"]).parent

    return make


@pytest.fixture(scope="module")
def alone(composed) -> dict[int, float]:
    """The losses of the same description as two processes of one node."""
    run = composed("alone", "launch=torchrun", "launch.num_gpus=2")
    done = harness.kit("launch-node", str(run), cwd=run)
    assert done.returncode == 0, done.stderr[-3000:]
    return harness.rows(run)


TWO = ("launch=torchrun", "launch.num_nodes=2", "launch.num_gpus=1")


def pods(run: Path, nodes: str) -> list[subprocess.CompletedProcess[str]]:
    """The manifest's command, once for each index, with its environment; no DNS here knows the service."""
    [container] = manifests(RUN=str(run), NODES=nodes)[1]["spec"]["template"]["spec"]["containers"]
    argv = [sys.executable if word == "python3" else word for word in container["command"]]
    env = {e["name"]: e["value"] for e in container["env"]} | {"MASTER_PORT": str(free_port())}
    assert env["MASTER_ADDR"] == "doctor-0.doctor"
    env["MASTER_ADDR"] = "127.0.0.1"
    started = [harness.start(argv, run, **env, JOB_COMPLETION_INDEX=str(index)) for index in range(int(nodes))]
    return [harness.finish(process, 180) for process in started]


@pytest.mark.launch
def test_pods_train_one_run(composed, alone):
    run = composed("pods", *TWO)
    done = pods(run, "2")
    assert [d.returncode for d in done] == [0, 0], [d.stderr[-3000:] for d in done]
    assert harness.rows(run) == pytest.approx(alone, abs=1.5e-6) and len(alone) == 2
    harness.assert_nothing_left(run)
    again = pods(run, "2")
    assert [d.returncode for d in again] == [0, 0] and all("is finished" in d.stderr for d in again)


@pytest.mark.launch
def test_a_pbs_job_starts_a_task_on_each_node(composed, alone, tmp_path: Path):
    run = composed("pbs", *TWO)
    done = pbs(tmp_path, run, ["localhost", "localhost", "node2", "node2"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted((tmp_path / "pbsdsh.txt").read_text().split()) == ["0", "2"]  # lines of the file
    assert harness.rows(run) == pytest.approx(alone, abs=1.5e-6)
    harness.assert_nothing_left(run)


@pytest.mark.launch
def test_nodes_that_the_plan_does_not_know(composed, tmp_path: Path):
    """Each would train alone, into one directory: both refuse."""
    run = composed("one")
    found = pbs(tmp_path, run, ["node1", "node1", "node2", "node2"])
    assert found.returncode == 3 and found.stderr.count("the job has 2 nodes, the run was planned for 1") == 2
    assert subprocess.run(["bash", str(harness.ROOT / "launch" / "pbs.sh")], capture_output=True).returncode != 0


def pbs(folder: Path, run: Path, nodes: list[str]) -> subprocess.CompletedProcess[str]:
    bin = folder / "bin"
    bin.mkdir()
    (bin / "pbsdsh").write_text(PBSDSH.format(notes=folder / "pbsdsh.txt"))
    (bin / "pbsdsh").chmod(0o755)
    (folder / "nodes").write_text("".join(f"{node}\n" for node in nodes))
    env = {
        "RUN": str(run), "PBS_NODEFILE": str(folder / "nodes"), "PBS_JOBID": "123.server", "PYTHON": sys.executable,
        "PATH": f"{bin}:{os.environ['PATH']}",
    }  # fmt: skip
    return harness.finish(harness.start(["bash", str(harness.ROOT / "launch" / "pbs.sh")], folder, **env), 120)
