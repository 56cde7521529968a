"""`kit doctor RUN` over run directories whose logs hold what the libraries write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.cli import verbs as cli
from kit.doctor import causes, oom, run_logs
from kit.doctor.run import diagnose
from kit.errors import DONE, FAILED, REFUSED, STOPPED
from kit.launchers.supervise import newest_checkpoint_name
from kit.storage import manifest, run_directory

sys.path.insert(0, str(Path(__file__).parent))
import messages  # noqa: E402

PLAN = {
    "world_size": 2,
    "trainer": {"per_device_train_batch_size": 4, "max_length": 2048, "gradient_checkpointing": False},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}


class Run:
    """A run directory that is written piece by piece."""

    def __init__(self, path: Path, state: str = "failed", plan: dict | None = None, **status) -> None:
        self.path = path
        (path / "logs").mkdir(parents=True)
        (path / "checkpoints").mkdir()
        (path / "plan.json").write_text(json.dumps(PLAN if plan is None else plan))
        run_directory.set_status(path, state, **status)

    def rank(
        self, number: int, text: str = "", problem: str = "", fix: str = "", age: float = 0.0, code: int = 4
    ) -> None:
        """age: seconds since this rank wrote last; problem: what it reported before it ended."""
        log, report = (self.path / "logs" / f"rank{number}.{kind}" for kind in ("log", "error.json"))
        with open(log, "a") as f:
            f.write(f"--- plan abcd1234 rank {number} 2026-01-01T00:00:00+0000\n{text}")
        if problem:
            where = str(log)
            report.write_text(
                json.dumps({"code": code, "problems": [{"problem": problem, "where": where, "fix": fix}]})
            )
            os.utime(report, (time.time() - age,) * 2)
        os.utime(log, (time.time() - age,) * 2)

    def checkpoint(self, step: int) -> Path:
        folder = self.path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.bin").write_bytes(b"state")
        manifest.write_manifest(folder, kind="checkpoint", step=step)
        return folder

    def ended(self, **facts) -> None:
        (self.path / "launch.json").write_text(json.dumps({"argv": [], "ended": facts}))


@pytest.fixture
def make(tmp_path):
    def made(state: str = "failed", plan: dict | None = None, **status) -> Run:
        return Run(tmp_path / "runs" / "x", state, plan, **status)

    return made


@pytest.mark.parametrize(("cause", "text"), messages.MESSAGES, ids=[f"{c}-{t[:24]}" for c, t in messages.MESSAGES])
def test_each_message_has_its_cause(cause, text, make):
    """As an exception with its traceback, the way the worker reports it."""
    run = make()
    run.rank(0, "step 1/9  loss 2.0\n" + messages.trace(text, messages.RUN), problem=f"rank 0: {text}")
    found = diagnose(run.path)
    assert (found.state, found.cause, found.rank, found.code) == ("failed", cause, 0, FAILED)
    assert found.fixes and all(found.fixes) and "{" not in "".join(found.fixes).replace("{use_reentrant: true}", "")
    assert found.sentence and "{" not in found.sentence
    assert str(found.where).startswith(run_directory.path_from_here(run.path))


def test_the_table_is_covered_and_has_no_doubles():
    ids = [cause.id for cause in causes.CAUSES]
    assert len(set(ids)) == len(ids)
    in_other_tests = {"illegal_instruction", "crash"}  # native: no exception carries them
    assert {cause for cause, _ in messages.MESSAGES} == set(ids) - in_other_tests


@pytest.mark.parametrize("where", messages.STAGES)
def test_out_of_memory_says_where(where, make):
    error = messages.OOM.format(reserved="12.00")
    run = make()
    run.rank(0, problem="rank 0: RuntimeError: Connection closed by peer", age=1)
    run.rank(1, messages.trace(error, *messages.STAGES[where]), problem=f"rank 1: {error}", age=2)
    found = diagnose(run.path)
    assert (found.cause, found.rank) == ("cuda_oom", 1)
    assert f"rank 1's GPU is full, in {where}" in found.sentence
    assert "rank 0 fell after it" in found.others[0]


def test_levers_follow_the_plan():
    """What the plan does already is not advised again, and the cheapest comes first."""
    error = messages.OOM.format(reserved="12.00")
    first = oom.memory_levers("the forward pass", PLAN, error)
    assert first[0].startswith("trainer.per_device_train_batch_size=2")
    assert first[1] == "trainer.gradient_checkpointing=true" and "deepspeed=zero3" in first
    assert any("expandable_segments" in lever for lever in first)
    small = messages.OOM.format(reserved="0.10")
    tight = {"world_size": 2, "trainer": {"per_device_train_batch_size": 1, "gradient_checkpointing": True}}
    tight |= {
        "deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        "quantization": {"a": 1},
    }
    assert oom.memory_levers("the forward pass", tight, small) == [
        "a GPU with more memory, or more GPUs with deepspeed=zero3"
    ]
    crowded = small.replace("this process has 77.80 GiB", "this process has 10.00 GiB")
    assert "other processes" in oom.memory_levers("loading the model", PLAN, crowded)[0]
    assert "other processes" not in oom.memory_levers("loading the model", PLAN, small)[0]
    assert oom.memory_levers("the backward pass", {}, error)  # no plan to read: still advice


def test_the_earliest_rank_counts_not_the_one_that_fell_after_it(make):
    run = make()
    run.rank(0, messages.trace(messages.PEER), problem=f"rank 0: {messages.PEER}", age=60)  # its clock says earlier
    run.rank(1, messages.WATCHDOG.format(rank=1, enqueued=1582), age=5)
    run.rank(2, problem="rank 2: OSError: [Errno 28] No space left on device", age=30)
    run.rank(3, problem="rank 3: ValueError: something of its own", age=10)
    found = diagnose(run.path)
    assert (found.cause, found.rank) == ("disk_full", 2)
    assert [line[:18] for line in found.others] == ["rank 0 fell after ", "rank 1 waited for ", "rank 3 failed too:"]


def test_a_rank_that_ended_without_a_word(make):
    run = make("failed")
    run.rank(0, problem=f"rank 0: {messages.PEER}")
    run.rank(1, "step 3/9  loss 2.0\n", age=5)
    found = diagnose(run.path)
    assert (found.cause, found.rank) == ("killed", 1) and "without a word" in found.sentence
    assert found.last_lines == ["step 3/9  loss 2.0"] and "rank 0 fell after it" in found.others[0]
    run.ended(returncode=247, oom_kills=0, deaths={"1": 5.0})
    assert "SIGKILL" in diagnose(run.path).sentence
    run.ended(returncode=247, oom_kills=2, deaths={"1": 5.0})
    found = diagnose(run.path)
    assert found.cause == "host_oom_kill" and "the kernel killed rank 1 for want of host memory" in found.sentence
    for number, cause in ((4, "illegal_instruction"), (11, "crash")):
        run.ended(returncode=256 - number, oom_kills=0)
        assert diagnose(run.path).cause == cause


def test_who_was_gone_first_was_seen_by_the_launcher(make):
    """A launcher ends the others at once: the logs' times say nothing, the times of death do."""
    run = make()
    for number, age in ((0, 9), (1, 1), (2, 5)):
        run.rank(number, "ready\n", age=age)
    run.ended(returncode=-9, oom_kills=0, deaths={"0": 30.0, "1": 10.0, "2": 30.0})
    assert diagnose(run.path).rank == 1


