"""Clocks that both arms of a training benchmark carry: step ends, tokens a step, and what loading a model takes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Wall-clock time at the end of every step, with the device idle, and its tokens; `clock.json` at the end."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.at: list[float] = []
        self.useful: list[list[Any]] = []  # of each step: tokens of each forward pass, still on the device

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.training_began = time.time()
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.useful.append([])

    def count(self, module, words, named):
        """Note how many tokens of a batch are no padding: a batch without a mask has none."""
        if module.training and self.useful:
            mask = named.get("attention_mask")
            padded = mask is not None and mask.dim() == 2
            self.useful[-1].append(mask.sum() if padded else named["input_ids"].numel())

    def on_step_end(self, args, state, control, **kwargs):
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.append(time.time())

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if args.process_index == 0:
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            saves = [s for s in range(1, len(self.at) + 1) if saves_at(args, s)]
            self.figures = {
                "begun": self.begun,
                "training_began": self.training_began,
                "step_ends": self.at,
                "tokens_per_step": rows * args.max_length,
                "save_steps": saves,
                "useful_tokens": [sum(int(tokens) for tokens in step) for step in self.useful],
                "peak_reserved_gb": reserved_gb(),
                "resident_parameter_gb": resident_parameter_gb(model),
            }
            Path(os.environ["KIT_BENCH_OUT"], "clock.json").write_text(json.dumps(self.figures))


def reserved_gb() -> float | None:
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None


def resident_parameter_gb(model: Any) -> float:
    """Bytes of parameters that this rank holds between steps, in 1e9: its shards under ZeRO-3, and what is whole."""
    held = 0
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size()  # none, where it is partitioned
        if (shard := getattr(parameter, "ds_tensor", None)) is not None:
            held += shard.numel() * shard.element_size()
    return round(held / 1e9, 3)


def saves_at(args: Any, step: int) -> bool:
    return args.save_strategy == "steps" and step % int(args.save_steps) == 0


def memory_gb(field: str) -> float:
    """A line of /proc/self/status. RssAnon is what a process holds itself; RssFile is page cache that it looks at."""
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1e6
    return 0.0


def watched(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load` with its seconds, its peak of anonymous host memory and its GPU memory written to load-RANK.json."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        import torch

        before, peaks, stop = memory_gb("RssAnon"), [0.0], threading.Event()

        def sample() -> None:
            while not stop.wait(0.02):
                peaks.append(memory_gb("RssAnon"))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        start = time.time()
        model = load(*args, **kwargs)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.time() - start
        stop.set()
        thread.join()
        found = {
            "seconds": round(seconds, 2),
            "ended": start + seconds,
            "anonymous_before_gb": round(before, 2),
            "peak_anonymous_gb": round(max(peaks), 2),
            "gpu_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
        }
        rank = os.environ.get("RANK", "0")
        Path(os.environ["KIT_BENCH_OUT"], f"load-{rank}.json").write_text(json.dumps(found))
        return model

    return wrapper
