"""The text of the scripts that are given to sbatch. Values come in by two ways only: patterns and shlex.quote."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import __version__
from kit.config import slurm as slurm_values
from kit.errors import FAILED, STOPPED, KitError, Problem
from kit.schema.run_plan import RunPlan

KIT_COMMAND = [sys.executable, "-m", "kit"]
RESUME_OPTIONS = ["--resume", "newest"]  # a job that was queued again goes on

# bash runs a trap only between commands: the step is put into the background and waited for, again after each signal.
STEP_TEMPLATE = """\
# Preempted, or its node lost: SLURM queues the job again by itself. That counts too.
[ "${{SLURM_RESTART_COUNT:-0}}" -le {requeues} ] || {{ echo "kit: queued again {requeues} times"; exit {failed}; }}

preempted() {{  # since this start; scancel by hand ends it without a new one
  facts=$(scontrol show job -o "$job") && [[ $facts =~ JobState=RUNNING ]] &&
    [[ $facts =~ " StartTime="([^ ]+) ]] && start=${{BASH_REMATCH[1]}} &&
    [[ $facts =~ PreemptTime=(2[^ ]+) ]] && ! [[ ${{BASH_REMATCH[1]}} < $start ]]
}}
asked=no
trap 'asked=yes; kill -USR1 "$step" 2>/dev/null' USR1  # near the time limit, or scancel --batch --signal=USR1
trap : TERM                                            # scancel, preemption: SLURM tells the step itself
{srun} "$run" {resume} &
step=$!
wait "$step"; while kill -0 "$step" 2>/dev/null; do wait "$step"; done; wait "$step"; code=$?

# {stopped}: all ranks stopped at one step, with a complete checkpoint. A preempted job may have got SIGTERM alone.
[ "$code" -eq {stopped} ] && preempted && asked=yes
if [ "$asked" = yes ] && {{ [ "$code" -eq {stopped} ] || [ "$code" -ge 128 ]; }}; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
    echo "kit: queued again, start $((${{SLURM_RESTART_COUNT:-0}} + 1)) of {requeues}"
    trap - TERM
    scontrol requeue "$job" && sleep 60  # which ends this script
  fi
  echo "kit: not queued again: launch.slurm.max_requeues={requeues}"
fi
exit "$code"
"""


def srun_command(plan: RunPlan) -> list[str]:
    """One task per node, which starts the ranks of its node; it may use all of the job's CPUs there."""
    assert plan.launch.slurm
    nodes = str(plan.launch.num_nodes)
    argv = ["srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--overlap"]
    if cpus := plan.launch.slurm.cpus_per_task:  # srun no longer takes it from sbatch
        argv += ["--cpus-per-task", str(cpus)]
    return [*argv, "--cpu-bind=none", *KIT_COMMAND, "launch-node"]


def train_script(plan: RunPlan, runs: Sequence[Path], output: str, at_once: int | None = None) -> str:
    """The script of one run, or of an array with a task to each of `runs`."""
    assert plan.launch.slurm
    slurm, nodes = plan.launch.slurm.model_dump(), int(plan.launch.num_nodes)
    requeues, name = slurm["max_requeues"], f"{plan.name}-{plan.hash}" if len(runs) == 1 else f"{plan.name}-array"
    options = [f"--signal=B:USR1@{slurm['signal_seconds']}", "--requeue", "--open-mode=append"]
    if len(runs) > 1:
        options.append(f"--array=0-{len(runs) - 1}" + (f"%{int(at_once)}" if at_once else ""))
    lines = sbatch_header(f"kit train of {len(runs)} run{'s' * (len(runs) > 1)}", name, output, slurm, nodes, options)
    if len(runs) == 1:
        lines += [f"run={quote_words([str(runs[0])])}", "job=$SLURM_JOB_ID"]
    else:
        lines += ["runs=(", *(f"  {quote_words([str(run)])}" for run in runs), ")"]
        lines += ["run=${runs[$SLURM_ARRAY_TASK_ID]}", "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"]
    step = STEP_TEMPLATE.format(
        srun=quote_words(srun_command(plan)),
        resume=quote_words(RESUME_OPTIONS),
        stopped=STOPPED,
        failed=FAILED,
        requeues=requeues,
    )
    return "\n".join(lines) + "\n" + step


def verb_script(verb: str, argv: Sequence[str], slurm: dict[str, Any], folder: Path) -> str:
    """The script of a step after training, which is one process."""
    lines = sbatch_header(f"kit {verb}", f"kit-{verb}", str(folder / "logs" / f"{verb}-%j.out"), slurm, 1, [])
    step = ["srun", "--nodes", "1", "--ntasks", "1", "--overlap"]
    if cpus := slurm.get("cpus_per_task"):
        step += ["--cpus-per-task", str(cpus)]
    return "\n".join([*lines, quote_words(["exec", *step, "--cpu-bind=none", *KIT_COMMAND, verb, *argv])]) + "\n"


def sbatch_header(
    about: str, name: str, output: str, slurm: dict[str, Any], nodes: int, more: Sequence[str]
) -> list[str]:
    """The lines before the work: options for sbatch, modules and set-up. KitError for a value that is not plain."""
    problems = [*slurm_values.slurm_value_problems(slurm), *slurm_values.slurm_extra_problems(slurm)]
    if problems:
        raise KitError([Problem(problem, key, fix, "slurm-value") for problem, key, fix in problems])
    if not slurm_values.JOB_NAME.fullmatch(name):
        raise KitError(f"{name!r} cannot be a job's name", "name", "letters, digits, . _ -", rule="slurm-value")
    directives = [f"--job-name={name}", f"--output={output}", f"--nodes={int(nodes)}", "--ntasks-per-node=1", *more]
    if slurm.get("cpus_per_task"):
        directives.append(f"--cpus-per-task={int(slurm['cpus_per_task'])}")
    directives += [f"--{key}={slurm[key]}" for key in slurm_values.PATTERNS if slurm.get(key) is not None]
    directives += slurm.get("extra") or []
    lines = ["#!/bin/bash", f"# {about}, written by kit {__version__}; sbatch takes it again as it is."]
    lines += [f"#SBATCH {option}" for option in directives] + [""]
    lines += [quote_words(["module", "load", module]) for module in slurm.get("modules") or []]
    lines += [quote_words(shlex.split(command)) for command in slurm.get("setup") or []]
    return lines


def quote_words(words: Sequence[str]) -> str:
    """Words for bash on one line: nothing in them is the shell's, and a newline does not begin a line."""
    return " ".join(
        quote_control_characters(word) if slurm_values.CONTROL.search(word) else shlex.quote(word) for word in words
    )


def quote_control_characters(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + slurm_values.CONTROL.sub(lambda m: "".join(f"\\x{b:02x}" for b in m[0].encode()), escaped) + "'"


def check_plain_path(path: Path) -> None:
    """KitError where a directory's name cannot stand behind --output."""
    if not slurm_values.PATH.fullmatch(str(path)):
        raise KitError(
            f"{str(path)!r} cannot stand in an #SBATCH line", "runs_dir, name",
            "a folder whose path has letters, digits and . _ , + @ = : - only", rule="slurm-value",
        )  # fmt: skip
