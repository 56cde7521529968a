"""The most GPU memory that each phase of a run took, for metrics.json and `kit plan --calibrate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class MemoryPeaks(TrainerCallback):
    """Bytes of torch's allocator at each phase's peak, of this rank. torch's own peaks begin anew with each phase."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.phases: dict[str, int] = {}
        self.most_allocated = self.most_reserved = 0

    def end_phase(self, name: str) -> None:
        """Note what was allocated at most since the last phase ended."""
        if not self.cuda:
            return
        peak = torch.cuda.max_memory_allocated()
        self.phases[name] = max(peak, self.phases.get(name, 0))
        self.most_allocated = max(self.most_allocated, peak)
        self.most_reserved = max(self.most_reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Return the most bytes that were allocated so far in the run."""
        return max(self.most_allocated, torch.cuda.max_memory_allocated())

    def figures(self) -> dict[str, Any] | None:
        """Return GiB: allocated and reserved at most, of each phase, and what all programs hold of the GPU now."""
        if not self.cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        reserved = max(self.most_reserved, torch.cuda.max_memory_reserved())
        sizes = {"allocated": self.allocated(), "reserved": reserved, "on_the_gpu": total - free, "gpu": total}
        found: dict[str, Any] = {name: round(size / 2**30, 3) for name, size in sizes.items()}
        return found | {"phases": {name: round(size / 2**30, 3) for name, size in self.phases.items()}}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.end_phase("load")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.cuda:  # what came since the last phase ended (a log, other callbacks) belongs to none
            self.most_allocated = self.allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.end_phase("forward and backward")  # under DeepSpeed the optimizer's step too: accelerate has it there

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end_phase("step")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.end_phase("evaluate")

    def on_save(self, *_: Any, **__: Any) -> None:
        self.end_phase("save")
