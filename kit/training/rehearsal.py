"""Before the first optimizer step: try what else could fail hours later, and leave no trace of it.

The longest batch, a checkpoint, its reload and an evaluation. No optimizer step is made, so nothing of the optimizer,
the scheduler or the scaler moves; the memory of the state that a first step would make is held in its place.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import re
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy, has_length
from transformers.utils import logging

from kit.errors import FAILED, LESS_MEMORY, KitError, first_line
from kit.schema.run_plan import RunPlan
from kit.storage import atomic_folder, run_directory
from kit.storage.json_files import atomic_write_json
from kit.training import checkpoint
from kit.training.keep_state import keep_state
from kit.training.packing_proof import text_ids, unwrap_base
from kit.training.whole_optimizer import flat_parts

STEPS = 200  # planned optimizer steps from which on `rehearsal: auto` rehearses, on GPUs
MICRO_STEPS = 2  # of the trial: in the second, activations and accumulated gradients are there together
STREAM_LENGTH = 1024  # tokens of a stream's row where trainer.max_length is null: TRL's default
PROBE = 4096  # elements; of fewer, 8-bit optimizers keep a 32-bit state
FOLDER = atomic_folder.TRASH + "rehearsal"  # beside the checkpoints: `remove_leftovers` clears it after a crash
OUT_OF_MEMORY = re.compile(r"out of memory|CU\w+_STATUS_ALLOC_FAILED|can't allocate memory", re.IGNORECASE)
FIXES = {
    "trial step": "the log holds the traceback; rehearsal=false leaves it out",
    "save": "free disk space, or another runs_dir",
    "reload": "a resume would fail too: the log holds the traceback; report the configuration",
    "evaluation": "trainer.per_device_eval_batch_size=1, or trainer.eval_strategy=no",
}
logger = logging.get_logger(__name__)
COUNTERS = ("_metrics", "_total_train_tokens", "current_gradient_accumulation_steps")  # trl's and transformers' own


@dataclass(frozen=True)
class TrialResult:
    """What the longest batch took. Lists hold a value for each rank, in GiB; `state`: what its optimizer will keep."""

    rows: int
    tokens: int  # of a row, padding included
    seconds: float
    allocated: list[float]  # at most, by torch's allocator; on a CPU the process's largest resident size
    reserved: list[float]
    state: list[float]


def prepare_rehearsal(trainer: Any, plan: RunPlan) -> None:
    """Have the trainer rehearse before its first step where the plan asks for it; the longest batch alone where its
    memory was forecast for a GPU.
    """

    def before_first_step() -> None:
        if is_due(plan.rehearsal, trainer):
            rehearse(trainer, plan.run_path)
        elif plan.memory and plan.rehearsal is None and is_first_start_on_gpu(trainer):
            try_longest_batch(trainer, plan.run_path)

    trainer.before_first_step = before_first_step


def is_due(setting: bool | None, trainer: Any) -> bool:
    """Whether to rehearse: never in a resumed run; null: on GPUs, where STEPS or more optimizer steps are planned."""
    if setting is None:
        return is_first_start_on_gpu(trainer) and trainer.state.max_steps >= STEPS
    return setting and not trainer.state.global_step


def is_first_start_on_gpu(trainer: Any) -> bool:
    return trainer.args.device.type == "cuda" and not trainer.state.global_step


def try_longest_batch(trainer: Any, run: Path) -> None:
    """Go forward and backward on the longest batch, as `rehearse` does, and say what it took. Collective."""
    with keep_state(trainer.model), keep_counters(trainer), name_part("trial step", trainer, run):
        result = trial_step(trainer)
    forget_peaks(trainer)
    if trainer.args.process_index == 0:
        print(f"trial     {describe_trial(result)} in {result.seconds:.1f} s", flush=True)


def rehearse(trainer: Any, run: Path) -> TrialResult:
    """Try the longest batch, a save, its reload and an evaluation; all is as before when it returns. Collective.

    run: the run directory. KitError (4) that names the part which failed; a rank that is out of memory leaves
    logs/rankN.oom.json too, and ends without the others, which may wait for it in a collective until they are ended.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir) / FOLDER
    started = time.monotonic()
    with keep_state(trainer.model), keep_counters(trainer):
        before = digest_weights(trainer)
        with name_part("trial step", trainer, run):
            result = trial_step(trainer)
        try:
            with name_part("save", trainer, run):
                save(trainer, folder, result)
            with name_part("reload", trainer, run):
                reload(trainer, folder)
                changed = digest_weights(trainer) != before
                error = None
                if changed:
                    error = KitError("the weights behind it are not those that were before", fix=FIXES["reload"])
                checkpoint.raise_on_all_ranks(error, trainer.ranks)
        finally:
            if args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
        evaluates = trainer.eval_dataset is not None and args.eval_strategy != "no"
        if evaluates:
            with name_part("evaluation", trainer, run):
                evaluate(trainer)
    forget_peaks(trainer)
    if args.process_index == 0:
        more = "saved, reloaded" + (", evaluated" if evaluates else "")
        print(f"rehearsal {describe_trial(result)}; {more} in {time.monotonic() - started:.1f} s", flush=True)
    return result


