"""sweep.svg: the curve of every trial, and the results beside each other. Plain text, no library, opens anywhere."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from kit.storage.json_files import atomic_write_text
from kit.sweeps.pool import Trial
from kit.sweeps.record import best, number, result

COLOURS = [
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
]
WIDTH, HEIGHT, LEFT, TOP = 460, 300, 70, 50  # of one panel, and the space before it


def write_plot(path: Path, trials: list[Trial], metric: str, direction: str, title: str) -> None:
    """Write the plot of the trials that have logged something; an empty frame says so where none has."""
    shown = [t for t in trials if t.curve.rows]
    curve = metric if any(len(t.curve.series(metric)) > 1 for t in shown) else "loss"
    height = TOP + HEIGHT + 60 + 18 * math.ceil(len(shown) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1160" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        text(20, 24, title, size=16),
        *curves(shown, curve, LEFT),
        *results(shown, metric, direction, LEFT + WIDTH + 120),
        *legend(shown),
        "</svg>",
    ]
    atomic_write_text(path, "\n".join(parts) + "\n")


def text(x: float, y: float, said: str, anchor: str = "start", size: int = 12, fill: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(said)}</text>'
    )


def colour(trials: list[Trial], trial: Trial) -> str:
    return COLOURS[trials.index(trial) % len(COLOURS)]


def span(values: list[float]) -> tuple[float, float]:
    """From least to most, with some room; one value alone gets room too."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def frame(left: float, title: str, low: float, high: float) -> list[str]:
    """A panel's border, its title, and five marks on the vertical axis."""
    parts = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
    parts.append(text(left, TOP - 8, title))
    for i in range(5):
        y = TOP + HEIGHT - i * HEIGHT / 4
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(text(left - 6, y + 4, number(low + (high - low) * i / 4), "end"))
    return parts


def curves(trials: list[Trial], key: str, left: float) -> list[str]:
    """The values of `key` over the steps, a line to a trial."""
    series = [(t, t.curve.series(key)) for t in trials]
    low, high = span([v for _, points in series for _, v in points])
    last = max([step for _, points in series for step, _ in points], default=1)
    first = min([step for _, points in series for step, _ in points], default=0)
    parts = frame(left, f"{key} over steps", low, high)
    for trial, points in series:
        at = [
            (left + WIDTH * (step - first) / max(last - first, 1), TOP + HEIGHT * (high - v) / (high - low))
            for step, v in points
        ]
        stroke = colour(trials, trial)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{stroke}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{stroke}"/>' for x, y in at if len(at) < 40]
    parts += [text(left, TOP + HEIGHT + 16, str(first)), text(left + WIDTH, TOP + HEIGHT + 16, str(last), "end")]
    return parts


def results(trials: list[Trial], metric: str, direction: str, left: float) -> list[str]:
    """The result of every trial as a dot above its number; the best one is ringed."""
    scored = [(t, value) for t in trials if (value := result(t, metric)) is not None and math.isfinite(value)]
    low, high = span([v for _, v in scored])
    parts = frame(left, f"{metric} at the end of each trial ({direction})", low, high)
    winner = best(trials, metric, direction)
    every = math.ceil(len(scored) / 20) or 1
    for place, (trial, value) in enumerate(scored):
        x = left + WIDTH * (place + 0.5) / len(scored)
        y = TOP + HEIGHT * (high - value) / (high - low)
        fill = colour(trials, trial) if trial.state == "done" else "white"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour(trials, trial)}">'
            f"<title>{escape(f'{trial.number}: {trial.label()} = {number(value)} ({trial.state})')}</title></circle>"
        )
        if trial is winner:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="#333"/>')
        if place % every == 0:
            parts.append(text(x, TOP + HEIGHT + 16, str(trial.number), "middle"))
    if not scored:
        parts.append(text(left + WIDTH / 2, TOP + HEIGHT / 2, f"no trial has logged {metric}", "middle"))
    return parts


def legend(trials: list[Trial]) -> list[str]:
    """Every trial's number, values and state, in two columns."""
    parts = []
    for place, trial in enumerate(trials):
        x, y = LEFT + 580 * (place % 2), TOP + HEIGHT + 45 + 18 * (place // 2)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour(trials, trial)}"/>')
        said = f"{trial.number}: {trial.label()}"
        parts.append(text(x + 16, y, (said if len(said) <= 75 else said[:74] + "…") + f" ({trial.state})"))
    return parts
