"""What this machine has, asked without torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One visible NVIDIA GPU; memory in GiB; capability as (major, minor), None where the driver does not say."""

    name: str
    memory_gb: float
    capability: tuple[int, int] | None


ASSUMED: ContextVar[tuple[Gpu, ...] | None] = ContextVar("ASSUMED", default=None)


@contextmanager
def assume_gpus(gpus: tuple[Gpu, ...]) -> Iterator[None]:
    """While the block runs, this machine has these GPUs: a run is planned for another one."""
    token = ASSUMED.set(gpus)
    try:
        yield
    finally:
        ASSUMED.reset(token)


def list_gpus() -> tuple[Gpu, ...]:
    """The GPUs that a process started here would see, in order; those of `assume_gpus` in their place."""
    assumed = ASSUMED.get()
    return ask_driver() if assumed is None else assumed


@lru_cache
def ask_driver() -> tuple[Gpu, ...]:
    """The visible GPUs by nvidia-smi; honours CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return ()
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return ()
    out = run_nvidia_smi("--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits")
    return parse_visible_gpus(out, run_nvidia_smi("-L") if "MIG-" in (visible or "") else "", visible)


def run_nvidia_smi(*words: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def parse_visible_gpus(table: str, listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """What CUDA_VISIBLE_DEVICES shows of nvidia-smi's table, and of its listing (`-L`) where it names MIG slices."""
    by_name: dict[str, Gpu] = {}
    for line in table.strip().splitlines():
        index, uuid, name, memory, capability = (part.strip() for part in line.split(","))
        major, _, minor = capability.partition(".")
        if memory.isdigit():
            size = float(memory) / 1024
        else:  # a GPU without memory of its own: the machine's
            import psutil

            size = psutil.virtual_memory().total / 2**30
        by_name[index] = by_name[uuid] = Gpu(name, size, (int(major), int(minor)) if major.isdigit() else None)
    if visible is None:
        return tuple(gpu for key, gpu in by_name.items() if key.isdigit())
    whole = None
    for line in listing.splitlines():
        if gpu := re.match(r"GPU \d+: .*\(UUID: ([^)]+)\)", line):
            whole = by_name.get(gpu[1])
        elif whole and (part := re.match(r"\s+MIG (\S*?(\d+)gb\S*)\s.*\(UUID: ([^)]+)\)", line)):
            # It holds a little less than its name says.
            by_name[part[3]] = Gpu(f"{whole.name} {part[1]}", 0.95 * int(part[2]), whole.capability)
    selected = []
    for name in (v.strip() for v in visible.split(",")):
        same = [key for key in by_name if key == name or (name.startswith(("GPU-", "MIG-")) and key.startswith(name))]
        if len(same) != 1:
            break  # CUDA does not see what stands behind a name that it does not know
        selected.append(by_name[same[0]])
    return tuple(selected)


@lru_cache
def cpu_has_bf16_matmul() -> bool:
    """Whether the CPU has bfloat16 matrix instructions; without them bf16 is 25-50 times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def count_cpu_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the control group: what of this machine is granted ----


def read_cgroup_file(name: str, controller: str, root: Path = Path("/")) -> str | None:
    """A file of this process's control group; `controller` where version 1 mounts one folder each."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    top = root / "sys/fs/cgroup"
    places: list[Path] = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            places += [top / path.lstrip("/"), top]
        elif controller in controllers.split(","):
            places += [top / controller / path.lstrip("/"), top / controller]
    for folder in places:
        try:
            return (folder / name).read_text().strip()
        except OSError:
            continue
    return None


def cgroup_memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of RAM beyond which the kernel kills, None where there is no limit below the machine's own."""
    text = read_cgroup_file("memory.max", "memory", root) or read_cgroup_file("memory.limit_in_bytes", "memory", root)
    return int(text) if text and text.isdigit() and int(text) < 2**60 else None


def cgroup_memory_used(root: Path = Path("/")) -> int | None:
    """Bytes that count against the limit."""
    text = read_cgroup_file("memory.current", "memory", root) or read_cgroup_file(
        "memory.usage_in_bytes", "memory", root
    )
    return int(text) if text and text.isdigit() else None


def cgroup_oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this control group the kernel has killed for want of memory, None where it is not told."""
    text = read_cgroup_file("memory.events", "memory", root) or read_cgroup_file("memory.oom_control", "memory", root)
    match = re.search(r"^oom_kill (\d+)$", text or "", re.M)
    return int(match[1]) if match else None


def cgroup_cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that are granted, None without a limit."""
    text = read_cgroup_file("cpu.max", "cpu", root)
    quota, _, period = (text or "").partition(" ")
    if text is None:
        quota = read_cgroup_file("cpu.cfs_quota_us", "cpu", root) or ""
        period = read_cgroup_file("cpu.cfs_period_us", "cpu", root) or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