def describe_trial(result: TrialResult) -> str:
    """Say how large the batch was and what it took on the fullest rank."""
    return f"{result.rows} x {result.tokens:,} tokens, the longest batch: {max(result.allocated):.1f} GiB"


def forget_peaks(trainer: Any) -> None:
    """Give memory back and start its peaks anew: the figures of the run are the run's own."""
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- the parts ----


def trial_step(trainer: Any) -> TrialResult:
    """Go forward and backward on the longest batch, and drop the gradients; no optimizer step. Collective."""
    args, model, accelerator = trainer.args, trainer.model_wrapped, trainer.accelerator
    engine = model if trainer.is_deepspeed_enabled else None
    batch = longest_batch(trainer, trainer.train_dataset, args.train_batch_size)
    steps = min(args.gradient_accumulation_steps, MICRO_STEPS)
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    sizes = optimizer_state_bytes(trainer)
    held = [torch.empty(sizes.get(args.device.type, 0), dtype=torch.uint8, device=args.device).fill_(0)]
    started = time.monotonic()
    items = trainer._get_num_items_in_batch([batch] * steps, args.device)
    trainer.current_gradient_accumulation_steps = steps
    # DistributedDataParallel orders its buckets anew after the first gradients that it reduces, and so may round
    # otherwise; the others reduce as they do in a step.
    alone = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    with no_engine_step(engine):
        for number in range(steps):
            accelerator.gradient_state._set_sync_gradients(number == steps - 1)
            with accelerator.no_sync(model) if alone else contextlib.nullcontext():
                trainer.training_step(model, dict(batch), items)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    del held
    drop_gradients(model, engine)
    gib = [n / 2**30 for n in (*peak_memory(cuda), sum(sizes.values()))]
    allocated, reserved, state = zip(*checkpoint.gather_objects(gib, trainer.ranks), strict=True)
    rows, tokens = batch["input_ids"].shape
    return TrialResult(rows, tokens, seconds, list(allocated), list(reserved), list(state))


def save(trainer: Any, folder: Path, result: TrialResult) -> None:
    """Write what the run will save into `folder`; its disk must also hold the optimizer's state of later ones."""
    if trainer.args.save_strategy == SaveStrategy.NO:
        trainer.save_model(str(folder), _internal_call=True)
        return
    trainer.write_checkpoint(folder)
    error = None
    if trainer.args.should_save and not trainer.args.save_only_model:
        try:
            atomic_folder.check_free_space(int(sum(result.state) * 2**30), folder)
        except KitError as problem:
            error = problem
    checkpoint.raise_on_all_ranks(error, trainer.ranks)


def reload(trainer: Any, folder: Path) -> None:
    """Load a save as a resume does. DeepSpeed reads its own files alone, which a save of weights has not."""
    if trainer.is_fsdp_enabled:
        trainer._load_from_checkpoint(str(folder), trainer.model_wrapped)
    elif not trainer.is_deepspeed_enabled:
        trainer._load_from_checkpoint(str(folder))
    elif trainer.args.save_strategy != SaveStrategy.NO and not trainer.args.save_only_model:
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        strict = not hasattr(trainer.model, "peft_config")
        deepspeed_load_checkpoint(trainer.model_wrapped, str(folder), load_module_strict=strict)


