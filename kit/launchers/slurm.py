"""SLURM: write a script that anyone can read, submit it, follow it.

One task per node starts that node's ranks (node.py): DeepSpeed's own slurm launcher sets no ranks, so that each task
would train alone. Inside an allocation (salloc) the same task is started at once.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.errors import DONE, ENVIRONMENT, FAILED, STOPPED, KitError, Problem
from kit.launchers.ranks import read_rank_errors
from kit.launchers.slurm_client import FINAL_STATES, current_job_id, follow_job, job_state, submit_script
from kit.launchers.slurm_script import RESUME_OPTIONS, check_plain_path, srun_command, train_script, verb_script
from kit.launchers.supervise import StopRequests, describe_stop, exit_code_of_run
from kit.schema.run_plan import RunPlan, load_plan
from kit.storage import run_directory
from kit.storage.json_files import atomic_write_json, atomic_write_text, read_json_or_empty
from kit.system.terminal import print_status

JOBS_FILE = "slurm.json"  # in the run directory: what was submitted
CHAINED_VERBS = ("merge", "eval", "generate")


def create_and_submit(plan: RunPlan, fresh: bool = False, follow: bool = False, then: Sequence[str] = ()) -> int:
    """Make the run directory of a plan and submit it; the exit code. KitError where sbatch refuses."""
    check_submission(then)
    check_plain_path(Path(plan.run_dir))
    if not fresh and run_directory.plan_hash_of(Path(plan.run_dir)) == plan.hash:
        refuse_second_job(Path(plan.run_dir))  # before its plan is written again, which the job will read
    inside_allocation(plan)  # a refusal leaves no directory behind
    return submit_run(run_directory.create_run_directory(plan, fresh), follow, then)


def submit_run(plan: RunPlan, follow: bool = False, then: Sequence[str] = ()) -> int:
    """Submit a run whose directory exists, new or to be continued, and the verbs that come after it (afterok)."""
    run = plan.run_path
    check_submission(then)
    refuse_second_job(run)
    if inside_allocation(plan):
        if then:
            raise KitError("--then chains batch jobs", "--then", "outside of the allocation", code=ENVIRONMENT)
        return run_in_allocation(plan)
    script = write_script(
        run / "train.sbatch", train_script(plan, [run], str(run / run_directory.LOGS / "slurm-%j.out"))
    )
    job = record_job(run, "train", submit_script(script), script)
    log = run / run_directory.LOGS / f"slurm-{job}.out"
    print(f"job {job}: {run_directory.path_from_here(run)}")
    stop = f"stop with a checkpoint: scancel --signal=USR1 {job}; end: scancel {job}"
    print_status(f"log: {run_directory.path_from_here(log)}; {stop}")
    previous = job
    for verb in then:
        chained = write_script(
            run / f"{verb}.sbatch", verb_script(verb, [str(run)], slurm_settings_for_verb(plan, verb), run)
        )
        submitted = submit_script(chained, "--dependency", f"afterok:{previous}", "--kill-on-invalid-dep=yes")
        previous = record_job(run, verb, submitted, chained)
        print(f"job {previous}: kit {verb}, once the one before is done")
    if not follow:
        return DONE
    return exit_code_of_job(run, job, *follow_job(job, log))


def submit_array(plans: Sequence[RunPlan], folder: Path, at_once: int | None = None) -> str:
    """One job array over frozen plans, a task to each; every run directory must exist. Returns the job's id.

    `folder` (of a sweep) takes the script and SLURM's logs; `at_once`: how many tasks may run together.
    """
    check_array(plans, [folder, *(plan.run_path for plan in plans)])
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / ("slurm-%A_%a.out" if len(plans) > 1 else "slurm-%j.out")
    text = train_script(plans[0], [plan.run_path for plan in plans], str(log), at_once)
    script = write_script(folder / "array.sbatch", text)
    job = submit_script(script)
    for number, plan in enumerate(plans):
        record_job(plan.run_path, "train", f"{job}_{number}" if len(plans) > 1 else job, script)
    return job


def check_array(plans: Sequence[RunPlan], paths: Sequence[Path]) -> None:
    """KitError where plans cannot be the tasks of one array, or where nothing can be submitted here."""
    check_submission(())
    if len({plan.launch.model_dump_json() for plan in plans}) != 1:
        message = "the tasks of an array share one script, so launch.* must be the same"
        raise KitError(message, "command line", "sweep other keys")
    for path in paths:
        check_plain_path(path)


def submit_verb(verb: str, source: str, argv: Sequence[str], words: Sequence[str], follow: bool = False) -> int:
    """`kit VERB argv` as a batch job. `words`: launch=slurm and launch.slurm.KEY=VALUE, over those of the run."""
    check_submission(())
    path = Path(source).expanduser()
    if not path.exists() and (path.is_absolute() or source[0] in ".~" or (path.parent.name and path.parent.is_dir())):
        raise KitError(f"there is no {source}", "command line", "a run, a folder, or a Hub id")  # now, not in the job
    plan = load_plan(source) if Path(source, run_directory.PLAN).is_file() else None
    slurm = override_slurm_settings(slurm_settings_for_verb(plan, verb), words)
    run = plan.run_path if plan else Path.cwd() / "slurm-logs"
    if plan:
        run = Path(source).absolute()
    check_plain_path(run)
    (run / run_directory.LOGS).mkdir(parents=True, exist_ok=True)
    script = write_script(run / f"{verb}.sbatch", verb_script(verb, argv, slurm, run))
    job = record_job(run, verb, submit_script(script), script)
    log = run / run_directory.LOGS / f"{verb}-{job}.out"
    print(f"job {job}: kit {verb} {source}")
    print_status(f"its log: {run_directory.path_from_here(log)}")
    if not follow:
        return DONE
    state, code = follow_job(job, log)
    return code if state in ("COMPLETED", "FAILED") else FAILED


def slurm_settings_for_verb(plan: RunPlan | None, verb: str) -> dict[str, Any]:
    """launch.slurm for a later verb of a run: on one GPU, as all of them are one process; a merge takes none."""
    if plan is None or plan.launch.slurm is None:
        return {}
    slurm = plan.launch.slurm.model_dump()
    gpu = re.match(r"gpu(:[A-Za-z][^:,]*)?", slurm["gres"] or "")
    return {**slurm, "gres": f"{gpu[0]}:1" if gpu and verb != "merge" else None}


def override_slurm_settings(slurm: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The settings with `launch.slurm.KEY=VALUE` on top; KitError for what is no setting of a job."""
    from kit.config.compose import apply_overrides
    from kit.config.sections import read_slurm_settings

    other = [w for w in words if w.startswith("launch=") and w != "launch=slurm"]
    other += [w for w in words if not w.startswith(("launch=", "launch.slurm."))]
    if other:
        raise KitError(f"{other[0]}: a later step runs here or with launch=slurm", "command line", "launch=slurm")
    tree = apply_overrides({"launch": {"slurm": slurm}}, [w for w in words if w != "launch=slurm"])
    return read_slurm_settings(tree["launch"]["slurm"])


