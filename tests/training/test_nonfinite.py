"""The rows that are named for a step are those that the step read."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
from peft import LoraConfig
from trl import SFTConfig

from kit.errors import KitError
from kit.training import bad_batches
from kit.training.trainer import ModifiedTrainer

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)
ROWS = 22  # 5.5 batches of 4: the last step of an epoch reads fewer


class Recorder(ModifiedTrainer):
    """Notes which rows of the data set each optimizer step sees."""

    def training_step(self, model, inputs, *args, **kwargs):
        known = [tuple(row["input_ids"]) for row in self.train_dataset]
        for ids, mask in zip(inputs["input_ids"].tolist(), (inputs["labels"] != -100).tolist(), strict=True):
            width = max(i for i, used in enumerate(mask) if used) + 1
            self.seen.setdefault(self.state.global_step + 1, []).append(known.index(tuple(ids[:width])))
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base")


def trainer_of(base, out, **changes):
    settings = {
        "output_dir": str(out), "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none",
        "model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False, "max_length": 64,
        "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    rows = [{"text": f"{tiny.WORDS[i]} {tiny.sentence(i, 4 + i % 5)}"} for i in range(ROWS)]
    made = Recorder(
        str(base), SFTConfig(**{**settings, **changes}), train_dataset=tiny.dataset(rows),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    made.seen = {}
    return made


@pytest.mark.parametrize("changes", [{}, {"data_seed": 3}, {"train_sampling_strategy": "sequential"}], ids=str)
def test_rows_of_steps(changes, base, tmp_path):
    """Two epochs, so that the second order is another one."""
    trainer = trainer_of(base, tmp_path / "checkpoints", **changes)
    trainer.train()
    assert sorted(trainer.seen) == list(range(1, 9))
    for step, rows in trainer.seen.items():
        assert bad_batches.rows_of_steps(trainer, step, step) == rows, step
    several = bad_batches.rows_of_steps(trainer, 5, 7)  # over the border of the epochs
    assert several == trainer.seen[5] + trainer.seen[6] + trainer.seen[7]


def test_the_note_and_the_refusal(base, tmp_path):
    (tmp_path / "logs").mkdir()
    trainer = trainer_of(base, tmp_path / "checkpoints", learning_rate=1e38, max_grad_norm=0.0, logging_steps=2)
    with pytest.raises(KitError, match="is (nan|inf) at step 2"):
        trainer.train()
    note = json.loads((tmp_path / "logs" / bad_batches.NONFINITE_FILE).read_text())
    assert (note["first_step"], note["last_step"], note["count"], note["of"]) == (1, 2, 8, ROWS)
    assert note["rows"] == trainer.seen[1] + trainer.seen[2]
    assert note["texts"][str(note["rows"][-1])].startswith(tiny.WORDS[note["rows"][-1]])


def test_a_note_that_cannot_be_written_does_not_hide_the_stop(base, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_batches, "write_rows_before_nonfinite_loss", lambda trainer: 1 / 0)
    trainer = trainer_of(base, tmp_path / "checkpoints", learning_rate=1e38, max_grad_norm=0.0)
    with pytest.raises(KitError, match="training stopped"):
        trainer.train()
