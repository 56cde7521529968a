"""Sweeps without training: names, freezing, refusing, continuing, stopping. A trial is a process that pretends."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.cli import verbs as cli
from kit.config import multirun, search_space
from kit.errors import DONE, ENVIRONMENT, FAILED, REFUSED, STOPPED, KitError
from kit.storage import run_directory
from kit.sweeps import pool
from kit.sweeps import record as files
from kit.sweeps.pool import MetricsLog, Trial
from kit.system import hardware

# Stands in the place of kit.sweeps.trial: r=8 fails, r=6 waits to be told to stop, all others log and end well.
PRETEND = """
import json, os, signal, sys, time
from pathlib import Path

run = Path(sys.argv[1]).parent
plan = json.loads(Path(sys.argv[1]).read_text())
r, rate = plan["peft"]["r"], plan["trainer"]["learning_rate"]
with open(run.parent / "started", "a") as f:
    f.write(f"{run.name} {os.environ.get('CUDA_VISIBLE_DEVICES')} {len(list(run.parent.glob('*/plan.json')))}\\n")
def leave(state, code, **facts):
    (run / "status.json").write_text(json.dumps({"state": state, **facts}))
    os._exit(code)
if r == 8 and not os.environ.get("KIT_TEST_MENDED"):
    leave("failed", 4, exit_code=4, problems=["it fails on purpose"])
signal.signal(signal.SIGTERM, lambda *_: leave("stopped", 75))
pause = 30 if r == 6 and not os.environ.get("KIT_TEST_MENDED") else float(os.environ.get("KIT_TEST_PAUSE", 0))
for step in (1, 2, 3):
    row = {"step": step, "seconds": step, "loss": 100 * rate + r / step, "num_tokens": 10 * step}
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(row) + "\\n")
    time.sleep(pause)
leave("done", 0)
"""


@pytest.fixture
def sweep(base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`kit train -m` on a tiny base, with pretended trials, in an empty folder."""
    (tmp_path / "pretend.py").write_text(PRETEND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "trial_command", lambda plan: [sys.executable, str(tmp_path / "pretend.py"), str(plan)])
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_length=64", "name=s"]

    def run(*overrides: str) -> int:
        return cli.run_verb(["train", "-m", *stock, *overrides])

    return run


def folder_of(tmp_path: Path) -> Path:
    [found] = (tmp_path / "runs").glob("s-sweep-????????")
    return found


def record(tmp_path: Path) -> dict:
    return json.loads((folder_of(tmp_path) / files.RECORD_FILE).read_text())


def states(tmp_path: Path) -> list[str]:
    return [t["state"] for t in record(tmp_path)["trials"]]


def started(tmp_path: Path) -> list[str]:
    """The names of trials in the order in which they started."""
    return [line.split()[0] for line in (folder_of(tmp_path) / "started").read_text().splitlines()]


# ---- a grid ----


