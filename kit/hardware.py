"""What this machine has, asked without torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One visible NVIDIA GPU; memory in GiB; capability as (major, minor), None where the driver does not say."""

    name: str
    memory_gb: float
    capability: tuple[int, int] | None


@lru_cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that a process started here would see, in order; honours CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return ()
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return ()
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found: dict[str, Gpu] = {}
    for line in out.strip().splitlines():
        index, uuid, name, memory, capability = (part.strip() for part in line.split(","))
        major, _, minor = capability.partition(".")
        gpu = Gpu(name, float(memory) / 1024, (int(major), int(minor)) if major.isdigit() else None)
        found[index] = found[uuid] = gpu
    if visible is None:
        return tuple(gpu for key, gpu in found.items() if key.isdigit())
    return tuple(found[key.strip()] for key in visible.split(",") if key.strip() in found)


@lru_cache
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bfloat16 matrix instructions; without them bf16 is 25-50 times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
