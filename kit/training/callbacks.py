"""What the trainer does about a signal, a stream and a resume: callbacks of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from kit.data.streams import StreamCounts
from kit.errors import KitError
from kit.schema.run_plan import RunPlan
from kit.storage import atomic_folder, run_directory
from kit.system.terminal import print_status
from kit.training import checkpoint, fingerprints, signals

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


class StreamPosition(TrainerCallback, ExportableState):
    """Writes into each checkpoint where in a stream it stands: finished passes, and steps of the one that is not.

    transformers takes a stream for one endless pass, and resumes at row 0 after the first
    (huggingface/transformers#26413).
    """

    def __init__(self, passes: int = 0, steps: int = 0) -> None:
        self.passes, self.steps = passes, steps

    def state(self) -> dict[str, Any]:
        """What trainer_state.json holds."""
        return {"args": {"passes": self.passes, "steps": self.steps}, "attributes": {}}

    def restore(self, state: Any) -> None:
        """Take the place of the checkpoint that a trainer's state was read from; KitError where it does not say it."""
        found = (state.stateful_callbacks.get(type(self).__name__) or {}).get("args", {})
        if not {"passes", "steps"} <= found.keys():
            raise KitError(
                "the checkpoint does not say where in its stream it stands: another trainer or an earlier version "
                "made it",
                "dataset.streaming",
                "begin a new run from its weights: kit train ... peft.init_from=CHECKPOINT",
            )
        self.passes, self.steps = found["passes"], found["steps"]

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        if not control.should_training_stop:  # reached in the middle of a pass too
            self.passes, self.steps = self.passes + 1, 0


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


class FingerprintCallback(TrainerCallback):
    """Compares the schedule with the one that a resumed run had, and writes down schedule and base.

    trainer: the ModifiedTrainer. resume: the checkpoint, None at a beginning. The base is hashed behind the training
    and written with the first checkpoint.
    """

    def __init__(self, trainer: Any, plan: RunPlan, resume: Path | None) -> None:
        self.trainer, self.plan, self.resume = trainer, plan, resume
        self.base: fingerprints.BaseDigest | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        asked = {key: self.plan.trainer.get(key) for key in ("max_steps", "num_train_epochs")}
        schedule = {
            "asked": asked,
            "steps": state.max_steps,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "learning_rate": args.learning_rate,
            "global_batch_size": self.plan.global_batch_size,
        }
        error = None
        if args.process_index == 0:
            try:
                if self.resume and fingerprints.compare_schedule(self.plan, self.resume, schedule):
                    print_status(self.describe_new_schedule(args, state, self.resume))
            except KitError as refused:
                error = refused
        checkpoint.raise_on_all_ranks(error, self.trainer.ranks)
        if args.process_index == 0:
            run_directory.update_fingerprints(self.plan.run_path, schedule=schedule)
            self.base = fingerprints.BaseDigest(self.plan)

    def describe_new_schedule(self, args: Any, state: Any, resume: Path) -> str:
        """What another number of steps does to the learning rate where the run goes on."""
        before = fingerprints.recorded_schedule(self.plan)["steps"]
        text = f"warning: the run was one of {before} steps and goes on to {state.max_steps}"
        rates = [learning_rate_at(args, state.global_step, total) for total in (before, state.max_steps)]
        if None not in rates:
            text += f": at step {state.global_step} the learning rate jumps from {rates[0]:.3g} to {rates[1]:.3g}"
        return f"{text}; a new run has a schedule of its own: {fingerprints.new_run_from(self.plan, resume)}"

    def on_save(self, args, state, control, **kwargs):
        if self.base is not None:
            self.base.record()
            self.base = None

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)


def learning_rate_at(args: Any, step: int, total: int) -> float | None:
    """The learning rate at a step of a run of `total` steps; None where the schedule is no function of the step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kwargs = {"num_warmup_steps": args.get_warmup_steps(total), "num_training_steps": total}
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=args.lr_scheduler_kwargs, **kwargs
    )
    lambdas = getattr(schedule, "lr_lambdas", None)
    return args.learning_rate * lambdas[0](step) if lambdas else None
