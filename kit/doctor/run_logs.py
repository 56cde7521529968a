"""What the ranks of a run left behind: one `Rank` each, from logs/rank*.log, rank*.error.json and launch.json."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.doctor import causes
from kit.storage import run_directory
from kit.storage.json_files import read_json_or_empty
from kit.system.terminal import describe_duration

TAIL_BYTES = 400_000  # bytes of a log that are read: the last start of a long run
START_HEADER = re.compile(r"^--- plan \w+ rank \d+ .*$", re.M)
# What native code says on its way out, without a Python traceback.
NATIVE_CAUSES = {"crash", "illegal_instruction", "gpu_fault", "nccl", "cuda_oom", "host_memory", "device_assert"}


@dataclass(frozen=True)
class Rank:
    """One rank's last start.

    error: its own error in words, "" where it left none; trace: the traceback; written: when its log last grew;
    failed: when it wrote its error; died: when the launcher saw it gone.
    """

    number: int
    log: Path
    lines: list[str]
    error: str
    trace: str
    code: int | None
    written: float
    failed: float | None
    died: float | None

    @property
    def text(self) -> str:
        """All that can name a cause: its error, its traceback, else the end of its log."""
        return "\n".join([self.error, self.trace]) if self.error or self.trace else "\n".join(self.lines[-60:])

    @property
    def kind(self) -> str:
        """`error` of its own, `fell` after another rank, `waited` for one in vain, `silent` (no word of an error)."""
        text = self.text
        if causes.WAITED.search(text):
            return "waited"
        if causes.FELL_AFTER.search(self.error or text):
            return "fell"
        if self.error or self.trace:
            return "error"
        native = causes.find_cause(text)
        return "error" if native and native[0].id in NATIVE_CAUSES else "silent"


def read_ranks(run: Path) -> list[Rank]:
    """Every rank that wrote a log, by number."""
    logs = run / run_directory.LOGS
    deaths = read_launch_end(run).get("deaths") or {}
    ranks = [read_rank(log, deaths) for log in logs.glob("rank*.log") if re.fullmatch(r"rank\d+", log.stem)]
    return sorted(ranks, key=lambda rank: rank.number)


def read_rank(log: Path, deaths: dict[str, float]) -> Rank:
    number = int(log.stem.removeprefix("rank"))
    text = START_HEADER.split(read_tail(log))[-1]  # a resumed run appends: only its last start matters
    report = log.with_name(f"rank{number}.error.json")
    error = read_json_or_empty(report)
    problems = error.get("problems") or []
    traces = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(?:\S.*(?:\n|$))?", text)
    return Rank(
        number=number,
        log=log,
        lines=[line for line in text.splitlines() if line.strip()],
        error="\n".join(describe_problem(p) for p in problems),
        trace=traces[-1] if traces and (problems or not trained_after(text, traces[-1])) else "",
        code=error.get("code"),
        written=log.stat().st_mtime,
        failed=report.stat().st_mtime if problems else None,
        died=deaths.get(str(number)),
    )


def trained_after(text: str, trace: str) -> bool:
    """Whether a rank trained on after a traceback: somebody caught that error."""
    after = text[text.rindex(trace) + len(trace) :]
    return bool(re.search(r"^step \d+/\d+", after, re.M))


def describe_problem(problem: dict[str, Any]) -> str:
    where = problem.get("where") or ""
    return str(problem.get("problem", "")) + (f" ({where})" if where and not where.endswith(".log") else "")


def read_tail(path: Path) -> str:
    """The last part of a file, whole where it is short; "" where it cannot be read."""
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - TAIL_BYTES))
            return f.read().decode("utf-8", "replace").replace("\r", "\n")
    except OSError:
        return ""


def read_launch_end(run: Path) -> dict[str, Any]:
    """What the launching `kit` wrote at the end: return code, kills for memory, when each rank was gone."""
    return read_json_or_empty(run / run_directory.LAUNCH).get("ended") or {}


def signal_of_returncode(returncode: int | None) -> int | None:
    """The signal in a return code: -9 of the process itself, 137 of a shell, 247 of deepspeed's launcher."""
    if returncode is None or returncode == 0:
        return None
    if returncode < 0:
        return -returncode
    if 192 < returncode < 255:
        return 256 - returncode
    return returncode - 128 if 128 < returncode < 193 else None


