"""A warm worker: `python -m kit.sweeps.warm_worker PARENT` reads {"plan": PATH} lines, answers {"code", "why"} lines.

Imports, the base and the tokenized data are paid once. Everything else is made anew for each trial, as in a process
of its own: environment, seeds, accelerate's state, tokenizer, adapter, optimizer, schedule, callbacks, log and lock.
After a trial the base is put back as it was loaded and compared with that; where anything is in doubt the worker ends.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit import worker
from kit.errors import DONE, STOPPED, KitError
from kit.launchers.command import rank_environment
from kit.launchers.ranks import remove_rank_files
from kit.launchers.supervise import exit_code_of_run, newest_checkpoint_name, stop_with_parent
from kit.schema.run_plan import load_plan
from kit.storage import run_directory
from kit.storage.json_files import atomic_write_json
from kit.sweeps.pool import TRIAL_LOG
from kit.system.terminal import print_status
from kit.training import signals


def main(argv: list[str]) -> None:
    """Take trials until stdin ends, or until this process should not have another."""
    signals.install_handlers()
    stop_with_parent(int(argv[0]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    install_tees()
    state = WarmState()
    reason = ""
    while not reason and (line := sys.stdin.readline()):
        code, reason = run_trial(Path(json.loads(line)["plan"]), state)
        answers.write(json.dumps({"code": code, "why": reason}) + "\n")
        answers.flush()
    os._exit(DONE)


def install_tees() -> None:
    """Streams that stay the same for libraries that keep them, whichever trial's log they write to."""
    null = open(os.devnull, "w")
    sys.stdout, sys.stderr = worker.Tee(sys.stdout, null), worker.Tee(sys.stderr, null)


