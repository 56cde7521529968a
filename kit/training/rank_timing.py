"""What each rank does by itself in a step, so that a slow one is found: the whole step takes equally long on all.

Seconds for reading rows and for the model's forward pass, and the memory; once per logging interval rank 0 collects
them through the host-side group. Under ZeRO-3 and FSDP forward passes wait for one another: there a slow reader is
found, a slow GPU is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist

MAX_EVENTS = 64  # forward passes that are timed on a GPU per interval; more would tell nothing new


class RankTimer:
    """The clocks of one rank. `exchange_due` says that the next `exchange` is one that every rank makes."""

    def __init__(self, group: Any, cuda: bool, compiled: bool) -> None:
        self.group, self.cuda = group, cuda
        self.compiled = compiled  # a hook on a compiled model would break its graph
        self.exchange_due = False
        self.latest: dict[str, list[float]] = {}
        self.hooks: list[Any] = []
        self.pending: tuple[Any, torch.Tensor] | None = None
        self.peak: Callable[[], int] | None = None  # bytes at most so far, where somebody resets torch's own
        self.reset()

    def reset(self) -> None:
        self.steps = self.passes = 0
        self.load = self.forward = 0.0
        self.events: list[tuple[Any, Any]] = []
        self.forward_started: Any = None

    def attach(self, model: Any) -> None:
        """Time the model's forward passes until `detach`."""
        self.detach()
        self.reset()
        self.latest = {}
        if not self.compiled:
            # First and last of the hooks, so that what others hang on is in between.
            pre_hook = model.register_forward_pre_hook(self.start_forward, prepend=True)
            self.hooks = [pre_hook, model.register_forward_hook(self.end_forward)]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def start_forward(self, module: Any, *_: Any) -> None:
        self.forward_started = None
        if not module.training:
            return
        if not self.cuda:
            self.forward_started = time.perf_counter()
        elif len(self.events) < MAX_EVENTS:
            self.forward_started = torch.cuda.Event(enable_timing=True)
            self.forward_started.record()

    def end_forward(self, module: Any, *_: Any) -> None:
        if not module.training:
            return
        self.passes += 1
        if self.forward_started is None:
            return
        if self.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.events.append((self.forward_started, end))
        else:
            self.forward += time.perf_counter() - self.forward_started
        self.forward_started = None

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of one step as they are, timed."""
        self.steps += 1
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.load += time.perf_counter() - started
            yield batch

    def figures(self) -> list[float]:
        """[seconds of reading per step, seconds of forward passes per step, GiB] of this rank's interval."""
        if self.cuda:  # the loss has just been fetched, so the events lie behind; one that does not is left out
            done = [a.elapsed_time(b) / 1e3 for a, b in self.events if b.query()]
            self.forward = sum(done) / len(done) * self.passes if done else 0.0
            memory = self.peak() if self.peak else torch.cuda.max_memory_allocated()
        else:
            memory = psutil.Process().memory_info().rss
        steps = max(self.steps, 1)
        return [self.load / steps, self.forward / steps, memory / 2**30]

    def exchange(self) -> None:
        """Send this rank's figures to rank 0, which keeps those of all in `latest`. Collective; only rank 0 waits."""
        self.exchange_due = False
        own = torch.tensor(self.figures(), dtype=torch.float32)
        self.reset()
        gathered = [own]
        if self.group is not None:
            first = dist.get_rank() == 0
            if self.pending is not None:
                self.pending[0].wait()
            gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())] if first else []
            work = dist.gather(own, gathered if first else None, dst=0, group=self.group, async_op=True)
            self.pending = None if first else (work, own)  # the tensor must live until it is sent
            if first:
                work.wait()
        columns = torch.stack(gathered).T.tolist() if gathered else [[], [], []]
        names = ("rank_load_seconds", "rank_forward_seconds", "rank_memory_gb")
        rounded = [[round(v, digits) for v in column] for column, digits in zip(columns, (5, 5, 3), strict=True)]
        self.latest = dict(zip(names, rounded, strict=True))
