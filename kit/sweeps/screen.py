"""What a person sees of a sweep: what is refused before it starts, a table or lines while it runs, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import api
from kit.errors import Problem
from kit.schema.run_plan import HparamsSearch
from kit.storage import run_directory
from kit.sweeps import record
from kit.sweeps.pool import FINAL_STATES, Trial
from kit.system.terminal import print_problems, print_status


@dataclass
class Sweep:
    """A sweep's directory, how it runs, and its trials in order."""

    folder: Path
    settings: HparamsSearch
    metric: str
    about: dict[str, Any]  # what sweep.json says beside the trials
    trials: list[Trial]


def print_start(sweep: Sweep, count: int) -> None:
    """What is refused and what is warned of, before anything starts."""
    refused = [t for t in sweep.trials if t.state == "refused"]
    if refused:
        print_status(f"{len(refused)} of {len(sweep.trials)} trials refused; the others run")
        problems = [(t.number, t.values, Problem(**p)) for t in refused for p in t.problems]
        print_problems(merge_problems(problems), refused=False)
    for text in dict.fromkeys(w for t in sweep.trials if t.plan for w in api.warning_lines(t.plan)):
        print_status(f"warning: {text}")
    print_status(f"{count_of_trials(count - len(refused))} in {run_directory.path_from_here(sweep.folder)}")


def name_trial(number: int, values: dict[str, Any], problem: Problem) -> Problem:
    """A problem with the trial that has it."""
    setting = ", ".join(f"{k}={v}" for k, v in values.items())
    return Problem(f"trial {number} ({setting}): {problem.problem}", problem.where, problem.fix, problem.rule)


def merge_problems(problems_of_trials: list[tuple[int, dict[str, Any], Problem]]) -> list[Problem]:
    """The problems of several trials (number, values, problem); what more than one of them has is said once."""
    by_problem: dict[Problem, list[tuple[int, dict[str, Any]]]] = {}
    for number, values, problem in problems_of_trials:
        by_problem.setdefault(problem, []).append((number, values))
    merged = []
    for problem, trials in by_problem.items():
        number, values = trials[0]
        others = ", ".join(str(n) for n, _ in trials[1:9]) + (", ..." if len(trials) > 9 else "")
        same = f" (the same in trial{'s' if len(trials) > 2 else ''} {others})" if others else ""
        text = problem.problem + same
        merged.append(name_trial(number, values, Problem(text, problem.where, problem.fix, problem.rule)))
    return merged


@contextmanager
def show_progress(sweep: Sweep) -> Iterator[Callable[[Trial | None], None]]:
    """What shows the sweep while it runs: a table on a terminal, else a line for each event and each interval."""
    last = time.monotonic()
    if run_directory.stdout_is_terminal():
        from rich.live import Live

        with Live(auto_refresh=False, transient=True) as live:

            def redraw(trial: Trial | None) -> None:
                nonlocal last
                if trial is not None or time.monotonic() - last > 1:
                    live.update(render_table(sweep), refresh=True)
                    last = time.monotonic()

            yield redraw
        return

    def tell(trial: Trial | None) -> None:
        nonlocal last
        if trial is not None:
            devices = f" on GPU {','.join(trial.devices)}" if trial.devices else ""
            reason = f": {trial.problems[0]['problem'].splitlines()[0]}" if trial.problems else ""
            duration = f" after {trial.seconds:.0f} s" if trial.state != "running" else ""
            print_status(f"trial {trial.number:03d} {trial.label()} {trial.state}{devices}{duration}{reason}")
        elif time.monotonic() - last > sweep.settings.progress_seconds:
            last = time.monotonic()
            print_status(record.progress_line(sweep.trials))

    yield tell


def render_table(sweep: Sweep) -> Any:
    return record.sweep_table(sweep.trials, sweep.settings, sweep.metric, run_directory.path_from_here(sweep.folder))


def count_of_trials(number: int) -> str:
    return f"{number} trial{'s' * (number != 1)}"


def print_report(sweep: Sweep) -> None:
    """The table and sweep.csv; what failed; which trial is the best."""
    from rich.console import Console

    record.write_csv(sweep.folder, sweep.trials, sweep.metric)
    Console(width=None if run_directory.stdout_is_terminal() else 160).print(render_table(sweep))
    failed = [t for t in sweep.trials if t.state == "failed"]
    if failed:
        print_problems(merge_problems([(t.number, t.values, Problem(**p)) for t in failed for p in t.problems]), False)
        print_status(f"kit doctor {run_directory.path_from_here(failed[0].run)} names the cause")
    done = [t for t in sweep.trials if t.state == "done"]
    if done and all(record.metric_of(t, sweep.metric) is None for t in done):
        print_status(f"no trial logged {sweep.metric}: trainer.logging_steps=1, or hparams_search.metric=ANOTHER")
    again = failed if sweep.settings.method == "grid" else []  # a search goes on to other values
    missing = [t for t in sweep.trials if t.state not in FINAL_STATES]
    if missing or again:
        counts = [
            f"{count_of_trials(len(them))} {how}" for them, how in ((missing, "missing"), (again, "failed")) if them
        ]
        print_status(
            f"{', '.join(counts)}: the same command goes on with {'it' if len(missing + again) == 1 else 'them'}"
        )
    folder = run_directory.path_from_here(sweep.folder)
    print(f"tables    {folder}/{record.CSV_FILE}, {record.RECORD_FILE}")
    if winner := record.best_trial(sweep.trials, sweep.metric, sweep.settings.direction):
        value = record.format_number(record.metric_of(winner, sweep.metric))
        print(f"best      {run_directory.path_from_here(winner.run)} ({sweep.metric} {value})")