@pytest.mark.launch
def test_a_grid_from_its_command_to_its_files(sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Six trials, two of them refused up front: the others run, each frozen before the first starts."""
    assert sweep("peft.r=2,4,banana", "trainer.learning_rate=1e-3,1e-2") == REFUSED
    shown = capsys.readouterr()
    assert shown.err.index("'banana'") < shown.err.index("trial 000")
    assert "trial 4 (peft.r=banana, trainer.learning_rate=0.001)" in shown.err
    assert states(tmp_path) == ["done"] * 4 + ["refused"] * 2
    folder = folder_of(tmp_path)
    assert started(tmp_path)[1] == "001-r-2--learning_rate-0.01"
    first = (folder / "started").read_text().splitlines()[0]
    assert first.endswith(" 4")  # plans that were there when it started
    plan = json.loads((folder / "001-r-2--learning_rate-0.01" / "plan.json").read_text())
    assert (plan["peft"]["r"], plan["trainer"]["learning_rate"]) == (2, 0.01)
    assert plan["run_dir"] == str(folder / "001-r-2--learning_rate-0.01")
    rows = list(csv.DictReader((folder / files.CSV_FILE).open()))
    assert [row["state"] for row in rows] == states(tmp_path)
    assert rows[3]["peft.r"] == "4" and float(rows[3]["loss"]) == pytest.approx(1 + 4 / 3) and rows[3]["step"] == "3"
    assert record(tmp_path)["best"] == 0 and "best      runs/" in shown.out and "000-r-2" in shown.out
    assert record(tmp_path)["trials"][4]["problems"][0]["rule"] == "kind"
    assert not (tmp_path / "multirun.yaml").exists() and sorted(p.name for p in tmp_path.iterdir())[-1] == "runs"


@pytest.mark.launch
def test_a_failed_trial_stops_no_other_and_is_tried_again(sweep, tmp_path: Path, monkeypatch, capsys):
    """The same command starts what is missing and nothing else."""
    assert sweep("peft.r=8,2,4") == FAILED
    assert states(tmp_path) == ["failed", "done", "done"] and "it fails on purpose" in capsys.readouterr().err
    monkeypatch.setenv("KIT_TEST_MENDED", "1")
    assert sweep("peft.r=8,2,4") == DONE
    assert started(tmp_path) == ["000-r-8", "001-r-2", "002-r-4", "000-r-8"]
    assert sweep("peft.r=8,2,4") == DONE and len(started(tmp_path)) == 4
    assert "3 done, 0 missing" in capsys.readouterr().err


@pytest.mark.launch
def test_what_was_frozen_is_what_runs(sweep, tmp_path: Path, monkeypatch):
    """A plan of a started sweep is read from its directory: composing it again has no say."""
    assert sweep("peft.r=8,2") == FAILED
    path = folder_of(tmp_path) / "000-r-8" / "plan.json"
    frozen = json.loads(path.read_text())
    frozen["trainer"]["learning_rate"] = 0.5
    path.write_text(json.dumps(frozen))
    monkeypatch.setenv("KIT_TEST_MENDED", "1")
    assert sweep("peft.r=8,2") == DONE
    assert record(tmp_path)["trials"][0]["loss"] == pytest.approx(50 + 8 / 3)


@pytest.mark.launch
def test_another_sweep_is_another_directory(sweep, tmp_path: Path, capsys):
    """More steps are more to do; how many run at once is not. --fresh begins again."""
    assert sweep("peft.r=2,4") == DONE
    assert sweep("peft.r=2,4", "hparams_search.parallel=2") == DONE
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert "all of its trials start anew" not in capsys.readouterr().err
    assert sweep("peft.r=2,4", "trainer.max_steps=7") == DONE
    assert "not the sweep of s-sweep-" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert sweep("peft.r=2,4", "--fresh") == DONE
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.launch
@pytest.mark.parametrize("times", [1, 2])
def test_stopped_and_continued(sweep, tmp_path: Path, monkeypatch, times: int):
    """SIGTERM to the sweep: running trials stop, waiting ones do not start, 75; the same command goes on."""
    ask = f"""
import os, signal, sys, time
from pathlib import Path
while not list(Path({str(tmp_path / "runs")!r}).glob("*/001-r-6/metrics.jsonl")):
    time.sleep(0.05)
for _ in range({times}):
    os.kill({os.getpid()}, signal.SIGTERM)
    time.sleep(0.1)
"""
    asking = subprocess.Popen([sys.executable, "-c", ask])
    assert sweep("peft.r=2,6,4") == STOPPED and asking.wait(10) == 0
    assert states(tmp_path) == ["done", "stopped", "waiting"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setenv("KIT_TEST_MENDED", "1")
    assert sweep("peft.r=2,6,4") == DONE
    assert started(tmp_path) == ["000-r-2", "001-r-6", "001-r-6", "002-r-4"]


def test_a_directory_runs_one_sweep(sweep, tmp_path: Path, capsys):
    assert sweep("peft.r=2,4") == DONE
    with run_directory.lock_run_directory(folder_of(tmp_path)):
        code = subprocess.run(
            [sys.executable, "-c", "import sys; from kit.storage import run_directory; from pathlib import Path\n"
             "try:\n  run_directory.lock_run_directory(Path(sys.argv[1])).__enter__()\n"
             "except Exception as e:\n  sys.exit(str(e))",
             str(folder_of(tmp_path))], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
            cwd=Path(__file__).parents[1])  # fmt: skip
    assert "in use by process" in code.stderr


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["peft.r=banana,apple"], ["'banana'", "'apple'"]),
        (["deepspeed=zero8,zero9"], ["no deepspeed named 'zero8'", "no deepspeed named 'zero9'"]),
        (["peft.r=2,4", "hparams_search.metric=eval_loss"], ["does not evaluate"]),
        (["peft.r=2,4", "hparams_search.parallel=0"], ["hparams_search.parallel"]),
        (["peft.r=2,4", "hparams_search.parralel=2"], ["did you mean hparams_search.parallel"]),
        (["peft.r=choice(2"], ["Hydra's override grammar"]),
        (["peft.r=interval(2,4)"], ["a grid cannot try all of an interval", "peft.r=range(START"]),
        (["peft.r=2,4", "hparams_search=null"], ["hparams_search=null names no choice", "known: grid, optuna"]),
        (["peft.r=2,4", "hparams_search=1"], ["hparams_search=1 names no choice"]),
        (["peft.r=2,4", "hparams_search.workers=cold,warm"], ["hparams_search.workers belongs to the whole sweep"]),
        (["peft.r=2,4", "runs_dir=a,b"], ["runs_dir belongs to the whole sweep"]),
        (["+hparams_search.search_space.peft.r=2,4"], ["belongs to the whole sweep", "fix:   peft.r=2,4"]),
        (["peft.r=2,4", "hparams_search.workers=hot"], ["'hot' (the same in trial 1)", "give 'cold' or 'warm'"]),
        (["peft.r=2,4", "hparams_search.parallel=two"], ["hparams_search.parallel: ", "a whole number or 'auto'"]),
        (["peft.r=2,4", "launch=local,slurm"], ["some trials are batch jobs"]),
        (["+hydra.sweeper.params=['peft.r=2']"], ["hydra.sweeper.params must hold key: values"]),
        (["+hydra.sweeper.params={peft.rr: '2,4'}"], ["unknown key peft.rr", "did you mean peft.r?"]),
        (["hparams_search=optuna", "peft.r=interval(0,inf)"], ["the smaller first"]),
        (["hparams_search=optuna", "peft.r=interval(nan,1)"], ["the smaller first"]),
        (["hparams_search=optuna", "hparams_search.seed=-5"], ["hparams_search.seed", "give at least 0"]),
        (["peft.r=2,4", "hparams_search=optuna", "hydra/launcher=basic"], ["a search starts its trials itself"]),
        (["hparams_search=optuna", "+hparams_search.search_space={peft.r: 8}"], ["a search chooses from several"]),
        (["hparams_search=optuna", "peft.r=interval(4,2)"], ["the smaller first"]),
        (["hparams_search=optuna", "peft.r=tag(log,interval(0,2))"], ["numbers above 0"]),
        (["hparams_search=optuna", "hparams_search.pruner.name=nun"], ["hparams_search.pruner.name"]),
    ],
)
def test_refused_as_a_whole(sweep, tmp_path: Path, capsys, overrides: list[str], said: list[str]):
    assert sweep(*overrides) == REFUSED
    shown = capsys.readouterr().err
    assert all(words in shown for words in said) and "Traceback" not in shown, shown
    assert not (tmp_path / "runs").exists()


def test_one_group_that_is_none(sweep, tmp_path: Path, capsys):
    """Hydra's own sweeper would refuse all for the one."""
    assert sweep("trainer.use_cpu=true", "peft=lora,lorra") == REFUSED
    assert states(tmp_path) == ["done", "refused"]
    assert "did you mean peft=lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["peft.r=2,4", "--cfg", "job"], "-m and --cfg exclude each other"),
        (["peft.r=2,4", "--resolve"], "--resolve says how --cfg prints"),
        (["peft.r=2,4", "--follow"], "not for a sweep"),
        (["peft.r=range(1,0)"], "the sweep has no trial"),
        (["peft.r=glob(*)"], "the sweep has no trial"),
        (["trainer.seed=1,2", "launch=torchrun", "launch.num_nodes=2", "trainer.use_cpu=true"], "starts all"),
    ],
)
def test_lines_that_are_no_sweep(sweep, tmp_path: Path, capsys, words: list[str], said: str):
    assert sweep(*words) == REFUSED
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not list(tmp_path.glob("runs/*"))


