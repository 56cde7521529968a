"""Keep up with a metrics.jsonl that another process writes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

PACE_STEPS = 20  # logged steps that the pace is taken from


class MetricsFollower:
    """The rows of a metrics.jsonl that may still grow, be cut off, replaced, or begin later.

    `losses`: step to loss, as it ended up where a step was trained twice. `restarts`: how often training began again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        self.offset, self.inode, self.rest = 0, 0, b""
        self.last: dict[str, Any] = {}  # the newest value of every figure, of this start
        self.begun: dict[str, Any] = {}  # the row that a start of training writes
        self.losses: dict[int, float] = {}
        self.marks: list[tuple[float, int]] = []  # (seconds, step) of this start
        self.restarts = self.damaged = 0
        self.written: float | None = None

    def read(self) -> None:
        """Take in what has been added. A file that became shorter or another one is read from its beginning."""
        try:
            with open(self.path, "rb") as f:
                about = os.fstat(f.fileno())
                if self.inode and (about.st_ino != self.inode or about.st_size < self.offset):
                    self.forget()
                self.inode, self.written = about.st_ino, about.st_mtime
                f.seek(self.offset)
                new = f.read()
        except OSError:
            return  # not there yet, or just being moved
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            if line.strip(b"\0 \r\t"):
                self.take(parse_metrics_row(line))

    def take(self, row: dict[str, Any] | None) -> None:
        if row is None:
            self.damaged += 1
            return
        step, seconds = row["step"], finite_number(row.get("seconds"))
        before = finite_number(self.last.get("seconds"))
        start = "max_steps" in row
        if before is not None and (start or (seconds is not None and seconds < before)):
            self.restarts += 1
            # What was trained after the checkpoint is trained again.
            self.losses = {s: v for s, v in self.losses.items() if (s <= step if start else s < step)}
            self.last, self.marks = {}, []
        if start:
            self.begun = row
        if isinstance(value := row.get("loss"), int | float):
            self.losses[step] = value
        if seconds is not None and (start or "loss" in row):
            self.marks.append((seconds, step))
        self.last.update(row)

    def pace(self) -> float | None:
        """Seconds per step lately, evaluations and saves included; None before two marks."""
        marks = self.marks[-PACE_STEPS - 1 :]
        if len(self.marks) > 2 and len(marks) == len(self.marks) and self.begun:
            marks = marks[1:]  # the first interval holds what happens once
        if len(marks) < 2 or marks[-1][1] <= marks[0][1]:
            return None
        return max(0.0, (marks[-1][0] - marks[0][0]) / (marks[-1][1] - marks[0][1]))


def parse_metrics_row(line: bytes) -> dict[str, Any] | None:
    """One row; of a line that a kill left half-written, what was appended to it; None where nothing can be read."""
    text = line.decode("utf-8", "replace").strip("\0 \r\t")
    for part in (text, text[text.rfind('{"') :]):
        try:
            row = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0:
            return row
    return None


def finite_number(value: Any) -> float | None:
    """A finite number, else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def numbers_per_rank(value: Any) -> list[float]:
    """A figure per rank, [] where it is none."""
    values = [finite_number(v) for v in value] if isinstance(value, list) else []
    return [v for v in values if v is not None] if None not in values else []