def inside_allocation(plan: RunPlan) -> bool:
    """Whether this process stands inside an allocation, as salloc makes it.

    KitError where that is over, or has fewer nodes than the plan.
    """
    job = current_job_id()
    if not job:
        return False
    if (state := job_state(job)[0]).startswith(FINAL_STATES):
        message = f"SLURM_JOB_ID={job} is set, but that job is {'not known' if state == 'GONE' else state.lower()}"
        raise KitError(message, "environment", "a new shell, or: unset SLURM_JOB_ID", code=ENVIRONMENT)
    nodes, planned = os.environ.get("SLURM_JOB_NUM_NODES", ""), int(plan.launch.num_nodes)
    if nodes.isdecimal() and int(nodes) < planned:
        message = f"the allocation {job} has {nodes} node{'s' * (nodes != '1')}, the run was planned for {planned}"
        fix = f"salloc --nodes={planned}, or launch.num_nodes={nodes}"
        raise KitError(message, "launch.num_nodes", fix, code=ENVIRONMENT)
    return True


def run_in_allocation(plan: RunPlan) -> int:
    """The job's step in the allocation that we stand in, in the foreground; Ctrl-C lets it save."""
    print_status(f"inside the allocation {current_job_id()}: started as a step of it")
    stop, requests = StopRequests(), 0
    with stop:
        step = subprocess.Popen([*srun_command(plan), str(plan.run_path), *RESUME_OPTIONS], start_new_session=True)
        while step.poll() is None:
            if stop.requests > requests:
                step.send_signal(signal.SIGUSR1 if requests == 0 else signal.SIGTERM)  # srun passes the first one on
                requests = stop.requests
            time.sleep(0.2)
    if step.returncode and run_directory.read_status(plan.run_path).get("state") == "created":
        message = f"srun ended with {step.returncode} before the run began"
        raise KitError(message, f"allocation {current_job_id()}", "what srun says above", code=ENVIRONMENT)
    return exit_code_of_run(plan.run_path, step.returncode)