def evaluate(trainer: Any) -> None:
    """One evaluation step on the longest rows of those that the run is evaluated on. Collective."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    model = trainer._wrap_model(trainer.model, training=False)
    loss_only = True if trainer.compute_metrics is None else trainer.args.prediction_loss_only
    for dataset in sets.values():
        batch = longest_batch(trainer, dataset, trainer.args.eval_batch_size)
        model.eval()
        trainer.prediction_step(model, batch, loss_only)


# ---- batches ----


def longest_batch(trainer: Any, dataset: Any, count: int) -> dict[str, Any]:
    """The `count` longest rows of a data set as the trainer's batch; of a stream, rows of max_length tokens.

    A stream's own rows stay unread: they are counted as they are.
    """
    sized = has_length(dataset)
    if sized:
        rows = [dataset[int(i)] for i in np.argsort(-row_lengths(dataset), kind="stable")[:count]]
    else:
        length = trainer.args.max_length or STREAM_LENGTH
        ids = np.resize(text_ids(trainer.processing_class, unwrap_base(trainer).config), length).tolist()
        rows = [{"input_ids": ids, "labels": ids, "seq_lengths": [length]}] * count
    trainer._set_signature_columns_if_needed()
    wanted = trainer._signature_columns if trainer.args.remove_unused_columns else rows[0].keys()
    return trainer.data_collator([{k: v for k, v in row.items() if k in wanted} for row in rows])


def row_lengths(dataset: Any) -> Any:
    """The tokens of each row as an array; the tokens themselves are not read."""
    import pyarrow.compute as pc

    chunks = dataset.data.column("input_ids").chunks
    lengths = np.concatenate([pc.list_value_length(c).to_numpy(zero_copy_only=False) for c in chunks])
    return lengths if dataset._indices is None else lengths[dataset._indices.column(0).to_numpy()]


# ---- memory ----


def optimizer_state_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of the state that this rank's optimizer makes at its first step, by kind of device.

    Told by a twin of it with a small parameter of the same dtype. {} with a warning where no twin can be made.
    """
    base, parts = trainer.optimizer, None
    while hasattr(base, "optimizer"):
        parts = flat_parts(base) if trainer.is_deepspeed_enabled and parts is None else parts
        base = base.optimizer
    parts = parts or [p for group in base.param_groups for p in group["params"]]
    sizes: dict[str, float] = {}
    known: dict[Any, float] = {}
    for part in parts:
        local = part.to_local() if hasattr(part, "to_local") else part
        kind = (local.dtype, local.device, local.ndim > 1)
        if base.state.get(part):
            continue  # it is there, and counted
        if kind not in known:
            try:
                known[kind] = state_bytes_per_element(base, *kind)
            except Exception as problem:  # optimizers take what they like; the run itself need not fail for it
                logger.warning(f"the memory of {type(base).__name__}'s state is not known: {first_line(problem)}")
                return {}
        sizes[local.device.type] = sizes.get(local.device.type, 0) + known[kind] * local.numel()
    return {device: int(size) for device, size in sizes.items()}