@pytest.mark.launch
def test_ranges_and_globs(sweep, tmp_path: Path):
    assert sweep("peft.r=range(2,5,2)", "tokenizer=glob(*)", "hydra/sweeper=basic", "trainer.max_steps=1",
                 "hparams_search.parallel=6") == DONE  # fmt: skip
    values = [t["values"] for t in record(tmp_path)["trials"]]
    assert [v["peft.r"] for v in values] == ["2", "2", "4", "4"]
    assert {v["tokenizer"] for v in values} == {"chatml", "default"}


@pytest.mark.launch
def test_the_command_line_stands_above_a_file(sweep, tmp_path: Path):
    """hydra.sweeper.params of a file: a key that is typed as well is what was typed, once; keys may be new."""
    (tmp_path / "run.yaml").write_text(
        "hydra: {sweeper: {params: {peft.r: '2,4', peft.use_dora: 'true,false', trainer.seed: '1,2'}}}\n"
    )
    assert sweep("run.yaml", "peft.r=3,5", "trainer.seed=7") == DONE
    values = [t["values"] for t in record(tmp_path)["trials"]]
    assert [(v["peft.use_dora"], v["peft.r"]) for v in values] == [
        ("True", "3"), ("True", "5"), ("False", "3"), ("False", "5")
    ]  # fmt: skip


