"""What a grid and a search share: a trial's plan, the sweep's directory, room on this machine, and the loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.config.compose import Composed
from kit.config.multirun import SweepPoint
from kit.config.nodes import starts_by_node
from kit.config.plan import build_plan
from kit.errors import DONE, FAILED, REFUSED, STOPPED, KitError, Problem
from kit.launchers.supervise import StopRequests
from kit.schema.run_plan import HparamsSearch, RunPlan, load_plan
from kit.storage import run_directory
from kit.sweeps import record
from kit.sweeps.pool import Trial, TrialPool, refresh_state, stop_trial
from kit.sweeps.screen import Sweep, show_progress
from kit.system import hardware
from kit.system.terminal import print_status

KILL_MARGIN_SECONDS = 30  # seconds beyond a trial's own grace before what still lives is killed
POLL_SECONDS = 0.2


def build_trial_plan(composed: Composed) -> RunPlan:
    """The plan of one trial, for a share of this machine; KitError with all that is wrong with it."""
    raw_settings = composed.tree.get("hparams_search")
    share = raw_settings.get("gpus_per_trial") if isinstance(raw_settings, dict) else None
    launch = composed.tree.get("launch")
    if (
        isinstance(launch, dict)
        and launch.get("num_gpus") == "auto"
        and not launch.get("slurm")
        and hardware.list_gpus()
    ):
        launch["num_gpus"] = share if isinstance(share, int) else 1
    plan = build_plan(composed, here=True)
    settings = search_settings(plan)
    problems = []
    if isinstance(share, int) and plan.trainer["use_cpu"]:
        message = f"hparams_search.gpus_per_trial is {share}, and trainer.use_cpu is true"
        fix = "leave it out: launch.num_gpus counts processes, hparams_search.parallel trials at a time"
        problems.append(Problem(message, "hparams_search.gpus_per_trial", fix))
    elif isinstance(share, int) and share != plan.world_size:
        message = f"hparams_search.gpus_per_trial is {share}, launch.num_gpus is {plan.world_size}"
        problems.append(Problem(message, "hparams_search.gpus_per_trial", "give one of them"))
    if (settings.metric or "").startswith("eval_") and plan.trainer.get("eval_strategy") in (None, "no"):
        message = f"hparams_search.metric={settings.metric}, but the trial does not evaluate"
        problems.append(Problem(message, "hparams_search.metric", "trainer.eval_strategy=steps, or metric=loss"))
    if plan.launch.master_port and plan.world_size > 1 and settings.parallel != 1:
        message = "trials side by side cannot share launch.master_port"
        problems.append(Problem(message, "launch.master_port", "leave it out, or hparams_search.parallel=1"))
    if starts_by_node(plan.launch) and not plan.launch.slurm:
        message = "a trial starts all of its ranks itself, which several nodes without ssh do not let it"
        problems.append(Problem(message, "launch.num_nodes", "launch.hostfile=FILE, or launch=slurm"))
    if problems:
        raise KitError(problems)
    return plan


def search_settings(plan: RunPlan) -> HparamsSearch:
    return HparamsSearch.model_validate(plan.composed.get("hparams_search") or {})


def sweep_folder(plan: RunPlan, digest: str, fresh: bool) -> Path:
    """`runs/<name>-sweep-<hash8>`; with `fresh` one that is not there yet."""
    base = plan.run_path.parent / f"{plan.name}-sweep-{digest}"
    folder, number = base, 2
    while fresh and folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    others = [f.name for f in base.parent.glob(f"{run_directory.escape_glob(plan.name)}-sweep-*") if f.is_dir()]
    if others and not fresh and not folder.exists():
        many = f" and {len(others) - 1} more" if len(others) > 1 else ""
        print_status(
            f"not the sweep of {max(others)}{many}, which had other values or settings: all of its trials start anew"
        )
    return folder


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """The sweep's directory, made and held: no second process runs the same sweep."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise KitError(f"{folder} cannot be made: {error.strerror}", "runs_dir", "runs_dir=FOLDER") from None
    with run_directory.lock_run_directory(folder):
        yield


def freeze_point(folder: Path, point: SweepPoint, plan: RunPlan | None) -> Trial:
    """A point frozen into its own run directory; one that has no plan is only named."""
    trial = Trial(point.number, folder / record.trial_directory_name(point.number, point.values), dict(point.values))
    if plan is None:
        trial.state, trial.code = "refused", REFUSED
        trial.problems = [vars(p) for p in point.problems]
    elif run_directory.plan_hash_of(trial.run) == plan.hash:  # the sweep's record is gone, the trial is not
        load_frozen_trial(trial)
    else:
        make_trial_directory(trial, plan)
    return trial


def make_trial_directory(trial: Trial, plan: RunPlan) -> None:
    """The trial's directory, with its frozen plan."""
    trial.plan = run_directory.make_run_directory(plan.model_copy(update={"run_dir": str(trial.run)}))