@pytest.mark.parametrize(
    "words", ["Fatal Python error: Segmentation fault\n", "CUDA error: uncorrectable ECC error\n"]
)
def test_native_words_at_the_end_of_a_log(words, make):
    run = make()
    run.rank(0, problem=f"rank 0: {messages.PEER}")
    run.rank(1, f"ready\n{words}", age=5)
    found = diagnose(run.path)
    assert (found.cause, found.rank) == ("crash" if "Segmentation" in words else "gpu_fault", 1)
    assert found.said == words.strip()


def test_who_hung(make):
    """The one that waited for nobody; else who enqueued least; else who wrote last longest ago."""
    run = make()
    for number in (0, 2):
        run.rank(number, messages.WATCHDOG.format(rank=number, enqueued=1582), age=number)
    run.rank(1, "step 7/9  loss 2.0\nevaluating\n", age=1800)
    found = diagnose(run.path)
    assert (found.cause, found.rank, found.last_lines[-1]) == ("hang", 1, "evaluating")
    assert "Watchdog caught" in found.said and "30 minutes ago" in found.sentence
    run.rank(1, messages.WATCHDOG.format(rank=1, enqueued=1580))
    found = diagnose(run.path)
    assert (found.cause, found.rank) == ("hang", 1) and "rank(s) 0, 2 waited" in found.sentence


