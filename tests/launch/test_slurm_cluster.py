"""A real SLURM on this machine: submit, run, preempt, requeue, resume, complete; an array; a chain; scancel; salloc.

One cluster serves all tests. Its jobs are slow on purpose (slow.py), so that they can be caught in the middle.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.launchers.slurm_client import FINAL_STATES
from launch import cluster, harness

pytestmark = [pytest.mark.launch, pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())]
STEPS, SEEDS = 20, (7, 8, 9, 10)
TOKEN = "hf_canary000000000000000000000000"


class Slurm:
    """Commands in the cluster's environment, from one folder."""

    def __init__(self, home: Path, env: dict[str, str], base: Path, data: Path) -> None:
        self.home, self.base, self.data = home, base, data
        self.env = {**env, "KIT_TEST_STEP": "0.4"}

    def run(self, runs: str, *more: str) -> list[str]:
        own = ["launch=slurm", f"launch.script={harness.ROOT / 'tests/launch/slow.py'}", "launch.slurm.time=30"]
        return harness.overrides(self.base, self.data, self.home / runs, *own, *more)

    def kit(self, *args: str, limit: float = 120, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = harness.kit(*args, cwd=self.home, limit=limit, HF_TOKEN=TOKEN, **self.env)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def ask(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", job)))

    def wait(self, job: str, *states: str, seconds: float = 150) -> dict[str, str]:
        """Until the job is in one of `states`. SLURM holds a job that is queued again for two minutes: here for 6 s.

        Sooner slurmd would take it for the start that has just been ended, and refuse it.
        """
        until, held = time.monotonic() + seconds, 0.0
        while (facts := self.facts(job))["JobState"] not in states:
            waits = facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime"
            held = (held or time.monotonic()) if waits else 0.0
            if held and time.monotonic() - held > 6:
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            assert time.monotonic() < until and facts["JobState"] not in FINAL_STATES, (facts, self.logs())
            time.sleep(0.3)
        return facts

    def reach(self, log: Path, text: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while text not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < until, (text, self.logs())
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{f}: {f.read_text()[-1500:]}" for f in self.home.rglob("*.out"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, base: Path, chat: Path) -> Iterator[Slurm]:
    home = tmp_path_factory.mktemp("slurm")
    with cluster.running(home / "cluster") as env:
        yield Slurm(home, env, base, chat)


FEW = ["trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false"]
SUBMIT = """
import json, sys
from pathlib import Path
from kit import api
from kit.launchers import slurm
from kit.storage import run_directory
plans = [run_directory.create_run_directory(api.compose(*json.loads(line), here=True)) for line in sys.argv[2:]]
print(slurm.submit_array(plans, Path(sys.argv[1])))
"""


@pytest.fixture(scope="session")
def array(slurm: Slurm) -> tuple[str, list[Path]]:
    """Four frozen plans as one array, to its end: the job and the run directories, by seed."""
    lines = [json.dumps(slurm.run("array", f"trainer.seed={seed}")) for seed in SEEDS]
    env = harness.environment(**slurm.env)
    argv = [sys.executable, "-c", SUBMIT, str(slurm.home / "array" / "sweep"), *lines]
    done = subprocess.run(argv, env=env, cwd=slurm.home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    job = done.stdout.strip()
    for number in range(4):
        slurm.wait(f"{job}_{number}", "COMPLETED")
    runs = {json.loads((run.parent / "plan.json").read_text())["trainer"]["seed"]: run.parent
            for run in (slurm.home / "array").glob("*/plan.json")}  # fmt: skip
    return job, [runs[seed] for seed in SEEDS]


def test_an_array_of_frozen_plans(slurm: Slurm, array: tuple[str, list[Path]]):
    job, runs = array
    losses = [harness.rows(run) for run in runs]
    assert [harness.status(run)["state"] for run in runs] == ["done"] * 4
    assert all(len(found) == STEPS for found in losses) and len({found[STEPS] for found in losses}) == 4
    assert json.loads((runs[2] / "slurm.json").read_text())["jobs"][0]["id"] == f"{job}_2"
    assert len(list((slurm.home / "array" / "sweep").glob("slurm-*.out"))) == 4
    for run in runs:
        harness.assert_nothing_left(run)


def test_interrupted_twice_and_a_chain_behind_it(slurm: Slurm, array: tuple[str, list[Path]]):
    """Signalled as before a time limit, then preempted by a better job: the losses are those of a run left alone."""
    done = slurm.kit("train", *slurm.run("chain", "launch.slurm.cpus_per_task=2"), "--then", "merge,eval")
    assert "HF_TOKEN" in done.stderr and TOKEN not in done.stderr
    train, merge, evaluate = re.findall(r"^job (\d+):", done.stdout, re.M)
    run = harness.the_run(slurm.home / "chain")
    log = run / "logs" / f"slurm-{train}.out"

    slurm.reach(log, "step 3/20")
    refused = slurm.kit("resume", str(run), code=2)  # two jobs would write into one directory
    assert f"job {train}" in refused.stderr
    slurm.ask("scancel", "--batch", "--signal=USR1", train)
    slurm.reach(log, "queued again, start 1 of 10")
    slurm.wait(train, "RUNNING")
    slurm.reach(log, "resuming from checkpoint-")
    slurm.reach(log, "step 9/20")
    urgent = "--partition=urgent --cpus-per-task=2 --output=urgent.out".split()
    better = slurm.ask("sbatch", "--parsable", *urgent, "--wrap=sleep 1").strip()
    slurm.reach(log, "queued again, start 2 of 10")
    slurm.wait(better, "COMPLETED")
    assert slurm.wait(train, "COMPLETED")["Restarts"] == "2"

    assert harness.status(run)["state"] == "done" and log.read_text().count("resuming from checkpoint-") == 2
    assert harness.rows(run) == harness.rows(array[1][0])  # seed 7 in the array
    adapters = [(r / "adapter" / "adapter_model.safetensors").read_bytes() for r in (run, array[1][0])]
    assert adapters[0] == adapters[1]

    slurm.wait(evaluate, "COMPLETED")
    assert slurm.facts(merge)["JobState"] == "COMPLETED" and (run / "merged" / "merge.json").exists()
    assert "merged" in (run / "logs" / f"eval-{evaluate}.out").read_text()
    harness.assert_nothing_left(run)
    kept = [f for folder in (run, slurm.home / "cluster") for f in folder.rglob("*") if f.is_file()]
    assert not [f for f in kept if TOKEN.encode() in f.read_bytes()]  # SLURM keeps a job's environment in files


def test_two_nodes_interrupted_once(slurm: Slurm):
    """A task on each node; signalled as before a time limit, both save at one step, and the losses are one node's."""
    wanted = ["launch.num_nodes=2", "launch.num_gpus=1", "launch.slurm.partition=both", "launch.master_addr=127.0.0.1"]
    done = slurm.kit("train", *slurm.run("two", "deepspeed=zero2", *wanted))
    [job] = re.findall(r"^job (\d+):", done.stdout, re.M)
    run = harness.the_run(slurm.home / "two")
    log = run / "logs" / f"slurm-{job}.out"
    slurm.reach(log, "step 3/20")
    started = [run / "launch.json", run / "logs" / "launch.node1.json"]
    argvs = [json.loads(file.read_text())["argv"] for file in started]
    assert [argv[argv.index("--node_rank") + 1] for argv in argvs] == ["0", "1"]
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    slurm.reach(log, "queued again, start 1 of 10")
    slurm.wait(job, "COMPLETED")
    assert harness.status(run)["state"] == "done" and log.read_text().count("resuming from checkpoint-") == 2
    alone = harness.overrides(slurm.base, slurm.data, slurm.home / "alone", "deepspeed=zero2", "launch.num_gpus=2")
    slurm.kit("train", *alone, "launch=deepspeed")
    expected = harness.rows(harness.the_run(slurm.home / "alone"))
    assert harness.rows(run) == pytest.approx(expected, abs=1.5e-6) and len(expected) == STEPS
    harness.assert_nothing_left(run)


def test_scancel_leaves_no_process_and_the_follower_says_so(slurm: Slurm):
    argv = [sys.executable, "-m", "kit", "train", *slurm.run("cancelled", "name=cancelled"), "--follow"]
    follower = harness.start(argv, slurm.home, **slurm.env)
    harness.wait_for(lambda: list((slurm.home / "cancelled").glob("*/logs/slurm-*.out")), 60, follower)
    run = harness.the_run(slurm.home / "cancelled")
    [log] = (run / "logs").glob("slurm-*.out")
    slurm.reach(log, "step 2/20")
    job = log.stem.partition("-")[2]
    slurm.ask("scancel", job)
    done = harness.finish(follower, 90)
    assert slurm.facts(job)["JobState"] == "CANCELLED" and "queued again" not in log.read_text()
    assert done.returncode == 75 and "is cancelled" in done.stderr, done.stderr  # it had the time to save
    assert "step 2/20" in done.stdout
    harness.assert_nothing_left(run)


def test_inside_an_allocation_it_is_a_step(slurm: Slurm):
    argv = ["salloc", "--quiet", "--ntasks=1", sys.executable, "-m", "kit", "train"]
    argv += slurm.run("inside", *FEW)
    done = harness.finish(harness.start(argv, slurm.home, **slurm.env), 120)
    run = harness.the_run(slurm.home / "inside")
    assert done.returncode == 0 and "inside the allocation" in done.stderr, done.stdout + done.stderr
    assert harness.status(run)["state"] == "done" and not (run / "slurm.json").exists()


def test_the_ready_script(slurm: Slurm):
    """launch/slurm.sh with a plan that was made for no batch system."""
    made = slurm.kit("compose", *harness.overrides(slurm.base, slurm.data, slurm.home / "ready", *FEW))
    run = Path(json.loads(made.stdout)["plan"]).parent
    env = {**slurm.env, "PYTHON": sys.executable, "PYTHONPATH": str(harness.ROOT)}
    argv = ["sbatch", "--parsable", "--output=ready.out", str(harness.ROOT / "launch" / "slurm.sh"), str(run)]
    done = subprocess.run(argv, env=env, cwd=slurm.home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    slurm.wait(done.stdout.strip(), "COMPLETED")
    assert harness.status(run)["state"] == "done"


def test_a_later_step_of_its_own(slurm: Slurm, array: tuple[str, list[Path]]):
    prompt = ["--prompt", "the $(touch canary) `touch canary`; touch canary \"'\n#SBATCH --x"]
    done = slurm.kit("generate", str(array[1][1]), *prompt, "--max-new-tokens", "4", "launch=slurm", "--follow")
    assert "touch canary" in done.stdout
    assert not (slurm.home / "canary").exists()
    refused = slurm.kit("eval", str(array[1][1]), "launch=slurm", "launch.slurm.partition=nowhere", code=3)
    assert "sbatch refused" in refused.stderr and "partition" in refused.stderr
