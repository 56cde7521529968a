"""ModifiedTrainer: TRL's SFTTrainer with other saving and stopping, and nothing else changed.

Every override of a private method of theirs stands here. tests/training/test_trainer.py holds the hashes of the
upstream methods that these follow (transformers/trainer.py, trl/trainer/sft_trainer.py) and says what to re-read when
one changes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, has_length
from transformers.utils import logging
from trl import SFTTrainer

from kit.errors import FAILED, REFUSED, KitError
from kit.models import adapters, checkpointing, kernels
from kit.storage import atomic_folder, checkpoints, manifest
from kit.training import bad_batches, checkpoint, saved_config, signals, whole_optimizer
from kit.training.callbacks import StopOnSignalCallback, StreamPosition
from kit.training.memory_peaks import MemoryPeaks
from kit.training.packing_proof import unwrap_base
from kit.training.rank_timing import RankTimer
from kit.training.saving import atomic_save, rotate_checkpoints, save_error

logger = logging.get_logger(__name__)


class ModifiedTrainer(SFTTrainer):
    """SFTTrainer whose saves are adapter-only, complete or absent, and which stops at a step that all ranks agree on.

    Takes SFTTrainer's arguments and `provenance` ({"plan": hash, "base": {...}}), which goes into every manifest;
    After `train()`, `stopped_by_signal` tells whether it ended early because of a signal; signals are only seen where
    `kit.training.signals.install_handlers()` was called. A non-finite loss or gradient raises KitError (4).
    """

    model: Any  # upstream types these more widely than they are by the time they are used here
    args: Any
    state: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *rest: Any,
        provenance: dict | None = None,
        **kwargs: Any,
    ) -> None:
        revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
        self.config_before = (
            {} if isinstance(model, PeftModel) else saved_config.config_before_training(model, revision)
        )
        self.provenance = provenance or {}
        self.saved_step: int | None = None
        self.saved_by = 0  # the processes that saved what is resumed from
        self.staging: Path | None = None  # the folder that a checkpoint is being built in
        self.before_first_step: Callable[[], None] | None = None  # called by `train()` where all is prepared for it
        self.checkpoint_seconds: list[float] = []  # how long each checkpoint held up training
        super().__init__(model, args, *rest, **kwargs)
        if (self.args.activation_checkpointing_kwargs or {}).get(checkpointing.SELECTIVE):
            checkpointing.enable_selective(self.model)
        kernels.undo_liger(unwrap_base(self), self.args.use_liger_kernel)
        if self.args.use_liger_kernel:
            self.args.liger_kernel_config = kernels.liger_kernel_config(self.args)
        adapters.leave_casts_to_autocast(self.model)
        self.args.logging_nan_inf_filter = False  # it hides what `log` looks for, at the price of a sync per step
        self.ranks = signals.host_side_group(self.args.ddp_timeout)
        cuda = self.args.device.type == "cuda"
        self.rank_timer = RankTimer(self.ranks, cuda, bool(self.args.torch_compile))
        self.memory_peaks = MemoryPeaks(cuda)
        self.rank_timer.peak = self.memory_peaks.allocated
        self.add_callback(self.memory_peaks)
        self.stop_callback = StopOnSignalCallback(self.ranks, self._begin, self.rank_timer.detach)
        self.add_callback(self.stop_callback)
        self.stream_position = None if has_length(self.train_dataset) else StreamPosition()
        if self.stream_position is not None:
            self.add_callback(self.stream_position)

    # ---- stopping ----

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the last `train()` ended early because of a signal."""
        return self.stop_callback.stopped

    def _begin(self) -> None:
        self.saved_step = None
        self.rank_timer.attach(self.model)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As upstream; a checkpoint with a manifest is verified first, and True means the newest complete one."""
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checked_resume(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checked_resume(self, requested: Any) -> str | bool:
        chosen: Any = requested
        error = None
        if self.args.should_save:
            if requested is True:
                atomic_folder.remove_leftovers(self.args.output_dir)
                newest = manifest.newest_complete_checkpoint(self.args.output_dir)
                for sentence in newest.skipped:
                    logger.warning(sentence)
                chosen = str(newest.path or True)
                if newest.path is None:
                    chosen = True  # no checkpoint of ours: upstream's rule, for runs that SFTTrainer began
            elif (Path(requested) / manifest.NAME).is_file():
                problems = manifest.verify_folder(requested)
                if problems:
                    error = KitError(
                        "; ".join(problems), where=str(requested), fix="resume from an older checkpoint", code=FAILED
                    )
        checkpoint.raise_on_all_ranks(error, self.ranks)
        chosen = checkpoint.gather_objects(chosen, self.ranks)[0]
        self.saved_by = self.args.world_size
        if chosen is True:
            return True
        if (Path(chosen) / manifest.NAME).is_file():
            self.saved_by = manifest.read_manifest(chosen)["world_size"]
            self._check_processes(Path(chosen))
        return os.fspath(chosen)

    def _check_processes(self, folder: Path) -> None:
        """Refuse a checkpoint that this number of processes cannot go on from; say what another one changes."""
        loader, adapter = self.args.accelerator_config, isinstance(self.model, PeftModel)
        problems = checkpoints.refuse_resume(
            folder,
            self.saved_by,
            self.args.world_size,
            trainer={**vars(self.args), "accelerator_config": loader.to_dict()},
            streaming=not has_length(self.train_dataset),
            deepspeed=self._deepspeed_json(),
            adapter=adapter,
            start_anew=checkpoints.weights_override(folder, adapter),
        )
        if problems:
            raise KitError(problems, code=REFUSED)
        if self.saved_by != self.args.world_size and self.args.should_save:
            logger.warning(
                f"{folder.name} was saved by {checkpoints.count(self.saved_by)} and goes on with "
                f"{self.args.world_size}: the same rows in each step, the same optimizer state; dropout draws anew"
            )

    def _deepspeed_json(self) -> dict[str, Any] | None:
        return self.accelerator.state.deepspeed_plugin.deepspeed_config if self.is_deepspeed_enabled else None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        file = None
        if resume_from_checkpoint and self.is_deepspeed_enabled:
            # DeepSpeed's own files are for the same processes and layout alone: else they are not offered to it.
            file, layout = checkpoints.whole_optimizer_of(Path(resume_from_checkpoint))
            if self.saved_by == self.args.world_size and layout == checkpoints.zero_layout(self._deepspeed_json()):
                file = None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if file else resume_from_checkpoint)
        if file:
            whole_optimizer.load_whole_optimizer(self.model, self.model_wrapped, file)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)  # the schedule: no optimizer under DeepSpeed
            self._load_scaler(resume_from_checkpoint)
        if self.before_first_step is not None:
            # The engine is there; the clock that train_runtime is counted by, callbacks and trackers have not begun.
            self.before_first_step()
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.saved_by == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        # Upstream would give the first ranks the states of others and leave the rest; these differ, and repeat.
        set_seed(self.args.seed + self.state.global_step * self.args.world_size + self.args.process_index)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with checkpoint.keep_trainable_dtypes(self.model):
            return super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with checkpoint.keep_trainable_dtypes(self.model):
            super()._load_best_model()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        if self.stream_position is None:
            return position
        if self.state.global_step:
            self.stream_position.restore(self.state)
        batches = self.stream_position.steps * self.args.gradient_accumulation_steps
        return self.stream_position.passes, 0 if self.args.ignore_data_skip else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Upstream looks whether the run is over only after a step, so resuming a finished run would add one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- figures ----

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(self.rank_timer.time_batches(epoch_iterator), *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The condition under which upstream gathers the loss from all ranks: none of them skips the exchange.
        self.rank_timer.exchange_due = (
            self.control.should_log and self.state.global_step > self._globalstep_last_logged
        )
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as upstream does; then ZeRO-3 lets go of what it gathered for a backward pass that did not follow.

        A save would find parameters in flight, and DeepSpeed refuses to part them (stage3.py, GatheredParameters).
        """
        result = super().evaluation_loop(*args, **kwargs)
        engine: Any = self.model_wrapped
        if self.is_deepspeed_enabled and hasattr(engine, "empty_partition_cache"):
            engine.empty_partition_cache()
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As upstream, then stop where the loss or the gradient is not finite; all ranks see the same values."""
        if self.rank_timer.exchange_due:
            self.rank_timer.exchange()
        super().log(logs, *args, **kwargs)
        for name in ("loss", "grad_norm", "train_loss"):
            value = logs.get(name)
            if value is None or math.isfinite(value) or (name == "grad_norm" and self.args.fp16):
                continue  # fp16's loss scaler meets infinite gradients and skips those steps
            try:
                bad_batches.write_rows_before_nonfinite_loss(self)
            except Exception as problem:  # a note for `kit doctor`: the stop itself matters more
                logger.warning(f"the rows before it could not be noted: {problem}")
            raise KitError(
                f"{name} is {value} at step {self.state.global_step}: training stopped, nothing of it is saved",
                where=f"step {self.state.global_step}",
                fix="lower learning_rate, set max_grad_norm, or look at the data of the steps before",
                code=FAILED,
            )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.stopped_by_signal:
            # Without a best one upstream neither loads it nor, at save_total_limit=1, deletes what was just saved.
            self.state.best_model_checkpoint = None
        result = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        return result

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, or the whole model where there is none, with its tokenizer. Collective.

        The folder appears complete, with a manifest, or not at all. KitError (4) where it would not be complete.
        """
        final = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.staging is not None and final == self.staging:
            self._write_model(final)
            return
        kind = "adapter" if isinstance(self.model, PeftModel) else "model"
        with self._saving(final, kind) as staging:
            self._write_model(staging)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _saving(self, final: Path, kind: str) -> AbstractContextManager[Path]:
        return atomic_save(final, kind, self.args, self.ranks, self.state.global_step, self.provenance)

    def _write_model(self, folder: Path) -> None:
        """The model's files in `folder`, proven complete, and the tokenizer's. Collective."""
        writer = self.args.should_save
        if (
            self.is_fsdp_enabled
            or self.is_distributed_loading_by_transformers
            or not isinstance(self.model, PreTrainedModel | PeftModel)
        ):
            super().save_model(str(folder), _internal_call=True)
            if writer:
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # it can hold hub_token
            return
        error = None
        try:
            if isinstance(self.model, PeftModel):
                self._write_adapter(folder, writer)
            else:
                self._write_full(folder, writer)
            if writer and self.processing_class is not None:
                self.processing_class.save_pretrained(str(folder))
        except (KitError, OSError, SafetensorError) as problem:
            error = save_error(problem, folder, self.state.global_step)
        checkpoint.raise_on_all_ranks(error, self.ranks)

    def _write_adapter(self, folder: Path, writer: bool) -> None:
        tensors, expected, embeddings = checkpoint.trainable_state_dict(self.model, writer)
        if not writer:
            return
        self.model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=embeddings)
        for adapter, keys in expected.items():
            adapter_folder = folder if adapter == "default" else folder / adapter
            for remark in checkpoint.check_saved_adapter(adapter_folder, keys, trained=self.state.global_step > 0):
                logger.warning(remark)

    def _write_full(self, folder: Path, writer: bool) -> None:
        tensors = checkpoint.full_state_dict(self.model, writer)
        if not writer:
            return
        # save_pretrained takes the tensors out of the dict that it is given
        self.model.save_pretrained(str(folder), state_dict=dict(tensors))
        checkpoint.check_saved_model(folder, tensors, self.model._keys_to_ignore_on_save or ())
        saved_config.restore_config(folder, self.config_before, self.processing_class, bool(self.args.pad_token))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self.saved_step == step:
            return  # an epoch's end asks again for what a step's end has just saved
        started = time.monotonic()
        model_id = self.args.hub_model_id or self.args.output_dir
        self.create_model_card(model_name=Path(model_id).name)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = self._get_output_dir(trial=trial)
        final = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step:
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == final or os.path.exists(best):
                self.state.best_model_checkpoint = best
        self.write_checkpoint(Path(final))
        self.saved_step = step
        if self.args.should_save:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.checkpoint_seconds.append(time.monotonic() - started)
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def write_checkpoint(self, final: Path) -> None:
        """Write a complete checkpoint to `final`; nothing but the files and `state.stateful_callbacks`. Collective."""
        with self._saving(final, "checkpoint") as staging:
            self.staging = staging
            try:
                self.save_model(str(staging), _internal_call=True)
            finally:
                self.staging = None
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_whole_optimizer(staging)
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            if self.args.should_save:
                self._save_state(staging)

    def _save_whole_optimizer(self, folder: Path) -> None:
        deepspeed = self._deepspeed_json()
        if deepspeed is None or checkpoints.why_not_whole(deepspeed, isinstance(self.model, PeftModel)):
            return
        error, reason, file = None, "", folder / checkpoints.WHOLE_OPTIMIZER
        layout = checkpoints.zero_layout(deepspeed)
        try:
            reason = whole_optimizer.save_whole_optimizer(
                self.model, self.model_wrapped, file, layout, self.args.should_save
            )
        except (OSError, SafetensorError) as problem:
            error = save_error(problem, folder, self.state.global_step)
        checkpoint.raise_on_all_ranks(error, self.ranks)
        if reason and self.args.should_save:
            logger.warning_once(
                f"checkpoints can be resumed by {checkpoints.count(self.args.world_size)} alone: {reason}"
            )

    def _save_state(self, folder: Path) -> None:
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                name = type(part).__name__
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(part.state())
                else:
                    self.state.stateful_callbacks[name] = part.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