def test_gloo_timeouts_are_a_hang_too(make):
    run = make()
    run.rank(0, messages.trace(messages.GLOO), problem=f"rank 0: {messages.GLOO}")
    run.rank(1, "step 7/9\n", age=1900)
    assert (diagnose(run.path).cause, diagnose(run.path).rank) == ("hang", 1)


def test_words_about_a_rank_that_left_none(make):
    """raise_together: the others quote the one that failed, whose own report is gone."""
    run = make()
    run.rank(0, problem="rank 1 failed: step 6 could not be saved: [Errno 28] No space left on device")
    found = diagnose(run.path)
    assert (found.cause, found.rank) == ("disk_full", 1)


def test_a_refusal_of_the_kit_keeps_its_own_fix(make):
    run = make()
    refusal = "the end token is not in the vocabulary"
    run.rank(
        0, messages.trace(f"kit.errors.KitError: {refusal}"), problem=refusal, fix="tokenizer.eos_token=X", code=2
    )
    found = diagnose(run.path)
    assert (found.cause, found.sentence, found.fixes) == ("refused", refusal, ["tokenizer.eos_token=X"])
    assert found.code == REFUSED


def test_an_unknown_cause_is_said_to_be_unknown(make, capsys, monkeypatch):
    run = make()
    text = messages.trace("ZeroDivisionError: division by zero", ("my_script.py", "reward", "return 1 / 0"))
    run.rank(
        0,
        "step 1/9\n" + text,
        problem="rank 0: ZeroDivisionError: division by zero",
        fix="the log holds the traceback",
    )
    monkeypatch.chdir(run.path.parent.parent)
    assert cli.run_verb(["doctor", "x"]) == FAILED
    out = capsys.readouterr().out
    assert "the cause is not known; rank 0 failed first" in out and "ZeroDivisionError: division by zero" in out
    assert "return 1 / 0" in out and "fix" not in out


def test_only_the_last_start_counts(make):
    """A resumed run appends to its logs; an error that was caught is none."""
    run = make()
    run.rank(0, messages.trace("OSError: [Errno 28] No space left on device"))
    run.rank(0, "ready\n", problem="rank 0: ModuleNotFoundError: No module named 'einops'")
    found = diagnose(run.path)
    assert found.cause == "missing_package" and found.fixes[0].startswith("pip install einops")
    caught = run_logs.read_ranks(run.path)[0]
    assert caught.trace == ""


def test_a_caught_error_is_no_cause(make):
    run = make()
    run.rank(0, messages.trace("OSError: [Errno 28] No space left on device") + "step 2/9  loss 2\nstep 3/9  loss 2\n")
    assert diagnose(run.path).cause == "killed"


def test_rows_before_a_loss_that_is_not_finite(make):
    run = make()
    run.rank(0, problem="loss is nan at step 6: training stopped, nothing of it is saved", fix="lower learning_rate")
    note = {
        "first_step": 5,
        "last_step": 6,
        "count": 4,
        "of": 96,
        "rows": [7, 1, 40, 3],
        "texts": {"40": "<|user|> pain"},
    }
    (run.path / "logs" / "nonfinite.json").write_text(json.dumps(note))
    found = diagnose(run.path)
    assert found.cause == "non_finite" and "by step 6" in found.sentence
    assert (
        found.others[0] == "steps 5 to 6 read 4 of the 96 prepared rows: 7, 1, 40, 3" and "row 40" in found.others[1]
    )


def test_a_damaged_checkpoint_is_passed_over_as_by_resume(make, capsys):
    run = make("failed")
    run.checkpoint(4)
    (run.checkpoint(8) / "optimizer.bin").write_bytes(b"stat\x00")
    assert diagnose(run.path).checkpoint == newest_checkpoint_name(run.path) == "checkpoint-4"
    assert "checkpoint-8 was passed over" in capsys.readouterr().err


def test_states_without_a_failure(make, capsys, monkeypatch):
    run = make("done", step=40)
    assert (diagnose(run.path).state, diagnose(run.path).code) == ("done", DONE)
    run_directory.set_status(run.path, "stopped", step=12)
    run.checkpoint(12)
    found = diagnose(run.path)
    assert (found.state, found.code, found.checkpoint) == ("stopped", STOPPED, "checkpoint-12")
    run_directory.set_status(run.path, "created")
    assert diagnose(run.path).cause == "not_started"
    monkeypatch.chdir(run.path.parent.parent)
    assert cli.run_verb(["doctor", "x", "--json"]) == FAILED
    assert json.loads(capsys.readouterr().out)["cause"] == "not_started"
    assert cli.run_verb(["doctor", "y"]) == REFUSED


