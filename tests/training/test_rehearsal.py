"""The rehearsal before the first step: what it finds, and that a run with it is bit for bit the run without it."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig

from kit.errors import FAILED, KitError
from kit.storage import atomic_folder
from kit.training import rehearsal
from kit.training.trainer import ModifiedTrainer

torch.set_num_threads(1)
TIMES = ("runtime", "per_second", "seconds")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base", attention_dropout=0.1)


class Events(TrainerCallback):
    """Everything that a callback is told, in its order, with what the trainer stands at."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def note(args, state, control, logs=None, metrics=None, **kwargs):
            figures = {k: v for k, v in {**(logs or {}), **(metrics or {})}.items() if not k.endswith(TIMES)}
            drawn = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
            self.seen.append((name, state.global_step, figures, vars(control).copy(), drawn, random.getstate()[1][:4],
                              np.random.get_state()[1][:4].tolist()))  # fmt: skip

        return note


def build(base, out: Path, *, peft: bool = True, rows=None, **changes) -> ModifiedTrainer:
    settings = dict(
        output_dir=str(out / "checkpoints"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, logging_steps=1, save_steps=2, eval_strategy="steps", eval_steps=2,
        use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False, max_length=64, disable_tqdm=True, seed=7, data_seed=3, neftune_noise_alpha=5.0,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return ModifiedTrainer(
        model=str(base),
        args=SFTConfig(**{**settings, **changes}),
        train_dataset=tiny.dataset(tiny.text_rows()) if rows is None else rows,
        eval_dataset=tiny.dataset(tiny.text_rows(6)),
        callbacks=[Events()],
        peft_config=lora if peft else None,
    )


def rehearsed(trainer: ModifiedTrainer, run: Path) -> list[rehearsal.TrialResult]:
    """Have a trainer rehearse; the list gets what was found."""
    results: list[rehearsal.TrialResult] = []
    trainer.before_first_step = lambda: results.append(rehearsal.rehearse(trainer, run))
    return results


def outcome(trainer: ModifiedTrainer, run: Path) -> dict:
    """All that a run leaves: events, losses, weights, states of optimizer and random numbers, every file's bytes."""
    trainer.train()
    trainer.save_model(str(run / "adapter"))
    events = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Events)).seen
    files = {}
    for file in sorted(p for p in run.rglob("*") if p.is_file()):
        name, data = str(file.relative_to(run)), file.read_bytes()
        if file.name == "trainer_state.json":
            log = json.loads(data)
            log["log_history"] = [
                {k: v for k, v in row.items() if not k.endswith(TIMES)} for row in log["log_history"]
            ]
            data = json.dumps(log).encode()
        elif file.name == "manifest.json":  # it holds the hash of trainer_state.json
            continue
        files[name] = hashlib.sha256(data).hexdigest()
    return {
        "events": events,
        "files": files,
        "folders": sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_dir()),
        "optimizer": str(trainer.optimizer.state_dict()),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "counters": [str(vars(trainer).get(name)) for name in rehearsal.COUNTERS],
        "random": [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()],
    }


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """What the LoRA run without a rehearsal leaves."""
    run = tmp_path_factory.mktemp("plain")
    return outcome(build(base, run), run)


def differing(one: dict, other: dict) -> list[str]:
    return [key for key in one if one[key] != other[key]]


def test_no_trace_of_it_is_left(base, tmp_path, plain, capsys):
    """Losses, events, random states, adapter, optimizer, scheduler, every file: as without it."""
    trainer = build(base, tmp_path)
    results = rehearsed(trainer, tmp_path)
    assert differing(outcome(trainer, tmp_path), plain) == []
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert (results[0].rows, results[0].tokens) == (2, longest)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert results[0].state[0] * 2**30 == pytest.approx(8 * trained, rel=0.01)  # AdamW's two moments in float32
    assert f"rehearsal 2 x {longest} tokens" in capsys.readouterr().out
    assert len([e for e in plain["events"] if e[0] == "on_evaluate"]) == 2  # what is compared is not empty
    assert any(name.endswith("optimizer.pt") for name in plain["files"])


@pytest.mark.parametrize("case", ["bf16", "full", "last save alone"])
def test_no_trace_in_other_runs(case, base, tmp_path):
    """bf16's autocast, full fine-tuning, and no save but the last."""
    changes = {
        "bf16": {"bf16": True, "max_steps": 2},
        "full": {"peft": False, "save_only_model": True},
        "last save alone": {"save_strategy": "no", "eval_strategy": "no", "optim": "adafactor"},
    }[case]
    found = []
    for name in ("without", "with"):
        trainer = build(base, tmp_path / name, **changes)
        if name == "with":
            rehearsed(trainer, tmp_path / name)
        found.append(outcome(trainer, tmp_path / name))
    assert differing(*found) == []


def test_a_forgotten_random_state_is_found(base, tmp_path, plain, monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kwargs: rehearsal.contextlib.nullcontext())
    trainer = build(base, tmp_path)
    rehearsed(trainer, tmp_path)
    assert {"events", "files", "random"} <= set(differing(outcome(trainer, tmp_path), plain))


