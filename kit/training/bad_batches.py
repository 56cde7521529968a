"""Which rows the steps before a loss that is not finite had read."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

NONFINITE_FILE = "nonfinite.json"
MAX_ROWS, MAX_TEXTS, MAX_TOKENS = 256, 8, 60  # row numbers that are listed, rows that are shown, how much of each


def rows_of_steps(trainer: Any, first: int, last: int) -> list[int]:
    """The rows of `trainer.train_dataset` that the optimizer steps first..last read, by all ranks; [] if unknown.

    Follows accelerate's SeedableRandomSampler (one permutation per epoch, seeded by epoch + seed) and its shards,
    which hand out consecutive batches to consecutive ranks.
    """
    loader, args, total = trainer.callback_handler.train_dataloader, trainer.args, len(trainer.train_dataset)
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else loader.sampler
    sampler_type = type(sampler).__name__
    if sampler_type not in ("SeedableRandomSampler", "SequentialSampler"):
        return []
    import torch

    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = -(-len(loader) // args.gradient_accumulation_steps)
    rows: list[int] = []
    for epoch, group in groupby(range(first - 1, last), lambda step: step // steps):
        order = list(range(total))
        if sampler_type == "SeedableRandomSampler":
            generator = torch.Generator().manual_seed(epoch + sampler.initial_seed)
            order = torch.randperm(total, generator=generator).tolist()
        for step in group:
            rows += order[step % steps * size : (step % steps + 1) * size]
    return rows


def write_rows_before_nonfinite_loss(trainer: Any) -> None:
    """Write logs/nonfinite.json beside the checkpoints' folder, where a run directory is; rank 0 only."""
    folder = Path(trainer.args.output_dir).parent / "logs"
    if trainer.args.process_index != 0 or not folder.is_dir():
        return
    last = trainer.state.global_step
    logged = [row["step"] for row in trainer.state.log_history if "loss" in row and row["step"] < last]
    first = logged[-1] + 1 if logged else 1
    rows = rows_of_steps(trainer, first, last)
    data, decode = trainer.train_dataset, trainer.processing_class.decode
    texts = {
        row: decode(list(data[row].get("input_ids") or [])[:MAX_TOKENS]) for row in rows[-MAX_TEXTS:]
    }  # the last step's
    record = {"first_step": first, "last_step": last, "count": len(rows), "of": len(data), "rows": rows[:MAX_ROWS]}
    (folder / NONFINITE_FILE).write_text(json.dumps({**record, "texts": texts}, ensure_ascii=False), encoding="utf-8")