def test_lists_in_the_table(sweep, tmp_path: Path, capsys):
    """Brackets are no markup."""
    assert sweep("peft.target_modules=[q_proj],[/x,v_proj]") == REFUSED
    table = capsys.readouterr().out
    assert "[q_proj]" in table and "[/x,v_proj]" in table


@pytest.mark.launch
def test_what_is_lost_of_a_sweep(sweep, tmp_path: Path, capsys):
    """A trial whose directory is gone starts anew; a record that is gone costs no trial that is done."""
    assert sweep("peft.r=2,3,4") == DONE
    folder = folder_of(tmp_path)
    shutil.rmtree(folder / "001-r-3")
    shutil.rmtree(folder / "002-r-4" / "logs")
    (folder / "002-r-4" / "status.json").write_text("[]")
    assert sweep("peft.r=2,3,4") == DONE and started(tmp_path)[3:] == ["001-r-3", "002-r-4"]
    (folder / "sweep.json").write_text("{")
    (folder / "000-r-2" / "plan.json").write_text("{")
    assert sweep("peft.r=2,3,4") == REFUSED
    shown = capsys.readouterr().err
    assert "record cannot be read" in shown and "rm " in shown and "Traceback" not in shown
    (folder / "sweep.json").unlink()
    assert sweep("peft.r=2,3,4") == DONE and started(tmp_path)[5:] == ["000-r-2"]
    (folder / "000-r-2" / "plan.json").write_text("{")
    assert sweep("peft.r=2,3,4") == REFUSED
    shown = capsys.readouterr().err
    assert "000-r-2/plan.json is not a plan" in shown and "fix:   rm -r runs/" in shown


