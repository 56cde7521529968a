"""What is asked of SLURM's own commands: submit a script, the state of a job, its log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from kit.errors import ENVIRONMENT, KitError
from kit.system.secrets import is_secret
from kit.system.terminal import print_status

CLIENT_VARIABLES = (
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_CLUSTERS",
    "SLURM_JWT",
    "SLURM_DEBUG_FLAGS",
    "SLURM_EXIT_ERROR",
)
FINAL_STATES = tuple(
    "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY PREEMPTED BOOT_FAIL DEADLINE GONE".split()
)


def current_job_id() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def without_secrets(env: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment that a job may be given, and the names that were left out of it."""
    hidden = sorted(k for k, v in env.items() if is_secret(k, v))
    return {k: v for k, v in env.items() if k not in hidden}, hidden


def describes_current_job(name: str) -> bool:
    """Whether a variable tells of the job that we stand in: srun would take it for one of the new job."""
    return name.startswith("SLURM_") and name not in CLIENT_VARIABLES


def submit_script(script: Path, *options: str) -> str:
    """Submit a script; its job id. Tokens stay behind: SLURM writes a job's environment into files of its own."""
    env, hidden = without_secrets({k: v for k, v in os.environ.items() if not describes_current_job(k)})
    if hidden:
        print_status(
            f"not given to the job: {', '.join(hidden)} (hf auth login keeps a token in a file that the job can read)"
        )
    process = run_slurm_command("sbatch", "--parsable", *options, str(script), env=env)
    job = process.stdout.strip().partition(";")[0]
    if process.returncode or not job.isdigit():
        message = process.stderr.strip().removeprefix("sbatch: error: ") or f"sbatch ended with {process.returncode}"
        large = "fewer trials: MaxArraySize at most (scontrol show config)"
        fix = large if "job array" in message else "mend launch.slurm.*"
        raise KitError(f"sbatch refused: {message}", str(script), fix, code=ENVIRONMENT)
    return job


def run_slurm_command(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv, env=env, capture_output=True, text=True, errors="replace", timeout=120, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 1, "", f"{argv[0]} gave no answer in 120 s")


def job_state(job: str) -> tuple[str, int]:
    """A job's state and exit code; ("", 0) where the controller has forgotten it or does not answer."""
    process = run_slurm_command("scontrol", "show", "job", "-o", job)
    state, code = re.search(r"\bJobState=(\w+)", process.stdout), re.search(r"\bExitCode=(\d+):(\d+)", process.stdout)
    if process.returncode or not state:
        return ("GONE" if "nvalid job id" in process.stderr else ""), 0
    return state[1], (int(code[1]) or (128 + int(code[2]) if int(code[2]) else 0)) if code else 0


def follow_job(job: str, log: Path) -> tuple[str, int]:
    """Show a job's log until it is over: its last state and exit code. A job that is queued again is waited for."""
    offset, last_state = 0, ""
    try:
        while True:
            state, code = job_state(job)
            if state and state != last_state:
                print_status(f"job {job} is {state.lower()}")
                last_state = state
            if log.exists():
                with open(log, encoding="utf-8", errors="replace") as f:
                    f.seek(offset)
                    sys.stdout.write(f.read())
                    sys.stdout.flush()
                    offset = f.tell()
            if state.startswith(FINAL_STATES):
                return state, code
            time.sleep(1)
    except KeyboardInterrupt:
        print_status(f"the job goes on; to end it: scancel {job}")
        raise
