"""`tracking=...`: what is refused, where each tracker writes, and one run with all four, watched for connections."""

from __future__ import annotations

import json
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kit import api
from kit.config.rules import tracking
from kit.errors import REFUSED, KitError
from kit.launchers.command import rank_environment
from kit.schema import trackers
from launch import harness

OURS = ["tensorboard", "wandb", "mlflow", "trackio"]
LOSS = {"tensorboard": "train/loss", "wandb": "train/loss", "mlflow": "loss", "trackio": "train/loss"}


@pytest.fixture
def compose(base, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI", "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    stock = [f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.use_cpu=true"]
    return lambda *more, here=False: api.compose(*stock, *more, here=here)


def test_each_choice_writes_below_the_run_directory(compose):
    for name in OURS:
        plan = compose(f"tracking={name}")
        assert trackers.tracker_names(plan.trainer["report_to"]) == [name]
        env = rank_environment(plan)
        assert any(plan.run_dir in value for key, value in env.items() if key.startswith(name.upper())), env
        others = [n.upper() + "_" for n in OURS if n != name]
        set_for_others = {k for k in env if k.startswith(tuple(others))} - {
            "MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING",
        }  # fmt: skip
        assert not set_for_others
    assert rank_environment(compose("tracking=wandb"))["WANDB_MODE"] == "offline"
    assert "WANDB_MODE" not in rank_environment(compose())


def test_the_users_environment_wins(compose, monkeypatch):
    """And nothing of it is copied to where launch.json would keep it."""
    theirs = {
        "WANDB_MODE": "online",
        "MLFLOW_TRACKING_URI": "https://me:secret@tracking.example",
        "WANDB_API_KEY": "k",
    }
    for key, value in theirs.items():
        monkeypatch.setenv(key, value)
    env = rank_environment(compose("trainer.report_to=[wandb,mlflow]"))
    assert not theirs.keys() & env.keys() and {"WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"} <= env.keys()


def test_reporting_is_not_what_a_run_is(compose):
    """Another tracker, run or project name is the same run: its hash stays, `kit resume` may change it."""
    assert compose().hash == compose("tracking=wandb", "trainer.run_name=x", "trainer.project=y").hash


def test_refused_at_check(compose, monkeypatch):
    for line, *words in [
        ("trainer.report_to=all", "whatever happens to be installed", "tracking=tensorboard"),
        ("trainer.report_to=[tensorbord]", "tensorbord", "tensorboard"),
        ("tracking=wanb", "did you mean tracking=wandb"),
    ]:
        with pytest.raises(KitError) as refused:
            compose(line)
        assert refused.value.code == REFUSED and all(word in str(refused.value) for word in words), refused.value
    assert any(
        "comet_ml sends what its own settings say" in w["problem"]
        for w in compose("tracking.report_to=comet_ml").warnings
    )
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    compose("trainer.report_to=[wandb,trackio]")  # for another machine
    with pytest.raises(KitError) as refused:
        compose("trainer.report_to=[wandb,trackio]", here=True)
    assert [p.fix.split(",")[0] for p in refused.value.problems] == [
        "pip install 'finetune-kit[wandb]'", "pip install 'finetune-kit[trackio]'",
    ]  # fmt: skip


def test_the_names_are_transformers_own():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert trackers.KNOWN.keys() == INTEGRATION_TO_CALLBACK.keys()


@pytest.fixture(scope="module")
def tracked(base, chat, tmp_path_factory) -> tuple[Path, Path]:
    """A run with all four, and the file that notes attempts to reach another machine."""
    work = tmp_path_factory.mktemp("tracked")
    more = ["launch=local", "trainer.max_steps=3", f"trainer.report_to=[{','.join(OURS)}]", "name=tracked"]
    more += ["trainer.eval_strategy=no", "trainer.load_best_model_at_end=false"]
    env = harness.watched(work / "connections.txt")
    done = harness.kit("train", *harness.overrides(base, chat, work / "runs", *more), cwd=work, **env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / "runs"), work / "connections.txt"


def tensorboard(run: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(name)]


def wandb(run: Path, name: str) -> list[float]:
    """Records of protobuf in LevelDB's log format, all in one block here."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = run.glob("wandb/offline-run-*/*.wandb")
    data, found, at = file.read_bytes(), [], 7
    assert len(data) < 32768
    while at + 7 <= len(data):
        _, length, _ = struct.unpack_from("<IHB", data, at)
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        found += [float(items[name])] if name in items else []
    return found


def mlflow(run: Path, name: str) -> list[float]:
    query = "select value from metrics where key = ? order by step, timestamp"
    with sqlite3.connect(run / "mlflow.db") as db:
        assert db.execute("select count(*), min(name), min(status) from runs").fetchone() == (1, run.name, "FINISHED")
        return [value for (value,) in db.execute(query, (name,))]


def trackio(run: Path, name: str) -> list[float]:
    with sqlite3.connect(run / "trackio" / "tracked.db") as db:
        rows = [json.loads(m) for (m,) in db.execute("select metrics from metrics order by id")]
        assert {r for (r,) in db.execute("select run_name from metrics")} == {run.name}
    return [row[name] for row in rows if name in row]


@pytest.mark.launch
@pytest.mark.parametrize("tracker", [tensorboard, wandb, mlflow, trackio], ids=lambda t: t.__name__)
def test_the_losses_are_those_of_metrics_jsonl(tracked, tracker):
    """Those of training, and that of the last evaluation, after which trackers that buffer must have been closed."""
    run, _ = tracked
    name = LOSS[tracker.__name__]
    expected = list(harness.rows(run).values())
    assert len(expected) == 3
    assert tracker(run, name) == pytest.approx(expected, rel=1e-6)
    held_out = name.replace("train/", "eval/") if "/" in name else "eval_loss"
    assert tracker(run, held_out) == pytest.approx(list(harness.rows(run, "eval_loss").values()), rel=1e-6)


@pytest.mark.launch
def test_the_run_reached_no_other_machine(tracked):
    run, attempts = tracked
    assert not attempts.exists(), attempts.read_text()
    assert not [f.name for f in run.parent.parent.iterdir() if f.name != "runs"]  # all that was written is inside


def test_the_watch_sees_what_telemetry_would_do(tmp_path):
    """The same report that TRL sends, with the kit's switches and without."""
    send = "import time; from huggingface_hub.utils import send_telemetry; send_telemetry('trl/x'); time.sleep(1)"
    for name, code in {
        "off": f"from kit.storage.hub_cache import disable_telemetry; disable_telemetry(); {send}",
        "on": send,
    }.items():
        env = harness.environment(**harness.watched(tmp_path / name))
        subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, timeout=60)
    assert not (tmp_path / "off").exists()
    assert "huggingface.co" in (tmp_path / "on").read_text()