def test_a_step_that_was_made_is_found(base, tmp_path, plain, monkeypatch):
    """By the rehearsal itself too, which compares the weights with those before it."""
    trainer = build(base, tmp_path)
    monkeypatch.setattr(rehearsal, "drop_gradients", lambda model, engine: trainer.optimizer.step())

    def rehearse_and_go_on():
        with pytest.raises(KitError, match="reload failed.*not those that were before"):
            rehearsal.rehearse(trainer, tmp_path)

    trainer.before_first_step = rehearse_and_go_on
    assert {"events", "files", "optimizer"} <= set(differing(outcome(trainer, tmp_path), plain))


# ---- what it finds ----


FAULTS = {
    "trial step": ("training_step", RuntimeError("device-side assert triggered\nmore"), "device-side assert"),
    "save": ("_save_rng_state", OSError(28, "No space left on device"), "could not be saved"),
    "reload": ("_load_from_checkpoint", ValueError("no such tensor"), "no such tensor"),
    "evaluation": ("prediction_step", RuntimeError("a logits error"), "a logits error"),
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_failure_names_its_part(part, base, tmp_path, monkeypatch):
    """A KitError with the first line of its cause, before any step, and no leftover."""
    trainer = build(base, tmp_path)
    rehearsed(trainer, tmp_path)
    method, error, text = FAULTS[part]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer, method, fail)
    said = f"the rehearsal's {part} failed on rank 0, before the first step: .*{text}"
    with pytest.raises(KitError, match=said) as e:
        trainer.train()
    assert e.value.code == FAILED and e.value.problems[0].fix and "more" not in str(e.value)
    assert trainer.state.global_step == 0 and not list((tmp_path / "checkpoints").glob(".*"))
    assert not list(tmp_path.glob("logs/*.oom.json"))


def test_weights_that_come_back_otherwise_are_found(base, tmp_path, monkeypatch):
    trainer = build(base, tmp_path)
    rehearsed(trainer, tmp_path)

    def load(*args, **kwargs):
        next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] += 1e-7

    monkeypatch.setattr(trainer, "_load_from_checkpoint", load)
    with pytest.raises(KitError, match="the rehearsal's reload failed.*not those that were before"):
        trainer.train()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_out_of_memory_leaves_a_note(error, base, tmp_path, monkeypatch):
    """logs/rank0.oom.json says which part, for whoever starts the run one step smaller."""
    trainer = build(base, tmp_path)
    rehearsed(trainer, tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(KitError, match="trial step failed on rank 0") as e:
        trainer.train()
    assert e.value.code == FAILED and "per_device_train_batch_size" in e.value.problems[0].fix
    note = json.loads((tmp_path / "logs" / "rank0.oom.json").read_text())
    assert (note["rank"], note["part"]) == (0, "trial step") and str(error) in note["message"]
    assert note["allocated_gb"] > 0


# ---- when, and with what ----


def test_when_it_is_due():
    def trainer(device, steps, done=0):
        state = type("State", (), {"global_step": done, "max_steps": steps})
        return type("Trainer", (), {"state": state, "args": type("Args", (), {"device": torch.device(device)})})

    few, many = rehearsal.STEPS - 1, rehearsal.STEPS
    assert rehearsal.is_due(None, trainer("cuda", many)) and not rehearsal.is_due(None, trainer("cuda", few))
    assert not rehearsal.is_due(None, trainer("cpu", many)) and rehearsal.is_due(True, trainer("cpu", few))
    assert not rehearsal.is_due(False, trainer("cuda", many))
    assert not rehearsal.is_due(True, trainer("cuda", many, done=5))  # a resumed run


def test_the_longest_rows(base, tmp_path):
    """Of a data set that was shuffled and cut, of packed rows, and of a stream, none of whose rows are read."""
    rows = tiny.dataset([{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 9, 4, 11, 7)])
    chosen = rows.select([4, 2, 1, 0])
    assert rehearsal.row_lengths(rows).tolist() == [3, 9, 4, 11, 7]
    assert rehearsal.row_lengths(chosen).tolist() == [7, 4, 9, 3]
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = build(base, tmp_path, rows=chosen, **skip)
    batch = rehearsal.longest_batch(trainer, chosen, 2)
    assert batch["input_ids"].shape == (2, 9) and (batch["labels"] != -100).sum().item() == 9 + 7

    read = []
    stream = chosen.to_iterable_dataset().map(lambda row: read.append(1) or row)
    trainer = build(base, tmp_path, rows=stream, max_length=48, **skip)
    read.clear()  # SFTTrainer looks at the first row
    assert rehearsal.longest_batch(trainer, stream, 2)["input_ids"].shape == (2, 48) and not read

    trainer = build(base, tmp_path, packing=True, max_length=32, eval_packing=False)
    assert rehearsal.longest_batch(trainer, trainer.train_dataset, 2)["input_ids"].numel() > 32


def test_leftovers_of_a_crash_are_cleared(tmp_path):
    (tmp_path / rehearsal.FOLDER).mkdir()
    atomic_folder.staging_path(tmp_path / rehearsal.FOLDER).mkdir()
    assert len(atomic_folder.remove_leftovers(tmp_path)) == 2 and not list(tmp_path.iterdir())