def load_frozen_trial(trial: Trial) -> None:
    """The plan as it was frozen, and what became of the trial; KitError where it cannot be read."""
    trial.plan = load_plan(trial.run).model_copy(update={"run_dir": str(trial.run)})
    refresh_state(trial)


def continue_trials(folder: Path, trials: list[Trial], plans: dict[int, RunPlan] | None = None) -> None:
    """Trials of an earlier process, as they were frozen: what is done stays, what failed or stopped is missing.

    One whose directory is gone is made again from `plans`; without them it has failed.
    """
    problems = []
    for trial in trials:
        if trial.state == "refused":
            continue
        if not trial.run.exists():
            if plan := (plans or {}).get(trial.number):
                print_status(f"{run_directory.path_from_here(trial.run)} is gone: the trial starts anew")
                make_trial_directory(trial, plan)
                trial.state, trial.code, trial.seconds, trial.problems = "waiting", None, 0.0, []
            else:
                trial.state, trial.code = "failed", FAILED
                trial.problems = [{"problem": "its directory is gone", "where": str(trial.run)}]
            continue
        try:
            load_frozen_trial(trial)
        except KitError as error:
            fix = f"rm -r {run_directory.path_from_here(trial.run)}, or the same command with --fresh"
            problems += [Problem(p.problem, str(trial.run / run_directory.PLAN), fix) for p in error.problems]
    if problems:
        raise KitError(problems)
    done, missing = (sum(t.state == s for t in trials) for s in ("done", "waiting"))
    print_status(
        f"continuing {run_directory.path_from_here(folder)}: {done} done, {missing} missing (--fresh starts anew)"
    )


def sweep_description(folder: Path, settings: HparamsSearch, metric: str) -> dict[str, Any]:
    return {"sweep": folder.name, "metric": metric, "direction": settings.direction, "method": settings.method}


def pool_for(settings: HparamsSearch, plans: list[RunPlan]) -> TrialPool:
    """Room for trials: a slot per GPU, or one on a CPU, unless hparams_search.parallel says how many."""
    devices = visible_devices()
    if devices is None or all(p.trainer["use_cpu"] for p in plans):
        return TrialPool(
            None, settings.parallel if isinstance(settings.parallel, int) else 1, settings.workers == "warm"
        )
    slots = settings.parallel if isinstance(settings.parallel, int) else len(devices)
    return TrialPool(devices, slots, settings.workers == "warm")


def visible_devices() -> list[str] | None:
    """The names by which CUDA_VISIBLE_DEVICES knows this process's GPUs; None where there are none."""
    count = len(hardware.list_gpus())
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count:
        return None
    return [v.strip() for v in devices.split(",") if v.strip()][:count] if devices else [str(i) for i in range(count)]


def supervise_trials(
    sweep: Sweep,
    pool: TrialPool,
    next_trial: Callable[[], Trial | None],
    is_over: Callable[[], bool],
    watch: Callable[[Trial, list[dict[str, Any]]], bool] = lambda trial, rows: False,
    ended: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Start what `next_trial` gives until nothing runs and `is_over()`; a trial that `watch` names is stopped early.

    Ctrl-C and SIGTERM let the running trials save a checkpoint, and start no other.
    """
    requests, deadline = 0, None
    with StopRequests() as signals, show_progress(sweep) as draw:
        try:
            while pool.running or not (is_over() or signals.requests):
                while not signals.requests and (trial := next_trial()) is not None:
                    pool.start(trial)
                    draw(trial)
                    record.write_record(sweep.folder, sweep.trials, sweep.about)
                for trial in pool.running:
                    if watch(trial, trial.curve.read()) and not trial.pruning:
                        trial.pruning = True
                        stop_trial(trial)
                for trial in pool.ended():
                    ended(trial)
                    draw(trial)
                    record.write_record(sweep.folder, sweep.trials, sweep.about)
                if signals.requests > requests:
                    requests = signals.requests
                    grace = max((t.plan.launch.grace_seconds for t in pool.running if t.plan), default=0.0)
                    deadline = deadline or time.monotonic() + grace + KILL_MARGIN_SECONDS
                    print_status("stopping: the running trials save a checkpoint (again to end them at once)")
                    pool.stop_all()
                if deadline and time.monotonic() > deadline:
                    pool.kill()
                draw(None)
                time.sleep(POLL_SECONDS)
        finally:
            pool.kill()
            record.write_record(sweep.folder, sweep.trials, sweep.about)


def exit_code_of_trial(trial: Trial) -> int:
    """What a trial adds to the exit code of the sweep; a pruned one has done what it was for."""
    codes = {"done": DONE, "pruned": DONE, "refused": REFUSED, "failed": trial.code or FAILED}
    return codes.get(trial.state, STOPPED)