def state_bytes_per_element(optimizer: Any, dtype: torch.dtype, device: torch.device, matrix: bool) -> float:
    side = int(PROBE**0.5)
    parameter = nn.Parameter(torch.zeros((side, side) if matrix else PROBE, dtype=dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    names = inspect.signature(type(optimizer)).parameters
    twin = type(optimizer)([parameter], **{k: v for k, v in optimizer.defaults.items() if k in names})
    twin.step()
    return sum(v.nbytes for v in twin.state[parameter].values() if isinstance(v, Tensor)) / PROBE


def peak_memory(cuda: bool) -> tuple[int, int]:
    """The most bytes that were allocated and reserved; on a CPU the process's largest resident size, twice."""
    if cuda:
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, resident


# ---- no trace ----


@contextlib.contextmanager
def keep_counters(trainer: Any) -> Iterator[None]:
    """What the trainer has counted and what its callbacks have said are after the block as before."""
    before = {name: copy.deepcopy(vars(trainer)[name]) for name in COUNTERS if name in vars(trainer)}
    said = copy.deepcopy(trainer.state.stateful_callbacks)
    gradient_state = trainer.accelerator.gradient_state
    synced = gradient_state.sync_gradients
    try:
        yield
    finally:
        for name in COUNTERS:
            vars(trainer).pop(name, None)
        vars(trainer).update(before)
        trainer.state.stateful_callbacks = said
        gradient_state._set_sync_gradients(synced)


@contextlib.contextmanager
def no_engine_step(engine: Any) -> Iterator[None]:
    """DeepSpeed's engine makes no optimizer step: accelerate calls it behind the backward pass."""
    if engine is None:
        yield
        return
    name = "_is_gradient_accumulation_boundary"
    before = [(owner, getattr(owner, name)) for owner in (engine, engine.optimizer) if hasattr(owner, name)]
    engine.step = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del engine.step
        for owner, value in before:
            setattr(owner, name, value)


def drop_gradients(model: Any, engine: Any) -> None:
    """Forget what a backward pass has left.

    In DeepSpeed as its own step does when it skips one because gradients overflow (`step` in
    runtime/zero/stage_1_and_2.py and stage3.py, 0.19.8). Buffers that stay are zero again: of a parameter that gets no
    gradient in the first step, they would hold the one of here.
    """
    model.zero_grad()
    if engine is None:
        return
    zero = engine.optimizer
    zero.zero_grad(set_to_none=True)
    if not hasattr(zero, "averaged_gradients"):  # no ZeRO stage
        return
    parts = flat_parts(zero)
    if engine.zero_optimization_partition_weights():
        zero._pre_step()
        zero._partition_all_parameters()
        if zero.grad_partitions_flat_buffer is not None:
            zero.grad_partitions_flat_buffer.zero_()
        offloads = zero.offload_optimizer
    else:
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero._release_preflattened_grad_buffers()
        zero.all_grad_tensors.clear()
        offloads = zero.cpu_offload
        if offloads:
            zero._offload_accumulated_param_ids = set()
            zero.accumulated_grads_in_cpu.clear()
    if offloads:
        zero.reset_cpu_buffers()
        for part in parts:  # with an optimizer on the host these stay
            if part.grad is not None:
                part.grad.zero_()
    zero.averaged_gradients.clear()
    zero._backward_hook_state.reset_for_new_step()


def digest_weights(trainer: Any) -> str:
    """SHA-256 of what this rank holds of the trained weights, and of the float32 ones that its optimizer keeps."""
    tensors = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]
    if trainer.is_deepspeed_enabled:
        tensors += flat_parts(trainer.model_wrapped.optimizer)
    digest = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- failures ----


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on a GPU or the host; saves wrap theirs in a KitError."""
    wrapped = isinstance(error, RuntimeError | KitError) and OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, torch.OutOfMemoryError) or wrapped


@contextlib.contextmanager
def name_part(part: str, trainer: Any, run: Path) -> Iterator[None]:
    """Turn a failure of the block into a KitError (4) that names the part; out of memory, note it for the launcher."""
    try:
        yield
    except Exception as error:
        rank, line = trainer.args.process_index, first_line(error)
        fix = FIXES[part]
        if is_out_of_memory(error):
            cuda = trainer.args.device.type == "cuda"
            allocated, reserved = peak_memory(cuda)
            note = {"rank": rank, "part": part, "message": str(error)[:2000]}
            figures = {"allocated_gb": round(allocated / 2**30, 3), "reserved_gb": round(reserved / 2**30, 3)}
            (run / run_directory.LOGS).mkdir(parents=True, exist_ok=True)
            atomic_write_json(run / run_directory.LOGS / f"rank{rank}.oom.json", note | figures)
            fix = LESS_MEMORY
        elif isinstance(error, KitError) and error.problems[0].fix:
            fix = error.problems[0].fix
        problem = f"the rehearsal's {part} failed on rank {rank}, before the first step: {line}"
        raise KitError(problem, str(run / run_directory.LOGS / f"rank{rank}.log"), fix, code=FAILED) from error
