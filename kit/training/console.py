"""What a run says while it trains, and the figures it leaves: metrics.jsonl, metrics.json."""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from kit.config.memory_choice import describe_choice
from kit.forecast.of_plan import forecast_plan
from kit.inspection.model import inspect_model
from kit.models.attention import describe_attention
from kit.models.kernels import describe_kernels
from kit.schema.run_plan import RunPlan
from kit.schema.steps import describe_steps, steps_per_epoch
from kit.storage import run_directory
from kit.training.packing_proof import unwrap_base


def quiet_libraries() -> None:
    """Leave the console to the run: library bars and notices about names to come say nothing a user can act on."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


class ProgressCallback(TrainerCallback):
    """Appends every log to metrics.jsonl; without a terminal it prints a line per interval instead of a bar.

    Each start of training first writes a row of its own, with max_steps and no loss. Rows with a loss also hold
    tokens_per_second, without the time of evaluations and saves, and `trainer.rank_timer.latest`, a figure per rank.
    """

    def __init__(self, run: Path, plan: RunPlan) -> None:
        self.path, self.plan, self.start = run / run_directory.METRICS_LOG, plan, time.monotonic()
        self.trainer: Any = None  # set once there is one
        self.interval = self.stepped = self.start
        self.tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.interval = self.stepped = time.monotonic()
        self.tokens = 0.0
        if state.is_world_process_zero:
            self.append(
                {
                    "step": state.global_step,
                    "seconds": 0.0,
                    "max_steps": state.max_steps,
                    "world_size": args.world_size,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                }
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skip()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skip()

    def skip(self) -> None:
        """What has passed since the step's end was no training."""
        now = time.monotonic()
        self.interval += now - self.stepped
        self.stepped = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        seconds = round(time.monotonic() - self.start, 3)
        row = {"step": state.global_step, "seconds": seconds, **{k: v for k, v in logs.items() if is_finite_number(v)}}
        if torch.cuda.is_available() and not args.use_cpu:
            row["memory_gb"] = round(self.trainer.memory_peaks.allocated() / 2**30, 3)
        if "loss" in logs:
            row |= self.speed(logs)
        self.append(row)
        if args.disable_tqdm and ("loss" in logs or "eval_loss" in logs):
            figures = [
                f"{k} {v:.4g}" for k, v in logs.items() if k in ("loss", "eval_loss", "grad_norm", "learning_rate")
            ]
            print(f"step {state.global_step}/{state.max_steps}  {'  '.join(figures)}  {seconds:.0f} s", flush=True)

    def speed(self, logs: dict[str, Any]) -> dict[str, Any]:
        """tokens_per_second of the interval that ends here, of all ranks together, and each rank's own figures."""
        figures: dict[str, Any] = {}
        now, tokens = time.monotonic(), logs.get("num_tokens")
        if tokens is not None and now > self.interval and tokens >= self.tokens:
            figures["tokens_per_second"] = round((tokens - self.tokens) / (now - self.interval), 1)
        self.interval = self.stepped = now
        self.tokens = tokens if tokens is not None else self.tokens
        return figures | (self.trainer.rank_timer.latest if self.trainer is not None else {})

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


def is_finite_number(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def upstream_printer() -> type[TrainerCallback]:
    """The callback that would print every log as a dict; Progress does it readably."""
    return PrinterCallback


def print_banner(plan: RunPlan, trainer: Any, data: Any, seconds: float) -> None:
    """What was found, once, on rank 0: hardware, parameters, data, batch."""
    if trainer.args.process_index != 0:
        return
    parameters = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in trainer.model.parameters()]
    total, trained = sum(n for n, _ in parameters), sum(n for n, t in parameters if t)
    device = "CPU" if trainer.args.use_cpu else torch.cuda.get_device_name()
    engine = f"DeepSpeed ZeRO-{plan.zero_stage}" if plan.deepspeed else ("FSDP" if plan.fsdp else "no sharding")
    config = unwrap_base(trainer).config
    attention = str(config._attn_implementation)
    computed_in = getattr(torch, plan.model.dtype if plan.precision == "float32" else plan.precision)
    held_out = f"{count_rows(data.test)} held out"
    if data.test is not data.validation:
        held_out = f"{count_rows(data.validation)} for validation, {count_rows(data.test)} for the test at the end"
    lines = [
        f"run       {run_directory.path_from_here(plan.run_path)}",
        f"machine   {plan.world_size} x {device}, {plan.precision}, {engine}",
        f"model     {plan.model.name_or_path}: {total:,} parameters, {trained:,} trained "
        f"({100 * trained / total:.2f} %)",
        f"attention {describe_attention(attention, trainer.args.device, computed_in, config)}",
        f"kernels   {describe_kernels(trainer.args, config, plan.precision)}",
        f"data      {count_rows(data.train)} rows, {held_out}",
        *(f"          {note}" for note in [*data.notes, *(n for n in plan.notes if n.startswith("packing: "))]),
        f"batch     {plan.global_batch_size} rows per step = {trainer.args.per_device_train_batch_size} rows x "
        f"{trainer.args.gradient_accumulation_steps} accumulation x {plan.world_size} processes",
        *([f"memory    {describe_choice(plan.memory)}"] if plan.memory else []),
        f"steps     {describe_run_steps(plan, data)}",
        f"ready     after {seconds:.1f} s",
    ]
    print("\n".join(lines), flush=True)


