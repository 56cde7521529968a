"""What each phase of a run takes on a GPU, from torch's own peaks, which begin anew with each phase."""

from __future__ import annotations

import pytest
import torch

from kit.training.memory_peaks import MemoryPeaks


class Allocator:
    """torch.cuda's counters: `take` allocates, `give` frees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = self.reserved = 0
        for name, value in {
            "max_memory_allocated": lambda: self.peak, "max_memory_reserved": lambda: self.reserved,
            "reset_peak_memory_stats": self.reset, "mem_get_info": lambda: (10 * 2**30, 80 * 2**30),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def reset(self) -> None:
        self.peak = self.now

    def take(self, gib: float) -> None:
        self.now += int(gib * 2**30)
        self.peak, self.reserved = max(self.peak, self.now), max(self.reserved, self.now)

    def give(self, gib: float) -> None:
        self.now -= int(gib * 2**30)


def test_each_phase_has_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, peaks = Allocator(monkeypatch), MemoryPeaks(True)
    gpu.take(20)  # weights, and the tensor that is loaded
    gpu.give(2)
    peaks.on_train_begin()
    for more in (0, 3, 1):  # batches of other lengths
        peaks.on_step_begin()
        gpu.take(30 + more)
        gpu.give(30 + more)
        peaks.on_pre_optimizer_step()
        gpu.take(4)
        gpu.give(4)
        peaks.on_step_end()
        assert peaks.allocated() == (48 + max(more, 3 * (more > 0))) * 2**30  # not forgotten with torch's
    gpu.take(50)
    gpu.give(50)
    peaks.on_evaluate()
    found = peaks.figures()
    assert found and found["phases"] == {"load": 20, "forward and backward": 51, "step": 22, "evaluate": 68}
    assert (found["allocated"], found["reserved"], found["on_the_gpu"], found["gpu"]) == (68, 68, 70, 80)


def test_a_cpu_has_none() -> None:
    peaks = MemoryPeaks(False)
    peaks.on_train_begin()
    peaks.on_step_begin()
    peaks.on_step_end()
    assert peaks.figures() is None and peaks.phases == {}
