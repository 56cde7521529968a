"""`kit doctor [RUN]`: what is typed, and how findings and diagnoses are printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from kit.doctor.findings import BAD, OK, WARN, Finding
from kit.errors import DONE, ENVIRONMENT, KitError

OPERATORS = ("deepspeed_shm_comm", "cpu_adam", "async_io")
LEVEL_MARKS = {OK: ("ok  ", ""), WARN: ("warn", "\033[33m"), BAD: ("bad ", "\033[31m")}


def doctor_verb(argv: list[str]) -> int:
    """The exit code: 0, or 3 where something would stop a run; of a run its own, 0 where it is done or alive."""
    parser = argparse.ArgumentParser(
        prog="kit doctor", allow_abbrev=False,
        description="What on this machine would stop or change a run; of a failed run, the cause and the fix.",
    )  # fmt: skip
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory, or the name of one below runs/")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--build-ops", nargs="?", const="", metavar="NAME,NAME",
        help=f"compile DeepSpeed's operators now ({', '.join(OPERATORS)}; default: what this machine can use)",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for --build-ops (1800)")
    parser.add_argument(
        "--remove-stale-locks", action="store_true", help="remove operator locks that no living process holds"
    )
    a = parser.parse_intermixed_args(argv)
    if a.run and (a.build_ops is not None or a.remove_stale_locks):
        raise KitError("a run is looked at, or the machine is mended: not both", "command line", "two commands")
    if a.run:
        return print_diagnosis(a.run, a.json)
    if a.remove_stale_locks:
        remove_stale_locks()
    if a.build_ops is not None:
        build_ops([name for name in a.build_ops.split(",") if name], a.limit)
        if not a.json:
            return DONE
    findings = check_machine()
    bad = any(finding.level == BAD for finding in findings)
    if a.json:
        print(json.dumps({"ready": not bad, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        print_findings(findings)
    return ENVIRONMENT if bad else DONE


def check_machine(
    root: Path = Path("/"), env: Mapping[str, str] = os.environ, here: Path | None = None, home: Path | None = None
) -> list[Finding]:
    """Every check, on this machine or below `root` with `env`."""
    from kit.doctor import environment, gpu, machine, op_locks, versions
    from kit.launchers import ops
    from kit.storage import hub_cache

    here, home = here or Path.cwd(), home or Path.home()
    cuda = versions.cuda_of_torch()
    built = any(ops.extensions_dir().glob(".built-*/*"))
    cached = hub_cache.hub_cache_folder(env)
    places = {
        "runs": here / "runs",
        "hub cache": cached,
        "temporary": Path(env.get("TMPDIR") or tempfile.gettempdir()),
    }
    checks = (
        versions.check_python,
        versions.check_packages,
        lambda: gpu.check_gpus(cuda, root, env),
        lambda: gpu.check_nvcc(cuda, root, env),
        lambda: machine.check_compilers(root, env, built),
        lambda: op_locks.check_locks(op_locks.extension_folders(env, home)),
        lambda: machine.check_disks(places),
        lambda: machine.check_shm(root),
        machine.check_limits,
        lambda: machine.check_cpu(root, env),
        lambda: machine.check_memory(root),
        lambda: machine.check_ports(env),
        lambda: environment.check_offline(env, cached),
        lambda: environment.check_leftovers(root, here, home),
        lambda: environment.check_variables(env),
    )
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except OSError as error:  # a check that is not allowed to look must not hide the others
            findings.append(
                Finding(WARN, "not looked at", f"{error.filename or ''} {error.strerror or error}".strip())
            )
    return findings


def print_findings(findings: list[Finding]) -> None:
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for finding in findings:
        mark, paint = LEVEL_MARKS[finding.level]
        mark = f"{paint}{mark}\033[0m" if color and paint else mark
        print(f"{mark}  {finding.what:<14} {finding.found}")
        if finding.fix and finding.level != OK:
            print(f"      {'':<14} fix: {finding.fix}")
    counts = {level: sum(finding.level == level for finding in findings) for level in (BAD, WARN)}
    print(f"\n{counts[BAD]} would stop a run, {counts[WARN]} to know of")


def print_diagnosis(name: str, as_json: bool) -> int:
    from kit.doctor.run import diagnose
    from kit.storage import run_directory

    diagnosis = diagnose(run_directory.find_run(name))
    if as_json:
        print(json.dumps(diagnosis.to_json(), indent=1, ensure_ascii=False))
        return diagnosis.code
    print(f"run       {diagnosis.run}: {diagnosis.state}")
    print(
        f"cause     {diagnosis.sentence}"
        if diagnosis.state in ("failed", "created")
        else f"state     {diagnosis.sentence}"
    )
    if diagnosis.said and diagnosis.said not in diagnosis.sentence:
        print(f"said      {diagnosis.said}")
    if diagnosis.where:
        print(f"where     {diagnosis.where}")
    for number, fix in enumerate(diagnosis.fixes, 1):
        print(f"{'fix' if number == 1 else '':<9} {fix}")
    for other in diagnosis.others:
        print(f"also      {other}")
    for line in diagnosis.last_lines:
        print(f"        | {line[:200]}")
    if diagnosis.state == "failed" and diagnosis.checkpoint:
        print(f"next      kit resume {diagnosis.run}  ({diagnosis.checkpoint} is complete)")
    return diagnosis.code


def remove_stale_locks() -> None:
    from kit.doctor import op_locks

    removed, left = op_locks.remove_dead_locks(op_locks.extension_folders(os.environ, Path.home()))
    for path in removed:
        print(f"removed   {path}", file=sys.stderr)
    for lock in left:
        reason = f"process {lock.pid} holds it" if lock.pid else "it may be held on another machine"
        print(f"left      {lock.path}: {reason}", file=sys.stderr)
    if not removed and not left:
        print("no operator locks", file=sys.stderr)


def build_ops(names: list[str], seconds: float) -> None:
    """Compile what is named, or what this machine can use; KitError where it fails or takes too long."""
    from kit.doctor import machine
    from kit.doctor.findings import find_program
    from kit.launchers import ops
    from kit.system import hardware
    from kit.system.dependencies import installed_version

    if wrong := [name for name in names if name not in OPERATORS]:
        raise KitError(f"there is no operator {', '.join(wrong)}", "--build-ops", f"of {', '.join(OPERATORS)}")
    if installed_version("deepspeed") is None:
        raise KitError("deepspeed is not installed", "--build-ops", "pip install deepspeed", code=ENVIRONMENT)
    cpu = not hardware.list_gpus()
    if not names:
        names = ["deepspeed_shm_comm"] if cpu else []
        names += ["cpu_adam"] + (["async_io"] if machine.check_libaio(Path("/")).level == OK else [])
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    if find_program("ninja", {"PATH": path}) is None:
        raise KitError("ninja is not here", "--build-ops", "pip install ninja", code=ENVIRONMENT)
    env = {"PATH": path, **({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
    tick = ProgressTicker(ops.extensions_dir())
    try:
        ops.build_missing_ops(names, seconds, tick.say, env, tick)
    except KitError as error:  # its limit is set here by an option, not by a run's key
        fixes = {p: p.fix.replace("launch.build_seconds=1800", "a larger --limit") for p in error.problems}
        raise KitError([replace(p, fix=fix) for p, fix in fixes.items()], code=error.code) from None
    finally:
        tick.clear()
    print(f"built     {', '.join(names)} in {ops.extensions_dir()}", file=sys.stderr)


class ProgressTicker:
    """Called while an operator compiles: a line that is redrawn on a terminal, one each half minute elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start, self.shown = folder, time.monotonic(), time.monotonic()
        self.terminal = sys.stderr.isatty()

    def say(self, line: str) -> None:
        self.clear()
        print(line, file=sys.stderr, flush=True)
        self.start = self.shown = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.shown >= (1 if self.terminal else 30):
            self.shown = now
            text = f"  {now - self.start:.0f} s{self.done()}"
            print(
                f"\r{text}\033[K" if self.terminal else text,
                end="" if self.terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
        return False

    def done(self) -> str:
        """ninja's own count, from the newest build log."""
        import re

        logs = sorted(self.folder.glob(".*.log"), key=lambda log: log.stat().st_mtime)
        counts = re.findall(r"\[(\d+/\d+)\]", logs[-1].read_text(errors="replace")) if logs else []
        return f", {counts[-1]} steps" if counts else ""

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
