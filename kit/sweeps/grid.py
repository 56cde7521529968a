"""`kit train -m`: every trial is composed and frozen first, then they run side by side until none is missing.

multirun.py hands over the points of a grid, or what a search may choose from; from here on a trial is a plan path.
"""

from __future__ import annotations

from functools import partial

from kit import api
from kit.config.compose import Composed
from kit.config.multirun import MultirunJob, Search, SweepPoint, run_multirun
from kit.errors import DONE, FAILED, REFUSED, KitError
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory
from kit.sweeps import record
from kit.sweeps.pool import Trial, is_held
from kit.sweeps.screen import Sweep, merge_problems, print_report, print_start
from kit.sweeps.session import (
    build_trial_plan,
    continue_trials,
    exit_code_of_trial,
    freeze_point,
    hold_folder,
    pool_for,
    search_settings,
    supervise_trials,
    sweep_description,
    sweep_folder,
)
from kit.system.dependencies import require_training_extras
from kit.system.terminal import print_problems, print_status


def run_sweep(argv: list[str], fresh: bool) -> int:
    """The exit code of a multirun: 0 all done, 75 stopped, 4 a trial failed, 2 a trial was refused."""
    return run_multirun(
        argv, MultirunJob(partial(train_point, fresh), partial(run_grid, fresh), partial(run_search, fresh))
    )


def train_point(fresh: bool, composed: Composed) -> int:
    """A point under one of Hydra's stock launchers: a run of its own, which does not end the others when it fails."""
    try:
        plan = build_trial_plan(composed)
        if search_settings(plan).workers == "warm":
            print_status("it starts cold: warm workers need the kit's own launcher (leave out hydra/launcher)")
        return api.train(plan=plan, fresh=fresh)
    except KitError as error:
        print_problems(error.problems, refused=error.code == REFUSED)
        return error.code


def run_search(fresh: bool, spec: Search) -> int:
    from kit.sweeps.optuna_search import run_optuna_search as search_trials

    return search_trials(fresh, spec)


def run_grid(fresh: bool, points: list[SweepPoint]) -> list[tuple[int, float | None]]:
    """Run the points of a grid, or what is missing of it; exit code and metric of each."""
    if not points:
        raise KitError("the sweep has no trial: a range or a glob in it is empty", "command line", "kit list GROUP")
    plans: dict[int, RunPlan] = {}
    for point in points:
        try:
            if point.composed is not None:
                plans[point.number] = build_trial_plan(point.composed)
        except KitError as error:
            point.problems = error.problems
    if not plans:
        raise KitError(merge_problems([(point.number, point.values, p) for point in points for p in point.problems]))
    if len({bool(p.launch.slurm) for p in plans.values()}) > 1:
        raise KitError("some trials are batch jobs and others run here", "launch", "one launch for the whole sweep")
    require_training_extras()
    first = next(iter(plans.values()))
    if first.launch.slurm:
        from kit.launchers import slurm

        slurm.check_array(list(plans.values()), [first.run_path.parent])  # before a directory is made
    identities = [[p.values, record.trial_identity(plans[p.number]) if p.number in plans else None] for p in points]
    folder = sweep_folder(first, record.sweep_digest(identities), fresh)
    with hold_folder(folder):
        trials = record.read_record(folder)
        if trials:
            continue_trials(folder, trials, plans)
        else:
            trials = [freeze_point(folder, point, plans.get(point.number)) for point in points]
        metric = search_settings(first).metric or record.default_metric(first)
        sweep = Sweep(
            folder, search_settings(first), metric, sweep_description(folder, search_settings(first), metric), trials
        )
        record.write_record(folder, trials, sweep.about)
        print_start(sweep, len(trials))
        pending = [t for t in trials if t.state == "waiting"]
        if first.launch.slurm:
            return submit_pending(sweep, pending, plans)
        pool = pool_for(sweep.settings, [t.plan for t in pending if t.plan])

        def next_trial() -> Trial | None:
            for trial in sorted(pending, key=lambda t: not pool.waits_for(t)):
                if trial.plan and pool.room_for(trial.plan) and not is_held(trial):
                    pending.remove(trial)
                    return trial
            return None

        supervise_trials(sweep, pool, next_trial, lambda: not pending)
        print_report(sweep)
    return [(exit_code_of_trial(t), record.metric_of(t, sweep.metric)) for t in trials]


def submit_pending(
    sweep: Sweep, pending: list[Trial], new_plans: dict[int, RunPlan]
) -> list[tuple[int, float | None]]:
    """What is missing as one job array, which needs nobody to stay; the table as it stands. Exit code and metric.

    `new_plans`: those of this command line. A frozen trial keeps all but launch.slurm.*, so that what sbatch or the
    cluster did not take can be mended.
    """
    from kit.launchers import slurm

    for trial in pending:
        if living := slurm.unfinished_job(trial.run):
            trial.state = "running"
            print_status(f"trial {trial.number:03d} is job {living[0]} ({living[1].lower()})")
        elif trial.plan and (new := new_plans.get(trial.number)) and new.launch.slurm != trial.plan.launch.slurm:
            trial.plan = replace_slurm_settings(trial.plan, new)
            run_directory.write_plan(trial.plan)
    plans = [t.plan for t in pending if t.plan and t.state == "waiting"]
    if plans:
        at_once = sweep.settings.parallel if isinstance(sweep.settings.parallel, int) else None
        job = slurm.submit_array(plans, sweep.folder, at_once)
        print(f"job {job}: {len(plans)} trials, {run_directory.path_from_here(sweep.folder)}")
        print_status("the same command shows the table, and submits again what has failed by then")
    if len(plans) < len(sweep.trials):
        print_report(sweep)
    record.write_record(sweep.folder, sweep.trials, sweep.about)
    codes = {"refused": REFUSED, "failed": FAILED}
    return [(codes.get(t.state, DONE), record.metric_of(t, sweep.metric)) for t in sweep.trials]


def replace_slurm_settings(plan: RunPlan, new: RunPlan) -> RunPlan:
    """A frozen plan with another's launch.slurm.*; the GPUs per node go with launch.num_gpus, which stays."""
    slurm = new.launch.slurm
    if slurm and plan.launch.slurm and new.launch.num_gpus != plan.launch.num_gpus:
        slurm = slurm.model_copy(update={"gres": plan.launch.slurm.gres})
    return plan.model_copy(update={"launch": plan.launch.model_copy(update={"slurm": slurm})})
