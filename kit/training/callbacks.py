"""What the trainer does about a signal: a callback of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from kit.data.streams import StreamCounts
from kit.schema.run_plan import RunPlan
from kit.storage import atomic_folder
from kit.training import signals

logger = logging.get_logger(__name__)


class StopOnSignalCallback(TrainerCallback):
    """Turns a signal on any rank into one step at which all ranks save and stop; `stopped` says that it did.

    group: the ranks' host-side group (`signals.host_side_group`), None in a one-process run.
    begin, end: called where training begins and ends, on every rank.
    """

    def __init__(self, group: Any, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.group, self.begin, self.end = group, begin, end
        self.stopped = False
        self.agreement: signals.StopAgreement | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = False
        if args.should_save:
            atomic_folder.remove_leftovers(args.output_dir)
        self.agreement = signals.StopAgreement(self.group)
        self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreement is None or not self.agreement.step() or state.global_step >= state.max_steps:
            return  # after the last step there is nothing to stop: the run is finished and is saved as such
        cause = signals.received_signal() or "a signal on another rank"
        logger.warning(f"{cause}: saving and stopping at step {state.global_step}")
        self.stopped = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # whoever sent the signal waits seconds, not for an evaluation

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # reached on the way out, also in the middle of an epoch
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.end()
        if self.agreement is not None:
            self.agreement.finish()


class StreamCallback(TrainerCallback, ExportableState):
    """Counts the rows of streams as they are read, and stops at refused ones; each checkpoint holds the counts."""

    def __init__(self, plan: RunPlan) -> None:
        self.counts = StreamCounts(plan)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json holds; rows are counted anew where a resume reads them again."""
        return {"args": {}, "attributes": {"read": self.counts.update()}}

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.update()
        if self.counts.refused and not signals.received_signal():
            signals.request_stop("bad rows in the stream")
