"""`kit doctor RUN`: the earliest rank that failed, its cause, the fix; honest where the cause is not known."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kit.doctor import causes, oom
from kit.doctor.run_logs import (
    Rank,
    describe_bad_rows,
    describe_other_rank,
    error_sentence,
    find_hung_rank,
    format_age,
    locate_line,
    read_last_metrics,
    read_launch_end,
    read_ranks,
    reported_fixes,
    signal_of_returncode,
)
from kit.errors import DONE, FAILED, STOPPED
from kit.storage import manifest, run_directory
from kit.storage.json_files import read_json_or_empty

LAST_LINES = 15  # lines that are shown where no cause is known
FULL_DISK_BYTES = 256 * 1024  # bytes: no error report or log line fits for sure
QUIET_SECONDS = 600.0  # seconds without a line after which a living run is called quiet


@dataclass(frozen=True)
class Diagnosis:
    """state: done, running, stopped, created or failed. cause: an id of causes.py or of here, "unknown" for none."""

    run: str
    state: str
    cause: str
    sentence: str
    rank: int | None = None
    said: str = ""
    where: str = ""
    fixes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    code: int = FAILED

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(run: Path) -> Diagnosis:
    """Read a run directory. It is only read: a living run is left alone."""
    status, name = run_directory.read_status(run), run_directory.path_from_here(run)
    newest = manifest.newest_complete_checkpoint(run / run_directory.CHECKPOINTS).path
    facts: dict[str, Any] = {"run": name, "checkpoint": newest.name if newest else None}
    if (pid := run_directory.process_holding_lock(run)) is not None:
        return diagnose_alive(run, pid, status, facts)
    state = status.get("state")
    if state == "done":
        sentence = f"finished at step {status.get('step')}, {status.get('time')}: nothing is wrong with it"
        return Diagnosis(**facts, state="done", cause="none", sentence=sentence, code=DONE)
    if state == "stopped":
        sentence = (
            f"a signal (preemption, a time limit, Ctrl-C) stopped it at step {status.get('step')}, with a checkpoint"
        )
        fixes = [f"kit resume {name}"]
        return Diagnosis(**facts, state="stopped", cause="stopped", sentence=sentence, fixes=fixes, code=STOPPED)
    ranks = read_ranks(run)
    if state == "created" and not ranks:
        return diagnose_not_started(run, facts)
    return diagnose_failed(run, ranks, status, facts)


def diagnose_alive(run: Path, pid: int, status: dict[str, Any], facts: dict[str, Any]) -> Diagnosis:
    """A run whose lock is held."""
    ranks, row = read_ranks(run), read_last_metrics(run)
    touched = [rank.written for rank in ranks]
    metrics = run / run_directory.METRICS_LOG
    if metrics.exists():
        touched.append(metrics.stat().st_mtime)
    quiet = time.time() - max(touched) if touched else None
    sentence = f"alive: process {pid} holds it, {status.get('state')} since {status.get('time')}"
    sentence += f", step {row['step']}" if "step" in row else ", no step yet"
    fixes, others = [], []
    if quiet is not None and quiet > QUIET_SECONDS:
        sentence += f"; nothing was written for {quiet / 60:.0f} minutes"
        last = min(ranks, key=lambda rank: rank.written, default=None)
        others += [f"rank {rank.number} wrote last {format_age(rank.written)}" for rank in ranks]
        fixes = [f"py-spy dump of rank {last.number} shows where it waits" if last else "look at the processes"]
        fixes.append("kit doctor tells of operator locks, which a start waits for without a word")
    return Diagnosis(**facts, state="running", cause="none", sentence=sentence, fixes=fixes, others=others, code=DONE)


def diagnose_not_started(run: Path, facts: dict[str, Any]) -> Diagnosis:
    sentence = "no rank of it ever started: `kit train` refused, or was ended, while it prepared"
    fixes = [f"kit resume {facts['run']} says it again; kit doctor looks at compilers and operator locks"]
    return Diagnosis(**facts, state="created", cause="not_started", sentence=sentence, fixes=fixes)


def diagnose_failed(run: Path, ranks: list[Rank], status: dict[str, Any], facts: dict[str, Any]) -> Diagnosis:
    """The root is the earliest rank with an error of its own; else one that ended without a word; else who hung."""
    facts = {**facts, "state": "failed"}
    with_error = [rank for rank in ranks if rank.kind == "error"]
    if with_error:
        first = min(with_error, key=lambda rank: (rank.failed or rank.written, rank.number))
        return diagnose_error(run, first, ranks, status, facts)
    if (free := shutil.disk_usage(run).free) < FULL_DISK_BYTES:  # the ranks could not even write why they ended
        row = next(cause for cause in causes.CAUSES if cause.id == "disk_full")
        sentence = f"{row.cause}: {free // 1024} KiB are left below {run_directory.path_from_here(run)}"
        return Diagnosis(**facts, cause="disk_full", sentence=sentence, fixes=[row.fix])
    reported = [problem for problem in status.get("problems") or [] if not causes.FELL_AFTER.search(problem)]
    end, waiting = read_launch_end(run), [rank for rank in ranks if rank.kind == "waited"]
    silent = [rank for rank in ranks if rank.kind == "silent"]
    fell = [rank for rank in ranks if rank.kind == "fell"]
    gone = min(silent, key=lambda rank: rank.died or rank.written, default=None)
    killed = signal_of_returncode(end.get("returncode")) in (9, 4, 6, 7, 11) or bool(end.get("oom_kills"))
    if end.get("asked"):
        return diagnose_preempted(ranks, facts)
    if status.get("state") == "running" and not (end or fell or waiting):
        return diagnose_launcher_killed(status, facts)
    if gone is not None and (fell or killed or not waiting):
        return diagnose_silent_rank(run, gone, ranks, status, facts)
    if waiting:
        return diagnose_hang(find_hung_rank(ranks), ranks, facts)
    for rank in fell:  # every rank points at another one: the one that is named, in the words it is quoted with
        if quoted := re.search(r"rank (\d+) failed: ([\s\S]+)", rank.error):
            return diagnose_text(run, quoted[2], int(quoted[1]), ranks, facts)
    if reported and not ranks:
        return diagnose_text(run, "\n".join(reported), None, ranks, facts)
    return diagnose_unknown(run, min(ranks, key=lambda rank: rank.written, default=None), ranks, status, facts)


def diagnose_error(
    run: Path, rank: Rank, ranks: list[Rank], status: dict[str, Any], facts: dict[str, Any]
) -> Diagnosis:
    """A rank that said why, in its own words."""
    match = causes.find_cause(rank.error) or causes.find_cause(rank.text)
    message = error_sentence(rank)
    facts = {
        **facts,
        "rank": rank.number,
        "said": message,
        "where": locate_line(rank, message[:60]),
        "others": [
            describe_other_rank(other) for other in ranks if other.number != rank.number and other.kind != "silent"
        ],
        "code": rank.code or FAILED,
    }
    advice = reported_fixes(rank)
    if match is None:
        if "kit.errors.KitError" in rank.trace or "KitError" in message or advice:
            return Diagnosis(**facts, cause="refused", sentence=message, fixes=advice)
        return diagnose_unknown(run, rank, ranks, status, facts)
    cause, groups = match
    if cause.id == "cuda_oom":
        return diagnose_cuda_oom(run, rank, ranks, facts)
    sentence = cause.cause.format_map(groups)
    fixes = [cause.fix.format_map(groups), *advice]
    if cause.id == "non_finite":
        rows = describe_bad_rows(run)
        return Diagnosis(
            **{**facts, "others": [*rows, *facts["others"]]}, cause=cause.id, sentence=sentence, fixes=fixes
        )
    where = "" if len(ranks) == 1 else f", on rank {rank.number}"
    return Diagnosis(**facts, cause=cause.id, sentence=f"{sentence}{where}", fixes=fixes)


def diagnose_cuda_oom(run: Path, rank: Rank, ranks: list[Rank], facts: dict[str, Any]) -> Diagnosis:
    where = oom.failed_stage(rank.trace)
    also = sum(other.kind == "error" and "out of memory" in other.text for other in ranks)
    step = read_last_metrics(run).get("step")
    after = (
        f", after step {step}" if step else ", before the first logged step" if where != "loading the model" else ""
    )
    sentence = f"the memory of rank {rank.number}'s GPU is full, in {where}{after}"
    if also > 1:
        sentence += f" ({also} of {len(ranks)} ranks say so)"
    fixes = oom.memory_levers(where, read_json_or_empty(run / run_directory.PLAN), rank.text)
    return Diagnosis(**facts, cause="cuda_oom", sentence=sentence, fixes=fixes)


def diagnose_silent_rank(
    run: Path, rank: Rank, ranks: list[Rank], status: dict[str, Any], facts: dict[str, Any]
) -> Diagnosis:
    """A rank that ended without an error: killed from outside, or the whole machine went."""
    end = read_launch_end(run)
    number, kills = signal_of_returncode(end.get("returncode")), end.get("oom_kills") or 0
    others = [describe_other_rank(other) for other in ranks if other.number != rank.number and other.kind != "silent"]
    facts = {
        **facts,
        "rank": rank.number,
        "where": locate_line(rank, ""),
        "others": others,
        "last_lines": rank.lines[-LAST_LINES:],
    }
    memory = [
        "deepspeed=zero3 loads shards, no whole model per rank; fewer ranks, or more RAM (kit doctor shows it)",
        "trainer.dataloader_num_workers=0; offload moves memory from the GPU to the host",
    ]
    if kills:
        sentence = f"the kernel killed rank {rank.number} for want of host memory ({kills} process(es) meanwhile)"
        return Diagnosis(**facts, cause="host_oom_kill", sentence=sentence, fixes=memory)
    if number == 9:
        sentence = (
            f"rank {rank.number} was killed by SIGKILL: by the kernel for want of host memory, a scheduler or a person"
        )
        return Diagnosis(
            **facts, cause="killed", sentence=sentence, fixes=["dmesg | grep -i 'killed process' tells which", *memory]
        )
    if number in (4, 6, 7, 11):
        kind = "illegal_instruction" if number == 4 else "crash"
        row = next(cause for cause in causes.CAUSES if cause.id == kind)
        return Diagnosis(
            **facts, cause=kind, sentence=f"{row.cause}, in rank {rank.number} (signal {number})", fixes=[row.fix]
        )
    sentence = f"rank {rank.number} ended first and without a word: most likely it was killed from outside (SIGKILL)"
    return Diagnosis(
        **facts,
        cause="killed",
        sentence=sentence,
        fixes=["dmesg | grep -i 'killed process' tells whether for memory", *memory],
    )


def diagnose_preempted(ranks: list[Rank], facts: dict[str, Any]) -> Diagnosis:
    """Asked to stop (preemption, a time limit, Ctrl-C), and ended before a checkpoint was whole."""
    last = max(ranks, key=lambda rank: rank.written, default=None)
    sentence = (
        "it was told to stop (preemption, a time limit, Ctrl-C), and no checkpoint was whole when its time was up"
    )
    fixes = ["a larger launch.grace_seconds, and a signal that comes earlier (sbatch --signal=TERM@300)"]
    lines = last.lines[-LAST_LINES:] if last else []
    return Diagnosis(**facts, cause="preempted", sentence=sentence, fixes=fixes, last_lines=lines)


def diagnose_launcher_killed(status: dict[str, Any], facts: dict[str, Any]) -> Diagnosis:
    """The status still says running, and nobody holds the lock."""
    since = str(status.get("time"))
    sentence = f"it was running since {since} and nobody runs it now: launcher and ranks were ended together"
    try:
        started = time.mktime(time.strptime(since[:19], "%Y-%m-%dT%H:%M:%S"))
        if psutil.boot_time() > started:
            sentence += "; the machine has been started anew since"
    except ValueError:
        pass
    fixes = ["look at the scheduler's record of the job (time limit, memory), and at dmesg"]
    if facts.get("checkpoint"):
        fixes.insert(0, f"kit resume {facts['run']}")
    return Diagnosis(**facts, cause="launcher_killed", sentence=sentence, fixes=fixes)


def diagnose_hang(rank: Rank, ranks: list[Rank], facts: dict[str, Any]) -> Diagnosis:
    waited = [other for other in ranks if other.kind == "waited" and other is not rank]
    message = next((line for other in waited or [rank] for line in other.lines if causes.WAITED.search(line)), "")
    numbers = ", ".join(str(other.number) for other in waited) or "all"
    sentence = f"rank {rank.number} stayed behind: rank(s) {numbers} waited for it until the limit; "
    sentence += f"it wrote last {format_age(rank.written)}"
    fixes = [
        "its last lines show what it did: a slow save, evaluation or tokenising (raise trainer.ddp_timeout), or a step"
        " that only some ranks take (a callback with `if rank == 0:` around a collective)",
        "mixture-of-experts under ZeRO-3: the expert block must be a leaf module",
        "TORCH_NCCL_TRACE_BUFFER_SIZE=2000 and TORCH_NCCL_DUMP_ON_TIMEOUT=1 record every collective",
    ]
    return Diagnosis(
        **facts, cause="hang", sentence=sentence, rank=rank.number, said=message.strip()[:400], fixes=fixes,
        where=locate_line(rank, ""), last_lines=rank.lines[-LAST_LINES:],
    )  # fmt: skip


def diagnose_text(run: Path, text: str, number: int | None, ranks: list[Rank], facts: dict[str, Any]) -> Diagnosis:
    """Words about a rank that left none itself."""
    match = causes.find_cause(text)
    facts = {**facts, "rank": number, "said": text.strip().splitlines()[0][:400]}
    if match is None:
        return Diagnosis(**facts, cause="unknown", sentence="the cause is not in the table; these are its words")
    cause, groups = match
    fix = cause.fix.format_map(groups) or "see the levers of kit plan"
    return Diagnosis(**facts, cause=cause.id, sentence=cause.cause.format_map(groups), fixes=[fix])


def diagnose_unknown(
    run: Path, rank: Rank | None, ranks: list[Rank], status: dict[str, Any], facts: dict[str, Any]
) -> Diagnosis:
    if rank is None:
        message = (status.get("problems") or [""])[0]
        return Diagnosis(
            **{**facts, "said": message}, cause="unknown", sentence="no rank left a log, and no cause is known"
        )
    facts = {**facts, "rank": rank.number, "where": locate_line(rank, ""), "last_lines": rank.lines[-LAST_LINES:]}
    sentence = f"the cause is not known; rank {rank.number} failed first, and these are its last lines"
    return Diagnosis(**facts, cause="unknown", sentence=sentence)