def test_a_disk_that_takes_nothing(sweep, tmp_path: Path, monkeypatch, capsys):
    """Not a matter of the override grammar."""

    def full(folder, *rest):
        raise OSError(28, "No space left on device", str(folder / "sweep.json"))

    monkeypatch.setattr(files, "write_record", full)
    assert sweep("peft.r=2,4") == ENVIRONMENT
    shown = capsys.readouterr().err
    assert "sweep.json: No space left on device" in shown and "grammar" not in shown


@pytest.mark.launch
def test_a_trial_too_large_for_its_gpu_is_left_out(sweep, tmp_path: Path, monkeypatch, capsys):
    """By the forecast, before anything starts."""
    monkeypatch.setattr(hardware, "list_gpus", lambda: (hardware.Gpu("Small GPU", 0.75, (9, 0)),))
    stock = ("trainer.bf16=true", "trainer.activation_checkpointing=false", "trainer.logging_steps=1")
    assert sweep("trainer.per_device_train_batch_size=1,4096", *stock) == REFUSED
    assert states(tmp_path) == ["done", "refused"]
    assert "1 of 2 trials refused" in (shown := capsys.readouterr().err) and "Small GPU has 0.8" in shown


@pytest.mark.launch
def test_the_devices_of_a_trial(sweep, tmp_path: Path, monkeypatch, capsys):
    """Two at a time on two GPUs, each with its own; more than there are is refused."""
    gpu = hardware.Gpu("H100", 80.0, (9, 0))
    monkeypatch.setattr(hardware, "list_gpus", lambda: (gpu, gpu))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("KIT_TEST_PAUSE", "0.3")
    assert sweep("peft.r=2,4,3", "trainer.bf16=true") == DONE
    lines = (folder_of(tmp_path) / "started").read_text().splitlines()
    assert {line.split()[1] for line in lines[:2]} == {"4", "7"} and lines[2].split()[1] in "47"
    assert sweep("peft.r=2,4", "trainer.bf16=true", "hparams_search.gpus_per_trial=3") == REFUSED
    assert sweep("peft.r=2,4", "hparams_search.gpus_per_trial=2", "launch.num_gpus=1") == REFUSED
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.launch
def test_stock_launcher_in_process(sweep, tmp_path: Path, monkeypatch, capsys):
    """Under hydra/launcher=basic each point is a run of its own; every point is tried, the worst code is returned."""
    from kit import api

    ran = []

    def train(plan, fresh):
        ran.append(plan.peft["r"])
        if plan.peft["r"] == 4:
            raise KitError("it fails on purpose", code=FAILED)
        return DONE

    monkeypatch.setattr(api, "train", train)
    for sweeper in ([], ["hydra/sweeper=basic"]):
        ran.clear()
        assert sweep("peft.r=2,4,banana,6", "hydra/launcher=basic", *sweeper) == FAILED
        assert ran == [2, 4, 6] and "'banana'" in capsys.readouterr().err


