"""A search over optuna's ask and tell: a trial is asked for whenever there is room, so none waits for a batch.

Trials are composed from a copy of the configuration that is made when the search begins. One that does worse than the
others at the same step is stopped early, by what its metrics.jsonl says so far.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kit.config.multirun import SweepPoint
from kit.config.search_space import Dimension, Search, TrialValue, compose_trial, snapshot_configuration
from kit.errors import DONE, ENVIRONMENT, KitError, first_line
from kit.schema.run_plan import HparamsSearch, RunPlan
from kit.sweeps import record
from kit.sweeps.pool import Trial, is_held
from kit.sweeps.screen import Sweep, name_trial, print_report, print_start
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
from kit.system import paths
from kit.system.dependencies import require_training_extras
from kit.system.terminal import print_problems, print_status

CONFIG_COPY = "conf"  # of the configuration, inside the sweep's directory
NEVER_LOGGED = "the trial never logged"
KEY_RULES = {"unknown-key", "renamed-key", "removed-key", "owned"}  # rules about keys: wrong whatever the value


def run_optuna_search(fresh: bool, spec: Search) -> int:
    """Run a search, or what is missing of it; the exit code of the sweep."""
    base = build_trial_plan(spec.base)
    settings = search_settings(base)
    check_search(spec, base)
    require_training_extras()
    space = {key: vars(d) for key, d in spec.space.items()}
    study_settings = settings.model_dump(include={"metric", "direction", "sampler", "seed", "pruner"})
    folder = sweep_folder(base, record.sweep_digest([record.trial_identity(base), space, study_settings]), fresh)
    metric = settings.metric or record.default_metric(base)
    with hold_folder(folder):
        if not (folder / CONFIG_COPY).exists():
            snapshot_configuration(spec, folder / CONFIG_COPY)
        trials = record.read_record(folder)
        sweep = Sweep(folder, settings, metric, sweep_description(folder, settings, metric), trials)
        study = load_study(sweep)
        if trials:
            continue_trials(folder, trials)
        close_open_trials(study, trials, metric)
        record.write_record(folder, trials, sweep.about)
        print_start(sweep, settings.n_trials)
        run_proposed_trials(sweep, study, spec, base)
        print_report(sweep)
    return max((exit_code_of_trial(t) for t in trials), default=DONE)


def run_proposed_trials(sweep: Sweep, study: Any, spec: Search, base: RunPlan) -> None:
    """Ask the study for trials and run them, side by side, until there are n_trials; `base`: the plan of any."""
    folder, settings, metric, trials = sweep.folder, sweep.settings, sweep.metric, sweep.trials
    pool = pool_for(settings, [base])
    asked: dict[int, Any] = {}  # number of a running trial: optuna's trial

    def next_trial() -> Trial | None:
        for trial in trials:
            if trial.state == "waiting" and trial.plan and pool.room_for(trial.plan) and not is_held(trial):
                asked[trial.number] = trial_in_study(study, trial.number)
                return trial
        if any(t.state == "waiting" for t in trials):
            return None
        while len(trials) < wanted() and pool.room_for(base):
            proposed = study.ask()
            values = {key: suggest_value(proposed, key, d) for key, d in spec.space.items()}
            trial = freeze_proposal(spec, folder, proposed.number, values)
            trials.append(trial)
            record.write_record(folder, trials, sweep.about)
            if trial.plan:
                asked[trial.number] = proposed
                return trial
            report_to_study(study, trial, metric)
        return None

    def watch(trial: Trial, rows: list[dict[str, Any]]) -> bool:
        reports = [r for r in rows if isinstance(r.get(metric), int | float) and "step" in r]
        optuna_trial = asked[trial.number]
        for row in reports:
            optuna_trial.report(float(row[metric]), int(row["step"]))
        return bool(reports) and optuna_trial.should_prune()

    def wanted() -> int:
        """How many trials in all. None ever logged the metric: neither would more of them."""
        mute = any(t.problems and t.problems[0]["problem"].startswith(NEVER_LOGGED) for t in trials)
        unheard = mute and all(record.metric_of(t, metric) is None for t in trials)
        return len(trials) if unheard else settings.n_trials

    def over() -> bool:
        return len(trials) >= wanted() and not any(t.state == "waiting" for t in trials)

    supervise_trials(sweep, pool, next_trial, over, watch, lambda t: report_to_study(study, t, metric))


def check_search(spec: Search, base: RunPlan) -> None:
    """KitError where there is nothing to choose from, where it cannot run here, or for a key that no trial can set."""
    if not spec.space:
        fix = "hparams_search.search_space, or a sweep on the command line: peft.r=8,16"
        raise KitError("the search has nothing to choose from", "hparams_search.search_space", fix)
    if base.launch.slurm:
        fix = "launch=auto inside an allocation, or a grid: key=value,value without hparams_search=optuna"
        raise KitError("a search stays with its trials, which a batch job does not", "hparams_search.method", fix)
    check_search_keys(spec)
    if find_spec("optuna") is None:
        raise KitError("optuna is not installed", "hparams_search=optuna", "pip install 'optuna>=4'", code=ENVIRONMENT)


def load_study(sweep: Sweep) -> Any:
    """The sweep's study; KitError where it cannot be read or does not know the sweep's trials."""
    folder, settings, trials = sweep.folder, sweep.settings, sweep.trials
    try:
        study = open_study(folder, settings, len(trials))
        known_to_study = len(study.trials)
    except Exception as error:  # of sqlalchemy, json or optuna, whatever the file holds
        fix = "--fresh starts anew"
        raise KitError(f"the study cannot be read: {first_line(error)}", str(folder), fix) from None
    if any(t.number >= known_to_study for t in trials):
        message = "the study does not know the trials that were there before: it was removed, or kept elsewhere"
        fix = "hparams_search.storage as it was, or --fresh"
        raise KitError(message, f"{folder}, hparams_search.storage={settings.storage}", fix)
    return study


def check_search_keys(spec: Search) -> None:
    """Refuse a key that no trial can set; a value that some trial cannot have is refused with that trial."""
    try:
        build_trial_plan(compose_trial(spec, {k: d.choices[0] if d.choices else d.low for k, d in spec.space.items()}))
    except KitError as error:
        if wrong := [p for p in error.problems if p.rule in KEY_RULES]:
            raise KitError(wrong) from None


def open_study(folder: Path, settings: HparamsSearch, trials_before: int) -> Any:
    """The study in the sweep's directory; `trials_before`: how many it had, so that a seed does not repeat itself."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = settings.seed + trials_before
    samplers: dict[str, Any] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=settings.parallel != 1),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    pruner = settings.pruner
    pruners: dict[str, Any] = {
        "none": lambda: optuna.pruners.NopPruner(),
        "median": lambda: optuna.pruners.MedianPruner(pruner.n_startup_trials, pruner.n_warmup_steps),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(pruner.min_resource, pruner.reduction_factor),
    }
    return optuna.create_study(
        storage=study_storage(folder, settings.storage),
        study_name=folder.name,
        load_if_exists=True,
        direction=settings.direction,
        sampler=samplers[settings.sampler](),
        pruner=pruners[pruner.name](),
    )


