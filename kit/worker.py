"""The door that every rank enters.

    deepspeed --num_gpus 2 --module kit.worker runs/x/plan.json
    deepspeed --num_gpus 2 --module kit.worker recipe=quickstart deepspeed=zero3

The rank comes from RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which every launcher sets; from SLURM_*
and OMPI_* where `srun` or `mpirun` started a process for each rank (`set_ranks`).
A script of one's own calls `main(callbacks=[...], compute_metrics=...)` and is started in this module's place
(`launch.script=my_train.py`). Nothing heavy is imported until the environment and the signal handlers are in place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from kit.errors import DONE, ENVIRONMENT, FAILED, LESS_MEMORY, KitError, Problem


def main(argv: list[str] | None = None, **hooks: Any) -> None:
    """Run this process as one rank of a plan and exit. `hooks` go to the trainer: callbacks, compute_metrics, ..."""
    from kit.training import signals

    signals.install_handlers()
    from kit.training import watchdog  # which imports more

    watchdog.watch_launcher()
    set_rank_variables()
    rank = int(os.environ.get("RANK", "0"))
    args, resume = split_argv(sys.argv[1:] if argv is None else argv)
    run: Path | None = None
    try:
        refuse_bare_srun()
        plan_path = args[0] if len(args) == 1 and args[0].endswith(".json") and "=" not in args[0] else None
        if len(args) == 1 and Path(args[0], "plan.json").is_file():
            plan_path = str(Path(args[0], "plan.json"))
        store = None
        if plan_path is None:
            plan_path, store = compose_on_rank0(args, rank)
        from kit.schema.run_plan import load_plan
        from kit.storage import run_directory

        plan = load_plan(plan_path).model_copy(update={"run_dir": str(Path(plan_path).absolute().parent)})
        if rank == 0:
            # Until this process ends; where the ranks of another launch have it, nothing in the directory is touched.
            lock = run_directory.lock_run_directory(plan.run_path, run_directory.RANK_LOCK)
            lock.__enter__()
        run = plan.run_path
        log = prepare_process(plan, rank)
        plan = choose_memory_here(plan, rank)
        if rank == 0:
            sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)
        else:  # the console is rank 0's; libraries that write to the descriptors are caught too
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if rank == 0:
            print_environment(plan)
        if not hooks and not plan.launch.script:
            from kit.training.unused_packages import skip_unused_packages

            skip_unused_packages(plan)
        code = train_in_this_process(plan, resume, **hooks)
        del store
    except Exception as error:
        code = report_failure(run, rank, error)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Interpreter shutdown joins threads of libraries that may wait for ranks which are gone.
    os._exit(code)


def choose_memory_here(plan: Any, rank: int) -> Any:
    """Return the plan with its memory chosen for this node's GPUs, where it was made elsewhere; rank 0 writes it."""
    from kit.config.memory_choice import choose_on_the_node
    from kit.storage import run_directory

    chosen = choose_on_the_node(plan)
    if chosen is not plan and rank == 0:
        run_directory.write_plan(chosen)
    return chosen


def train_in_this_process(plan: Any, resume: str | None, **hooks: Any) -> int:
    """Train a plan in this process, which was prepared for it; the exit code."""
    from kit.training import tracking
    from kit.training.run import train

    with tracking.closing_trackers(plan):
        return train(plan, resume=resume, **hooks)


def report_failure(run: Path | None, rank: int, error: Exception) -> int:
    """Write down what ended a rank; the exit code."""
    if isinstance(error, KitError):
        return write_rank_error(run, rank, error.problems, error.code, error)
    cause = "".join(traceback.format_exception_only(error)).strip()
    problem = Problem(f"rank {rank}: {cause[:2000]}", rank_log(run, rank), advice_for(error))
    return write_rank_error(run, rank, [problem], FAILED, error)


