"""DeepSpeed's operators are compiled before the ranks start: with progress, a limit, and an eye on dead locks.

torch's builder leaves a file `lock` beside the operator it builds; a killed build leaves it for ever, and every later
run waits for it without a word.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from kit.errors import ENVIRONMENT, KitError
from kit.schema.run_plan import RunPlan
from kit.system import paths
from kit.system.dependencies import installed_version


def extensions_dir() -> Path:
    """TORCH_EXTENSIONS_DIR, or a folder of our own for this CPU, environment, torch and DeepSpeed.

    A home shared by a cluster mixes CPUs: code compiled with -march=native must not travel between them. Another
    environment has other include paths, for which ninja would compile everything again, in the ranks and silently.
    """
    if directory := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(directory).absolute()
    try:
        cpu = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
        cpu = "".join(line for line in cpu.splitlines() if line.startswith(("model name", "flags")))
    except OSError:
        cpu = platform.processor()
    packages = [installed_version(package) or "none" for package in ("torch", "deepspeed")]
    fingerprint = [cpu, sys.prefix, platform.python_version(), *packages]
    return paths.kit_cache_folder() / "ops" / hashlib.sha256("|".join(fingerprint).encode()).hexdigest()[:12]


def installation_stamp() -> str:
    """When torch and DeepSpeed were installed. ninja compiles again what is older than its sources, so an environment
    that was made anew at the same place has nothing built, whatever lies in the folder."""
    mtimes = []
    for package in ("torch", "deepspeed"):
        spec = importlib.util.find_spec(package)
        mtimes.append(str(os.stat(spec.origin).st_mtime_ns) if spec and spec.origin else "none")
    return " ".join(mtimes)


def is_built(stamp: Path) -> bool:
    return stamp.exists() and stamp.read_text() == installation_stamp()


def required_ops(plan: RunPlan) -> list[str]:
    """The operators that a plan's ranks will load."""
    if not plan.deepspeed:
        return []
    names = ["deepspeed_shm_comm"] if plan.trainer["use_cpu"] else []
    zero = plan.deepspeed.get("zero_optimization", {})
    devices = {part: (zero.get(part) or {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
    optimizer = plan.deepspeed.get("optimizer") or {}  # DeepSpeed's own optimizer, from a file that names one
    parameters = optimizer.get("params") or {}
    if devices["offload_optimizer"] in ("cpu", "nvme"):
        names.append("cpu_adam")
    elif str(optimizer.get("type")).lower() in ("adam", "adamw") and not parameters.get("torch_adam"):
        names.append("fused_adam")
    if "nvme" in devices.values():
        names.append("async_io")
    return names


def build_missing_ops(
    names: list[str],
    seconds: float,
    say: Callable[[str], None],
    env: dict[str, str],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Build what is not built yet; KitError (exit 3) when it fails, takes longer than `seconds`, or is locked.

    Returns early, with nothing half-built left, once `stopped()` says so.
    """
    folder = extensions_dir()
    stamps = folder / (".built-" + env.get("DS_ACCELERATOR", "auto"))
    if all(is_built(stamps / name) for name in names):
        return
    stamps.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with open(folder / ".kit-build", "a") as turn:
        wait_for_build_lock(turn.fileno(), deadline, say, folder, stopped)
        for name in names:
            if stopped():
                return
            if is_built(stamps / name):
                continue
            clear_stale_locks(folder, name, say)
            if build_op(name, deadline, say, folder, env, stopped):
                (stamps / name).write_text(installation_stamp())


def wait_for_build_lock(
    fd: int, deadline: float, say: Callable[[str], None], folder: Path, stopped: Callable[[], bool]
) -> None:
    """One build at a time per folder: the lock is the kernel's, so a dead builder frees it."""
    announced = False
    while not stopped():
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > deadline:
                problem = f"another process has been building in {folder} all along"
                raise KitError(problem, str(folder), "kit doctor names it: end it", code=ENVIRONMENT) from None
            if not announced:
                say("another run is compiling DeepSpeed's operators: waiting for it")
                announced = True
            time.sleep(0.5)


def build_locks(folder: Path, name: str) -> list[Path]:
    """An operator's lock: torch builds in NAME below TORCH_EXTENSIONS_DIR, one folder deeper below its default."""
    return [*folder.glob(f"{name}/lock"), *folder.glob(f"*/{name}/lock")]


def clear_stale_locks(folder: Path, name: str, say: Callable[[str], None]) -> None:
    """A lock that no living build owns is removed from the kit's own folder and refused in anybody else's."""
    for lock in build_locks(folder, name):
        owner = builder_process(lock.parent)
        age = int(time.time() - lock.stat().st_mtime)
        if owner:
            raise KitError(f"{name} is being compiled by process {owner}", str(lock), "wait for it", code=ENVIRONMENT)
        if "TORCH_EXTENSIONS_DIR" not in os.environ:  # ours, and we hold its turn: whoever left the lock is dead
            say(f"removing the lock that a killed build of {name} left {age} s ago")
            lock.unlink(missing_ok=True)
            continue
        raise KitError(
            f"a killed build of {name} left a lock {age} s ago; every run would wait for it for ever",
            str(lock),
            f"rm {lock}",
            code=ENVIRONMENT,
        )


def builder_process(folder: Path) -> int | None:
    """A process that works in `folder` (ninja and the compilers run there), None where there is none."""
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) or any(str(folder) in part for part in process.cmdline()):
                return process.pid
        except psutil.Error:
            continue
    return None


def build_op(
    name: str,
    deadline: float,
    say: Callable[[str], None],
    folder: Path,
    env: dict[str, str],
    stopped: Callable[[], bool],
) -> bool:
    """Compile one operator in a process of its own, so that a hang can be ended; False where it was stopped."""
    say(f"compiling DeepSpeed's {name} (once for this machine; a minute or two)")
    start = time.monotonic()
    log = folder / f".{name}.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "kit.training.build_ops", name],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env, "TORCH_EXTENSIONS_DIR": str(folder)},
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if stopped():
                    return False
                if time.monotonic() > deadline:
                    raise KitError(
                        f"compiling {name} took longer than the limit",
                        str(log),
                        "launch.build_seconds=1800, or see the log",
                        code=ENVIRONMENT,
                    )
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()
                for lock in build_locks(folder, name):  # ours, and its builder is gone
                    lock.unlink(missing_ok=True)
    if process.returncode != 0:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise KitError(
            f"{name} does not compile: {last[0] if last else 'no output'}",
            str(log),
            "a C++ compiler, ninja (and libaio-dev for async_io, nvcc on a GPU) must be there",
            code=ENVIRONMENT,
        )
    say(f"compiled {name} in {time.monotonic() - start:.0f} s")
    return True


def kill_tree(pid: int) -> None:
    """End a process and everything below it."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.Error:
        return
    for process in family:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(family, timeout=10)