def describe_run_steps(plan: RunPlan, data: Any) -> str:
    """The steps of the run, with the rows of a step where an epoch has fewer than were asked for."""
    if not hasattr(data.train, "__len__"):
        return f"{plan.trainer['max_steps']:,} steps"
    rows, trainer = len(data.train), plan.trainer
    text = describe_steps(rows, {"num_train_epochs": 3, **trainer}, plan.world_size)
    if rows < plan.global_batch_size and steps_per_epoch(rows, trainer, plan.world_size) == 1:
        text += f"; each takes {rows:,} rows, all that there are"
    return text


def count_rows(rows: Any) -> str:
    if rows is None:
        return "no"
    if isinstance(rows, dict):
        return ", ".join(f"{name} {count_rows(part)}" for name, part in rows.items())
    return f"{len(rows):,}" if hasattr(rows, "__len__") else "streamed"


def final_metrics(
    plan: RunPlan, trainer: Any, trained: dict[str, float], held_out: dict[str, float], saved: float, seconds: float
) -> dict[str, Any]:
    """metrics.json: losses, speed, memory, seconds, versions."""
    history = [row for row in trainer.state.log_history if "loss" in row]
    runtime = trained.get("train_runtime") or math.nan
    tokens = next((row["num_tokens"] for row in reversed(trainer.state.log_history) if "num_tokens" in row), None)
    cuda = torch.cuda.is_available() and not trainer.args.use_cpu
    memory = trainer.memory_peaks.figures()
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")
    return {
        "plan": plan.hash,
        "step": trainer.state.global_step,
        "first_loss": history[0]["loss"] if history else None,
        "last_loss": history[-1]["loss"] if history else None,
        "best_model_checkpoint": trainer.state.best_model_checkpoint,
        **{k: v for k, v in trained.items() if is_finite_number(v)},
        **{k: v for k, v in held_out.items() if is_finite_number(v)},
        "tokens": tokens,
        "tokens_per_second": round(tokens / runtime, 1) if tokens and runtime == runtime else None,
        "peak_memory_gb": memory and memory["allocated"],
        "memory_gb": memory,
        "forecast_gb": forecast_gb(plan) if cuda else None,
        "packing": getattr(trainer, "packing_proof", None),  # how far packed documents were from themselves alone
        "save_seconds": round(saved, 3),
        "checkpoint_seconds": [round(s, 3) for s in trainer.checkpoint_seconds],
        "total_seconds": round(seconds, 3),
        "world_size": plan.world_size,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
    }


def forecast_gb(plan: RunPlan) -> dict[str, float] | None:
    """Return the forecast's GiB: in all, and allocated at the peak of each phase; None where there is none."""
    memory = forecast_plan(plan, inspect_model(plan.model, here=False)[0].text)
    if memory is None:
        return None
    sizes = {"needed": memory.peak + memory.outside_allocator, "allocated": memory.peak, **memory.peaks}
    return {name: round(size / 2**30, 3) for name, size in sizes.items()}


def print_next_steps(plan: RunPlan, metrics: dict[str, Any]) -> None:
    """The last lines of a finished run: the figures and the commands that come next."""
    run = run_directory.path_from_here(plan.run_path)
    folder = run_directory.ADAPTER if plan.peft else run_directory.MODEL
    loss = f", loss {metrics['train_loss']:.4g} on average" if "train_loss" in metrics else ""
    if metrics["first_loss"] is not None:  # a run shorter than logging_steps logs none
        loss = f", loss {metrics['first_loss']:.4g} -> {metrics['last_loss']:.4g}"
    held_out = f", held out {metrics['eval_loss']:.4g}" if "eval_loss" in metrics else ""
    print(f"done      {metrics['step']} steps in {metrics['train_runtime']:.1f} s{loss}{held_out}")
    print(f"saved     {run}/{folder}")
    print(f"next      kit merge {run}" if plan.peft else f"next      kit generate {run}", flush=True)
