"""What each rank does by itself: measured, out of the way of training, and sent only where all ranks send."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import TrainerCallback
from trl import SFTConfig

from kit.training.console import ProgressCallback
from kit.training.rank_timing import MAX_EVENTS, RankTimer
from kit.training.trainer import ModifiedTrainer

torch.set_num_threads(1)
SLEEP = 0.05
FIGURES = ("rank_load_seconds", "rank_forward_seconds", "rank_memory_gb")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base")


class Sleep(TrainerCallback):
    """A slow forward pass, and somebody's own log in the middle of a step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.hook = model.register_forward_pre_hook(lambda *_: time.sleep(SLEEP * model.training))

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.log({"mine": 1.0})

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        time.sleep(SLEEP / 2)
        return self.rows[n]


def train(base, out, monkeypatch, **changes):
    settings = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "logging_steps": 2, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none",
        "model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False, "max_length": 64,
        "disable_tqdm": True, "seed": 7, **changes,
    }  # fmt: skip
    (out / "logs").mkdir(parents=True)
    progress, sleep = ProgressCallback(out, SimpleNamespace()), Sleep()
    rows = tiny.dataset(tiny.text_rows())
    trainer = ModifiedTrainer(
        model=str(base), args=SFTConfig(**settings), train_dataset=rows, eval_dataset=rows,
        callbacks=[sleep, progress],
    )  # fmt: skip
    progress.trainer = sleep.trainer = trainer
    trainer.train_dataset = Rows(trainer.train_dataset)
    before = len(trainer.model._forward_hooks), len(trainer.model._forward_pre_hooks)
    sent: list[int] = []
    exchange = trainer.rank_timer.exchange
    monkeypatch.setattr(trainer.rank_timer, "exchange", lambda: (sent.append(trainer.state.global_step), exchange()))
    trainer.train()
    assert (len(trainer.model._forward_hooks), len(trainer.model._forward_pre_hooks)) == before
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found, sent


def test_seconds_per_step_of_reading_and_of_forward_passes(base, tmp_path, monkeypatch):
    found, sent = train(base, tmp_path / "a", monkeypatch)
    assert sent == [2, 4], "once per logging interval, and not for a log of one's own"
    assert {k: found[0][k] for k in ("step", "seconds", "max_steps", "world_size")} == {
        "step": 0, "seconds": 0.0, "max_steps": 4, "world_size": 1
    }  # fmt: skip
    logged = [row for row in found if "grad_norm" in row]
    assert [row["step"] for row in logged] == [2, 4]
    for row in logged:
        assert [len(row[key]) for key in FIGURES] == [1, 1, 1]
        # a step: two passes, and four rows in two batches
        assert 2 * SLEEP <= row["rank_forward_seconds"][0] < 4 * SLEEP
        assert 2 * SLEEP <= row["rank_load_seconds"][0] < 6 * SLEEP
        assert 0.1 < row["rank_memory_gb"][0] < 64


@pytest.mark.launch
def test_tokens_per_second_leave_out_evaluations(base, tmp_path, monkeypatch):
    evaluate = ModifiedTrainer.evaluate

    def slow(*args, **kwargs):
        time.sleep(20 * SLEEP)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(ModifiedTrainer, "evaluate", slow)
    found, _ = train(base, tmp_path / "a", monkeypatch, eval_strategy="steps", eval_steps=1)
    first, second = (row for row in found if "grad_norm" in row)
    tokens, seconds = second["num_tokens"] - first["num_tokens"], second["seconds"] - first["seconds"]
    assert seconds > 40 * SLEEP  # two evaluations lie between
    took = tokens / second["tokens_per_second"]
    assert took < seconds - 39 * SLEEP and took > 8 * SLEEP


def test_a_compiled_model_gets_no_hook():
    pace, model = RankTimer(None, False, True), torch.nn.Linear(2, 2)
    pace.attach(model)
    assert not model._forward_hooks and list(pace.time_batches(iter([1, 2]))) == [1, 2]
    pace.exchange()
    assert pace.latest["rank_forward_seconds"] == [0.0] and pace.steps == 0


class Event:
    """A GPU's event, of a GPU that is one event behind."""

    clock, recorded = 0.0, []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.clock += 10.0
        self.at = Event.clock
        Event.recorded.append(self)

    def query(self):
        return self is not Event.recorded[-1]

    def elapsed_time(self, end):
        return end.at - self.at


def test_on_a_gpu_events_are_read_and_never_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    pace, model = RankTimer(None, True, False), torch.nn.Linear(2, 2)
    pace.attach(model)
    for _ in range(10):
        list(pace.time_batches(iter([1] * 20)))
        for _ in range(20):
            model(torch.ones(1, 2))
    model.eval()
    model(torch.ones(1, 2))
    assert len(Event.recorded) == 2 * MAX_EVENTS
    pace.exchange()
    assert pace.latest["rank_forward_seconds"] == [pytest.approx(20 * 0.010)]
    assert pace.latest["rank_memory_gb"] == [3.0]
