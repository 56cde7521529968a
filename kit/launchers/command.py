"""What is typed to start the ranks: one argv and the environment it needs, for each launcher.

One node: `deepspeed`, `torchrun` or plain Python, with a free port of this machine.
A hostfile: one `deepspeed` here, which reaches the nodes with ssh through pdsh (ssh.py).
Several nodes without ssh (torchrun; launch.no_ssh; a batch system): on every node one command with the node's rank,
`kit launch-node PLAN --node-rank N --master-addr A --master-port P`, or `launch(plan)` of supervise.py (node.py).
"""

from __future__ import annotations

import os
import random
import socket
import sys
from pathlib import Path

from kit.config.nodes import starts_by_node, starts_over_ssh
from kit.schema import trackers
from kit.schema.run_plan import Launch, RunPlan
from kit.storage.hub_cache import NO_TELEMETRY
from kit.system import hardware

WORKER_MODULE = "kit.worker"


def free_port() -> int:
    """A TCP port that nobody holds now, below those that the system gives to outgoing connections meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def launch_command(plan: RunPlan, plan_path: Path, resume: str | None = None) -> tuple[list[str], dict[str, str]]:
    """The argv that starts the ranks of a plan, and what it adds to the environment."""
    launch, count = plan.launch, str(plan.launch.num_gpus)
    port = str(launch.master_port or free_port())
    target = [launch.script] if launch.script else [WORKER_MODULE]
    script_args = [str(plan_path), *(["--resume", resume] if resume else [])]
    module = [] if launch.script else ["--module"]
    env = rank_environment(plan)
    address = (launch.master_addr or "127.0.0.1") if starts_by_node(launch) else "127.0.0.1"
    if launch.launcher == "deepspeed":
        argv = [sys.executable, "-m", "deepspeed.launcher.runner"]
        if starts_over_ssh(launch):
            argv += [*hostfile_options(launch), "--launcher", "pdsh", "--force_multi"]
            argv += ["--launcher_args=-N"]  # lines without host names
            argv += ["--no_ssh_check", "--master_port", port]  # checked already, all nodes and not the first alone
            argv += ["--master_addr", launch.master_addr] if launch.master_addr else []
        elif starts_by_node(launch):
            node_launch = write_node_hostfile(plan) if not launch.hostfile else launch
            argv += ["--no_ssh", "--node_rank", str(launch.node_rank), *hostfile_options(node_launch)]
            argv += ["--master_addr", address, "--master_port", port]
            if not launch.hostfile:
                env |= visible_devices_variable(plan)
        else:
            argv += [*device_options(launch), "--master_port", port]
            env |= {} if "--include" in argv or "--exclude" in argv else visible_devices_variable(plan)
            # A hostfile left in /job would turn one node into a cluster; an absent file means this machine.
            argv += ["--hostfile", str(plan.run_path / "no-hostfile"), "--master_addr", address]
        argv += ["--log_level", "error", "--no_local_rank", *module, *target, *script_args]
    elif launch.launcher == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count]
        argv += ["--nnodes", str(launch.num_nodes if starts_by_node(launch) else 1)]
        argv += ["--node_rank", str(launch.node_rank)] if starts_by_node(launch) else []
        argv += ["--master_addr", address, "--master_port", port, *module, *target, *script_args]
    else:
        argv = [sys.executable, *(target if launch.script else ["-m", *target]), *script_args]
        if plan.deepspeed:  # DeepSpeed asks MPI for its rank where these are not set
            env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if not plan.trainer["use_cpu"] and len(hardware.list_gpus()) > 1:
            # A plain process that sees several GPUs is wrapped in DataParallel, which the trainer refuses.
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return argv, env


def device_filter_options(launch: Launch) -> list[str]:
    """DeepSpeed takes either a filter or counts, never both."""
    if launch.include or launch.exclude:
        return ["--include", launch.include] if launch.include else ["--exclude", str(launch.exclude)]
    return []


def hostfile_options(launch: Launch) -> list[str]:
    counts = ["--num_nodes", str(launch.num_nodes), "--num_gpus", str(launch.num_gpus)]
    return ["--hostfile", str(launch.hostfile), *(device_filter_options(launch) or counts)]


def write_node_hostfile(plan: RunPlan) -> Launch:
    """DeepSpeed numbers nodes by a hostfile even without ssh; the names in it mean nothing then."""
    from kit.storage import run_directory
    from kit.storage.json_files import atomic_write_text

    file = plan.run_path / run_directory.LOGS / f"hostfile.node{plan.launch.node_rank}"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"node{n} slots={plan.launch.num_gpus}\n" for n in range(int(plan.launch.num_nodes))]
    atomic_write_text(file, "".join(lines))
    return plan.launch.model_copy(update={"hostfile": str(file), "no_ssh": True})


def visible_devices_variable(plan: RunPlan) -> dict[str, str]:
    """The devices that a batch system gave to this node: DeepSpeed counts from 0, the worker puts them right."""
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if plan.trainer["use_cpu"] or not visible:
        return {}
    return {"KIT_VISIBLE_DEVICES": ",".join(visible[: int(plan.launch.num_gpus)])}


def device_options(launch: Launch) -> list[str]:
    """The deepspeed command forgets CUDA_VISIBLE_DEVICES beside --num_gpus: the devices are named instead."""
    if launch.include or launch.exclude:
        return device_filter_options(launch)
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if visible and all(v.isdigit() for v in visible):
        return ["--include", "localhost:" + ",".join(visible[: int(launch.num_gpus)])]
    return ["--num_gpus", str(launch.num_gpus)]


def rank_environment(plan: RunPlan) -> dict[str, str]:
    """What must be in the environment before torch, transformers or deepspeed are imported, in launcher and ranks."""
    from kit.launchers.ops import extensions_dir

    bin_dir = os.path.dirname(sys.executable)
    path = os.environ.get("PATH", "").split(os.pathsep)
    env = {
        # One ninja for all: two versions hash command lines differently, and each would compile the operators again.
        "PATH": os.pathsep.join([bin_dir, *(p for p in path if p != bin_dir)]),
        "PYTHONUNBUFFERED": "1",
        **{key: os.environ.get(key, value) for key, value in NO_TELEMETRY.items()},
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        "TORCH_EXTENSIONS_DIR": str(extensions_dir()),
    }
    env |= tracker_environment(plan)
    if plan.trainer["use_cpu"]:
        threads = max(1, hardware.count_cpu_cores() // int(plan.launch.num_gpus))
        env |= {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Traffic of CPU ranks stays on this machine where there is one.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or gloo_interface(plan),
        }
    return env


def gloo_interface(plan: RunPlan) -> str:
    """The network interface of CPU ranks: this machine's own, or the one that leads to node 0.

    gloo would take the one that the host's name resolves to, which is often the loopback.
    """
    address = os.environ.get("MASTER_ADDR") or plan.launch.master_addr
    loopback = "lo" if sys.platform == "linux" else "lo0"
    if plan.launch.num_nodes in (1, "auto") or not address:
        return loopback
    import psutil

    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent: the system only chooses a route
            probe.connect(sockaddr)
            source = probe.getsockname()[0]
    except OSError:
        return loopback
    interfaces = {a.address: name for name, addresses in psutil.net_if_addrs().items() for a in addresses}
    return interfaces.get(source, loopback)


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
    variables = [settings.get(name, {}) for name in trackers.tracker_names(plan.trainer.get("report_to"))]
    return {key: value for each in variables for key, value in each.items() if key not in os.environ}
