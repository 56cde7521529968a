"""A state as a frame, as a line, as a table: what `kit watch` shows."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any

BLOCKS = " ▁▂▃▄▅▆▇█"
NAME_WIDTH = 12  # the column of names
CURVE_HEIGHT = 6  # lines of the loss curve
COLOURS = {"running": "cyan", "done": "green", "stopped": "yellow", "pruned": "yellow", "failed": "red"}


def render_text(renderable: Any) -> str:
    """A frame as plain text, with colour where standard output is a terminal that wants it."""
    from io import StringIO

    from rich.console import Console

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    out = Console(
        file=StringIO(), width=shutil.get_terminal_size((100, 24)).columns, force_terminal=colour, no_color=not colour,
        highlight=False, legacy_windows=False, emoji=False,
    )  # fmt: skip
    out.print(renderable, soft_wrap=not sys.stdout.isatty())  # in a file a path stays whole
    printed = out.file.getvalue()  # type: ignore[attr-defined]
    return encode_for_stdout("\n".join(row.rstrip() for row in printed.split("\n")))


def encode_for_stdout(words: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return words.encode(encoding, "replace").decode(encoding, "replace")


def run_frame(s: dict[str, Any], hint: bool = False) -> Any:
    """One run: its state, its figures, its loss curve."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text(escape_control(s["run"]), style="bold")
    head.append(f"  {escape_control(s['state'])}", style=COLOURS.get(s["state"], ""))
    head.append(escape_control(process_or_exit_code(s)), style="not bold")
    grid = Table.grid(padding=(0, 2))
    for name, value in figure_rows(s):
        grid.add_row(Text(name), Text(escape_control(value)))
    parts: list[Any] = [head, grid]
    if len(points := [(step, v) for step, v in s["losses"] if v is not None]) > 1:
        width = max(20, min(shutil.get_terminal_size((100, 24)).columns, 100) - 12)
        parts.append(Text("\n".join(loss_curve(points, width, CURVE_HEIGHT, can_show_blocks()))))
    for problem in s["problems"][:3]:
        parts.append(Text("\n".join(escape_control(row) for row in problem.splitlines()[:6]), style="red"))
    parts += [Text(f"note: {escape_control(note)}", style="yellow") for note in s["notes"]]
    if s["state"] == "stopped" or (s["state"] == "failed" and s["checkpoint"]):
        parts.append(Text(f"next: kit resume {escape_control(s['run'])}"))
    if hint:
        parts.append(Text("q leaves; the run goes on", style="dim"))
    return Group(*parts)


def process_or_exit_code(s: dict[str, Any]) -> str:
    if s["alive"]:
        return f", process {s['pid']} is alive"
    if s["alive"] is None:
        return f" on {s['host']}"
    if s["state"] == "created":
        return ", not started yet"
    return f", exit code {s['exit_code']}" if s["exit_code"] else ""


