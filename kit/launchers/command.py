"""What is typed to start the ranks: one argv and the environment it needs, for each launcher."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from kit import hardware
from kit.config import trackers
from kit.config.schema import RunPlan
from kit.hub import NO_TELEMETRY

WORKER = "kit.worker"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(plan: RunPlan, plan_path: Path, resume: str | None = None) -> tuple[list[str], dict[str, str]]:
    """The argv that starts the ranks of a plan, and what it adds to the environment."""
    launch, count = plan.launch, str(plan.launch.num_gpus)
    port = str(launch.master_port or free_port())
    target = [launch.script] if launch.script else [WORKER]
    tail = [str(plan_path), *(["--resume", resume] if resume else [])]
    module = [] if launch.script else ["--module"]
    env = rank_environment(plan)
    if launch.launcher == "deepspeed":
        argv = [sys.executable, "-m", "deepspeed.launcher.runner", *chosen_devices(count), "--master_port", port]
        # A hostfile left in /job would turn one node into a cluster; an absent file means this machine.
        argv += ["--hostfile", str(plan.run_path / "no-hostfile"), "--master_addr", "127.0.0.1"]
        argv += ["--log_level", "error", "--no_local_rank", *module, *target, *tail]
    elif launch.launcher == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count, "--nnodes", "1"]
        argv += ["--master_addr", "127.0.0.1", "--master_port", port, *module, *target, *tail]
    else:
        argv = [sys.executable, *(target if launch.script else ["-m", *target]), *tail]
        if plan.deepspeed:  # DeepSpeed asks MPI for its rank where these are not set
            env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if not plan.trainer["use_cpu"] and len(hardware.gpus()) > 1:
            # A plain process that sees several GPUs is wrapped in DataParallel, which the trainer refuses (T66).
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return argv, env


def chosen_devices(count: str) -> list[str]:
    """The deepspeed command forgets CUDA_VISIBLE_DEVICES beside --num_gpus (T69): the devices are named instead."""
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if visible and all(v.isdigit() for v in visible):
        return ["--include", "localhost:" + ",".join(visible[: int(count)])]
    return ["--num_gpus", count]


def rank_environment(plan: RunPlan) -> dict[str, str]:
    """What must be in the environment before torch, transformers or deepspeed are imported, in launcher and ranks."""
    from kit.launchers.ops import extensions_dir

    here = os.path.dirname(sys.executable)
    path = os.environ.get("PATH", "").split(os.pathsep)
    env = {
        # One ninja for all: two versions hash command lines differently, and each would compile the operators again.
        "PATH": os.pathsep.join([here, *(p for p in path if p != here)]),
        "PYTHONUNBUFFERED": "1",
        **{key: os.environ.get(key, value) for key, value in NO_TELEMETRY.items()},
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        "TORCH_EXTENSIONS_DIR": str(extensions_dir()),
    }
    env |= tracker_environment(plan)
    if plan.trainer["use_cpu"]:
        threads = max(1, hardware.cores() // int(plan.launch.num_gpus))
        env |= {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Inter-process traffic of CPU ranks stays on this machine.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
    return env


def tracker_environment(plan: RunPlan) -> dict[str, str]:
    """Where trackers write: below the run directory, without a connection. What the user's own environment sets stays.

    Nothing is copied from there, since launch.json keeps this: a tracking URI may hold a password.
    """
    run = plan.run_path
    settings = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(run / "tensorboard")},
        "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": str(run), "WANDB_PROJECT": plan.name},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{run}/mlflow.db", "MLFLOW_EXPERIMENT_NAME": plan.name},
        "trackio": {"TRACKIO_DIR": str(run / "trackio")},
    }
    chosen = [settings.get(name, {}) for name in trackers.names(plan.trainer.get("report_to"))]
    return {key: value for some in chosen for key, value in some.items() if key not in os.environ}
