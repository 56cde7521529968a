"""What a sweep is called and what it leaves: sweep.json (its record), sweep.csv, and the table on screen."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.schema.run_plan import HparamsSearch, RunPlan, field_class, leaves
from kit.storage import run_directory
from kit.storage.json_files import atomic_write_json, atomic_write_text, read_json_or_empty
from kit.sweeps.pool import Trial, format_value, short_names

RECORD_FILE, CSV_FILE = "sweep.json", "sweep.csv"
FIGURES = ("loss", "eval_loss", "tokens_per_second", "peak_memory_gb")
NAME_LENGTH = 80


def trial_directory_name(number: int, values: dict[str, Any]) -> str:
    """`003-r-16--learning_rate-2e-4`: letters that every shell, file system and launcher takes, and not too many."""
    parts = [f"{short}-{values[key]}" for key, short in short_names(list(values)).items()]
    text = "--".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("_") for part in parts)
    return f"{number:03d}-{text}"[:NAME_LENGTH].rstrip("-_.")


def sweep_digest(parts: Sequence[Any]) -> str:
    """8 hex digits of whatever makes a sweep this sweep."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True, default=str).encode()).hexdigest()[:8]


def trial_identity(plan: RunPlan) -> list[Any]:
    """What makes a trial another one: identity, and what a person may extend; not the machine's keys."""
    extendable = {k: v for k, v in leaves(plan.composed).items() if field_class(k) == "extendable"}
    return [plan.hash, extendable]


def default_metric(plan: RunPlan) -> str:
    return "eval_loss" if plan.trainer.get("eval_strategy") not in (None, "no") else "loss"


def metric_of(trial: Trial, metric: str) -> float | None:
    """A trial's result: the metric as it was logged last, else as metrics.json has it."""
    value = trial.curve.last(metric)
    if value is None:
        value = read_json_or_empty(trial.run / run_directory.METRICS).get(metric)
    return value if isinstance(value, int | float) else None


def last_figures(trial: Trial) -> dict[str, Any]:
    """The last figures of a trial, None for what it has not logged."""
    final = read_json_or_empty(trial.run / run_directory.METRICS)
    values = {key: trial.curve.last(key) if trial.curve.last(key) is not None else final.get(key) for key in FIGURES}
    if values["tokens_per_second"] is None:
        values["tokens_per_second"] = tokens_per_second(trial)
    if values["peak_memory_gb"] is None:
        values["peak_memory_gb"] = trial.curve.last("memory_gb")
    return {"step": trial.curve.last("step"), **values}


def tokens_per_second(trial: Trial) -> float | None:
    """Tokens per second between the last two logs that count them."""
    rows = [row for row in trial.curve.rows if "num_tokens" in row and "seconds" in row][-2:]
    if len(rows) < 2 or rows[1]["seconds"] <= rows[0]["seconds"]:
        return None
    return round((rows[1]["num_tokens"] - rows[0]["num_tokens"]) / (rows[1]["seconds"] - rows[0]["seconds"]), 1)


def best_trial(trials: list[Trial], metric: str, direction: str) -> Trial | None:
    """The finished trial with the best result; of equals the first."""
    results = [(metric_of(t, metric), t) for t in trials if t.state == "done"]
    scored = [(v, t) for v, t in results if v is not None and math.isfinite(v)]  # nan is neither more nor less
    sign = -1 if direction == "maximize" else 1
    return min(scored, key=lambda pair: sign * pair[0])[1] if scored else None


def write_record(folder: Path, trials: list[Trial], about: dict[str, Any]) -> None:
    """sweep.json: what the sweep is and the state of every trial. It is what a continued sweep reads."""
    metric = about["metric"]
    rows = [
        {
            "number": t.number,
            "run": t.run.name,
            "state": t.state,
            "values": t.values,
            **{k: json_number(v) for k, v in {"metric": metric_of(t, metric), **last_figures(t)}.items()},
            "seconds": t.seconds,
            "exit_code": t.code,
            "problems": t.problems,
        }
        for t in trials
    ]
    winner = best_trial(trials, metric, about["direction"])
    atomic_write_json(
        folder / RECORD_FILE,
        {**about, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "best": winner and winner.number, "trials": rows},
    )


def json_number(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> list[Trial]:
    """The trials of a sweep that was started before; [] where there is none; KitError where it cannot be read."""
    path = folder / RECORD_FILE
    if not path.exists():
        return []
    try:
        return [
            Trial(
                row["number"], folder / row["run"], row["values"], row["state"], row["problems"], row["exit_code"],
                row["seconds"],
            )
            for row in json.loads(path.read_text(encoding="utf-8"))["trials"]
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        record = run_directory.path_from_here(path)
        fix = f"rm {record}: a grid then looks at its trials' directories; --fresh starts anew"
        raise KitError("the sweep's record cannot be read", str(path), fix) from None


def write_csv(folder: Path, trials: list[Trial], metric: str) -> None:
    """One row per trial: what was swept, how it ended, its figures."""
    keys = list(dict.fromkeys(key for t in trials for key in t.values))
    out = io.StringIO()
    extra = [] if metric in FIGURES else [metric]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", *keys, *extra, "step", *FIGURES, "seconds", "exit_code", "run"])
    for t in trials:
        values = last_figures(t)
        row = [t.number, t.state, *(t.values.get(key) for key in keys), *(metric_of(t, m) for m in extra)]
        writer.writerow([*row, values["step"], *(values[key] for key in FIGURES), t.seconds, t.code, t.run.name])
    atomic_write_text(folder / CSV_FILE, out.getvalue())


def sweep_table(trials: list[Trial], settings: HparamsSearch, metric: str, title: str) -> Any:
    """The state of a sweep as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    keys = list(dict.fromkeys(key for t in trials for key in t.values))
    names = short_names(keys)
    grid = Table(title=escape(title), title_justify="left")
    losses = ["loss", metric] if metric != "loss" else ["loss"]
    for name in ("trial", *(names[k] for k in keys), "state", "step", *losses, "tokens/s", "seconds"):
        grid.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
    winner = best_trial(trials, metric, settings.direction)
    for t in trials:
        figures_of = last_figures(t)
        seconds = t.seconds + (time.monotonic() - t.started if t.state == "running" else 0)
        state = t.state + (f" on {','.join(t.devices)}" if t.devices else "") + (" (best)" if t is winner else "")
        cells = [format_number(v) for v in (figures_of["loss"], metric_of(t, metric))[: len(losses)]]
        cells.append(format_number(figures_of["tokens_per_second"]))
        values = [escape(format_value(t.values.get(key, ""))) for key in keys]  # [q_proj] would be a style
        grid.add_row(str(t.number), *values, state, format_steps(t, figures_of["step"]), *cells, f"{seconds:.0f}")
    return grid


def format_steps(trial: Trial, step: int | None) -> str:
    if step is None:
        return ""
    most = trial.plan.trainer.get("max_steps", -1) if trial.plan else -1
    return f"{step}/{most}" if most and most > 0 else str(step)


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def progress_line(trials: list[Trial]) -> str:
    """The same in one line, for a log: how many are in each state, and where the running ones are."""
    states = [t.state for t in trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states, key=STATE_ORDER.index)))
    running = []
    for t in trials:
        if t.state == "running":
            values = last_figures(t)
            loss = f" loss {format_number(values['loss'])}" if values["loss"] is not None else ""
            running.append(f"{t.number:03d} step {format_steps(t, values['step']) or '-'}{loss}")
    return counts + (": " + " | ".join(running) if running else "")


STATE_ORDER = ["running", "done", "pruned", "failed", "refused", "stopped", "waiting"]
