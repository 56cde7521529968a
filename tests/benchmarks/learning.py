"""Losses that can be told apart: text with structure, a base that learned it, and what two arms made of it.

A word's successor is one of four, drawn with fixed probabilities. A base is trained on one table of successors and
then fine-tuned on another, in which half of the words have new ones.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

WORDS, SHARES = 1000, (0.7, 0.15, 0.1, 0.05)
LAST = 20  # steps at the end whose mean is a run's final loss


@cache
def successors(word: int, shifted: bool) -> list[int]:
    draw = random.Random(f"{word} {shifted and word % 2 == 0}")
    return [draw.randrange(WORDS) for _ in SHARES]


def walk(draw: random.Random, words: int, shifted: bool) -> list[int]:
    """Draw a text of numbers below WORDS."""
    text = [draw.randrange(WORDS)]
    while len(text) < words:
        text.append(draw.choices(successors(text[-1], shifted), SHARES)[0])
    return text


def make_structured(path: Path, rows: int, words: int) -> None:
    """Write rows of the shifted table, as JSON lines of `text`."""
    draw = random.Random(1)
    with open(path, "w") as f:
        for _ in range(rows):
            f.write(json.dumps({"text": " ".join(f"w{n}" for n in walk(draw, words, True))}) + "\n")


def pretrain(model: Any, steps: int, rows: int, words: int, device: str) -> list[float]:
    """Train all weights (float32, in place) on the unshifted table; the losses. w0 has the token number 4."""
    import torch

    draw, losses = random.Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        ids = 4 + torch.tensor([walk(draw, words, False) for _ in range(rows)], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare_seeds(arms: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Compare two arms' losses, seed by seed: how far apart they lie, beside how far seeds of one arm lie apart.

    arms: name to the losses of each seed, step by step. first_loss, final_loss: means over the seeds.
    """
    final = {arm: [statistics.mean(losses[-LAST:]) for losses in seeds] for arm, seeds in arms.items()}
    (one, ones), (other, others) = arms.items()
    pairs = list(zip(ones, others, strict=True))
    gaps = [a - b for a, b in zip(final[one], final[other], strict=True)]
    return {
        "arms": [one, other],
        "seeds": len(gaps),
        "first_loss": {arm: round(statistics.mean(losses[0] for losses in seeds), 4) for arm, seeds in arms.items()},
        "final_loss": {arm: round(statistics.mean(values), 4) for arm, values in final.items()},
        "paired_gap": round(statistics.mean(gaps), 5),
        "between_seeds": {arm: round(statistics.stdev(v), 5) if len(v) > 1 else None for arm, v in final.items()},
        "largest_apart": round(max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)), 5),
    }
