"""One rank's whole life, top to bottom: what `deepspeed --module kit.worker plan.json` does after the plan is read."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kit.errors import DONE, STOPPED, KitError
from kit.schema.run_plan import RunPlan
from kit.storage import manifest, run_directory
from kit.storage.json_files import atomic_write_json
from kit.system.terminal import print_status

DATA_TIMEOUT = 7 * 24 * 3600  # seconds that ranks wait for the one that prepares the data


def load_inputs(plan: RunPlan, args: Any) -> tuple[Any, Any, Any]:
    """Tokenizer, data and base model of a plan, as new."""
    from kit.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(plan)
    data = load_data(plan, tokenizer, args)
    return tokenizer, data, load_model(plan, tokenizer)


def load_data(plan: RunPlan, tokenizer: Any, args: Any) -> Any:
    """The plan's rows as tokens, prepared by one rank of each node; KitError on every rank where rows are bad.

    A resumed run is refused here, before a weight is loaded, where it would go on with other data.
    The others wait in a gloo group of its own, whose patience is days: NCCL would give up after ddp_timeout.
    """
    from kit.data import prepare, streams
    from kit.training import checkpoint, fingerprints, signals

    group = signals.host_side_group(timeout_s=DATA_TIMEOUT)
    outcome: Any = None
    if args.local_process_index == 0:
        try:
            outcome = (streams.check_streams if plan.dataset.streaming else prepare.prepare_data)(plan, tokenizer)
            if args.resume_from_checkpoint:
                report = outcome if plan.dataset.streaming else prepare.read_report(outcome)
                resumed = Path(args.resume_from_checkpoint)
                notes = fingerprints.compare_inputs(
                    plan, resumed, lambda: tokenizer, fingerprints.started_with(plan), report
                )
                for note in notes if args.process_index == 0 else ():
                    print_status(note)
        except KitError as error:
            outcome = error
    outcomes = checkpoint.gather_objects(outcome, group)
    for refused in outcomes:
        if isinstance(refused, KitError):
            raise refused
    of_this_node = outcomes[args.process_index - args.local_process_index]
    if plan.dataset.streaming:
        return streams.open_streams(plan, tokenizer, of_this_node)
    return prepare.open_prepared(of_this_node)


def train(
    plan: RunPlan,
    *,
    resume: str | None = None,
    callbacks: Sequence[Any] = (),
    load: Callable[[RunPlan, Any], tuple[Any, Any, Any]] = load_inputs,
    **hooks: Any,
) -> int:
    """Train the plan on this rank; returns the exit code (DONE or STOPPED). All ranks must enter.

    `load`: where tokenizer, data and base come from; a warm worker has them already.
    """
    started = time.monotonic()
    import torch

    from kit.models.initial_adapter import load_initial_adapter
    from kit.models.load import check_added_tokens_train, load_peft_config, prepare_leaf_modules, restore_adapter_dtype
    from kit.training import console, fingerprints, rehearsal
    from kit.training.callbacks import FingerprintCallback, StreamCallback
    from kit.training.packing_proof import PackingProofCallback
    from kit.training.trainer import ModifiedTrainer

    run = plan.run_path
    args = start_rank(plan)
    checkpoint = verified_checkpoint(plan, resume) if resume else None
    args.resume_from_checkpoint = checkpoint and str(checkpoint)
    tokenizer, data, model = load(plan, args)
    if args.process_index == 0:
        link_data(plan, data)
        fingerprints.record_inputs(plan, tokenizer, data)
    progress = console.ProgressCallback(run, plan)
    trainer = ModifiedTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        peft_config=load_peft_config(plan),
        callbacks=[progress, *callbacks],
        provenance={"plan": plan.hash, "base": plan.base},
        **hooks,
    )
    progress.trainer = trainer
    restore_adapter_dtype(trainer.model, plan)
    prepare_leaf_modules(trainer.model, plan)
    trainer.remove_callback(console.upstream_printer())
    check_added_tokens_train(trainer.model, plan)
    if plan.init_from and not resume:  # a checkpoint knows more than what the run began with
        load_initial_adapter(trainer.model, plan.init_from)
    console.print_banner(plan, trainer, data, time.monotonic() - started)
    rehearsal.prepare_rehearsal(trainer, plan)
    trainer.add_callback(PackingProofCallback(trainer))
    if plan.dataset.streaming:
        trainer.add_callback(StreamCallback(plan))
    trainer.add_callback(FingerprintCallback(trainer, plan, checkpoint))

    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if plan.dataset.streaming:
        data.report["splits"].update(counted_streams(plan))
    if trainer.stopped_by_signal:
        if args.process_index == 0:
            run_directory.set_status(run, "stopped", exit_code=STOPPED, step=trainer.state.global_step)
        args.distributed_state.wait_for_everyone()  # a launcher ends all ranks when the first one leaves
        return STOPPED

    save_and_evaluate(plan, trainer, data, result.metrics, started)
    args.distributed_state.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return DONE


def link_data(plan: RunPlan, data: Any) -> None:
    """Leave in the run directory which prepared rows it is trained on, and what became of those that were read."""
    from kit.data import prepare

    folder = data.folder
    if folder is None:  # a stream's counts are known at its end
        return
    samples = folder / prepare.SAMPLES if plan.dataset.report_samples else None
    where = {"key": folder.name, "folder": str(folder), "samples": samples and str(samples)}
    atomic_write_json(plan.run_path / run_directory.DATA, where | {"splits": prepare.split_counts(data.report)})


def counted_streams(plan: RunPlan) -> dict[str, Any]:
    """The counts of all streamed rows; KitError where rows were refused, for which the run has stopped and saved."""
    from kit.data.streams import StreamCounts

    counts = StreamCounts(plan)
    parts = counts.update()
    if counts.refused:
        raise KitError(counts.refused)
    return parts


def start_rank(plan: RunPlan) -> Any:
    """Join the other ranks, seed, and return the trainer's SFTConfig. Collective.

    SFTConfig comes before the model and is kept alive: zero.Init looks for the live DeepSpeed config that it holds
    (transformers modeling_utils.py).
    """
    from transformers import set_seed
    from trl import SFTConfig

    from kit.training import console

    check_world_size(plan)
    console.quiet_libraries()
    start_process_group(plan)
    args = SFTConfig(**sft_config_arguments(plan))
    check_ranks_agree(plan)
    if args.process_index == 0:
        run_directory.set_status(plan.run_path, "running", pid=os.getpid())
    set_seed(args.seed)  # PEFT initialises the adapter before the Trainer seeds
    return args


def save_and_evaluate(plan: RunPlan, trainer: Any, data: Any, trained: dict[str, float], started: float) -> None:
    """Save what was trained, evaluate it on the held-out rows, and write metrics.json and the status. Collective.

    trained: the figures of `trainer.train()`. started: when this rank began, by time.monotonic().
    """
    from kit.data import prepare
    from kit.training import console, tracking

    run = plan.run_path
    save_started = time.monotonic()
    trainer.save_model(str(run / (run_directory.ADAPTER if plan.peft else run_directory.MODEL)))
    save_seconds = time.monotonic() - save_started
    tracking.reopen_mlflow(plan)
    held_out = trainer.evaluate(None if data.test is data.validation else data.test) if data.test is not None else {}
    metrics = console.final_metrics(plan, trainer, trained, held_out, save_seconds, time.monotonic() - started)
    metrics["data"] = prepare.split_counts(data.report)
    if trainer.args.process_index == 0:
        atomic_write_json(run / run_directory.METRICS, metrics)
        run_directory.set_status(run, "done", exit_code=DONE, step=trainer.state.global_step)
        console.print_next_steps(plan, metrics)


def sft_config_arguments(plan: RunPlan) -> dict[str, Any]:
    """What SFTConfig is given: the plan's `trainer` as it is, and what other sections hold."""
    return {
        # Trackers show the run directory's name, in a project of the plan's name.
        **{
            "disable_tqdm": not run_directory.stdout_is_terminal(),
            "run_name": plan.run_path.name,
            "project": plan.name,
        },
        **plan.trainer,
        "dataset_kwargs": {**(plan.trainer.get("dataset_kwargs") or {}), "skip_prepare_dataset": True},
        # The labels say what is in the loss: with these SFTTrainer would look for chats and refuse tokens.
        "assistant_only_loss": False,
        "completion_only_loss": None,
        "output_dir": str(plan.run_path / run_directory.CHECKPOINTS),
        "deepspeed": copy.deepcopy(plan.deepspeed),
        # Upstream annotates a string for its command line; True is what it works with.
        "fsdp": bool(plan.fsdp) or None,
        "fsdp_config": copy.deepcopy(plan.fsdp),
        "ddp_backend": plan.trainer.get("ddp_backend")
        or ("gloo" if plan.trainer["use_cpu"] and plan.world_size > 1 else None),
    }


