"""Start the ranks of a plan, stay with them, and leave nothing behind.

A single-node `deepspeed` command has no signal handlers of its own: ending it leaves its ranks running. So
the ranks are signalled directly, by the process ids that they write down, and whatever still lives at last is killed.

Where each node starts its own ranks, each has a process like this one: it ends its own ranks only, learns from files
in the run directory that another node has failed, and node 0 keeps the status. Ranks that were reached with ssh look
for a file once a second instead of being signalled (ssh.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from kit.config import memory_choice
from kit.config.nodes import starts_over_ssh
from kit.errors import DONE, STOPPED, KitError, Problem
from kit.inspection import adapter
from kit.launchers import environment, node, ops, ranks, ssh
from kit.launchers.command import launch_command, rank_environment
from kit.schema.run_plan import RunPlan, load_plan
from kit.storage import checkpoints, manifest, run_directory
from kit.storage.json_files import atomic_write_json
from kit.system import hardware
from kit.system.terminal import print_status

STATUS_WAIT_SECONDS = 90  # a shared file system may show node 0's last word late

PR_SET_PDEATHSIG = 1


def launch(plan: RunPlan, resume: str | None = None) -> int:
    """Run a plan whose directory exists; the exit code of the command. Blocks until no process is left."""
    plan = node.resolve_node(plan)
    run, own_ranks, by_ssh = plan.run_path, node.ranks_of_node(plan), starts_over_ssh(plan.launch)
    first = own_ranks is None or own_ranks.start == 0
    status_before = None if first else run_directory.read_status(run)
    name = "" if first else f".node{plan.launch.node_rank}"
    if first:
        for w in plan.warnings:
            print_status(f"warning: {w['problem']} ({w['where']}); {w['fix']} [{w['rule']}]")
    with run_directory.lock_run_directory(run, run_directory.LOCK + name):
        if own_ranks is not None and first:
            node.check_port_is_free(plan)
            print_status(f"node 0 waits for the others: {node.launch_node_command(plan)}")
        if by_ssh:
            ssh.check_nodes_reachable(plan)
        stop = StopRequests()
        with stop:
            ops.build_missing_ops(
                ops.required_ops(plan),
                plan.launch.build_seconds,
                print_status,
                rank_environment(plan),
                lambda: stop.requests > 0,
            )
            if stop.requests:
                return 128 + signal.SIGINT
            while True:
                returncode = run_ranks(plan, resume, stop, name, own_ranks)
                smaller = None if resume or stop.requests else next_memory_option(plan, first)
                if smaller is None:
                    break
                plan = smaller
    return exit_code_of_run(run, returncode, name, status_before)


def run_ranks(plan: RunPlan, resume: str | None, stop: StopRequests, name: str, own_ranks: range | None) -> int | None:
    """Start the ranks of this machine and stay until none is left; the launcher's exit code."""
    run, by_ssh = plan.run_path, starts_over_ssh(plan.launch)
    ranks.remove_rank_files(run, own_ranks, name)
    argv, env = launch_command(plan, run / run_directory.PLAN, resume)
    if by_ssh:
        env |= ssh.write_remote_environment(plan, env, print_status)
    launcher_env = dict(os.environ)
    cleared = environment.clear_environment(launcher_env, env)
    if plan.launch.launcher == "local":
        cleared |= environment.clear_ranks(launcher_env, env)
    for line in environment.describe_environment(plan, cleared, {}):
        print_status(line)
    record = {"argv": argv, "env": env, "cleared": cleared, "cwd": os.getcwd(), "resume": resume}
    record_file = run / run_directory.LOGS / f"launch{name}.json" if name else run / run_directory.LAUNCH
    atomic_write_json(record_file, record)
    if not name:
        run_directory.set_status(run, "running")
    kills_before, deaths = hardware.cgroup_oom_kills() or 0, ranks.RankDeathTimes(run, own_ranks)
    peers = ranks.PeerFailures(run, own_ranks) if own_ranks is not None or by_ssh else None
    # SLURM signals all processes of a step: SIGUSR1 is for us and for the ranks, and would end a launcher.
    process = subprocess.Popen(
        argv, env={**launcher_env, **env}, stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )  # fmt: skip
    try:
        wait_for_launcher(process, run, stop, plan.launch.grace_seconds, deaths, peers, by_ssh)
    finally:
        if by_ssh and process.poll() is None:
            ssh.request_remote_stop(run, "now")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        kill_all(process, run, own_ranks)
        if by_ssh and process.returncode:  # whatever still lives on the nodes
            ssh.request_remote_stop(run, "now")
        # For `kit doctor RUN`: the launchers' own exit codes do not tell which rank went first, or why.
        killed = (hardware.cgroup_oom_kills() or 0) - kills_before
        end = {
            "returncode": process.returncode,
            "oom_kills": killed,
            "deaths": deaths.times,
            "asked": stop.requests,
        }
        atomic_write_json(record_file, {**record, "ended": end})
    return process.returncode


def next_memory_option(plan: RunPlan, first: bool) -> RunPlan | None:
    """Return the plan with the next option for its memory, where a rank ran out of it in the trial step; else None.

    Node 0 writes it, the others wait for it: the run directory is theirs together.
    """
    run = plan.run_path
    if not ranks.out_of_memory(run):
        return None
    written = load_plan(run)
    if first:
        smaller = memory_choice.take_next_option(written)
        if smaller is None:
            return None
        assert smaller.memory
        run_directory.write_plan(smaller.model_copy(update={"run_dir": str(run)}))
        print_status(f"out of memory in the trial step; next: {memory_choice.describe_choice(smaller.memory)}")
    else:
        chosen, deadline = written.memory and written.memory.chosen, time.monotonic() + STATUS_WAIT_SECONDS
        while (smaller := load_plan(run)).memory is None or smaller.memory.chosen == chosen:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.5)
    return smaller.model_copy(update={"run_dir": str(run), "launch": plan.launch})