def read_last_metrics(run: Path) -> dict[str, Any]:
    """The newest whole row of metrics.jsonl."""
    for line in reversed(read_tail(run / run_directory.METRICS_LOG).splitlines()):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}


def find_hung_rank(ranks: list[Rank]) -> Rank:
    """Whom the others waited for: who itself waited for nobody, else who enqueued least, else who fell silent first.

    NCCL's watchdog tells each rank's last enqueued work: the lowest number belongs to the one that stayed behind.
    """
    quiet = [rank for rank in ranks if rank.kind != "waited"]
    if quiet:
        return min(quiet, key=lambda rank: rank.written)
    counts = {rank.number: last_enqueued_work(rank) for rank in ranks}
    counted = {number: count for number, count in counts.items() if count is not None}
    if len(set(counted.values())) > 1:
        least = min(counted, key=lambda number: counted[number])
        return next(rank for rank in ranks if rank.number == least)
    return min(ranks, key=lambda rank: rank.written)


def last_enqueued_work(rank: Rank) -> int | None:
    numbers = re.findall(r"last enqueued(?: NCCL)? work: (\d+)", "\n".join(rank.lines))
    return int(numbers[-1]) if numbers else None


def locate_line(rank: Rank, text: str) -> str:
    """LOG:LINE of the last line that holds `wanted`."""
    number = 0
    if text:
        try:
            with open(rank.log, encoding="utf-8", errors="replace") as f:
                number = max((i for i, line in enumerate(f, 1) if text in line), default=0)
        except OSError:
            number = 0
    return f"{run_directory.path_from_here(rank.log)}{f':{number}' if number else ''}"


def reported_fixes(rank: Rank) -> list[str]:
    """The fixes that the kit's own refusal holds; not the general one of an unforeseen error."""
    problems = read_json_or_empty(rank.log.with_name(f"rank{rank.number}.error.json")).get("problems") or []
    general = ("the log holds the traceback", "lower trainer.per_device_train_batch_size")
    return [p["fix"] for p in problems if p.get("fix") and not p["fix"].startswith(general)]


def error_sentence(rank: Rank) -> str:
    """The error itself: the last line of the traceback, else the first of what was reported, else of the log."""
    lines = [line for line in (rank.error or rank.trace).splitlines() if line.strip()]
    if rank.error:
        return lines[0].removeprefix(f"rank {rank.number}: ")[:400]
    if lines:
        return lines[-1][:400]
    telling = [line for line in rank.lines if causes.find_cause(line)]
    return (telling or rank.lines or [""])[-1][:400]


def describe_other_rank(rank: Rank) -> str:
    words = {"fell": "fell after it", "waited": "waited for it", "error": "failed too"}.get(rank.kind, "said nothing")
    return f"rank {rank.number} {words}: {error_sentence(rank)[:160]}"


def format_age(moment: float) -> str:
    return f"{describe_duration(max(0.0, time.time() - moment))} ago"


def describe_bad_rows(run: Path) -> list[str]:
    """Which rows were in the steps before a loss that is not finite, as the trainer wrote them down."""
    report = read_json_or_empty(run / run_directory.LOGS / "nonfinite.json")
    if not report:
        return []
    steps = f"{report['first_step']} to {report['last_step']}"
    listed = ", ".join(map(str, report["rows"][:24])) + (", ..." if report["count"] > 24 else "")
    read = f"steps {steps} read {report['count']} of the {report['of']} prepared rows: {listed}"
    return [read, *(f"row {row}: {text[:120]!r}" for row, text in report.get("texts", {}).items())]