HOLD = """
import sys, time
from pathlib import Path
from kit.storage import run_directory
with run_directory.lock_run_directory(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_living_run_and_one_whose_launcher_was_killed(make):
    """A real lock, then a real SIGKILL of who holds it."""
    run = make("running")
    run.rank(0, "step 3/9\n", age=3600)
    (run.path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"st')
    os.utime(run.path / "metrics.jsonl", (time.time() - 3600,) * 2)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        found = diagnose(run.path)
        assert (found.state, found.code) == ("running", DONE)
        assert f"process {holder.pid}" in found.sentence and "step 3" in found.sentence
        assert "nothing was written for 60 minutes" in found.sentence
    finally:
        holder.kill()
        holder.wait()
    found = diagnose(run.path)
    assert (found.state, found.cause) == ("failed", "launcher_killed") and "nobody runs it now" in found.sentence


def test_asked_to_stop_and_out_of_time(make):
    run = make()
    run.rank(0, "SIGTERM: saving and stopping at step 6\n")
    run.ended(returncode=-9, oom_kills=0, deaths={}, asked=1)
    found = diagnose(run.path)
    assert found.cause == "preempted" and "grace_seconds" in found.fixes[0]


def test_a_full_disk_swallows_the_report_too(make, monkeypatch):
    run = make("running")
    run.rank(0, "step 3/9\n")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 4096})())
    assert diagnose(run.path).cause == "disk_full"


@pytest.mark.parametrize(
    ("code", "number"),
    [(0, None), (1, None), (-9, 9), (137, 9), (247, 9), (245, 11), (255, None), (None, None), (143, 15)],
)
def test_signals_in_return_codes(code, number):
    assert run_logs.signal_of_returncode(code) == number


def test_a_run_directory_in_pieces_is_no_traceback(make, tmp_path):
    """Half-written files, binary rubbish, missing folders: an answer all the same."""
    run = make()
    (run.path / "logs" / "rank0.log").write_bytes(b"\xff\xfe\x00rubbish\n" * 100)
    for name in ("status.json", "launch.json", "metrics.jsonl", "plan.json", "logs/rank0.error.json"):
        (run.path / name).write_text('{"state": ')
    assert diagnose(run.path).cause in ("killed", "unknown")
    (run.path / "logs" / "rank0.log").unlink()
    assert diagnose(run.path).cause == "unknown"


def test_texts_that_the_installed_libraries_hold():
    """The fixtures quote them: where a release words one anew, its row must be looked at again."""
    from importlib.metadata import distribution

    for package, file, words in (
        ("deepspeed", "deepspeed/runtime/config.py", "Check batch related parameters. train_batch_size is not equal"),
        ("deepspeed", "deepspeed/runtime/engine.py", "The checkpoint being loaded used a DP"),
        ("deepspeed", "deepspeed/runtime/fp16/loss_scaler.py", "Current loss scale already at minimum"),
        ("deepspeed", "deepspeed/ops/op_builder/builder.py", "does not match the"),
        ("deepspeed", "deepspeed/ops/op_builder/builder.py", "Unable to JIT load the"),
        ("deepspeed", "deepspeed/ops/op_builder/builder.py", "class MissingCUDAException"),
        ("deepspeed", "deepspeed/launcher/launch.py", "sys.exit(last_return_code)"),
        ("torch", "torch/utils/checkpoint.py", "Recomputed values for the following tensors"),
        ("torch", "torch/utils/cpp_extension.py", "Error building extension"),
        ("torch", "torch/utils/cpp_extension.py", "Ninja is required to load C++ extensions"),
        ("torch", "torch/cuda/__init__.py", "is not compatible with the current PyTorch installation"),
        ("transformers", "transformers/integrations/deepspeed.py", "Can't find a valid checkpoint at"),
        ("transformers", "transformers/dynamic_module_utils.py", "requires the following packages"),
        ("huggingface_hub", "huggingface_hub/utils/_http.py", "offline mode is enabled"),
    ):
        text = Path(str(distribution(package).locate_file(file))).read_text(encoding="utf-8")
        assert words in text, (package, file, words)
