"""Warm workers without training: who may share one, what becomes of a trial when one dies. The worker pretends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_sweeps import PRETEND, folder_of, record, started, states

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE, FAILED, REFUSED, STOPPED
from kit.schema.run_plan import RunPlan
from kit.sweeps import pool, warm_pool
from kit.system import hardware

# Stands in the place of kit.sweeps.warm_worker, with one way to end for each r.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path

asked = []
print("printed by a module that Python imports at its start", flush=True)
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
for line in sys.stdin:
    asked.clear()
    run = Path(json.loads(line)["plan"]).parent
    plan = json.loads((run / "plan.json").read_text())
    r, code, why = plan["peft"]["r"], 0, ""
    with open(run.parent / "started", "a") as f:
        f.write(f"{run.name} {os.environ.get('CUDA_VISIBLE_DEVICES') or '-'} {os.getpid()} warm\\n")
    def leave(state, **facts):
        (run / "status.json").write_text(json.dumps({"state": state, **facts}))
    if r == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if r == 10 or r == 12:
        code, why = (4 if r == 10 else 2), "a trial failed in it"
        leave("failed", exit_code=code, problems=["it fails on purpose"])
    else:
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": 1, "loss": r}) + "\\n")
        if r == 14:
            why = "the trial changed the base"
        while (r == 6 and not asked and not os.environ.get("KIT_TEST_MENDED")) or r == 16:
            time.sleep(0.05)
        time.sleep(float(os.environ.get("KIT_TEST_PAUSE", 0)))
        code = 75 if asked else 0
        leave("stopped" if asked else "done")
    print(json.dumps({"code": code, "why": why}), flush=True)
    if why:
        break
"""