def newest_checkpoint_name(run: Path) -> str | None:
    """The name of the checkpoint that an unattended start goes on from, None where there is none; said aloud."""
    newest = manifest.newest_complete_checkpoint(run / run_directory.CHECKPOINTS)
    for reason in newest.skipped:
        print_status(reason)
    if newest.path is None:
        return None
    print_status(f"resuming from {newest.path.name}")
    return newest.path.name


class StopRequests:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a flag while ranks run, and gives the handlers back afterwards."""

    def __init__(self) -> None:
        self.requests = 0
        self.handlers_before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it goes on without us
                self.handlers_before[number] = signal.signal(number, self.count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def count(self, number: int, frame: FrameType | None) -> None:
        self.requests += 1


def wait_for_launcher(
    process: subprocess.Popen[bytes],
    run: Path,
    stop: StopRequests,
    grace: float,
    deaths: ranks.RankDeathTimes,
    peers: ranks.PeerFailures | None = None,
    by_ssh: bool = False,
) -> None:
    """Until the launcher ends. The first request lets the ranks save; the second, or `grace` seconds, ends them."""
    deadline = None
    while process.poll() is None:
        deaths.update()
        if peers and peers.failed():
            print_status("ranks of another node have failed: ending those that are left")
            return
        if stop.requests and deadline is None:
            deadline = time.monotonic() + grace
            pids = ranks.living_rank_pids(run, deaths.own_ranks)
            if by_ssh:
                ssh.request_remote_stop(run, "save")
            elif not pids:  # nothing trains yet, so there is nothing to save
                return
            print_status("stopping: the ranks save a checkpoint at the next step (again to end them at once)")
            for pid in pids:
                ranks.send_signal(pid, signal.SIGTERM)
        if deadline is not None and (stop.requests > 1 or time.monotonic() > deadline):
            print_status("ending the ranks without a checkpoint")
            return
        time.sleep(0.1)


def kill_all(process: subprocess.Popen[bytes], run: Path, own_ranks: range | None = None) -> None:
    """End the launcher, everything below it and every rank; ranks under torchrun have sessions of their own."""
    pids = ranks.living_rank_pids(run, own_ranks)
    ops.kill_tree(process.pid)
    for pid in pids:
        ops.kill_tree(pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    for file in (run / run_directory.LOGS).glob("rank*.pid"):
        if own_ranks is None or int(file.stem.removeprefix("rank")) in own_ranks:
            file.unlink(missing_ok=True)


def exit_code_of_run(
    run: Path, returncode: int | None, name: str = "", status_before: dict[str, Any] | None = None
) -> int:
    """The exit code, from what rank 0 wrote down: a launcher's own code says little (deepspeed can end with 0).

    `name`: of a node that is not the first, which waits for the first one's word and leaves the status alone;
    `status_before`: the status when that node began, which may be an earlier start's.
    """
    state = final_status(run, returncode, status_before) if name else run_directory.read_status(run)
    if state.get("state") == "done":
        return DONE
    if state.get("state") == "stopped":
        print_status(describe_stop(run, state))
        return STOPPED
    problems, code = ranks.read_rank_errors(run)
    if not problems:
        log = run / run_directory.LOGS / "rank0.log"
        how = f"was killed by signal {-returncode}" if returncode and returncode < 0 else f"ended with {returncode}"
        problems = [Problem(f"training ended before it was done (the launcher {how})", str(log), "read the log")]
    if not name:
        run_directory.set_status(run, "failed", exit_code=code, problems=[str(p) for p in problems])
    report = {"code": code, "problems": [vars(p) for p in problems]}  # for the other nodes
    atomic_write_json(run / run_directory.LOGS / f"{ranks.node_file_name(name)}.error.json", report)
    raise KitError(problems, code=code)


def describe_stop(run: Path, state: dict[str, Any]) -> str:
    """What a run that was stopped by a signal leaves, and how it goes on."""
    step, folder = state.get("step"), run_directory.path_from_here(run)
    saved = run / run_directory.CHECKPOINTS / f"checkpoint-{step}"
    if (saved / manifest.NAME).is_file() and manifest.what_it_resumes(saved) == "weights":
        left = "its checkpoint holds weights alone (trainer.save_only_model), for a new run to begin with"
        weights = checkpoints.weights_override(run_directory.path_from_here(saved), (saved / adapter.CONFIG).is_file())
        return f"stopped at step {step}; {left}: kit train ... {weights}"
    return f"stopped at step {step} with a complete checkpoint: kit resume {folder}"


def final_status(run: Path, returncode: int | None, status_before: dict[str, Any] | None) -> dict[str, Any]:
    """The run's status once node 0 has written how it ended; ranks that failed here need no word of node 0."""
    deadline = time.monotonic() + STATUS_WAIT_SECONDS
    while (state := run_directory.read_status(run)).get("state") in ("created", "running") or state == status_before:
        if time.monotonic() > deadline or (returncode and ranks.read_rank_errors(run)[0]):
            return {}
        time.sleep(0.5)
    return state


def stop_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, however it ends; only Linux does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(128 + signal.SIGTERM)