@pytest.mark.launch
def test_what_a_stock_launcher_takes_to_another_process(base: Path, chat: Path, tmp_path: Path):
    """joblib and submitit pickle the task, the context and Hydra's register: all of it must open elsewhere."""
    code = """
import sys, cloudpickle
from functools import partial
from hydra.core.singleton import Singleton
from hydra._internal.core_plugins import basic_launcher
from kit.config import multirun
from kit.sweeps import grid as sweep

def launch(self, jobs, initial_job_idx):
    parts = (self.hydra_context, self.config, self.task_function, list(jobs[1]), Singleton.get_state())
    open("task.pkl", "wb").write(cloudpickle.dumps(parts))
    return []
from hydra.core.plugins import Plugins
Plugins.instance()
sys.modules["hydra._internal.core_plugins.basic_launcher"].BasicLauncher.launch = launch
tasks = (sweep.train_point, sweep.run_grid, sweep.run_search)
job = multirun.MultirunJob(*(partial(task, False) for task in tasks))
multirun.run_multirun(["-m", "hydra/launcher=basic", *sys.argv[1:]], job)
"""
    other = """
import pickle
from hydra.core.singleton import Singleton
from hydra.core.utils import run_job, setup_globals
from kit import api
context, config, task, overrides, state = pickle.load(open("task.pkl", "rb"))
setup_globals()
Singleton.set_state(state)
api.train = lambda plan, fresh: print("peft.r is", plan.peft["r"]) or 0
job = context.config_loader.load_sweep_config(config, overrides)
run_job(hydra_context=context, task_function=task, config=job, job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir").return_value
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    args = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.max_length=64", "peft.r=2,4"]
    for argv in ([code, *args], [other]):
        done = subprocess.run([sys.executable, "-c", *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "peft.r is 4" in done.stdout


# ---- a search ----

# Without a pruner: which trial it stops hangs on which others were told of by then.
SEARCH = ["hparams_search=optuna", "hparams_search.sampler=random", "hparams_search.pruner.name=none",
          "trainer.learning_rate=tag(log,interval(1e-4,1))"]  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_search_fills_up_and_goes_on(sweep, tmp_path: Path, storage: str):
    """n_trials in all; more of them later continue the same study with other values."""
    more = [*SEARCH, "peft.r=choice(2,4)", f"hparams_search.storage={storage}", "hparams_search.parallel=2"]
    assert sweep(*more, "hparams_search.n_trials=3") == DONE
    assert sweep(*more, "hparams_search.n_trials=5") == DONE
    found = record(tmp_path)["trials"]
    assert [t["state"] for t in found] == ["done"] * 5
    assert len({t["values"]["trainer.learning_rate"] for t in found}) == 5
    assert {t["values"]["peft.r"] for t in found} <= {"2", "4"}
    for t in found:
        plan = json.loads((folder_of(tmp_path) / t["run"] / "plan.json").read_text())
        assert plan["trainer"]["learning_rate"] == t["values"]["trainer.learning_rate"]
    assert record(tmp_path)["best"] == min(found, key=lambda t: t["metric"])["number"]


@pytest.mark.launch
def test_a_search_composes_from_its_copy(sweep, tmp_path: Path, monkeypatch):
    """A recipe of one's own that is edited while the search runs changes nothing, whatever it is edited to."""
    recipe = tmp_path / "own" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\npeft:\n  lora_alpha: 8\n")
    edit = f"open({str(recipe)!r}, 'w').write('peft: [')\n"
    (tmp_path / "pretend.py").write_text(edit + PRETEND)
    assert sweep(*SEARCH, "peft.r=choice(2,4)", "--config-dir", str(tmp_path / "own"), "recipe=mine",
                 "hparams_search.n_trials=3") == DONE  # fmt: skip
    plans = [json.loads(p.read_text()) for p in folder_of(tmp_path).glob("*/plan.json")]
    assert [p["peft"]["lora_alpha"] for p in plans] == [8, 8, 8] and recipe.read_text() == "peft: ["


