"""Warm workers: trials that differ only in what is made anew share one living process, its imports, base and data.

Which trials those are is decided here, from their plans, by a list of what a worker is known to make anew. Whatever is
not on the list must be equal: a key that nobody thought of makes another worker, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from kit.launchers.command import rank_environment, tracker_environment
from kit.schema import trackers
from kit.schema.run_plan import RunPlan, leaves

WORKER_MODULE = "kit.sweeps.warm_worker"
# Made anew with every trial: where it writes, who it is, how it came to be.
PLAN_KEYS_MADE_ANEW = set(
    "run_dir hash name recipe notes warnings overrides provenance composed prompts launch init_from global_batch_size"
    " memory rehearsal"
    .split()
)  # fmt: skip
TRAINER_KEYS_MADE_ANEW = set(
    "adam_beta1 adam_beta2 adam_epsilon data_seed disable_tqdm eval_accumulation_steps eval_delay eval_on_start"
    " eval_steps eval_strategy gradient_accumulation_steps greater_is_better learning_rate load_best_model_at_end"
    " logging_first_step logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps"
    " metric_for_best_model num_train_epochs optim optim_args per_device_eval_batch_size per_device_train_batch_size"
    " project report_to run_name save_only_model save_steps save_strategy save_total_limit seed warmup_steps"
    " weight_decay".split()
)
ADAPTER_KEYS_MADE_ANEW = set(
    "alpha_pattern exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout r"
    " rank_pattern target_modules use_dora use_rslora".split()
)
# Of an adapter, and neither made anew nor able to change the base.
HARMLESS_ADAPTER_KEYS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
}
SAFE_INIT_LORA_WEIGHTS = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
)  # init_lora_weights that leave the base as it is


def reason_to_start_cold(plan: RunPlan) -> str | None:
    """Why a plan cannot share a process with others; None where it can."""
    trainer, peft = plan.trainer, plan.peft
    if plan.world_size > 1 or plan.deepspeed or plan.fsdp:
        return "warm workers are for one process without DeepSpeed or FSDP"
    if plan.launch.launcher != "local" or plan.launch.script:
        return "warm workers take the place of launch=local without a script"
    if peft is None:
        return "full fine-tuning changes the base"
    if plan.tokenizer.added_tokens or plan.model.random_init:
        return "weights of the base are drawn with the trial's seed"
    if plan.dataset.streaming:
        return "a stream is read again by every trial"
    if plan.model.trust_remote_code:
        return "the base's own code may remember the trials before"
    for key, value in peft.items():
        allowed = (
            key in ADAPTER_KEYS_MADE_ANEW | HARMLESS_ADAPTER_KEYS or not value or (key, value) == ("bias", "none")
        )
        if key == "init_lora_weights":
            allowed = any(value is v or value == v for v in SAFE_INIT_LORA_WEIGHTS)
        if key == "peft_type":
            allowed = value == "LORA"
        if not allowed:
            return f"peft.{key}={value} may change the base"
    # Each of the three words about compiling turns it on.
    for key in ("torch_compile", "torch_compile_backend", "torch_compile_mode", "push_to_hub", "auto_find_batch_size"):
        if trainer.get(key):
            return f"trainer.{key} is not made anew"
    if str(trainer.get("optim")).startswith("paged_"):  # bitsandbytes takes managed memory, and frees none of it
        return f"trainer.optim={trainer['optim']} does not give its memory back"
    if others := set(trackers.tracker_names(trainer.get("report_to"))) - {"none", "tensorboard"}:
        return f"{min(others)} is open once in a process"
    return None


def sharing_key(plan: RunPlan) -> str:
    """Equal for plans that may share a worker: a hash of everything that is not made anew for each."""
    shared = {name: value for name, value in plan.model_dump(mode="json").items() if name not in PLAN_KEYS_MADE_ANEW}
    anew = {f"trainer.{k}" for k in TRAINER_KEYS_MADE_ANEW} | {f"peft.{k}" for k in ADAPTER_KEYS_MADE_ANEW}
    if plan.trainer.get("shuffle_dataset"):  # then the order of the tokenized rows depends on it
        anew.remove("trainer.seed")
    shared_leaves = {k: v for k, v in leaves(shared).items() if not any(k == a or k.startswith(a + ".") for a in anew)}
    return hashlib.sha256(json.dumps(shared_leaves, sort_keys=True, default=str).encode()).hexdigest()


class WarmWorker:
    """A living process that takes plan paths on its stdin and answers each with a line when that trial is over."""

    def __init__(self, key: str, devices: list[str], plan: RunPlan, env: dict[str, str], log: BinaryIO) -> None:
        ranks = {k: v for k, v in rank_environment(plan).items() if k not in tracker_environment(plan)}
        if "OMP_NUM_THREADS" in env:  # this process may have none, or another number: sums depend on it
            ranks["OMP_NUM_THREADS"] = env["OMP_NUM_THREADS"]
        env = {**env, **ranks}
        self.key, self.devices, self.text = key, devices, b""
        self.process = subprocess.Popen(
            worker_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def assign(self, plan: Path) -> None:
        """Hand over a trial. A worker that has died meanwhile is found out by `poll_result`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"plan": str(plan)}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return

    def poll_result(self) -> dict[str, Any] | None:
        """What became of the trial: `code`, and `why` the worker is done for ("" where it is not). None: not yet."""
        assert self.process.stdout is not None
        gone = self.process.poll()  # first: what it wrote before it went is read below
        *lines, self.text = (self.text + (self.process.stdout.read() or b"")).split(b"\n")
        for line in lines:  # a sitecustomize.py may have printed before the worker began
            with contextlib.suppress(ValueError):
                if isinstance(answer := json.loads(line), dict):
                    return answer
        return None if gone is None else {"code": gone, "why": "its process is gone"}

    def kill(self) -> None:
        """End it and all that it started, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # the latter is macOS' word for a process that has ended
            return

    def end(self) -> None:
        """End it and close its pipes. It has nothing to save between trials."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                try:
                    pipe.close()
                except OSError:
                    continue


def worker_command() -> list[str]:
    """What is typed to start a worker."""
    return [sys.executable, "-m", WORKER_MODULE, str(os.getpid())]


def overdue(requested: float | None, plan: RunPlan | None) -> bool:
    """Whether a trial that was told to stop has had its time to save."""
    return requested is not None and plan is not None and time.monotonic() - requested > plan.launch.grace_seconds
