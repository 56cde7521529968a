"""Compilers, disks, memory, limits, ports: what stands between a plan and a run, without GPUs and packages."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from kit.doctor.findings import BAD, OK, WARN, Finding, find_program, format_gb, run_program
from kit.system import hardware

MASTER_PORT = 29500  # the default of deepspeed, torchrun and accelerate
GIB = 2**30


# ---- what compiles DeepSpeed's operators ----


def check_compilers(root: Path, env: Mapping[str, str], built: bool = False) -> list[Finding]:
    """built: the operators are there already, so that a missing compiler stops nothing today."""
    findings: list[Finding] = []
    need = BAD if not built else WARN
    cxx = env.get("CXX") or next((c for c in ("c++", "g++") if find_program(c, env)), "g++")
    for label, name, fix in (
        ("C++ compiler", cxx, "apt install g++ (or a compiler module of the cluster)"),
        ("ninja", "ninja", "pip install ninja"),
    ):
        here = find_program(name, {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{env.get('PATH', '')}"})
        if here is None:
            purpose = "DeepSpeed on a CPU and offload compile with it"
            findings.append(Finding(need, label, f"{name} is not on the PATH; {purpose}", fix))
            continue
        good, text = run_program([here, "--version"], env)
        version = text.splitlines()[0] if text else "no version"
        findings.append(Finding(OK if good else WARN, label, f"{version} ({here})"))
    return [*findings, check_libaio(root)]


def check_libaio(root: Path) -> Finding:
    """The header and the library that the async_io operator is compiled with."""
    places = [
        "usr/lib",
        "usr/lib64",
        "usr/local/lib",
        "lib64",
        "usr/lib/x86_64-linux-gnu",
        "usr/lib/aarch64-linux-gnu",
    ]
    header = any((root / p / "libaio.h").exists() for p in ("usr/include", "usr/local/include"))
    library = any((root / p / "libaio.so").exists() for p in places)
    if header and library:
        return Finding(OK, "libaio", "header and library are here")
    lacks = " and ".join(n for n, there in (("libaio.h", header), ("libaio.so", library)) if not there)
    return Finding(WARN, "libaio", f"no {lacks}: offload to NVMe cannot be compiled", "apt install libaio-dev")


# ---- disks ----


def check_disks(places: Mapping[str, Path], usage: Callable[[Path], Any] = shutil.disk_usage) -> list[Finding]:
    """places: what is written there -> folder, which need not exist yet."""
    findings = []
    for label, folder in places.items():
        there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))
        try:
            free = usage(there).free
            files = os.statvfs(there)
        except OSError as error:
            findings.append(Finding(WARN, label, f"{folder}: {error.strerror}"))
            continue
        size = f"{format_gb(free)} free in {folder}"
        if not os.access(there, os.W_OK | os.X_OK):
            findings.append(Finding(BAD, label, f"{folder} cannot be written", "another folder, or its rights"))
        elif free < 1e9:
            findings.append(Finding(BAD, label, size, "free some space, or choose another disk"))
        elif files.f_files and files.f_favail < 1000:
            findings.append(Finding(BAD, label, f"{size}, but only {files.f_favail} more files", "delete small files"))
        elif free < 20e9 and label != "temporary":
            findings.append(
                Finding(WARN, label, f"{size}: a 7B model alone takes 14 GB", "free some, or another disk")
            )
        else:
            findings.append(Finding(OK, label, size))
    return findings


def check_shm(root: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> list[Finding]:
    """NCCL, gloo and the workers of a data loader exchange through /dev/shm; containers get 64 MB by default."""
    try:
        size = usage(root / "dev" / "shm")
    except OSError:
        fix = "mount a tmpfs there"
        return [Finding(BAD, "/dev/shm", "is not there: ranks of one machine exchange through it", fix)]
    description = f"{format_gb(size.total)}, {format_gb(size.free)} free"
    fix = "docker run --shm-size=16g (or --ipc=host); or delete what earlier runs left in it"
    if size.free < 64 * 2**20:
        return [Finding(BAD, "/dev/shm", description, fix)]
    return [Finding(WARN, "/dev/shm", f"{description}: too little for several GPUs", fix)] if size.free < GIB else [
        Finding(OK, "/dev/shm", description)
    ]  # fmt: skip


# ---- limits ----


def check_limits(memlock: int | None = None, files: tuple[int, int] | None = None) -> list[Finding]:
    """memlock: soft limit in bytes (-1: none); files: soft and hard limit."""
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if memlock is None else memlock
    soft, hard = files or resource.getrlimit(resource.RLIMIT_NOFILE)
    findings = []
    if memlock in (-1, resource.RLIM_INFINITY) or memlock >= 16 * GIB:
        findings.append(Finding(OK, "locked memory", "no limit" if memlock < 0 else format_gb(memlock)))
    else:
        problem = f"{memlock / 2**20:.0f} MiB: NVMe offload locks its buffers and InfiniBand its regions"
        findings.append(Finding(WARN, "locked memory", problem, "ulimit -l unlimited (docker: --ulimit memlock=-1)"))
    if soft in (-1, resource.RLIM_INFINITY) or soft >= 4096:
        findings.append(Finding(OK, "open files", "no limit" if soft < 0 else str(soft)))
    else:
        best = "65535" if hard < 0 else str(hard)
        findings.append(
            Finding(WARN, "open files", f"{soft}: sharded models and data workers need more", f"ulimit -n {best}")
        )
    return findings


def check_cpu(root: Path, env: Mapping[str, str], cores: int | None = None) -> list[Finding]:
    """Cores that may be used against the share of time that the control group grants; NUMA nodes."""
    cores = hardware.count_cpu_cores() if cores is None else cores
    granted = hardware.cgroup_cpu_quota(root)
    nodes = len(list((root / "sys" / "devices" / "system" / "node").glob("node[0-9]*"))) or 1
    numa = f", {nodes} NUMA nodes" if nodes > 1 else ""
    threads = env.get("OMP_NUM_THREADS", "")
    if granted and granted < cores and not (threads.isdigit() and int(threads) <= max(1, granted)):
        text = f"{cores} cores are seen, {granted:.1f} are granted{numa}: libraries start a thread for each seen"
        return [Finding(WARN, "cpu", text, f"export OMP_NUM_THREADS={max(1, int(granted))}")]
    if threads.isdigit() and int(threads) > cores:
        return [Finding(WARN, "cpu", f"OMP_NUM_THREADS={threads} on {cores} cores{numa}", "unset OMP_NUM_THREADS")]
    return [Finding(OK, "cpu", f"{cores} cores{numa}")]


def check_memory(root: Path) -> list[Finding]:
    """Physical RAM against the control group's limit, beyond which the kernel kills without a word."""
    try:
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        facts = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)}
        total, free = facts["MemTotal"], facts["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return [Finding(WARN, "memory", "/proc/meminfo cannot be read")]
    description, limit = f"{format_gb(total)}, {format_gb(free)} available", hardware.cgroup_memory_limit(root)
    if limit and limit < total:
        used = hardware.cgroup_memory_used(root)
        free = min(free, limit - used) if used is not None else min(free, limit)
        available = format_gb(max(free, 0))
        description = f"{format_gb(limit)} of {format_gb(total)} granted to this control group, {available} available"
    if kills := hardware.cgroup_oom_kills(root):
        description += f"; the kernel has killed {kills} process(es) here for want of it"
    if free < 4e9:
        return [Finding(WARN, "memory", description, "end what else runs, or ask the scheduler for more")]
    return [Finding(OK, "memory", description)]


# ---- ports ----


def check_ports(env: Mapping[str, str], port: int | None = None) -> list[Finding]:
    """The default master port, or the one that MASTER_PORT names: who listens there."""
    given = env.get("MASTER_PORT", "")
    port = port or (int(given) if given.isdigit() else MASTER_PORT)
    try:
        listening = [
            c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr[1:2] == (port,)
        ]
    except (psutil.Error, OSError):
        return [Finding(OK, "port", f"who listens on {port} is not visible here; the kit takes a free one")]
    if not listening:
        return [Finding(OK, "port", f"{port} is free")]
    pid = next((c.pid for c in listening if c.pid), None)
    fix = "the kit takes a free port itself; a launch by hand needs --master_port"
    return [Finding(WARN, "port", f"{port} is taken by {describe_process(pid)}", fix)]


def describe_process(pid: int | None) -> str:
    """A process as one would name it to its owner."""
    if pid is None:
        return "a process of another user"
    try:
        process = psutil.Process(pid)
        return f"process {pid} ({' '.join(process.cmdline())[:60] or process.name()}, user {process.username()})"
    except psutil.Error:
        return f"process {pid}"