def start_process_group(plan: RunPlan) -> None:
    """On CPU DeepSpeed must know the world before zero.Init computes batch sizes with it."""
    if plan.deepspeed and plan.trainer["use_cpu"]:
        import deepspeed
        import torch.distributed as dist

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        # DeepSpeed leaves the buffers through which its ranks exchange, 70 MB each, in memory for ever, run after run.
        # Once every rank has opened them their names are not needed, and without a name they go with the last rank.
        dist.barrier()
        buffer = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
        Path("/dev/shm", f"deepspeed_allreduce_buffer_{buffer}").unlink(missing_ok=True)


def check_world_size(plan: RunPlan) -> None:
    """As many processes must run as the plan was resolved for: its batch arithmetic depends on it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.world_size:
        raise KitError(
            f"the plan is for {plan.world_size} processes, {world} {'was' if world == 1 else 'were'} started",
            where="launch.num_gpus",
            fix=f"start {plan.world_size}, or compose again",
        )


def check_ranks_agree(plan: RunPlan) -> None:
    """Every rank must hold the same plan. Collective."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    plans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(plans, (plan.hash, plan.memory and plan.memory.options[plan.memory.chosen].model_dump()))
    hashes = [digest for digest, _ in plans]
    if len(set(hashes)) > 1:
        raise KitError(f"the ranks hold different plans: {', '.join(hashes)}", fix="start all ranks with one plan")
    if any(option != plans[0][1] for _, option in plans):
        raise KitError(
            "the ranks' GPUs differ, and so does what fits: the nodes chose different batches or checkpointing",
            "trainer.activation_checkpointing, trainer.per_device_train_batch_size",
            "give both: trainer.activation_checkpointing=true trainer.per_device_train_batch_size=N",
        )


def verified_checkpoint(plan: RunPlan, resume: str) -> Path:
    """The checkpoint to go on from: a name below checkpoints/, checked against its manifest."""
    from kit.training import fingerprints

    folder = plan.run_path / run_directory.CHECKPOINTS / resume
    if damage := manifest.verify_folder(folder):
        raise KitError(
            f"{folder} is not a complete checkpoint: {damage[0]}", fix="kit resume takes the newest complete one"
        )
    fingerprints.compare_checkpoint(plan, folder)
    return folder
