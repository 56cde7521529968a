"""How many optimizer steps rows make: the arithmetic of transformers' Trainer.set_initial_training_values."""

from __future__ import annotations

import math
from typing import Any


def steps_per_epoch(rows: int, trainer: dict[str, Any], processes: int) -> int:
    """Return the steps that one pass over `rows` takes, the last one smaller where they do not divide."""
    size = trainer.get("per_device_train_batch_size", 8)  # TrainingArguments' defaults, here and below
    if trainer.get("dataloader_drop_last"):
        batches = rows // size // processes
    else:
        batches = math.ceil(math.ceil(rows / size) / processes)
    return max(math.ceil(batches / trainer.get("gradient_accumulation_steps", 1)), 1)


def total_steps(rows: int, trainer: dict[str, Any], processes: int) -> int:
    """Return the steps of a whole run: trainer.max_steps where it is given, else those of its epochs."""
    if trainer.get("max_steps", -1) > 0:
        return int(trainer["max_steps"])
    return math.ceil(trainer.get("num_train_epochs", 3) * steps_per_epoch(rows, trainer, processes))


def describe_steps(rows: int, trainer: dict[str, Any], processes: int) -> str:
    """Return the steps of a run and of an epoch in words."""
    each, steps = steps_per_epoch(rows, trainer, processes), total_steps(rows, trainer, processes)
    return f"{steps:,} step{'s' * (steps != 1)}, {each:,} for the {rows:,} rows of an epoch"
