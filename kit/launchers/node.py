"""Several nodes that each start their own ranks (no ssh): which one this is, and where node 0 is met.

What neither the plan nor `kit launch-node` names comes from the environment: NODE_RANK, MASTER_ADDR and MASTER_PORT,
else what SLURM (one task per node) or an indexed Kubernetes Job sets.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import socket
from collections.abc import Mapping

from kit.config.nodes import read_hosts, starts_by_node
from kit.errors import ENVIRONMENT, REFUSED, KitError, Problem
from kit.schema.run_plan import HOST_PATTERN, RunPlan
from kit.system import hardware

FIRST_PORT, PORT_COUNT = 20_000, 10_000  # below what systems give to outgoing connections, and below Kubernetes' own


def resolve_node(plan: RunPlan, env: Mapping[str, str] = os.environ) -> RunPlan:
    """The plan with node_rank, master_addr and master_port filled in; as it is where one command starts all ranks."""
    launch = plan.launch
    if not starts_by_node(launch):
        return plan
    rank = launch.node_rank
    if rank is None:
        rank = first_integer(env, "NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
    problems = []
    if rank is None:
        message = (
            f"the run has {launch.num_nodes} nodes, each of which starts its own ranks, and this one has no number"
        )
        fix = "launch.node_rank=0 here; NODE_RANK and SLURM_NODEID do too"
        problems.append(Problem(message, "launch.node_rank", fix))
    elif not 0 <= rank < int(launch.num_nodes):
        message = f"node {rank} of {launch.num_nodes}: they are numbered from 0"
        problems.append(Problem(message, "launch.node_rank", f"0 to {int(launch.num_nodes) - 1}"))
    address = launch.master_addr or env.get("MASTER_ADDR") or first_slurm_host(env)
    if not address and launch.hostfile:
        address = next(iter(read_hosts(launch)))
    if not address:
        message = "nobody says where node 0 is"
        problems.append(Problem(message, "launch.master_addr", "launch.master_addr=HOST, the same on every node"))
    elif not re.fullmatch(HOST_PATTERN, address):
        message = f"{address!r} is no host's name or address"
        problems.append(Problem(message, "launch.master_addr", "that of node 0, the same on every node"))
    port = launch.master_port if launch.master_port is not None else first_integer(env, "MASTER_PORT")
    if port is not None and not 1 <= port <= 65535:
        problems.append(Problem(f"{port} is no port", "launch.master_port", "1 to 65535, the same on every node"))
    if problems:
        raise KitError(problems, code=REFUSED)
    port = port or port_of_run(plan, env)
    place = {"node_rank": rank, "master_addr": address, "master_port": port}
    return plan.model_copy(update={"launch": launch.model_copy(update=place)})


def first_integer(env: Mapping[str, str], *names: str) -> int | None:
    return next((int(env[name]) for name in names if re.fullmatch("[0-9]+", env.get(name, ""))), None)


def first_slurm_host(env: Mapping[str, str]) -> str:
    """The first host of SLURM's list, as in `gpu[03-07,11],login1`."""
    text = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", text)
    return "".join(part or "" for part in match.groups()) if match else ""


def port_of_run(plan: RunPlan, env: Mapping[str, str]) -> int:
    """A port that every node finds by itself, without a word between them; another for each run and job."""
    return derive_port(f"{env.get('SLURM_JOB_ID', '')}:{plan.run_dir}")


def derive_port(mark: str) -> int:
    return FIRST_PORT + int(hashlib.sha256(mark.encode()).hexdigest(), 16) % PORT_COUNT


def ranks_of_node(plan: RunPlan) -> range | None:
    """The ranks that this node starts; None: all of the run's, or all that a launcher reaches."""
    if not starts_by_node(plan.launch) or plan.launch.node_rank is None:
        return None
    count = int(plan.launch.num_gpus)
    return range(plan.launch.node_rank * count, (plan.launch.node_rank + 1) * count)


def check_port_is_free(plan: RunPlan) -> None:
    """KitError on node 0 where somebody else listens at the port that the nodes have agreed on."""
    port = int(plan.launch.master_port or 0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            message = f"port {port} cannot be taken: {error.strerror}"
            fix = "launch.master_port=PORT, another one, the same on every node"
            raise KitError(message, "launch.master_port", fix, code=ENVIRONMENT, rule="port-taken") from None


def launch_node_command(plan: RunPlan) -> str:
    """What is to be typed on the other nodes."""
    launch = plan.launch
    rendezvous = f"--master-addr {launch.master_addr} --master-port {launch.master_port}"
    ranks = "1" if launch.num_nodes == 2 else f"N   (N = 1 to {int(launch.num_nodes) - 1})"
    return f"kit launch-node {shlex.quote(str(plan.run_path / 'plan.json'))} {rendezvous} --node-rank {ranks}"


def check_node_count(plan: RunPlan, env: Mapping[str, str]) -> None:
    """KitError where the batch system has other nodes than the plan: each would train alone, into one place."""
    allocated, planned = first_integer(env, "NNODES", "SLURM_STEP_NUM_NODES"), int(plan.launch.num_nodes)
    if allocated is not None and planned != allocated:
        raise KitError(
            f"the job has {allocated} node{'s' * (allocated != 1)}, the run was planned for {planned}",
            "launch.num_nodes", "ask for as many nodes as the plan has", code=ENVIRONMENT,
        )  # fmt: skip


def check_gpu_count(plan: RunPlan) -> None:
    """KitError where this node has fewer GPUs than the plan, which was made on another machine."""
    visible = len(hardware.list_gpus())
    if not plan.trainer["use_cpu"] and int(plan.launch.num_gpus) > visible:
        raise KitError(
            f"{plan.launch.num_gpus} GPUs asked for, this node shows {visible}", "launch.num_gpus",
            "a batch job asks for them: launch.slurm.gres=gpu:N", code=ENVIRONMENT, rule="gpus-missing",
        )  # fmt: skip
