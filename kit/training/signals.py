"""A signal on any rank becomes one agreed step on all ranks. Light: nothing is imported before training needs it.

The handler only sets a flag. The ranks agree through a gloo group of their own: the flag's all-reduce starts at the
end of one step and is waited for at the end of the next, so neither the GPU nor the step waits for it.
"""

from __future__ import annotations

import signal
from datetime import timedelta
from types import FrameType
from typing import Any

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
_received: list[str] = []
_installed = False


def _handle(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and "SIGINT" in _received:
        raise KeyboardInterrupt  # a second Ctrl-C means now; saves are atomic, so nothing half-written is published
    _received.append(name)


def install_handlers() -> None:
    """Catch SIGTERM, SIGUSR1 and SIGINT in this process; main thread only. Call it before the slow imports."""
    global _installed
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _handle)
    _installed = True


def received_signal() -> str | None:
    """The first signal that arrived in this process, by name."""
    return _received[0] if _received else None


def forget_signals() -> None:
    """Forget the signals that arrived (for a second run in one process)."""
    _received.clear()


def host_side_group(timeout_s: float = 1800) -> Any:
    """A gloo group over all ranks for small host-side messages; None in a one-process run. Collective.

    It keeps flags and file lists off the GPU's communicator, where they would cost a synchronisation.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


class StopAgreement:
    """Whether any rank was told to stop; the answer of one step is known at the next and is the same on all ranks."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.pending: Any = None
        self.flag: Any = None
        self.active = _installed
        if group is not None:
            # One rank with handlers is enough; every rank must know it, because the steps' exchange is collective.
            self.start_exchange(_installed)
            self.active = self.finish()

    def start_exchange(self, value: bool) -> None:
        """Start the exchange of one flag; collective, returns at once."""
        import torch
        import torch.distributed as dist

        self.flag = torch.tensor([int(value)], dtype=torch.int32)
        self.pending = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def step(self) -> bool:
        """Once per optimizer step on every rank: the answer of the step before, then ask again."""
        if not self.active:
            return False
        if self.group is None:
            return bool(_received)
        answer = self.finish()
        if not answer:
            self.start_exchange(bool(_received))
        return answer

    def finish(self) -> bool:
        """Wait for the question that is under way, if any, and return its answer."""
        if self.pending is None:
            return False
        self.pending.wait()
        self.pending = None
        return bool(self.flag.item())


def request_stop(reason: str = "SIGTERM") -> None:
    """Ask for the same stop from inside the process (a watched launcher that died, a time limit)."""
    _received.append(reason)