@pytest.mark.launch
def test_a_search_with_refused_failed_and_silent_trials(sweep, tmp_path: Path, capsys):
    """Each counts as one of n_trials and is told to optuna; the search goes on."""
    import optuna

    assert (
        sweep(*SEARCH[:3], "peft.r=choice(2,8,banana)", "hparams_search.seed=1", "hparams_search.n_trials=8") == FAILED
    )
    assert set(states(tmp_path)) == {"done", "failed", "refused"}
    folder = folder_of(tmp_path)
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")
    names = {"COMPLETE": "done", "FAIL": "other"}
    assert [names[t.state.name] for t in study.trials] == [s if s == "done" else "other" for s in states(tmp_path)]
    assert "'banana'" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert (
        sweep(*SEARCH[:3], "peft.r=choice(2,4)", "hparams_search.metric=rouge", "hparams_search.n_trials=1") == FAILED
    )
    assert "never logged rouge; it logged loss" in capsys.readouterr().err
    silent = [*SEARCH[:3], "peft.r=choice(2,4)", "hparams_search.metric=rouge", "hparams_search.n_trials=5"]
    assert sweep(*silent) == FAILED and states(tmp_path) == ["failed"]  # four more would be no better
    assert sweep(*silent) == FAILED and states(tmp_path) == ["failed"]


@pytest.mark.launch
def test_a_bad_trial_is_pruned(sweep, tmp_path: Path, monkeypatch):
    """SIGTERM once its loss is worse than the others' at the same step; it counts as done with."""
    monkeypatch.setenv("KIT_TEST_PAUSE", "1.5")
    space = "trainer.learning_rate=choice(1e-3,1)"
    args = [*SEARCH[:3], space, "peft.r=2", "hparams_search.seed=6", "hparams_search.n_trials=4",
            "hparams_search.parallel=2", "hparams_search.pruner.name=median",
            "hparams_search.pruner.n_startup_trials=1"]  # fmt: skip
    assert sweep(*args) == DONE
    found = {t["values"]["trainer.learning_rate"]: t["state"] for t in record(tmp_path)["trials"]}
    assert found == {"0.001": "done", "1": "pruned"}
    assert sweep(*args) == DONE and len(started(tmp_path)) == 4  # nothing is missing


@pytest.mark.launch
def test_a_search_that_was_killed(sweep, tmp_path: Path):
    """A trial that was frozen and never ended goes on under its own number; one that never was frozen is given up."""
    import optuna

    args = [*SEARCH, "peft.r=2", "hparams_search.n_trials=3"]
    assert sweep(*args, "hparams_search.n_trials=2") == DONE
    folder = folder_of(tmp_path)
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")
    study.ask()  # a process that dies here leaves it open
    assert sweep(*args) == DONE
    assert [t["number"] for t in record(tmp_path)["trials"]] == [0, 1, 3]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.launch
def test_a_search_whose_files_are_not_what_they_were(sweep, tmp_path: Path, capsys):
    """No number is given twice, and a trial that ended untold is told."""
    import optuna

    args = [*SEARCH, "peft.r=2"]
    assert sweep(*args, "hparams_search.n_trials=2") == DONE
    folder = folder_of(tmp_path)
    name, db = folder.name, folder / "study.db"
    assert sweep(*args, "hparams_search.n_trials=3", "hparams_search.storage=journal") == REFUSED
    assert "hparams_search.storage as it was" in capsys.readouterr().err
    (folder / "study.log").unlink()
    db.unlink()
    study = optuna.create_study(study_name=name, storage=f"sqlite:///{db}")
    study.ask(), study.ask()
    shutil.rmtree(folder / json.loads((folder / files.RECORD_FILE).read_text())["trials"][1]["run"])
    assert sweep(*args, "hparams_search.n_trials=3") == FAILED
    assert "its directory is gone" in capsys.readouterr().err
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    db.write_text("not a database")
    assert sweep(*args, "hparams_search.n_trials=3") == REFUSED
    assert "the study cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, want",
    [
        ("choice(8,16)", {"choices": ["8", "16"]}),
        ("8,16", {"choices": ["8", "16"]}),
        ("choice([q_proj,v_proj],all-linear)", {"choices": ["[q_proj,v_proj]", "all-linear"]}),
        ("range(8,65,8)", {"low": 8, "high": 64, "step": 8, "whole": True}),
        ("range(0,1,0.25)", {"low": 0, "high": 0.75, "step": 0.25}),
        ("interval(0,1)", {"low": 0, "high": 1}),
        ("int(interval(4,64))", {"low": 4, "high": 64, "whole": True}),
        ("tag(log, interval(1e-5,1e-3))", {"low": 1e-5, "high": 1e-3, "log": True}),
        ("int(tag(log,interval(4,64)))", {"low": 4, "high": 64, "log": True, "whole": True}),
    ],
)
def test_the_grammar_of_a_search(text: str, want: dict):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [override] = OverridesParser.create().parse_overrides([f"a.b={text}"])
    assert search_space.to_dimension(override) == search_space.Dimension(**want)


