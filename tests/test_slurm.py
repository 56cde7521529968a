"""The scripts for SLURM as text: what is refused, what is quoted, what is asked of sbatch. No SLURM is needed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kit import api
from kit.cli import verbs as cli
from kit.config import slurm as slurm_values
from kit.errors import DONE, ENVIRONMENT, REFUSED, KitError
from kit.launchers import node, slurm, slurm_client, slurm_script
from kit.schema.run_plan import Slurm
from kit.storage import run_directory

HOSTILE = [
    "x\n#SBATCH --uid=0", "x\ntouch canary", "x; touch canary", "$(touch canary)", "`touch canary`", "(x)", "é", "-x",
    "x | touch canary", "x > canary", "x\rtouch canary", "x\u2028touch canary", "x' ; touch canary ; '", "--wrap=id",
    'x" ; touch canary ; "', "x #y", "a b", "x\\", "x\0y", "~/x", "${HOME}", "*", "", " ", "x\t", "!x", "{a,b}",
    "x & touch canary",
]  # fmt: skip


def script_of(**settings) -> str:
    return slurm_script.verb_script("merge", ["RUN"], Slurm(**settings).model_dump(), Path("/runs/x"))


@pytest.mark.parametrize("key", slurm_values.PATTERNS)
@pytest.mark.parametrize("value", HOSTILE)
def test_no_hostile_value_reaches_a_directive(key: str, value: str):
    if key == "constraint" and value in ("(x)",):
        return  # SLURM's own grouping; the line is a comment to the shell
    with pytest.raises(KitError) as refused:
        script_of(**{key: value})
    assert refused.value.problems[0].where == f"launch.slurm.{key}" and refused.value.problems[0].fix


@pytest.mark.parametrize("value", HOSTILE)
def test_nor_an_option_or_a_module(value: str):
    comment = [f"--comment={value or ' '}"] * (not value.startswith("-"))  # behind the = it is no option
    for settings in ({"extra": [value, *comment]}, {"extra": comment or ["-x"]}, {"modules": [value]}):
        with pytest.raises(KitError):
            script_of(**settings)


@pytest.mark.parametrize("value", HOSTILE)
def test_a_setup_line_is_words_and_no_more(value: str, tmp_path: Path):
    """Refused, or a command whose words the shell does not read again: run, it leaves no canary."""
    try:
        text = script_of(setup=[f"true {value}"])
    except KitError:
        return
    body = text.replace("exec srun", "exec true srun")
    subprocess.run(["bash", "-c", body], cwd=tmp_path, timeout=20, capture_output=True)
    assert not list(tmp_path.iterdir())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


@pytest.mark.parametrize("value", [v for v in HOSTILE if "\0" not in v])
def test_words_of_a_verb_arrive_as_they_are(value: str, tmp_path: Path):
    text = slurm_script.verb_script("generate", ["RUN", "--prompt", value], {}, Path("/runs/x"))
    assert text.splitlines()[-1].startswith("exec srun") and text.count("#SBATCH") == 4 + ("#SBATCH" in value)
    show = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    body = re.sub(r"^exec srun .* -m kit", lambda m: "exec " + shlex.join(show), text, flags=re.M)
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, timeout=20, capture_output=True, text=True)
    assert json.loads(done.stdout) == ["generate", "RUN", "--prompt", value]
    assert not list(tmp_path.iterdir())


OWN = """--export=ALL --expor=ALL --export-file=x --output=x --out=x --array=0-9 --partition=x --no --nodes=2 --e
    --mem=1 --dependency=afterok:1 --job-name=x --signal=9@1 --get-user-env --uid=0""".split()


@pytest.mark.parametrize("option", OWN)
def test_options_that_the_script_sets_itself(option: str):
    with pytest.raises(KitError, match="itself"):
        script_of(extra=[option])


SETUP = {  # a line: what it is refused for, None where it is not
    "export PATH=/x:$PATH": "'$'", 'export A="$HOME"': "'$'", "echo `id`": "'`'", "source x && source y": "'&'",
    "cd /x; source y": "';'", "source ~/env/bin/activate": "'~'", "export PATH=~/bin": "'~'", "# a comment": "'#'",
    "source x > log": "'>'", "export HF_TOKEN=abc": "HF_TOKEN a value", "export 'WANDB_API_KEY=a b'": "WANDB_API_KEY",
    "export X=hf_" + "a" * 20: "gives X", "export A='$HOME' B=\"a;b\"": None, r"export A=\$5": None,
    "export A=b~c#d": None, "export HF_TOKEN_PATH=/x": None, "export HF_TOKEN=": None,
}  # fmt: skip


@pytest.mark.parametrize("line", SETUP)
def test_a_setup_line_that_means_more_than_its_words(line: str):
    """It would be quoted into something else than was meant; a secret would stand in the script and the plan."""
    found = list(slurm_values.slurm_value_problems({"setup": [line]}))
    assert (not found) if SETUP[line] is None else SETUP[line] in found[0][0] and found[0][2]
    assert "gives" not in str(found) or not re.search("abc|aaaa|a b", str(found))


@pytest.mark.parametrize("key", ["time", "mem"])
def test_true_is_no_number(key: str):
    with pytest.raises(ValueError, match="valid"):
        Slurm(**{key: True})


GOOD = {
    "partition": "gpu,long", "account": "team-1", "qos": "high", "gres": "gpu:a100:4", "time": "1-12:00:00",
    "mem": "64G",    "constraint": "[rack1|rack2]&nvlink", "exclude": "node[01-04,07],gpu3", "cpus_per_task": 8,
}  # fmt: skip


def test_what_is_given_stands_in_the_script():
    text = script_of(**GOOD, modules=["cuda/12.4"], setup=["source '/opt/my env/activate'"], extra=["--nice=10"])
    lines = text.splitlines()
    assert all(f"#SBATCH --{key.replace('_', '-')}={value}" in lines for key, value in GOOD.items())
    assert (
        "#SBATCH --nice=10" in lines and "module load cuda/12.4" in lines and "source '/opt/my env/activate'" in lines
    )
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])  # where sbatch stops to look
    assert "--cpus-per-task 8" in lines[-1]


@pytest.mark.parametrize(
    ("value", "fine"),
    [(20, True), ("20", True), ("2:00:00", True), ("1-0", True), (43200, False), (5400, False), ("2h", False)],
)
def test_a_time_that_yaml_made_a_number_of(value, fine: bool):
    assert (list(slurm_values.slurm_value_problems({"time": value})) == []) is fine


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu", 1),
        ("gpu:4", 4),
        ("gpu:a100:2", 2),
        ("gpu:a100", 1),
        ("shard:2", None),
        ("shard:1,gpu:2", 2),
        (None, None),
    ],
)
def test_gpus_of_a_gres(gres, count):
    assert slurm_values.gpus_of(gres) == count


@pytest.fixture
def plan_of(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def make(*overrides: str):
        stock = (f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path / 'runs'}", "launch=slurm")
        return api.compose(*stock, *overrides, here=True)

    return make


def test_gpus_are_said_once_and_need_not_be_here(plan_of):
    """On a login node: no GPU, and none is missed; the base is identified all the same."""
    plan = plan_of("launch.num_gpus=4", "deepspeed=zero2")
    assert plan.launch.slurm.gres == "gpu:4" and plan.launch.launcher == "deepspeed" and not plan.trainer["use_cpu"]
    assert plan.precision == "bfloat16" and plan.base["fingerprint"]
    plan = plan_of("launch.slurm.gres=gpu:a100:2", "deepspeed=zero2")
    assert (plan.launch.num_gpus, plan.world_size) == (2, 2)
    plan = plan_of("trainer.use_cpu=true")
    assert (plan.launch.slurm.gres, plan.launch.num_gpus) == (None, 1)
    with pytest.raises(KitError, match="asks for 2 GPUs per node, launch.num_gpus for 4"):
        plan_of("launch.slurm.gres=gpu:2", "launch.num_gpus=4")
    with pytest.raises(KitError, match="no key|unknown|not in struct"):
        plan_of("launch.slurm.partitoin=x")
    with pytest.raises(KitError, match="this node shows 0"):
        node.check_gpu_count(plan_of("launch.num_gpus=2"))


def test_settings_are_no_part_of_what_a_run_is(plan_of, base: Path, chat: Path, tmp_path: Path):
    plain = api.compose(
        f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path}", "trainer.use_cpu=true"
    )
    assert plan_of("trainer.use_cpu=true", "launch.slurm.partition=gpu").hash == plain.hash


def test_the_scripts_are_sound_bash(plan_of, tmp_path: Path):
    plan = plan_of("trainer.use_cpu=true", "launch.slurm.cpus_per_task=4")
    one = slurm_script.train_script(plan, [Path("/runs/a")], "/runs/a/logs/slurm-%j.out")
    many = slurm_script.train_script(plan, [Path("/runs/a"), Path("/runs/it's")], "/runs/x/slurm-%A_%a.out", 1)
    assert "#SBATCH --array=0-1%1" in many and "#SBATCH --signal=B:USR1@300" in one and "DeepSpeed" not in one
    for text in (one, many):
        assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=20).returncode == 0
        assert "--export" not in text


# ---- the script's own decisions, with a step and a controller that only pretend ----

RUNS = {  # exit code of the step, signal, what the controller says, starts so far -> (exit code, queued again)
    "done": (0, "", "RUNNING", 0, 0, False),
    "failed": (4, "", "RUNNING", 0, 4, False),
    "near the time limit": (75, "USR1", "RUNNING", 0, 75, True),
    "so often is enough": (75, "USR1", "RUNNING", 10, 75, False),
    "nothing was trained yet": (130, "USR1", "RUNNING", 0, 130, True),
    "failed after the signal": (4, "USR1", "RUNNING", 0, 4, False),
    "stopped by hand": (75, "", "RUNNING", 0, 75, False),
    "preempted": (75, "", "RUNNING PreemptTime=2026-01-02T00:00:10", 0, 75, True),
    "preempted in an earlier start": (75, "", "RUNNING PreemptTime=2026-01-01T00:00:00", 1, 75, False),
    "cancelled": (75, "", "CANCELLED PreemptTime=2026-01-02T00:00:10", 0, 75, False),
    "queued again by SLURM itself": (0, "", "RUNNING", 11, 4, False),
}


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS.keys())
def test_when_a_job_is_queued_again(case, plan_of, tmp_path: Path):
    code, signal, state, starts, expected, again = case
    script = slurm_script.train_script(plan_of("trainer.use_cpu=true"), [tmp_path / "run"], f"{tmp_path}/x")
    bin = tmp_path / "bin"
    bin.mkdir()
    send = f"kill -{signal} $PPID; sleep 0.2" if signal else ":"
    programs = {
        "srun": f"trap 'exit {code}' USR1; {send}; exit {code}",
        "scontrol": f'echo "scontrol $*" >> {tmp_path}/asked; '
        f'[ "$1" = requeue ] || echo "JobId=5 JobState={state} StartTime=2026-01-02T00:00:00 EndTime=x"',
        "sleep": "exec /bin/sleep 0.05",
    }
    for name, body in programs.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(starts)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=30)
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert (done.returncode, "scontrol requeue 5" in asked) == (expected, again), (done.stdout, done.stderr, asked)


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, None),
        ({"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "4"}, 2),
        ({"SLURM_NNODES": "4"}, None),  # typed inside of an allocation: no step of it
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1"}, 2),
        ({"NNODES": "3", "NODE_RANK": "2", "SLURM_STEP_NUM_NODES": "1"}, 3),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # four jobs of one node
    ],
)
def test_a_job_of_other_nodes_than_the_plan(env, count, plan_of):
    node.check_node_count(plan_of("trainer.use_cpu=true", f"launch.num_nodes={count or 1}"), env)
    if count:
        with pytest.raises(KitError, match=f"the job has {count} nodes, the run was planned for 1"):
            node.check_node_count(plan_of("trainer.use_cpu=true"), env)


# ---- submitting ----


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that note what they are given; sbatch answers with a job id. Returns the folder of the notes."""
    bin = tmp_path / "slurm-bin"
    bin.mkdir()
    programs = {
        "sbatch": f'echo "$@" >> {bin}/argv; env > {bin}/env; echo $((40 + $(wc -l < {bin}/argv)));',
        "srun": "exit 1",
        "scontrol": 'echo "JobId=$5 JobState=${KIT_TEST_STATE:-PENDING} ExitCode=0:0"',
    }
    for name, body in programs.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return bin


