"""launch/kubernetes-job.yaml and launch/pbs.sh: their commands and environments, run here."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kit.launchers import job
from launch import harness

SETTINGS = {"NAME": "doctor", "IMAGE": "registry/kit:1", "CLAIM": "runs", "NODES": "2", "GPUS": "8", "TRIES": "10"}
FEW = ["trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false", "launch=local"]
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
    assert [job.node({**env, "JOB_COMPLETION_INDEX": str(i)}) for i in (0, 1)] == [(0, 2), (1, 2)]
    # a pod's name in DNS: the service's selector and the subdomain must both be the job's name
    assert service["spec"]["selector"] == {"job-name": "doctor"} and service["metadata"]["name"] == pod["subdomain"]
    assert container["command"] == ["python3", "-m", "kit.launchers.job", "/runs/x"]
    assert "hostIPC" not in pod and "TOKEN" not in json.dumps(made)


@pytest.mark.launch
def test_both_run_the_same_plan(tmp_path: Path, base: Path, chat: Path):
    """The manifest's command trains it; the PBS job finds it finished."""
    made = harness.kit("compose", *harness.overrides(base, chat, tmp_path / "runs", *FEW), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    run = Path(json.loads(made.stdout)["plan"]).parent
    [container] = manifests(RUN=str(run), NODES="1")[1]["spec"]["template"]["spec"]["containers"]
    argv = [sys.executable if word == "python3" else word for word in container["command"]]
    env = {e["name"]: e["value"] for e in container["env"]} | {"JOB_COMPLETION_INDEX": "0"}
    done = harness.finish(harness.start(argv, tmp_path, **env), 120)
    assert done.returncode == 0 and harness.status(run)["state"] == "done", done.stderr[-3000:]
    harness.assert_nothing_left(run)
    found = pbs(tmp_path, run, ["node1"] * 4)
    assert found.returncode == 0 and "is finished" in found.stderr


@pytest.mark.launch
def test_a_pbs_job_starts_a_task_on_each_node(tmp_path: Path, base: Path, chat: Path):
    """Two nodes for a plan of one: both are started, each with its rank, and each refuses to train alone."""
    made = harness.kit("compose", *harness.overrides(base, chat, tmp_path / "runs", *FEW), cwd=tmp_path)
    run = Path(json.loads(made.stdout)["plan"]).parent
    found = pbs(tmp_path, run, ["node1", "node1", "node2", "node2"])
    assert found.returncode == 3 and found.stderr.count("the job has 2 nodes, the run was planned for 1") == 2
    assert sorted((tmp_path / "pbsdsh.txt").read_text().split()) == ["0", "1"]
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
