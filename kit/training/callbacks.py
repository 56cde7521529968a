"""What the trainer does about a signal, and where its clocks begin and end: a callback of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.utils import logging

from kit.storage import atomic_folder
from kit.training import signals as stopping

if TYPE_CHECKING:
    from kit.training.trainer import ModifiedTrainer

logger = logging.get_logger(__name__)


class StopAtAgreedStep(TrainerCallback):
    """Turns a signal on any rank into one step at which all ranks save and stop."""

    def __init__(self, trainer: ModifiedTrainer) -> None:
        self.trainer = trainer
        self.agreement: stopping.Agreement | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.stopped_by_signal = False
        self.trainer.saved_step = None
        if args.should_save:
            atomic_folder.remove_leftovers(args.output_dir)
        self.agreement = stopping.Agreement(self.trainer.ranks)
        self.trainer.pace.attach(self.trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreement is None or not self.agreement.step() or state.global_step >= state.max_steps:
            return  # after the last step there is nothing to stop: the run is finished and is saved as such
        cause = stopping.requested() or "a signal on another rank"
        logger.warning(f"{cause}: saving and stopping at step {state.global_step}")
        self.trainer.stopped_by_signal = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # whoever sent the signal waits seconds, not for an evaluation

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.stopped_by_signal:  # reached on the way out, also in the middle of an epoch
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.pace.detach()
        if self.agreement is not None:
            self.agreement.finish()