def figure_rows(s: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every figure that is known."""
    done = f" ({100 * s['step'] / s['max_steps']:.0f} %)" if s["step"] is not None and s["max_steps"] else ""
    epoch = f", epoch {s['epoch']:.2f}" if s["epoch"] is not None else ""
    spent = f"{format_duration(s['seconds'])} since its start" if s["seconds"] is not None else ""
    left = f"{format_duration(s['seconds_left'])} left" if s["seconds_left"] is not None else ""
    pace = f"{s['seconds_per_step']:.3g} s per step" if s["seconds_per_step"] is not None else ""
    saved = s["checkpoint"] and f"{s['checkpoint']}, {format_duration(time.time() - s['checkpoint_time'])} ago"
    figures = [
        ("step", f"{format_steps(s)}{done}{epoch}" if s["step"] is not None else "none yet"),
        ("time", ", ".join(filter(None, (spent, left, pace)))),
        ("loss", format_number(s["loss"])),
        ("eval_loss", format_number(s["eval_loss"])),
        ("learning_rate", format_number(s["learning_rate"])),
        ("grad_norm", format_number(s["grad_norm"])),
        ("tokens/s", format_rate(s["tokens_per_second"])),
        ("memory", format_memory(s)),
        ("slowest rank", format_slowest_rank(s["slowest_rank"])),
        ("checkpoint", saved or "none yet"),
        ("restarts", str(s["restarts"])),
    ]
    return [(name, value) for name, value in figures if value]


def format_memory(s: dict[str, Any]) -> str:
    """The fullest rank's: on a GPU the peak that was allocated, on CPU what the process holds."""
    kind = "peak allocated" if s["memory_gb"] is not None else "resident"
    ranks = s["rank_memory_gb"]
    if len(ranks) > 1:
        return f"{max(ranks):.3g} GiB {kind} on rank {ranks.index(max(ranks))}, {min(ranks):.3g} the least"
    one = ranks[0] if ranks else s["memory_gb"]
    return f"{one:.3g} GiB {kind}" if one is not None else ""


def format_slowest_rank(slowest: dict[str, Any] | None) -> str:
    if not slowest:
        return ""
    own_time = f"{slowest['seconds']:.3g} s of its own per step ({slowest['load_seconds']:.2g} s reading)"
    return f"{slowest['rank']}: {own_time}, the median rank {slowest['median_seconds']:.3g} s"


def run_line(s: dict[str, Any]) -> str:
    """A run in one line."""
    slowest, restarts = s["slowest_rank"], s["restarts"]
    parts = [
        (escape_control(s["state"]), "{}"),
        (format_steps(s) or "none yet", "step {}"),
        (format_number(s["loss"]), "loss {}"),
        (format_number(s["eval_loss"]), "eval_loss {}"),
        (format_number(s["learning_rate"]), "learning_rate {}"),
        (format_number(s["grad_norm"]), "grad_norm {}"),
        (format_rate(s["tokens_per_second"]), "{} tokens/s"),
        (format_memory(s), "{}"),
        (str(slowest["rank"]) if slowest else "", "slowest rank {}"),
        (format_duration(s["seconds_left"]), "{} left"),
        (s["checkpoint"], "{}"),
        (str(restarts or ""), "restarts {}"),
        *((escape_control(note), "({})") for note in s["notes"]),
    ]
    return "  ".join(words.format(value) for value, words in parts if value)


def sweep_table(name: str, states: list[dict[str, Any]]) -> Any:
    """A sweep: a line per trial."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = ("trial", "state", "step", "loss", "eval_loss", "tokens/s", "memory", "left", "restarts")
    rows = [trial_cells(s) for s in states]
    used = [n for n in range(len(names)) if n < 2 or any(row[n] for row in rows)]
    wide = [max(len(text) for text in (names[n], *(row[n] for row in rows))) + 3 for n in range(len(names))]
    room = shutil.get_terminal_size((100, 24)).columns - 2 - (NAME_WIDTH + 3) - wide[1]
    for n in (2, 3, 7, 4, 5, 6, 8):  # what a narrow terminal shows first
        if n in used and wide[n] > room:
            used.remove(n)
        elif n in used:
            room -= wide[n]
    grid = Table(box=box.SIMPLE if can_show_blocks() else box.ASCII2)
    for n in used:
        wraps = {"overflow": "fold", "min_width": NAME_WIDTH} if n == 0 else {"no_wrap": True}
        grid.add_column(names[n], justify="left" if n < 2 else "right", **wraps)
    for row in rows:
        grid.add_row(*(Text(row[n], style=COLOURS.get(row[n], "") if n == 1 else "") for n in used))
    problems = [f"{s['name']}: {problem.splitlines()[0]}" for s in states for problem in s["problems"][:1] if problem]
    return Group(
        Text(f"{escape_control(name)}  {count_states(states)}"),
        grid,
        *(Text(escape_control(words), style="red") for words in problems),
    )


def trial_cells(s: dict[str, Any]) -> list[str]:
    """A trial's line; one that is refused or waits has no directory, so no figures."""
    names = [escape_control(s["name"]), escape_control(s["state"])]
    if "losses" not in s:
        return [*names, *[""] * 7]
    memories = [*s["rank_memory_gb"], *([s["memory_gb"]] if s["memory_gb"] is not None else [])]
    figures = [
        format_steps(s),
        format_number(s["loss"]),
        format_number(s["eval_loss"]),
        format_rate(s["tokens_per_second"]),
    ]
    memory = f"{max(memories):.3g} GiB" if memories else ""
    return [*names, *figures, memory, format_duration(s["seconds_left"]), str(s["restarts"] or "")]


def count_states(states: list[dict[str, Any]]) -> str:
    kinds = [s["state"] for s in states]
    return ", ".join(f"{kinds.count(kind)} {escape_control(kind)}" for kind in dict.fromkeys(kinds)) or "no trials yet"


def format_steps(s: dict[str, Any]) -> str:
    if s["step"] is None:
        return ""
    return f"{s['step']}/{s['max_steps']}" if s["max_steps"] else str(s["step"])


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def format_rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def format_duration(seconds: float | None) -> str:
    """`42 s`, `12:05` (minutes), `3:04:05`, `2 days 03:04:05`; "" for what is not known."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} day{'s' * (days > 1)} {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}" if minute else f"{second} s"


def escape_control(words: Any) -> str:
    """Control characters as escapes: what a run wrote must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(words))


def can_show_blocks() -> bool:
    """Whether standard output can show block characters."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def loss_curve(points: list[tuple[int, float]], width: int, height: int, fine: bool = True) -> list[str]:
    """The loss over the steps as `height` lines of bars and one of steps; a column is the mean of its steps.

    fine: with eighths of a character, else with whole `*`.
    """
    first, last = points[0][0], points[-1][0]
    width = min(width, 8 * len(points))
    columns: list[list[float]] = [[] for _ in range(width)]
    each = max(1, (last - first) // max(len(points) - 1, 1))  # steps from one log to the next: the last has room too
    for step, value in points:
        columns[(step - first) * width // (last - first + each)].append(value)
    means: list[float] = []
    for column in columns:  # a column without a step repeats the one before
        means.append(sum(column) / len(column) if column else means[-1])
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    levels = [1 + round((v - low) / span * (8 * height - 1)) for v in means]
    label = max(len(format_number(low)), len(format_number(high)))
    rows = []
    for row in range(height - 1, -1, -1):
        filled = (max(0, min(8, level - 8 * row)) for level in levels)
        bars = "".join(BLOCKS[n] if fine else " *"[n > 3 or (n > 0 and row == 0)] for n in filled)
        mark = format_number(high) if row == height - 1 else format_number(low) if row == 0 else ""
        rows.append(f"{mark:>{label}} {bars}".rstrip())
    return [*rows, f"{'':{label}} {f'step {first}':<{max(width - len(str(last)), 0)}} {last}"]
