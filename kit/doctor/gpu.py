"""GPUs, their driver, and whether driver, nvcc and torch speak of the same CUDA."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from kit.doctor.findings import BAD, OK, WARN, Finding, find_program, run_program
from kit.system.dependencies import release_numbers

NVIDIA_SMI_QUERY = "index,name,memory.total,memory.used,compute_cap,driver_version"
# cuDriverGetVersion needs no initialised device. A process of its own: a sick driver can hang whoever asks it.
DRIVER_CUDA = """
import ctypes
number = ctypes.c_int()
ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
print(f"{number.value // 1000}.{number.value % 1000 // 10}")
"""
# The oldest compute capability in torch's wheels, by CUDA major version.
OLDEST_CAPABILITY = {12: (5, 0), 13: (7, 5)}


def check_gpus(torch_cuda: str | None, root: Path, env: Mapping[str, str]) -> list[Finding]:
    """torch_cuda: as versions.torch_cuda gives it."""
    devices = sorted((root / "dev").glob("nvidia[0-9]*")) or [d for d in [root / "dev" / "dxg"] if d.exists()]
    if not devices:
        if count_gpus_on_bus(root):
            fix = "install NVIDIA's driver (in a container: start it with --gpus all)"
            return [
                Finding(
                    WARN,
                    "gpu",
                    f"{count_gpus_on_bus(root)} NVIDIA card(s) in this machine, and no driver for them",
                    fix,
                )
            ]
        return [Finding(OK, "gpu", "none: runs use the CPU")]
    smi = find_program("nvidia-smi", env)
    if smi is None:
        fix = "put nvidia-smi on the PATH: the kit counts GPUs with it"
        return [Finding(BAD, "gpu", f"{len(devices)} device(s) in /dev, and no nvidia-smi", fix)]
    good, text = run_program([smi, f"--query-gpu={NVIDIA_SMI_QUERY}", "--format=csv,noheader,nounits"], env)
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 5]
    if not good or not rows:
        message = text.splitlines()[0] if text else "no output"
        fix = "the driver was replaced under the running kernel: reload its modules, or reboot"
        return [Finding(BAD, "gpu", message, fix if "mismatch" in message else "nvidia-smi must work first")]
    return [
        *check_each_gpu(rows, torch_cuda),
        *check_driver(rows[0][5], torch_cuda, root, env),
        *check_visible_devices(len(rows), env),
    ]


def count_gpus_on_bus(root: Path) -> int:
    """NVIDIA display controllers on the PCI bus."""
    count = 0
    for device in (root / "sys" / "bus" / "pci" / "devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def check_each_gpu(rows: list[list[str]], torch_cuda: str | None) -> list[Finding]:
    findings = []
    for index, name, total, used, capability, _ in rows:
        label, size = f"gpu {index}", f"{float(total) / 1024:.0f} GiB" if total.isdigit() else "memory unknown"
        description = f"{name}, {size}, compute capability {capability}"
        version = release_numbers(capability)
        oldest = OLDEST_CAPABILITY.get(release_numbers(torch_cuda)[0]) if torch_cuda else None
        if version and oldest and version < oldest:
            reason = f"; torch for CUDA {torch_cuda} begins at {oldest[0]}.{oldest[1]}"
            findings.append(
                Finding(BAD, label, description + reason, "a torch wheel for an older CUDA (2.11 has cu126)")
            )
        elif total.isdigit() and used.isdigit() and int(used) > max(1024, int(total) // 20):
            description += f"; {int(used) / 1024:.1f} GiB are in use already"
            findings.append(Finding(WARN, label, description, "nvidia-smi shows whose they are"))
        elif version and version < (8, 0):
            findings.append(Finding(OK, label, description + "; no bfloat16: precision is float16 there"))
        else:
            findings.append(Finding(OK, label, description))
    return findings


def check_driver(driver: str, torch_cuda: str | None, root: Path, env: Mapping[str, str]) -> list[Finding]:
    good, served = run_program([sys.executable, "-I", "-c", DRIVER_CUDA], env)
    serves = served if good and release_numbers(served) > (0,) else ""
    description = f"{driver}, serves CUDA {serves or 'unknown'}"
    if torch_cuda is None:
        return [Finding(OK, "driver", description)]
    if torch_cuda == "":
        fix = "pip install torch from an index of CUDA builds (https://download.pytorch.org/whl/)"
        return [Finding(BAD, "driver", f"{description}, but the installed torch is a CPU build", fix)]
    if serves and release_numbers(serves)[0] < release_numbers(torch_cuda)[0]:
        fix = f"a newer driver, or a torch wheel for CUDA {serves} or older"
        return [Finding(BAD, "driver", f"{description}; torch was built for CUDA {torch_cuda}", fix)]
    return [Finding(OK, "driver", f"{description}; torch was built for CUDA {torch_cuda}")]


def check_visible_devices(count: int, env: Mapping[str, str]) -> list[Finding]:
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return []
    names = [v for v in visible.split(",") if v.strip() not in ("", "-1", "NoDevFiles")]
    wrong = [v for v in names if v.strip().isdigit() and int(v) >= count]
    if wrong:
        text = f"CUDA_VISIBLE_DEVICES={visible}, and there are {count}: {', '.join(wrong)} and all after it are lost"
        return [Finding(BAD, "gpus seen", text, "name devices that are there")]
    if len(names) < count:
        text = f"CUDA_VISIBLE_DEVICES={visible} hides {count - len(names)} of {count}"
        return [Finding(WARN, "gpus seen", text, "unset CUDA_VISIBLE_DEVICES, unless a scheduler set it")]
    return []


def check_nvcc(torch_cuda: str | None, root: Path, env: Mapping[str, str]) -> list[Finding]:
    """nvcc compiles DeepSpeed's operators on a GPU machine, and must be of torch's own CUDA."""
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = find_program("nvcc", env)
    places += [Path(on_path)] if on_path else []
    places += [root / "usr" / "local" / "cuda" / "bin" / "nvcc"]
    nvcc = next((p for p in places if os.access(p, os.X_OK)), None)
    needs = "offload to CPU or NVMe compiles with it"
    if not torch_cuda:  # a CPU build of torch compiles without nvcc
        return [Finding(OK, "nvcc", "not needed: torch is a CPU build" if torch_cuda == "" else "not needed here")]
    if nvcc is None:
        fix = f"install the CUDA {torch_cuda} toolkit and set CUDA_HOME"
        return [Finding(WARN, "nvcc", f"not found; {needs}", fix)]
    _, text = run_program([str(nvcc), "--version"], env)
    release = re.search(r"release (\d+\.\d+)", text)
    if release is None:
        return [Finding(WARN, "nvcc", f"{nvcc} does not say its version", f"{nvcc} --version must work")]
    description = f"{release[1]} ({nvcc}), torch was built for CUDA {torch_cuda}"
    if release_numbers(release[1])[0] == release_numbers(torch_cuda)[0]:
        return [Finding(OK, "nvcc", description)]
    if env.get("DS_SKIP_CUDA_CHECK") == "1":
        return [Finding(WARN, "nvcc", f"{description}; DS_SKIP_CUDA_CHECK=1 lets it compile all the same")]
    return [
        Finding(
            WARN, "nvcc", f"{description}; {needs}, and DeepSpeed refuses", f"CUDA_HOME of a CUDA {torch_cuda} toolkit"
        )
    ]
