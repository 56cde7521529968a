"""Where a rank's time goes: samples of its Python stack up to the first step, and torch's profile of two steps.

`KIT_BENCH_PROFILE=FOLDER` before a training benchmark's arm of the kit (kit_clock.py); rank 0 writes start.json and
steps.json there.
"""

from __future__ import annotations

import collections
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

PROFILED = (5, 6)  # steps
OWN = ("kit/", "trl/", "peft/", "transformers/", "accelerate/", "deepspeed/", "liger_kernel/", "safetensors/")
SECONDS = 0.05  # between samples


class StackSampler:
    """Samples the main thread: seconds in each function, with all that it called."""

    def __init__(self) -> None:
        self.began, self.seconds = time.time(), collections.Counter[str]()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample, args=(threading.main_thread().ident,), daemon=True)
        self.thread.start()

    def sample(self, ident: int) -> None:
        last = time.time()
        while not self.stop.wait(SECONDS):
            frame, now, seen = sys._current_frames().get(ident), time.time(), set()
            while frame:
                code = frame.f_code
                file = "/".join(Path(code.co_filename).parts[-3:])
                seen.add(f"{file}:{code.co_name}")
                frame = frame.f_back
            for name in seen:
                self.seconds[name] += now - last
            last = now

    def end(self, out: Path) -> None:
        self.stop.set()
        self.thread.join()
        own = {k: round(v, 2) for k, v in self.seconds.most_common() if v >= 0.2 and "importlib" not in k}
        out.write_text(json.dumps({"seconds": round(time.time() - self.began, 2), "functions": own}, indent=1))


class Profile(TrainerCallback):
    """torch's profile of PROFILED: milliseconds a step of each kernel and operator, and of the GPU's idle time."""

    def __init__(self, folder: Path, sampler: StackSampler) -> None:
        self.folder, self.sampler, self.profiler = folder, sampler, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            self.sampler.end(self.folder / "start.json")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == PROFILED[0] and args.process_index == 0:
            import torch

            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler and state.global_step == PROFILED[1]:
            self.profiler.__exit__(None, None, None)
            (self.folder / "steps.json").write_text(json.dumps(summarize(self.profiler), indent=1))
            self.profiler = None


def summarize(profiler: Any) -> dict[str, Any]:
    """Milliseconds a step."""
    steps = PROFILED[1] - PROFILED[0] + 1
    kernels = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]
    by_name: collections.Counter[str] = collections.Counter()
    for e in kernels:
        by_name[e.name[:90]] += e.time_range.elapsed_us() / 1e3 / steps
    found: dict[str, Any] = {"kernels": {k: round(v, 2) for k, v in by_name.most_common(40)}}
    for label, chosen in (("all", kernels), ("nccl", [e for e in kernels if "nccl" in e.name]),
                          ("without nccl", [e for e in kernels if "nccl" not in e.name])):  # fmt: skip
        found[f"busy, {label}"] = round(union(e.time_range for e in chosen) / 1e3 / steps, 2)
    if kernels:
        ends = [e.time_range.start for e in kernels], [e.time_range.end for e in kernels]
        found["from first to last kernel"] = round((max(ends[1]) - min(ends[0])) / 1e3 / steps, 2)
    averages = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)[:40]
    found["cpu"] = {e.key[:90]: [round(e.self_cpu_time_total / 1e3 / steps, 2), e.count // steps] for e in averages}
    return found


def union(ranges: Any) -> float:
    """Microseconds that at least one of the ranges covers."""
    covered, until = 0.0, float("-inf")
    for r in sorted(ranges, key=lambda r: r.start):
        covered += max(0.0, r.end - max(until, r.start))
        until = max(until, r.end)
    return covered