def run_trial(path: Path, state: WarmState) -> tuple[int, str]:
    """One trial: its exit code, and why this process must not have another ("" where it may)."""
    signals.forget_signals()
    run = path.parent
    with open(run / run_directory.LOGS / TRIAL_LOG, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        with (
            run_directory.lock_run_directory(run),
            run_directory.lock_run_directory(run, run_directory.RANK_LOCK),
            restored_environment(),
        ):
            code = train_trial(path, state)
    except KitError as error:
        print(error, file=sys.stderr)
        run_directory.set_status_refused(run, error)
        code = error.code
    if code not in (DONE, STOPPED):
        return code, "a trial failed in it"
    return code, state.reset()


def train_trial(path: Path, state: WarmState) -> int:
    """What a launcher and its one rank do with a plan; KitError where the run is not done and not stopped."""
    run = path.parent
    plan = load_plan(path).model_copy(update={"run_dir": str(run)})
    resume = newest_checkpoint_name(run)
    for w in plan.warnings:
        print_status(f"warning: {w['problem']} ({w['where']}); {w['fix']} [{w['rule']}]")
    remove_rank_files(run)
    record = {"argv": sys.orig_argv, "env": rank_environment(plan), "cwd": os.getcwd(), "resume": resume}
    atomic_write_json(run / run_directory.LAUNCH, record)
    run_directory.set_status(run, "running")
    log = worker.prepare_process(plan, rank=0)
    for stream in (sys.stdout, sys.stderr):
        stream.log = log  # type: ignore[union-attr]
    try:
        worker.print_environment(plan)
        code = worker.train_in_this_process(plan, resume, load=state.load)
    except Exception as error:
        code = worker.report_failure(run, 0, error)
    finally:
        (run / run_directory.LOGS / "rank0.pid").unlink(missing_ok=True)
        ended = {"returncode": 0, "oom_kills": 0, "deaths": {}, "asked": int(signals.received_signal() is not None)}
    atomic_write_json(run / run_directory.LAUNCH, {**record, "ended": {**ended, "returncode": code}})
    return exit_code_of_run(run, code)


@contextmanager
def restored_environment() -> Iterator[None]:
    """Libraries note a run's settings in the environment: the next one finds it as it was."""
    variables = dict(os.environ)
    try:
        yield
    finally:
        for key in os.environ.keys() - variables.keys():
            del os.environ[key]
        os.environ.update(variables)


def data_settings(plan: Any) -> Any:
    """What of a plan the prepared rows depend on."""
    from kit.data.prepare import TRAINER_KEYS

    return plan.dataset, plan.tokenizer, [plan.trainer.get(key) for key in TRAINER_KEYS]


class WarmState:
    """What one trial leaves to the next: the data and the base as it was loaded."""

    def __init__(self) -> None:
        self.data: Any = None
        self.data_settings: Any = None
        self.model: Any = None
        self.model_before: Any = None
        self.sums: list[Any] = []
        self.draws_random = False

    def load(self, plan: Any, args: Any) -> tuple[Any, Any, Any]:
        """In the place of kit.training.run.load_inputs: the first trial loads, the others get the same, put back."""
        import torch

        from kit.models.load import load_tokenizer
        from kit.training import run

        if self.model is not None:
            if data_settings(plan) != self.data_settings:  # another seed where rows are shuffled
                self.data, self.data_settings = run.load_data(plan, load_tokenizer(plan), args), data_settings(plan)
            if torch.cuda.is_available() and not args.use_cpu:
                torch.cuda.reset_peak_memory_stats()
            return load_tokenizer(plan), self.data, self.model
        state = random_states()
        tokenizer, self.data, self.model = run.load_inputs(plan, args)
        self.data_settings = data_settings(plan)
        self.draws_random = any(not torch.equal(a, b) for a, b in zip(state, random_states(), strict=True))
        if not plan.quantization:  # that is on its device already; the trainer would move this one
            self.model.to(args.device)
        self.model_before = snapshot_model(self.model)
        self.sums = tensor_checksums(self.model)
        gc.collect()
        gc.freeze()  # looking through all that was imported took half a second, twice a trial
        return tokenizer, self.data, self.model

    def reset(self) -> str:
        """Put the base back as it was loaded; why no other trial may have it, "" where one may."""
        import torch
        from accelerate.state import AcceleratorState, GradientState

        if self.model is None or self.draws_random:
            return "loading the base drew random numbers: it depends on the seed"
        restore_model(self.model_before)
        # Whatever was compiled (an optimizer, an attention): after a number of shapes torch no longer compiles.
        torch._dynamo.reset()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "" if tensor_checksums(self.model) == self.sums else "the trial changed the base"


def random_states() -> list[Any]:
    import torch

    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def snapshot_model(model: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """What makes a model what it is, beside the values of its tensors: modules, configs, parameters."""
    from transformers import GenerationConfig, PreTrainedConfig

    config_types = (PreTrainedConfig, GenerationConfig)
    modules = [(m, type(m), {k: shallow_copy(v) for k, v in vars(m).items()}) for m in model.modules()]
    configs: dict[int, Any] = {}
    pending = [v for _, _, attributes in modules for v in attributes.values() if isinstance(v, config_types)]
    while pending:
        config = pending.pop()
        if id(config) not in configs:  # parts of a model share the object, and must go on to
            attributes = {k: v if isinstance(v, config_types) else copy.deepcopy(v) for k, v in vars(config).items()}
            configs[id(config)] = config, attributes
            pending += [v for v in attributes.values() if isinstance(v, config_types)]
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    return modules, list(configs.values()), parameters


def restore_model(snapshot: tuple[list[Any], list[Any], list[Any]]) -> None:
    """Undo all that was put into, hooked onto or set on a model; the adapter goes with it."""
    modules, configs, parameters = snapshot
    for module, kind, own in modules:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update({k: shallow_copy(v) for k, v in own.items()})
    for config, own in configs:
        attributes = {k: v if any(v is c for c, _ in configs) else copy.deepcopy(v) for k, v in own.items()}
        vars(config).clear()
        vars(config).update(attributes)
    for parameter, data, trains in parameters:
        if parameter.dtype != data.dtype or parameter.data_ptr() != data.data_ptr():
            parameter.data = data
        parameter.requires_grad_(trains)
        parameter.grad = None


def shallow_copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def tensor_checksums(model: Any) -> list[Any]:
    """Name, dtype, shape and a sum over the bits of every parameter and buffer."""
    import torch

    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        sums = [t.detach().view(whole[t.element_size()]).sum(dtype=torch.int64) for _, t in named]
        numbers = torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []
    return [(name, t.dtype, tuple(t.shape), n) for (name, t), n in zip(named, numbers, strict=True)]


if __name__ == "__main__":
    main(sys.argv[1:])
