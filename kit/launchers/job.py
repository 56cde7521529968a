"""What a batch system starts on a node: the ranks of a frozen run, from its newest complete checkpoint if it has one.

    python -m kit.launchers.job RUN

SLURM_NODEID and SLURM_STEP_NUM_NODES say which node of how many it is; elsewhere NODE_RANK (or JOB_COMPLETION_INDEX,
Kubernetes' own) and NNODES. The same command starts a run and, after the job was queued again, goes on with it. Exit
codes are those of `kit`.
"""

from __future__ import annotations

import os
import sys

from kit import hardware, manifest, rundir
from kit.config.schema import RunPlan, load_plan
from kit.errors import DONE, ENVIRONMENT, REFUSED, KitError
from kit.launchers.run import launch, say
from kit.launchers.slurm_script import nodes_of


def main(argv: list[str]) -> int:
    from kit.terminal import print_problems

    try:
        if len(argv) != 1:
            raise KitError("one run directory is needed", "command line", "python -m kit.launchers.job RUN")
        return start(argv[0])
    except KitError as error:
        print_problems(error.problems, refused=error.code == REFUSED)
        return error.code


def start(name: str) -> int:
    """Launch a run on this node, or go on with it; nothing to do for one that is done."""
    run = rundir.find_run(name)
    plan = load_plan(run).model_copy(update={"run_dir": str(run)})
    if rundir.status(run).get("state") == "done":
        say(f"{run} is finished")
        return DONE
    right_nodes(plan, dict(os.environ))
    enough_gpus(plan)
    newest = manifest.newest_complete(run / rundir.CHECKPOINTS)
    for reason in newest.skipped:
        say(reason)
    say(f"resuming from {newest.path.name}" if newest.path else "no checkpoint yet: from the beginning")
    return launch(plan, resume=newest.path.name if newest.path else None)


def node(env: dict[str, str]) -> tuple[int, int]:
    """(rank of this node, number of nodes), as the batch system says."""

    def number(default: int, *names: str) -> int:
        return next((int(env[name]) for name in names if env.get(name, "").isdigit()), default)

    count = number(1, "NNODES", "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    return number(0, "NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX") if count > 1 else 0, count


def right_nodes(plan: RunPlan, env: dict[str, str]) -> None:
    """Nodes that the plan does not know of would each train alone, into one directory (T68)."""
    planned, (_, given) = nodes_of(plan), node(env)
    if planned != given:
        raise KitError(
            f"the job has {given} node{'s' * (given != 1)}, the run was planned for {planned}", "launch.num_nodes",
            "ask for as many nodes as the plan has", code=ENVIRONMENT,
        )  # fmt: skip


def enough_gpus(plan: RunPlan) -> None:
    """The plan was made on another machine, whose GPUs did not count."""
    seen = len(hardware.gpus())
    if not plan.trainer["use_cpu"] and int(plan.launch.num_gpus) > seen:
        raise KitError(
            f"{plan.launch.num_gpus} GPUs asked for, this node shows {seen}", "launch.num_gpus",
            "launch.slurm.gres=gpu:N asks for them", code=ENVIRONMENT, rule="gpus-missing",
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