def check_submission(then: Sequence[str]) -> None:
    wrong = [verb for verb in then if verb not in CHAINED_VERBS]
    if wrong:
        verbs = ",".join(CHAINED_VERBS)
        raise KitError(f"--then {wrong[0]}: no step after training", "--then", f"some of {verbs}")
    if len(set(then)) < len(then):
        raise KitError("--then names a verb twice", "--then", "each verb once")
    from shutil import which

    absent = [name for name in ("sbatch", "srun", "scontrol") if not which(name)]
    if absent:
        raise KitError(
            f"launch=slurm, but there is no {absent[0]} on the PATH", "PATH",
            "a login node of the cluster, or launch=auto", code=ENVIRONMENT,
        )  # fmt: skip


def refuse_second_job(run: Path) -> None:
    """KitError where a job of this run still waits or runs: two would write into one directory."""
    if living := unfinished_job(run):
        job, state = living
        raise KitError(f"{run} is job {job} ({state.lower()})", fix=f"wait for it, or scancel {job}")


def unfinished_job(run: Path) -> tuple[str, str] | None:
    """(id, state) of a job that trains this run, or will; None where there is none but our own."""
    jobs = [j["id"] for j in read_json_or_empty(run / JOBS_FILE).get("jobs", []) if j["verb"] == "train"]
    if (
        jobs
        and jobs[-1] != current_job_id()
        and (state := job_state(jobs[-1])[0])
        and not state.startswith(FINAL_STATES)
    ):
        return jobs[-1], state
    return None


def write_script(script: Path, text: str) -> Path:
    atomic_write_text(script, text)
    script.chmod(0o700)
    return script


def record_job(run: Path, verb: str, job: str, script: Path) -> str:
    jobs = read_json_or_empty(run / JOBS_FILE).get("jobs", [])
    jobs.append({"verb": verb, "id": job, "script": str(script), "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    atomic_write_json(run / JOBS_FILE, {"jobs": jobs})
    return job


def exit_code_of_job(run: Path, job: str, state: str, code: int) -> int:
    """The exit code of a run that was followed; KitError with what its ranks wrote down."""
    status = run_directory.read_status(run)
    if status.get("state") == "done":
        return DONE
    if status.get("state") == "stopped":
        print_status(describe_stop(run, status))
        return STOPPED
    problems, exit_code = read_rank_errors(run)
    log = str(run / run_directory.LOGS / f"slurm-{job}.out")
    problems = problems or [Problem(f"job {job} is {state.lower()} (exit code {code})", log, "read the log")]
    raise KitError(problems, code=exit_code)