# ---- names and files ----


@pytest.mark.parametrize(
    "values, name",
    [
        ({"peft.r": "8", "trainer.learning_rate": "1e-4"}, "007-r-8--learning_rate-1e-4"),
        ({"dataset.seed": "1", "trainer.seed": "2"}, "007-dataset.seed-1--trainer.seed-2"),
        ({"peft.target_modules": "[q_proj,v_proj]"}, "007-target_modules-_q_proj_v_proj"),
        ({"model.name_or_path": "../../a b/$(rm)\n"}, "007-name_or_path-.._.._a_b_rm"),
        ({"x": "ü" * 5}, "007-x"),
        ({}, "007"),
        ({"dataset.path": "y" * 300}, "007-path-" + "y" * 71),
    ],
)
def test_names(values: dict, name: str):
    """Nothing that a shell, a path or an override would read in its own way, and no more than a file name holds."""
    assert files.trial_directory_name(7, values) == name


def test_what_tells_jobs_apart():
    jobs = [["++a=1", "b=x", "c=1"], ["++a=2", "b=x", "c=1"]]
    assert multirun.swept_keys(jobs, ["++a=1,2", "b=x", "c=1"]) == ["a"]
    assert multirun.swept_keys([["++a=1", "b=x"]], ["++a=choice(1)", "b=x"]) == ["a"]


def test_a_curve_reads_what_is_whole(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    curve = MetricsLog(path)
    assert curve.read() == []
    path.write_text('{"step": 1, "loss": 3}\nnoise\n{"step": 2, "lo')
    assert curve.read() == [{"step": 1, "loss": 3}]
    with path.open("a") as f:
        f.write('ss": 2}\n{"step": 1, "loss": 1}\n')
    assert len(curve.read()) == 2 and curve.last("loss") == 1


def finished(tmp_path: Path, count: int, state: str = "done") -> list[Trial]:
    found = []
    for i in range(count):
        trial = Trial(i, tmp_path / f"{i:03d}", {"peft.target_modules": f"<{i}&>"}, state)
        trial.curve.rows = [{"step": s, "loss": 5.0 - i / (s + 1)} for s in range(4)]
        found.append(trial)
    return found


def test_what_is_no_number(tmp_path: Path):
    """A loss that is nan is never the best, and is null in sweep.json."""
    odd = finished(tmp_path, 4)
    for trial, loss in zip(odd, (math.nan, math.inf, "x", 2.0), strict=True):
        trial.curve.rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": loss}]
    for direction in ("minimize", "maximize"):
        assert files.best_trial(odd[:2] + odd[3:], "loss", direction).number == 3
    files.write_record(tmp_path, odd, {"metric": "loss", "direction": "minimize"})
    found = json.loads((tmp_path / files.RECORD_FILE).read_text(), parse_constant=pytest.fail)
    assert [t["metric"] for t in found["trials"]] == [None, None, 3.0, 2.0]


def test_the_best_of_equals_is_the_first(tmp_path: Path):
    found = finished(tmp_path, 3)
    assert (
        files.best_trial(found, "loss", "minimize").number == 2
        and files.best_trial(found, "loss", "maximize").number == 0
    )
    assert files.best_trial(found, "eval_loss", "minimize") is None
    assert files.best_trial(finished(tmp_path, 3, "failed"), "loss", "minimize") is None