def test_a_run_with_its_chain(plan_of, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for name, value in {
        "HF_TOKEN": "canary-1",
        "WANDB_API_KEY": "canary-2",
        "MY_URL": "http://me:canary-3@host/",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    plan = plan_of("launch.num_gpus=2", "deepspeed=zero2", "launch.slurm.partition=gpu")
    assert slurm.create_and_submit(plan, then=["merge", "eval"]) == DONE
    run = plan.run_path
    out, err = capsys.readouterr()
    assert [line.split()[1].strip(":") for line in out.splitlines()] == ["41", "42", "43"] and "HF_TOKEN" in err
    argv = (sbatch / "argv").read_text().splitlines()
    assert (
        argv[0] == f"--parsable {run}/train.sbatch" and "--dependency afterok:42 --kill-on-invalid-dep=yes" in argv[2]
    )
    env = (sbatch / "env").read_text()
    assert "canary" not in env and "HF_TOKEN_PATH=/home/me/token" in env
    written = "".join(f.read_text() for f in run.glob("*.sbatch")) + (run / "plan.json").read_text()
    assert "canary" not in written
    assert (
        "--gres=gpu:2" in (run / "train.sbatch").read_text()
        and "--partition=gpu" in (run / "merge.sbatch").read_text()
    )
    assert "gres" not in (run / "merge.sbatch").read_text() and "--gres=gpu:1" in (run / "eval.sbatch").read_text()
    assert oct((run / "train.sbatch").stat().st_mode)[-3:] == "700"
    with pytest.raises(KitError, match="is job 41"):
        slurm.submit_run(plan)
    monkeypatch.setenv("KIT_TEST_STATE", "CANCELLED")
    assert slurm.submit_run(plan) == DONE
    run_directory.set_status(run, "created")
    with pytest.raises(KitError, match="is cancelled"):
        slurm.submit_run(plan, follow=True)


def test_an_array_needs_one_kind_of_job(plan_of, sbatch: Path, tmp_path: Path):
    plans = [plan_of("trainer.use_cpu=true", f"trainer.seed={n}") for n in range(4)]
    plans = [run_directory.create_run_directory(plan) for plan in plans]
    assert slurm.submit_array(plans, tmp_path / "sweep", at_once=2) == "41"
    assert "#SBATCH --array=0-3%2" in (tmp_path / "sweep" / "array.sbatch").read_text()
    assert json.loads((plans[3].run_path / "slurm.json").read_text())["jobs"][0]["id"] == "41_3"
    other = plan_of("trainer.use_cpu=true", "launch.slurm.mem=1G", "trainer.seed=9")
    with pytest.raises(KitError, match="must be the same"):
        slurm.submit_array([*plans, other], tmp_path / "sweep")


@pytest.mark.launch
def test_a_multirun_is_one_array(sbatch: Path, tmp_path: Path, base: Path, chat: Path, monkeypatch, capsys):
    """All points are composed and frozen first; one that is refused is listed, and the others are submitted."""
    monkeypatch.chdir(tmp_path)
    line = [f"model.name_or_path={base}", f"dataset.path={chat}", "launch=slurm", "trainer.use_cpu=true", "-m"]
    assert cli.run_verb(["train", *line, "peft.r=0,-1"]) == REFUSED
    assert cli.run_verb(["train", *line, "peft.r=4,8", "hparams_search=optuna"]) == REFUSED
    assert "a search stays with its trials" in capsys.readouterr().err
    assert cli.run_verb(["train", *line, "peft.r=4,8", "--follow"]) == REFUSED
    assert not (sbatch / "argv").exists()
    sweep = [*line, "peft.r=4,8,0", "hparams_search.parallel=1"]
    assert cli.run_verb(["train", *sweep]) == REFUSED
    assert "job 41: 2 trials" in capsys.readouterr().out
    [folder] = tmp_path.glob("runs/*-sweep-*")
    script = (folder / "array.sbatch").read_text()
    runs = [f.parent for f in sorted(folder.glob("*/plan.json"))]
    assert len(runs) == 2 and all(str(run) in script for run in runs) and "--array=0-1%1" in script
    # the same command: what is queued or runs is left alone, what is done stays, what failed is submitted again
    assert cli.run_verb(["train", *sweep]) == REFUSED
    assert "trial 001 is job 41_1 (pending)" in capsys.readouterr().err
    assert len((sbatch / "argv").read_text().splitlines()) == 1
    monkeypatch.setenv("KIT_TEST_STATE", "COMPLETED")
    run_directory.set_status(runs[0], "done")
    run_directory.set_status(runs[1], "failed")
    assert cli.run_verb(["train", *sweep]) == REFUSED
    assert "job 42: 1 trials" in capsys.readouterr().out and (folder / "sweep.csv").exists()
    assert json.loads((runs[1] / "slurm.json").read_text())["jobs"][-1]["id"] == "42"
    assert "--array" not in (folder / "array.sbatch").read_text()


def test_what_is_refused_before_anything_is_made(
    plan_of, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(KitError, match="no step after training"):
        slurm.create_and_submit(plan_of("trainer.use_cpu=true"), then=["mrge"])
    with pytest.raises(KitError, match="cannot stand in an #SBATCH line"):
        slurm.create_and_submit(plan_of("trainer.use_cpu=true", f"runs_dir='{tmp_path}/my runs'"))
    assert cli.run_verb(["train", "recipe=quickstart", "--follow"]) == REFUSED
    assert cli.run_verb(["merge", str(tmp_path), "launch=deepspeed"]) == REFUSED
    assert cli.run_verb(["eval", str(tmp_path), "launch=slurm", "launch.slurm.mme=1G"]) == REFUSED
    assert cli.run_verb(["eval", str(tmp_path), "launch=slurm", "launch.slurm.mem='1G;id'"]) == REFUSED
    assert not list(tmp_path.rglob("plan.json")) and not (sbatch / "argv").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KitError, match="no sbatch on the PATH") as refused:
        slurm.create_and_submit(plan_of("trainer.use_cpu=true"))
    assert refused.value.code == ENVIRONMENT


@pytest.mark.parametrize("verb", ["merge", "eval", "generate"])
def test_later_verbs_submit_themselves(verb: str, sbatch: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.run_verb([verb, "some/adapter", "--base", "some/base", "launch=slurm", "launch.slurm.mem=64G"])
    assert ended.value.code == DONE and "job 41" in capsys.readouterr().out
    text = (tmp_path / "slurm-logs" / f"{verb}.sbatch").read_text()
    assert "#SBATCH --mem=64G" in text and text.endswith(f"-m kit {verb} some/adapter --base some/base\n")
    with pytest.raises(SystemExit) as ended:  # what the verb does not take is said now, not in the job
        cli.run_verb([verb, "some/adapter", "--bsae", "x", "launch=slurm"])
    assert ended.value.code == REFUSED


def test_a_queued_job_keeps_its_plan(plan_of, sbatch: Path, tmp_path: Path):
    """The job will read plan.json: typed again with other machine keys, the command must not write it anew."""
    plan = plan_of("trainer.use_cpu=true")
    assert slurm.create_and_submit(plan) == DONE
    before = (plan.run_path / "plan.json").read_text()
    with pytest.raises(KitError, match="is job 41"):
        slurm.create_and_submit(plan_of("trainer.use_cpu=true", "launch.slurm.partition=urgent"))
    assert (plan.run_path / "plan.json").read_text() == before


def test_a_sweep_that_sbatch_refused(sbatch: Path, tmp_path: Path, base: Path, chat: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = [f"model.name_or_path={base}", f"dataset.path={chat}", "launch=slurm", "trainer.use_cpu=true", "-m"]
    works = (sbatch / "sbatch").read_text()
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: no such partition' >&2; exit 1\n")
    assert cli.run_verb(["train", *line, "peft.r=4,8", "launch.slurm.partition=nope"]) == ENVIRONMENT
    (sbatch / "sbatch").write_text(works)
    assert cli.run_verb(["train", *line, "peft.r=4,8", "launch.slurm.partition=good"]) == DONE
    [folder] = tmp_path.glob("runs/*-sweep-*")
    assert "#SBATCH --partition=good" in (folder / "array.sbatch").read_text()
    plans = [json.loads(f.read_text()) for f in folder.glob("*/plan.json")]
    assert [p["launch"]["slurm"]["partition"] for p in plans] == ["good", "good"]
    # nothing is made for a sweep that cannot be an array
    assert cli.run_verb(["train", *line, "launch.slurm.partition=a,b", "runs_dir=other"]) == REFUSED
    assert "share one script" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("env", "state", "said"),
    [
        ({"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "1"}, "RUNNING", "has 1 node, the run was planned for 2"),
        ({"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2"}, "COMPLETED", "that job is completed"),
        ({"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2"}, "RUNNING", "srun ended with 1 before the run began"),
    ],
)
def test_an_allocation_that_does_not_do(env, state, said, plan_of, sbatch: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of("trainer.use_cpu=true", "launch.num_nodes=2")
    for name, value in {**env, "KIT_TEST_STATE": state}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KitError, match=said) as refused:
        slurm.create_and_submit(plan)
    assert refused.value.code == ENVIRONMENT and all(p.where and p.fix for p in refused.value.problems)
    assert run_directory.read_status(plan.run_path).get("state") in (
        None,
        "created",
    )  # the same command does it, elsewhere


def test_a_job_learns_nothing_of_the_one_it_was_submitted_from(sbatch: Path, tmp_path: Path, monkeypatch):
    """srun ends where SLURM_MEM_PER_CPU of an allocation meets the --mem of the job."""
    for name in ("SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "1")
    slurm_client.submit_script(tmp_path / "x.sbatch")
    given = {line.partition("=")[0] for line in (sbatch / "env").read_text().splitlines()}
    assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= given
    assert not given & {"SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_NTASKS"}


def test_what_sbatch_says_of_a_long_array(sbatch: Path, tmp_path: Path):
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Invalid job array specification' >&2; exit 1\n")
    with pytest.raises(KitError) as refused:
        slurm_client.submit_script(tmp_path / "x.sbatch")
    assert "MaxArraySize" in refused.value.problems[0].fix


@pytest.mark.parametrize("argv", [["merge", "runs/nosuch"], ["eval", "./x"], ["generate", "/no/such/run"]])
def test_a_slip_in_a_path_is_said_before_the_queue(argv, sbatch: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert cli.run_verb([*argv, "launch=slurm"]) == REFUSED and f"there is no {argv[1]}" in capsys.readouterr().err
    assert not (sbatch / "argv").exists()


def test_a_verb_once(plan_of, sbatch: Path):
    with pytest.raises(KitError, match="twice"):
        slurm.create_and_submit(plan_of("trainer.use_cpu=true"), then=["merge", "merge"])


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("launch.slurm.modules=cuda/12.4", """'launch.slurm.modules=["cuda/12.4"]'"""),
        ("launch.slurm.account=12345", """launch.slurm.account="'12345'\""""),
        ("launch.slurm.partition=[a,b]", """launch.slurm.partition="'a,b'\""""),
        ("launch.include='a:0,'", "host1@host2"),
    ],
)
def test_a_value_of_another_kind_comes_with_what_would_do(given: str, fix: str, plan_of):
    with pytest.raises(KitError) as refused:
        plan_of("trainer.use_cpu=true", given)
    assert fix in refused.value.problems[0].fix
    with pytest.raises(KitError) as refused:  # one of several kinds: the key is named as it is typed
        plan_of("trainer.use_cpu=true", "launch.num_gpus=two")
    assert all(p.problem.startswith("launch.num_gpus: ") for p in refused.value.problems)
