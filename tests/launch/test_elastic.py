"""A resume on another number of processes, and under another ZeRO stage, against the run that was never stopped.

One start: elastic.py forks all ranks. Float32 without dropout; the next five losses and all rows are compared.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import tiny
from conftest import write_rows

from kit import api
from kit.storage import manifest, run_directory
from kit.storage.checkpoints import WHOLE_OPTIMIZER
from kit.storage.safetensors_header import read_header
from launch import harness

pytestmark = pytest.mark.launch
LOSS = 1e-5  # absolute; measured here: at most 9.6e-7. A first moment of zero or one shifted batch makes 0.03 or more
STEPS, STOP = 10, "checkpoint-5"  # of 8 rows; an epoch ends after 8 steps, with a step of 4 rows
ENGINES = {
    "plain": [],
    "zero2": ["deepspeed=zero2"],
    "zero3": ["deepspeed=zero3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"],
    "zero2_offload": ["deepspeed=zero2_offload"],  # with round_robin_gradients, which orders the parameters anew
}
# name: (engine, saved by, goes on with, other overrides, fault)
RESUMES = {
    **{f"{engine} 2 to 1": (engine, 2, 1, [], "") for engine in ENGINES},
    **{f"{engine} 1 to 2": (engine, 1, 2, [], "") for engine in ("plain", "zero2", "zero3")},
    "stage 2 to 3": ("zero2", 2, 1, ["deepspeed.zero_optimization.stage=3"], ""),
    "offload to none": ("zero2_offload", 2, 2, ["deepspeed.zero_optimization.offload_optimizer.device=none"], ""),
    "no momentum": ("zero2", 2, 1, [], "momentum"),
    "other rows": ("plain", 1, 2, [], "rows"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory, base, ops_dir) -> Path:
    """All runs, in one start."""
    folder = tmp_path_factory.mktemp("elastic")
    rows = [
        {"messages": [
            {"role": "user", "content": f"{tiny.WORDS[i // 20]} {tiny.WORDS[i % 20]} {tiny.sentence(i, 4 + i % 5)}"},
            {"role": "assistant", "content": tiny.sentence(i + 3, 3 + i % 7)},
        ]}
        for i in range(60)
    ]  # fmt: skip
    data = write_rows(folder / "chat.jsonl", rows)
    # Accumulation is typed: a resume on other processes derives it anew. The norm makes a group without weight decay.
    common = [
        "dataset.test_size=null", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false",
        f"trainer.max_steps={STEPS}", "trainer.save_steps=5", "peft.lora_dropout=0", "trainer.weight_decay=0.3",
        "peft.modules_to_save=[norm]",
    ]  # fmt: skip
    plans = {}
    for engine, processes in sorted({(engine, saved_by) for engine, saved_by, *_ in RESUMES.values()}):
        more = [*common, *ENGINES[engine], f"launch.num_gpus={processes}"]
        stock = harness.overrides(base, data, folder / f"{engine}-{processes}", *more)
        stock = [o for o in stock if not o.startswith("global_batch_size")]
        accumulation = f"trainer.gradient_accumulation_steps={8 // 2 // processes}"
        plan = run_directory.create_run_directory(api.compose(*stock, accumulation, here=True))
        plans[engine, processes] = str(plan.run_path / run_directory.PLAN)
    stages = [
        {"world": world, "runs": [{"plan": plan} for (_, n), plan in plans.items() if n == world]} for world in (2, 1)
    ]
    stages += [
        {"world": world, "runs": [
            {"plan": plans[engine, before], "folder": str(folder / name), "checkpoint": STOP, "fault": fault,
             "overrides": [f"launch.num_gpus={world}", *more]}
            for name, (engine, before, after, more, fault) in RESUMES.items() if after == world
        ]}
        for world in (1, 2)
    ]  # fmt: skip
    (folder / "whole.json").write_text(json.dumps({f"{e}-{n}": plan for (e, n), plan in plans.items()}))
    script = str(harness.ROOT / "tests" / "launch" / "elastic.py")
    done = harness.finish(
        harness.start([sys.executable, script, json.dumps(stages)], folder, DS_ACCELERATOR="cpu"), 500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def whole_run(work: Path, engine: str, processes: int) -> Path:
    return Path(json.loads((work / "whole.json").read_text())[f"{engine}-{processes}"]).parent


def losses(run: Path) -> dict[int, float]:
    """The last loss of each step: a resumed run's log begins with the steps of the run that it was copied from."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def seen(run: Path) -> dict[int, list[str]]:
    return {int(step): sorted(rows) for step, rows in json.loads((run / "rows.json").read_text()).items()}


def apart(one: Path, other: Path) -> float:
    a, b = losses(one), losses(other)
    return max(abs(a[step] - b[step]) for step in range(6, STEPS + 1))


@pytest.mark.parametrize("name", [name for name, case in RESUMES.items() if not case[-1]])
def test_the_next_losses_and_rows_are_those_of_the_run_that_went_on(work, name):
    engine, before, *_ = RESUMES[name]
    run, whole = work / name, whole_run(work, engine, before)
    assert apart(run, whole) < LOSS
    rows, all_rows = seen(run), seen(whole)
    assert list(rows) == list(range(6, STEPS + 1)) and all(rows[step] == all_rows[step] for step in rows)
    epoch = sum((all_rows[step] for step in range(1, 9)), [])
    assert len(epoch) == len(set(epoch)) == 60  # none twice, none left out


def test_planted_faults_are_far_outside(work):
    assert apart(work / "no momentum", whole_run(work, "zero2", 2)) > 100 * LOSS
    assert seen(work / "no momentum")[6] == seen(whole_run(work, "zero2", 2))[6]
    assert apart(work / "other rows", whole_run(work, "plain", 1)) > 100 * LOSS
    assert seen(work / "other rows")[6] != seen(whole_run(work, "plain", 1))[6]


def test_the_whole_state_is_in_the_manifest_and_no_part_of_the_adapter(work):
    checkpoint = whole_run(work, "zero3", 2) / "checkpoints" / STOP
    listed = manifest.read_manifest(checkpoint)
    adapter = read_header(checkpoint / "adapter_model.safetensors")
    state = read_header(checkpoint / WHOLE_OPTIMIZER)
    assert WHOLE_OPTIMIZER in listed["files"] and not manifest.verify_folder(checkpoint)
    assert (listed["tensors"], listed["world_size"]) == (len(adapter), 2)
    assert len(state) == 3 * len(adapter) and {t.dtype for t in state} == {"F32"}  # weight, exp_avg, exp_avg_sq
    assert not (whole_run(work, "plain", 2) / "checkpoints" / STOP / WHOLE_OPTIMIZER).exists()


def test_a_checkpoint_without_it_is_refused_before_anything_loads_and_its_weights_start_a_run(work):
    """The command that the refusal gives is a valid run."""
    run = work / "zero2 2 to 1"
    newest = run / "checkpoints" / f"checkpoint-{STEPS}"
    names = manifest.read_manifest(newest)
    (newest / WHOLE_OPTIMIZER).unlink()
    del names["files"][WHOLE_OPTIMIZER]
    (newest / manifest.NAME).write_text(json.dumps(names))
    done = harness.kit("resume", str(run), "trainer.max_steps=12", "launch.num_gpus=2", cwd=work)
    assert done.returncode == 2 and "ready" not in done.stdout
    assert f"{newest.name} was saved by 1 process and cannot go on with 2: it has no" in done.stderr
    command = next(line for line in done.stderr.splitlines() if "peft.init_from=" in line).partition("weights: ")[2]
    assert not api.check(*shlex.split(command)[2:])