@pytest.fixture
def sweep(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`kit train -m` with warm workers; all processes pretend."""
    for name, text in (("pretend.py", PRETEND), ("worker.py", WORKER)):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "trial_command", lambda plan: [sys.executable, str(tmp_path / "pretend.py"), str(plan)])
    monkeypatch.setattr(warm_pool, "worker_command", lambda: [sys.executable, str(tmp_path / "worker.py")])
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_length=64", "name=s",
             "hparams_search.workers=warm"]  # fmt: skip
    return lambda *overrides: cli.run_verb(["train", "-m", *stock, *overrides])


def lines(tmp_path: Path) -> list[tuple[str, str]]:
    """(trial, `w0`, `w1` ... by worker or `cold`) in the order in which they started; no worker lives on."""
    found, pids = [], []
    for line in (folder_of(tmp_path) / "started").read_text().splitlines():
        name, *_, number, kind = [*line.split(), "cold"] if not line.endswith("warm") else line.split()
        if kind == "warm" and number not in pids:
            pids.append(number)
        found.append((name, f"w{pids.index(number)}" if kind == "warm" else "cold"))
    alive = [p for p in pids if psutil.pid_exists(int(p)) and "worker.py" in str(psutil.Process(int(p)).cmdline())]
    assert not alive
    return found


# ---- the life of a worker ----


@pytest.mark.launch
def test_one_worker_until_it_fails(sweep, tmp_path: Path, monkeypatch, capsys):
    """Killed or failed in: the trial starts cold, once, and the others get a new worker. Refused: it stays refused."""
    monkeypatch.setenv("KIT_TEST_MENDED", "1")  # r=8 ends well in a process of its own
    assert sweep("peft.r=2,4,8,3,10,5,12,14,7") == REFUSED
    assert lines(tmp_path) == [
        ("000-r-2", "w0"), ("001-r-4", "w0"), ("002-r-8", "w0"), ("002-r-8", "cold"), ("003-r-3", "w1"),
        ("004-r-10", "w1"), ("004-r-10", "cold"), ("005-r-5", "w2"), ("006-r-12", "w2"), ("007-r-14", "w3"),
        ("008-r-7", "w4"),
    ]  # fmt: skip
    assert states(tmp_path) == ["done"] * 6 + ["failed"] + ["done"] * 2
    assert record(tmp_path)["trials"][6]["exit_code"] == REFUSED
    shown = capsys.readouterr().err
    assert "trial 002 r=8 failed in a warm worker, which is ended: the trial was killed by signal 9" in shown
    assert "trial 004 r=10 failed in a warm worker, which is ended: it fails on purpose" in shown
    assert "the worker of trial 007 takes no other trial: the trial changed the base" in shown


@pytest.mark.launch
def test_cold_once(sweep, tmp_path: Path):
    """A trial that fails cold as well has failed."""
    assert sweep("peft.r=8,2") == FAILED
    assert lines(tmp_path) == [("000-r-8", "w0"), ("000-r-8", "cold"), ("001-r-2", "w1")]
    assert states(tmp_path) == ["failed", "done"]


@pytest.mark.launch
def test_trials_of_one_key_follow_each_other(sweep, tmp_path: Path):
    """A worker is used up before it makes room for one of another key; what cannot share starts cold."""
    assert sweep("peft.r=2,4", "trainer.max_length=32,64", "peft.bias=none,all") == DONE
    kinds = {name: kind for name, kind in lines(tmp_path)}
    assert [kinds[n] for n in kinds if "bias-all" in n] == ["cold"] * 4
    shared = [(("32" in n), kind) for n, kind in lines(tmp_path) if "bias-none" in n]
    assert shared == [(True, "w0"), (True, "w0"), (False, "w1"), (False, "w1")]


@pytest.mark.launch
def test_why_it_is_cold_is_said_once(sweep, tmp_path: Path, capsys):
    assert sweep("peft.r=2,4", "peft.bias=all") == DONE
    assert capsys.readouterr().err.count("starts cold, and so do others for this reason: peft.bias=all may") == 1
    assert sweep("peft.r=2,5", "hparams_search.workers=cold") == DONE
    assert "starts cold" not in capsys.readouterr().err


@pytest.mark.launch
def test_workers_keep_their_gpus(sweep, tmp_path: Path, monkeypatch):
    """Two workers, each with a GPU; a trial of another key gets the GPU of one that is idle."""
    gpu = hardware.Gpu("H100", 80.0, (9, 0))
    monkeypatch.setattr(hardware, "list_gpus", lambda: (gpu, gpu))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("KIT_TEST_PAUSE", "0.5")
    assert sweep("trainer.max_length=64,32", "peft.r=2,4,3", "trainer.bf16=true") == DONE
    found = [line.split() for line in (folder_of(tmp_path) / "started").read_text().splitlines()]
    assert {line[1] for line in found[:2]} == {"4", "7"}
    by_worker: dict[str, set[str]] = {}
    for _, device, number, _ in found:
        by_worker.setdefault(number, set()).add(device)
    assert all(len(devices) == 1 for devices in by_worker.values()) and len(by_worker) in (3, 4)


@pytest.mark.launch
@pytest.mark.parametrize("times", [1, 2])
def test_stopped_and_continued(sweep, tmp_path: Path, monkeypatch, times: int):
    """The trial in the worker saves and stops; asked twice, it is ended. It is not started cold by that."""
    slow = "16" if times == 2 else "6"  # the former does not listen
    ask = f"""
import os, signal, time
from pathlib import Path
while not list(Path({str(tmp_path / "runs")!r}).glob("*/001-r-{slow}/metrics.jsonl")):
    time.sleep(0.05)
for _ in range({times}):
    os.kill({os.getpid()}, signal.SIGTERM)
    time.sleep(0.5)
"""
    asking = subprocess.Popen([sys.executable, "-c", ask])
    assert sweep(f"peft.r=2,{slow},4") == STOPPED and asking.wait(10) == 0
    assert states(tmp_path) == ["done", "stopped", "waiting"]  # by the user, not for a fault of its own
    assert lines(tmp_path) == [("000-r-2", "w0"), (f"001-r-{slow}", "w0")]
    if times == 1:
        monkeypatch.setenv("KIT_TEST_MENDED", "1")
        assert sweep("peft.r=2,6,4") == DONE
        assert started(tmp_path) == ["000-r-2", "001-r-6", "001-r-6", "002-r-4"]


@pytest.mark.launch
def test_one_that_does_not_save_in_time(sweep, tmp_path: Path):
    """launch.grace_seconds counts in a warm worker as it does in a process of its own."""
    ask = f"""
import os, signal, time
from pathlib import Path
while not list(Path({str(tmp_path / "runs")!r}).glob("*/000-r-16/metrics.jsonl")):
    time.sleep(0.05)
os.kill({os.getpid()}, signal.SIGTERM)
"""
    asking = subprocess.Popen([sys.executable, "-c", ask])
    assert sweep("peft.r=16,2", "launch.grace_seconds=0.5") == STOPPED and asking.wait(10) == 0
    assert states(tmp_path) == ["stopped", "waiting"]
    assert "killed by signal 9" in record(tmp_path)["trials"][0]["problems"][0]["problem"]


@pytest.mark.launch
def test_a_search_prunes_in_a_worker_that_goes_on(sweep, tmp_path: Path):
    """SIGTERM to the worker ends the trial that is worse than the others; the next one is given to the same worker."""
    assert sweep("hparams_search=optuna", "hparams_search.sampler=random",
                 "peft.r=choice(2,6)", "hparams_search.n_trials=5", "hparams_search.seed=2",
                 "hparams_search.pruner.n_startup_trials=1") == DONE  # fmt: skip
    found = [(t["values"]["peft.r"], t["state"]) for t in record(tmp_path)["trials"]]
    assert set(found) == {("2", "done"), ("6", "pruned")} and found[-1] == ("2", "done")
    assert {kind for _, kind in lines(tmp_path)} == {"w0"}


# ---- who may share ----


@pytest.fixture(scope="module")
def plan(base: Path, chat: Path) -> Callable[..., RunPlan]:
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_length=64", "trainer.use_cpu=true"]

    def make(*overrides: str) -> RunPlan:
        given = {o.partition("=")[0] for o in overrides}
        return api.compose(*(o for o in stock if o.partition("=")[0] not in given), *overrides, here=True)

    return make


@pytest.mark.parametrize(
    "override",
    ["trainer.learning_rate=1e-5", "peft.r=2", "peft.lora_alpha=3", "peft.lora_dropout=0.1", "trainer.seed=1",
     "trainer.optim=sgd", "trainer.max_steps=3", "peft.target_modules=[q_proj]", "peft.use_rslora=true", "name=x",
     "trainer.gradient_accumulation_steps=2", "trainer.lr_scheduler_type=linear", "launch.grace_seconds=3",
     "trainer.report_to=tensorboard", "+peft.init_lora_weights=gaussian", "runs_dir=elsewhere"],
)  # fmt: skip
def test_made_anew(plan, override: str):
    assert warm_pool.reason_to_start_cold(plan(override)) is None and warm_pool.sharing_key(
        plan(override)
    ) == warm_pool.sharing_key(plan())


@pytest.mark.parametrize(
    "override",
    ["trainer.max_length=32", "model.dtype=float16", "dataset.seed=1", "dataset.test_size=8", "tokenizer=chatml",
     "trainer.gradient_checkpointing=true", "trainer.completion_only_loss=false", "trainer.neftune_noise_alpha=5",
     "model.attn_implementation=eager", "dataset.limit=50", "trainer.shuffle_dataset=true"],
)  # fmt: skip
def test_another_worker(plan, override: str):
    assert warm_pool.sharing_key(plan(override)) != warm_pool.sharing_key(plan())


def test_the_seed_counts_where_it_orders_the_data(plan):
    shuffled = [
        warm_pool.sharing_key(plan("trainer.shuffle_dataset=true", f"trainer.seed={seed}")) for seed in (1, 2, 1)
    ]
    assert shuffled[0] != shuffled[1] and shuffled[0] == shuffled[2]


def test_a_key_that_nobody_thought_of(plan):
    """Whatever a later version adds to a plan makes another worker."""
    stock = plan()
    for section in ("trainer", "peft"):
        more = stock.model_copy(update={section: {**getattr(stock, section), "something_new": 1}})
        assert warm_pool.sharing_key(more) != warm_pool.sharing_key(stock)
    assert "something_new=1 may change the base" in str(warm_pool.reason_to_start_cold(more))


@pytest.mark.parametrize(
    "overrides, why",
    [
        (["launch.num_gpus=2"], "one process"),
        (["deepspeed=zero2"], "one process"),
        (["launch=torchrun"], "launch=local"),
        (["peft=none"], "full fine-tuning"),
        (["peft.bias=lora_only"], "peft.bias=lora_only may"),
        (["+peft.modules_to_save=[lm_head]"], "peft.modules_to_save"),
        (["+peft.init_lora_weights=pissa"], "init_lora_weights=pissa"),
        (["+peft.init_lora_weights=olora"], "init_lora_weights=olora"),
        (["model.random_init=true"], "drawn with the trial's seed"),
        (["trainer.torch_compile=true"], "torch_compile"),
        (["trainer.torch_compile_backend=inductor"], "torch_compile_backend"),  # which turns it on
        (["trainer.auto_find_batch_size=true"], "auto_find_batch_size"),
        (["trainer.report_to=wandb"], "wandb is open once"),
        (["trainer.optim=paged_adamw_8bit"], "does not give its memory back"),
    ],
)
def test_cold_by_nature(plan, overrides: list[str], why: str):
    assert why in str(warm_pool.reason_to_start_cold(plan(*overrides)))


def test_what_was_compiled_goes_with_the_trial():
    """torch compiles a function anew for so many shapes and no more, which trials must not use up for each other."""
    import torch

    from kit.sweeps.warm_worker import WarmState, snapshot_model, tensor_checksums

    made = []

    def backend(graph, inputs):
        made.append(1)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend, dynamic=False)
    held = WarmState()
    held.model = torch.nn.Linear(2, 2)
    held.model_before, held.sums = snapshot_model(held.model), tensor_checksums(held.model)
    for size in range(2, 22):
        double(torch.ones(size))
    assert len(made) < 20 and held.reset() == ""
    made.clear()
    double(torch.ones(50))
    assert made == [1]


def test_the_lists_name_what_there_is():
    """A key that was renamed upstream would be made anew in name only."""
    from dataclasses import fields

    from peft import LoraConfig
    from trl import SFTConfig

    assert {f.name for f in fields(SFTConfig)} >= warm_pool.TRAINER_KEYS_MADE_ANEW
    assert {f.name for f in fields(LoraConfig)} >= warm_pool.ADAPTER_KEYS_MADE_ANEW
    assert set(RunPlan.model_fields) >= warm_pool.PLAN_KEYS_MADE_ANEW
