"""Warm workers that really train: bit-equal to cold; a mistake in one is seen; killed, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kit import api
from kit.storage import run_directory
from kit.sweeps import warm_pool
from launch import harness

pytestmark = pytest.mark.launch

SMALL = ["trainer.max_steps=4", "trainer.eval_steps=4", "trainer.save_steps=4", "launch=local"]
# Two like the first and two of one seed: whatever a trial left behind would show in one that came later.
CASES = {
    "first": [], "rate": ["trainer.learning_rate=3e-2"], "r": ["peft.r=8"], "alpha": ["peft.lora_alpha=32"],
    "dropout": ["peft.lora_dropout=0.3"], "seed": ["trainer.seed=11"], "optimizer": ["trainer.optim=sgd"],
    "modules": ["peft.target_modules=[q_proj,v_proj]", "peft.use_dora=true"],
    "schedule": ["trainer.lr_scheduler_type=constant", "trainer.gradient_accumulation_steps=2", "global_batch_size=4"],
    "init": ["+peft.init_lora_weights=gaussian", "trainer.adam_beta1=0.5"],
    "stopped": ["trainer.max_steps=24", "trainer.eval_steps=24", "trainer.save_steps=24"], "again": [],
}  # fmt: skip
# Over a quantized base, whose packed weights have to stay as they are: two kinds, two workers.
PACKED = {
    f"{kind}-{name}": [f"quantization={kind}", *more]
    for kind in ("nf4", "int8")
    for name, more in {"first": [], "r": ["peft.r=8", "trainer.learning_rate=3e-2"], "again": []}.items()
}
# The trial that follows the first. PEFT makes an adapter anew where the first had one: only fewer modules show it.
FAULTS = {"adapter": "modules", "adapter-unseen": "modules", "seed": "rate", "base": "rate"}


def freeze(folder: Path, base: Path, chat: Path, *overrides: str) -> Path:
    small = [o for o in SMALL if o.partition("=")[0] not in {m.partition("=")[0] for m in overrides}]
    plan = api.compose(*harness.overrides(base, chat, folder, *small, *overrides), here=True)
    assert warm_pool.reason_to_start_cold(plan) is None
    run_directory.make_run_directory(plan.model_copy(update={"run_dir": str(folder)}))
    return folder / run_directory.PLAN


def curve(run: Path) -> list[dict]:
    """Every logged value of a step or an evaluation but clocks, memory and tokens (a resumed run counts anew)."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = ("second", "runtime", "memory", "num_tokens")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in left_out)}
        for row in rows
        if "loss" in row or "eval_loss" in row
    ]


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of the adapters of a run and of its checkpoints, optimizer and random states with them."""
    names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.json")
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted(run.rglob("*")) if f.name in names}


@pytest.fixture(scope="module")
def forked(base: Path, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list]]:
    """Every case cold, and each fault with two trials; the answers of the faulty workers."""
    work = tmp_path_factory.mktemp("forked")
    jobs = [["", *(freeze(work / name, base, chat, *more) for name, more in (CASES | PACKED).items())]]
    for fault in FAULTS:
        pair = ("first", FAULTS[fault])
        jobs.append([fault, *(freeze(work / f"{fault}-{n}", base, chat, *CASES[n]) for n in pair)])
    argv = [sys.executable, str(Path(__file__).with_name("forks.py")), json.dumps(jobs, default=str)]
    done = harness.finish(harness.start(argv, work))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return work, [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]


def served(plans: list[Path], log: Path) -> list[dict]:
    """The answers of one worker that is given these plans one after the other; `stopped` is told to stop, once."""
    with open(log, "ab") as out:
        env = harness.environment(HF_HUB_OFFLINE="1")
        worker = warm_pool.WarmWorker("", [], api.load_plan(plans[0]), env, out)
    found: list[dict] = []
    asked = False
    try:
        for plan in plans:
            worker.assign(plan)
            deadline = time.monotonic() + 120
            while (answer := worker.poll_result()) is None and time.monotonic() < deadline:
                time.sleep(0.02)
                if plan.parent.name == "stopped" and not asked and (plan.parent / "metrics.jsonl").exists():
                    os.kill(worker.process.pid, signal.SIGTERM)
                    asked = True
            found.append(answer or {})
    finally:
        worker.end()
    return found


def test_bit_equal_to_cold(forked, base: Path, chat: Path, tmp_path: Path):
    """One worker has all of them, the first twice, and one that is told to stop and then goes on: losses, gradients'
    norms, evaluations, adapters, optimizer and random states."""
    cold, _ = forked
    plans = [freeze(tmp_path / name, base, chat, *more) for name, more in CASES.items()]
    stopped = tmp_path / "stopped" / run_directory.PLAN
    answers = served([*plans, stopped], tmp_path / "worker.log")
    codes = {p.parent.name: a.get("code") for p, a in zip(plans, answers, strict=False)}
    assert codes == {name: 75 if name == "stopped" else 0 for name in CASES}
    assert answers[-1] == {"code": 0, "why": ""} and {a["why"] for a in answers} == {""}
    assert "resuming from checkpoint-" in (stopped.parent / "logs" / "trial.log").read_text()
    for name in CASES:
        assert curve(tmp_path / name) == curve(cold / name), name
        mine, theirs = weights(tmp_path / name), weights(cold / name)
        assert len(theirs) == 7 and mine.keys() >= theirs.keys()
        assert [k for k in theirs if mine[k] != theirs[k]] == [], name
    shape = {n: curve(tmp_path / n)[-1]["eval_loss"] for n in CASES}
    assert len(set(shape.values())) == len(CASES) - 1  # the cases do differ, but for the first and its repetition
    run = tmp_path / "again"
    assert harness.status(run)["state"] == "done" and run_directory.process_holding_lock(run) is None
    assert all("step 4/4" in (run / "logs" / log).read_text() for log in ("rank0.log", "trial.log"))
    assert json.loads((run / "launch.json").read_text())["ended"]["returncode"] == 0
    assert sorted(p.name for p in run.iterdir()) == sorted(
        [*(p.name for p in (cold / "again").iterdir()), ".lock", "launch.json"]
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_base(kind, forked, base: Path, chat: Path, tmp_path: Path):
    cold, _ = forked
    cases = {name: more for name, more in PACKED.items() if name.startswith(kind)}
    plans = [freeze(tmp_path / name, base, chat, *more) for name, more in cases.items()]
    assert served(plans, tmp_path / "worker.log") == [{"code": 0, "why": ""}] * 3
    for name in cases:
        assert curve(tmp_path / name) == curve(cold / name), name
        assert weights(tmp_path / name) == weights(cold / name), name
    losses = {name: curve(cold / name)[-1]["eval_loss"] for name in (*cases, "first")}
    assert losses[f"{kind}-first"] == losses[f"{kind}-again"] and len(set(losses.values())) == 3


def test_faults_are_seen(forked):
    """The comparison above can fail: what is not made anew makes another trial. The worker itself sees most of it."""
    cold, answers = forked
    found = {(fault, number): (code, why) for fault, number, code, why in answers}
    assert found["adapter", 0] == found["base", 0] == (0, "the trial changed the base")
    assert found["adapter-unseen", 0][1] == found["seed", 0][1] == ""
    for fault, second in FAULTS.items():
        run = cold / f"{fault}-{second}"
        assert found[fault, 1][0] != 0 or weights(run) != weights(cold / second), fault
        assert weights(cold / f"{fault}-first") == weights(cold / "first")
    assert curve(cold / "seed-rate") != curve(cold / "rate")


def test_a_worker_is_killed_in_a_sweep(forked, base: Path, chat: Path, tmp_path: Path):
    """SIGKILL in the middle of its second trial: that one starts cold, the others are not lost, all equal to cold."""
    cold, _ = forked
    argv = ["train", "-m", *harness.overrides(base, chat, tmp_path / "runs", *SMALL, "name=w", "peft.lora_dropout=0.0",
            "hparams_search.workers=warm", "trainer.learning_rate=1e-2,3e-2,1e30,2e-2")]  # fmt: skip
    process = harness.start([sys.executable, "-m", "kit", *argv], tmp_path)
    runs = tmp_path / "runs"
    harness.wait_for(lambda: any(runs.glob("*/001-*/logs/rank0.pid")), 120, process)
    harness.wait_for(lambda: any(runs.glob("*/001-*/metrics.jsonl")), 60, process)
    [pid] = runs.glob("*/001-*/logs/rank0.pid")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    done = harness.finish(process)
    [record] = runs.glob("*/sweep.json")
    trials = json.loads(record.read_text())["trials"]
    print(done.stderr[-6000:])
    assert [t["state"] for t in trials] == ["done", "done", "failed", "done"]
    assert done.returncode == 4
    assert "trial 001 learning_rate=0.03 failed in a warm worker" in done.stderr and "signal 9" in done.stderr
    assert done.stderr.count("starts cold") == 2 and "not" in trials[2]["problems"][0]["problem"]
    found = {t["values"]["trainer.learning_rate"]: record.parent / t["run"] for t in trials}
    for rate, name in (("0.01", "first"), ("0.03", "rate")):
        kept = "adapter/adapter_model.safetensors"
        assert weights(found[rate])[kept] == weights(cold / name)[kept]
    harness.assert_nothing_left(record.parent)