def study_storage(folder: Path, backend: str) -> Any:
    import optuna

    if backend == "sqlite":
        return f"sqlite:///{folder / 'study.db'}"
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))


def trial_in_study(study: Any, number: int) -> Any:
    """optuna's trial of that number, to report to; it may be one that another process asked for."""
    import optuna

    return optuna.trial.Trial(study, study.trials[number]._trial_id)


def close_open_trials(study: Any, trials: list[Trial], metric: str) -> None:
    """Close what a killed process left open: a trial that was asked for and never frozen, or ended untold."""
    import optuna

    ours = {t.number: t for t in trials}
    for frozen in study.trials:
        trial = ours.get(frozen.number)
        if trial and trial.state == "waiting" and frozen.state.is_finished():
            trial.state = "failed"  # a search goes on to other values; it does not try the same again
        elif trial and trial.state == "done":
            fail_without_metric(trial, metric)
        if not frozen.state.is_finished():
            if trial is None:
                study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            else:
                report_to_study(study, trial, metric)


def fail_without_metric(trial: Trial, metric: str) -> bool:
    """Whether a trial ended well without a result, which a search takes for a failure."""
    if record.metric_of(trial, metric) is not None:
        return False
    trial.state, trial.code = "failed", None
    logged = ", ".join(sorted({k for row in trial.curve.rows for k in row})) or "nothing"
    fix = "hparams_search.metric=ANOTHER, trainer.logging_steps=1"
    message = f"{NEVER_LOGGED} {metric}; it logged {logged}"
    trial.problems = [{"problem": message, "where": "hparams_search.metric", "fix": fix}]
    return True


def suggest_value(trial: Any, key: str, dimension: Dimension) -> TrialValue:
    if dimension.choices:
        return trial.suggest_categorical(key, dimension.choices)
    if dimension.whole:
        return trial.suggest_int(
            key, int(dimension.low), int(dimension.high), step=int(dimension.step or 1), log=dimension.log
        )
    return trial.suggest_float(key, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def freeze_proposal(spec: Search, folder: Path, number: int, values: dict[str, TrialValue]) -> Trial:
    """A proposal composed and frozen; refused and listed where it is no valid run."""
    point = SweepPoint(number, {key: v if isinstance(v, str) else f"{v:.6g}" for key, v in values.items()})
    plan = None
    try:
        with paths.use_config_folder(folder / CONFIG_COPY):
            plan = build_trial_plan(compose_trial(spec, values, folder / CONFIG_COPY))
    except KitError as error:
        point.problems = error.problems
        print_status(f"trial {number:03d} refused")
        print_problems([name_trial(number, point.values, p) for p in error.problems], refused=False)
    trial = freeze_point(folder, point, plan)
    trial.values = dict(values)
    return trial


def report_to_study(study: Any, trial: Trial, metric: str) -> None:
    """optuna's record of how a trial ended; one that was stopped stays open, for the same command to continue."""
    import optuna

    states = optuna.trial.TrialState
    if trial.state == "done" and not fail_without_metric(trial, metric):
        value = record.metric_of(trial, metric)
        study.tell(trial.number, value)
    elif trial.state == "pruned":
        study.tell(trial.number, state=states.PRUNED)
    elif trial.state in ("failed", "refused"):
        study.tell(trial.number, state=states.FAIL)