def split_argv(argv: list[str]) -> tuple[list[str], str | None]:
    """The words that are ours; `--local_rank`, which the deepspeed command adds, is accepted and dropped."""
    words: list[str] = []
    resume = None
    rest = iter(argv)
    for word in rest:
        if word.startswith("--local_rank") or word.startswith("--local-rank"):
            if "=" not in word:
                next(rest, None)
        elif word == "--resume":
            resume = next(rest, None)
        else:
            words.append(word)
    return words, resume


def set_rank_variables() -> None:
    """RANK and its companions, where a batch system or MPI has started one process for each rank."""
    env = os.environ
    if "WORLD_SIZE" in env:
        return
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_LOCALID" in env:
        from kit.launchers.node import derive_port, first_slurm_host

        rank, local, world = env["SLURM_PROCID"], env["SLURM_LOCALID"], env["SLURM_NTASKS"]
        address, port = first_slurm_host(env), str(derive_port(f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"))
        size = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
    elif "OMPI_COMM_WORLD_RANK" in env and int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        rank, local, world = (env[f"OMPI_COMM_WORLD_{name}"] for name in ("RANK", "LOCAL_RANK", "SIZE"))
        address, port, size = "", "", env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    else:
        return
    env.update(RANK=rank, LOCAL_RANK=local, WORLD_SIZE=world, LOCAL_SIZE=re.match(r"\d*", size)[0] or "1")  # type: ignore[index]
    if address and "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = address
    if port and "MASTER_PORT" not in env:
        env["MASTER_PORT"] = port
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del env[name]
        raise SystemExit(f"kit: rank {rank} of {world}, and no {' and no '.join(missing)}: export it for all ranks")


def refuse_bare_srun() -> None:
    """Refuse several SLURM tasks without ranks: each would train alone."""
    if (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1
        and "WORLD_SIZE" not in os.environ
        and "SLURM_PROCID" in os.environ
    ):
        raise KitError(
            "several SLURM tasks, but no WORLD_SIZE: each task would train alone",
            "srun",
            "start one task per node, and the ranks through deepspeed or torchrun",
            code=ENVIRONMENT,
        )


def compose_on_rank0(args: list[str], rank: int) -> tuple[str, Any]:
    """Rank 0 composes in a child process, so that no rank imports Hydra; the path goes round through the store.

    Returns the plan's path and the store, which must live until the process group is made on the same port.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_per_node = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world
    )  # torchrun, deepspeed
    if world > ranks_per_node and not any(a.startswith("launch.num_nodes=") for a in args):
        args = [*args, f"launch.num_nodes={world // ranks_per_node}"]
    if world == 1:
        return plan_path_of_reply(compose_in_child(args, world)), None
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))
    if rank == 0:
        store.set("kit/plan", compose_in_child(args, world))
    return plan_path_of_reply(store.get("kit/plan").decode()), store


def compose_in_child(args: list[str], world: int) -> str:
    """`kit compose` in a child: its answer is JSON with the plan's path, or with the problems."""
    command = [sys.executable, "-m", "kit", "compose", "--world-size", str(world), *args]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if child.stderr:
        print(child.stderr, file=sys.stderr, end="", flush=True)
    lines = child.stdout.strip().splitlines()
    return (
        lines[-1] if lines else json.dumps({"code": FAILED, "problems": [{"problem": "`kit compose` gave no answer"}]})
    )


def plan_path_of_reply(answer: str) -> str:
    reply = json.loads(answer)
    if "plan" not in reply:
        raise KitError([Problem(**p) for p in reply["problems"]], code=reply["code"])
    return str(reply["plan"])


def prepare_process(plan: Any, rank: int) -> TextIO:
    """Environment, process id and the rank's open log, before torch is imported."""
    from kit.launchers import environment
    from kit.launchers.command import rank_environment
    from kit.storage.json_files import atomic_write_json

    if devices := os.environ.pop("KIT_VISIBLE_DEVICES", None):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    rank_env = rank_environment(plan)
    cleared = environment.clear_environment(os.environ, rank_env)
    several = plan.launch.num_nodes not in (1, "auto") or plan.launch.hostfile
    if several:  # the operators of a node that no `kit` has prepared
        from kit.launchers import ops

        ops.build_missing_ops(ops.required_ops(plan), plan.launch.build_seconds, lambda line: None, rank_env)
    record = environment.record_environment(os.environ, cleared)  # before the kit's own are added
    for key, value in rank_env.items():
        if key == "PATH" or key not in os.environ:
            os.environ[key] = value
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    logs = plan.run_path / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        atomic_write_json(plan.run_path / environment.FILE, record)
    (logs / f"rank{rank}.pid").write_text(f"{os.getpid()} {socket.gethostname()}" if several else str(os.getpid()))
    if several:
        from kit.training import watchdog

        watchdog.watch_stop_file(plan.run_path)
    log = open(logs / f"rank{rank}.log", "a", buffering=1, encoding="utf-8", errors="replace")
    log.write(f"--- plan {plan.hash} rank {rank} {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
    if rank:  # rank 0 says it on the console
        log.writelines(f"{line}\n" for line in environment.describe_environment(plan, cleared, {}))
    return log


def print_environment(plan: Any) -> None:
    """Say what this rank cleared from its environment, and what it found there that changes numbers."""
    from kit.launchers import environment
    from kit.storage.json_files import read_json_or_empty

    record = read_json_or_empty(plan.run_path / environment.FILE)
    lines = environment.describe_environment(plan, record.get("cleared", {}), record.get("numeric_environment", {}))
    if lines:
        print("\n".join(f"{'' if n else 'variables':<10}{line}" for n, line in enumerate(lines)), flush=True)


class Tee:
    """A text stream that also goes to the rank's log; everything else is the console's (isatty, fileno, ...)."""

    def __init__(self, console: TextIO, log: TextIO) -> None:
        self.console, self.log = console, log

    def write(self, text: str) -> int:
        if not self.log.closed and not text.startswith("\r"):  # the log gets no redrawn progress bars
            self.log.write(text)
        with contextlib.suppress(OSError):  # a console that is gone (ssh, a closed pipe) must not end the run
            try:
                self.console.write(text)
            except UnicodeEncodeError:  # nor may one that lacks a letter
                code = self.console.encoding or "ascii"
                self.console.write(text.encode(code, "backslashreplace").decode(code))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


def write_rank_error(run: Path | None, rank: int, problems: list[Problem], code: int, error: BaseException) -> int:
    """Write the problems where the launching `kit` finds them, the traceback into this rank's log; the exit code."""
    if run is None:
        if rank == 0:
            print("\n".join(map(str, problems)), file=sys.stderr)
        return code
    with open(rank_log(run, rank), "a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    from kit.storage import run_directory
    from kit.storage.json_files import atomic_write_json

    record = {"code": code, "problems": [vars(p) for p in problems]}
    atomic_write_json(run / run_directory.LOGS / f"rank{rank}.error.json", record)  # as a whole: other nodes read it
    if rank == 0:
        run_directory.set_status(run, "failed", exit_code=code, problems=[str(p) for p in problems])
        if not (run / run_directory.LAUNCH).exists():  # started by hand: nobody else will say it
            print("\n".join(map(str, problems)), file=sys.stderr)
    return code if code != DONE else FAILED


def rank_log(run: Path | None, rank: int) -> str:
    return str(run / "logs" / f"rank{rank}.log") if run else ""


def advice_for(error: BaseException) -> str:
    if "out of memory" in str(error).lower():
        return LESS_MEMORY
    if "out of resource: shared memory" in str(error):  # Triton's, of FlexAttention with wide heads on small GPUs
        return "model.attn_implementation=eager: a compiled kernel needs more shared memory than this GPU has"
    return "the log holds the traceback"


if __name__ == "__main__":
    main()
