"""`kit launch-node`: the ranks of one node of a frozen plan, where every node starts its own.

    kit launch-node runs/x/plan.json --node-rank 1 --master-addr node0 --master-port 29500

starts the ranks of one node of a plan whose directory all nodes share, and ends when they do. With `--resume newest`
the same words start a run and, after a job was queued again, continue it: a batch job types them on each of its
nodes, one or several.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from kit.errors import DONE, KitError
from kit.launchers.node import check_gpu_count, check_node_count
from kit.launchers.supervise import launch, newest_checkpoint_name
from kit.schema.run_plan import load_plan
from kit.storage import run_directory
from kit.system.dependencies import require_training_extras
from kit.system.terminal import print_status


def launch_node_verb(argv: list[str]) -> int:
    """`kit launch-node PLAN`: the ranks of one node of a frozen plan."""
    parser = argparse.ArgumentParser(
        prog="kit launch-node", description="Start the ranks of one node of a frozen plan.", allow_abbrev=False
    )
    parser.add_argument("plan", help="plan.json, or the run directory, on a file system that all nodes share")
    parser.add_argument("--node-rank", type=int, help="0 to NODES - 1 (NODE_RANK, SLURM_NODEID, JOB_COMPLETION_INDEX)")
    parser.add_argument("--master-addr", help="host name or address of node 0 (MASTER_ADDR, SLURM's first node)")
    parser.add_argument("--master-port", type=int, help="the same on every node (MASTER_PORT, else from the run)")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from it; `newest`: if there is one")
    options = parser.parse_args(argv)
    path = Path(options.plan)
    run = run_directory.find_run(str(path.parent if path.name == run_directory.PLAN else path))
    plan = load_plan(run)
    settings = {"node_rank": options.node_rank, "master_addr": options.master_addr, "master_port": options.master_port}
    settings = {key: value for key, value in settings.items() if value is not None or key == "node_rank"}
    plan = plan.model_copy(update={"run_dir": str(run), "launch": plan.launch.model_copy(update=settings)})
    if options.resume == "newest" and run_directory.read_status(run).get("state") == "done":
        print_status(f"{run} is finished")
        return DONE
    if plan.launch.num_nodes == 1 and options.node_rank:
        raise KitError(
            f"--node-rank {options.node_rank}, but the run was planned for one node", "--node-rank",
            "leave it out, or freeze the run with launch.num_nodes=NODES",
        )  # fmt: skip
    if (
        options.resume
        and options.resume != "newest"
        and not (run / run_directory.CHECKPOINTS / options.resume).is_dir()
    ):
        message = f"there is no {options.resume} in {run_directory.path_from_here(run / run_directory.CHECKPOINTS)}"
        raise KitError(message, "--resume", "--resume newest, or the name of a checkpoint there")
    check_node_count(plan, os.environ)
    check_gpu_count(plan)
    require_training_extras()
    resume = options.resume
    if resume == "newest" and (resume := newest_checkpoint_name(run)) is None:
        print_status("no checkpoint yet: from the beginning")
    return launch(plan, resume=resume)
