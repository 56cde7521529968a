"""`kit watch` over directories that are written here: every state, every damage, a file that grows."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from kit.cli import verbs as cli
from kit.errors import DONE, FAILED, REFUSED, STOPPED
from kit.storage import run_directory
from kit.watching import main, view
from kit.watching import state as watch
from kit.watching.metrics import MetricsFollower

ROOT = Path(__file__).resolve().parents[1]
PLAN = {
    "name": "tiny", "hash": "12345678", "world_size": 2, "model": {"name_or_path": "some/base"},
    "trainer": {"max_steps": -1, "num_train_epochs": 2, "logging_steps": 1},
}  # fmt: skip


def begun(step: int = 0, **more) -> dict:
    return {"step": step, "seconds": 0.0, "max_steps": 40, "world_size": 2, "time": "2026-01-01T00:00:00+0000", **more}


def row(step: int, start: int = 0, **more) -> dict:
    return {
        "step": step, "seconds": 2.0 * (step - start), "loss": 4.0 / step, "grad_norm": 0.5, "learning_rate": 1e-4,
        "epoch": step / 20, "num_tokens": 1000.0 * step, "tokens_per_second": 512.3,
        "rank_load_seconds": [0.01, 0.02], "rank_forward_seconds": [0.4, 0.9], "rank_memory_gb": [1.25, 1.5], **more,
    }  # fmt: skip


def write(run: Path, *rows: dict | str, state: str = "done", plan: dict | None = None, **facts) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / run_directory.PLAN).write_text(json.dumps(PLAN if plan is None else plan))
    text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows)
    (run / run_directory.METRICS_LOG).write_text(text, encoding="utf-8")
    if state:
        run_directory.set_status(run, state, **facts)
    return run


def alive(run: Path) -> Path:
    (run / run_directory.LOCK).write_text(str(os.getpid()))
    return run


def state(run: Path) -> dict:
    return watch.read_run_state(run, MetricsFollower(run / run_directory.METRICS_LOG))


def kit(*argv: str, capsys) -> tuple[int, str]:
    code = cli.run_verb(["watch", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out + out.err


# ---- what is read ----


def test_a_living_run(tmp_path):
    found = state(alive(write(tmp_path / "r", begun(), *(row(n) for n in range(1, 11)), state="running")))
    assert (found["state"], found["alive"], found["pid"]) == ("running", True, os.getpid())
    assert (found["step"], found["max_steps"], found["loss"], found["learning_rate"]) == (10, 40, 0.4, 1e-4)
    assert (found["grad_norm"], found["tokens_per_second"], found["rank_memory_gb"]) == (0.5, 512.3, [1.25, 1.5])
    assert (found["seconds_per_step"], found["seconds_left"], found["restarts"]) == (2.0, 60.0, 0)
    assert found["slowest_rank"] == {
        "rank": 1, "seconds": 0.92, "median_seconds": 0.41, "load_seconds": 0.02, "forward_seconds": 0.9
    }  # fmt: skip
    assert found["losses"] == [[n, 4.0 / n] for n in range(1, 11)]


MARKED = [begun(), *(row(n) for n in range(1, 8)), begun(5), *(row(n, 5, loss=9.0) for n in (6, 7, 8))]
UNMARKED = [r for r in MARKED if "max_steps" not in r]
RESUMED = [[n, 4.0 / n] for n in range(1, 6)] + [[n, 9.0] for n in (6, 7, 8)]
LINE = json.dumps(row(3)) + "\n"
GROWING = [
    # what the file holds, and what is then known of it
    ("nothing yet", [], {"step": None, "loss": None, "restarts": 0, "losses": []}),
    ("begun", [begun()], {"step": 0, "loss": None, "max_steps": 40, "seconds_left": None}),
    ("no marks", [row(10)], {"step": 10, "max_steps": 40, "seconds_left": None}),  # 2 epochs, half of one is done
    ("resumed", MARKED, {"step": 8, "restarts": 1, "losses": RESUMED, "seconds": 6.0}),
    ("resumed, no marks", UNMARKED, {"step": 8, "restarts": 1, "losses": RESUMED}),
    ("resumed twice", [*MARKED, begun(8), begun(8)], {"step": 8, "restarts": 3, "losses": RESUMED, "loss": None}),
    ("half a line", [row(2), LINE[:-20]], {"step": 2, "notes": []}),
    ("half a line, then more", [row(2), LINE[:-20], row(3)], {"step": 3, "loss": 4.0 / 3, "notes": []}),
    ("half a line, then a start", [row(2), LINE[:20], begun(2), row(3, 2)], {"step": 3, "restarts": 1, "notes": []}),
    ("rubbish", [row(2), "\x00\x00\x00\n", "what\n", "[1]\n", '{"step": "7"}\n', row(3)], {"step": 3, "damaged": 3}),
    ("zeros before a row", [row(2), "\x00\x00" + LINE], {"step": 3, "notes": []}),
    ("not a number", [row(2), row(3, loss=math.nan)], {"loss": None, "notes": ["loss is nan at step 3"]}),
    ("infinite", [row(2, grad_norm=math.inf)], {"grad_norm": None, "notes": ["grad_norm is inf at step 2"]}),
    ("other kinds", [row(2, loss="low", rank_memory_gb="much", seconds=None)], {"loss": None, "rank_memory_gb": []}),
    ("one rank", [row(2, rank_load_seconds=[1.0], rank_forward_seconds=[2.0])], {"slowest_rank": None}),
    ("evaluation", [row(2), {"step": 2, "seconds": 5.0, "eval_loss": 3.0}], {"eval_loss": 3.0, "loss": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "known"), [case[1:] for case in GROWING], ids=[case[0] for case in GROWING])
def test_what_a_file_may_hold(rows, known, tmp_path):
    """Read at once, and read while it grows by three bytes at a time: the same is known."""
    run = alive(write(tmp_path / "r", *rows, state="running"))
    at_once = state(run)
    damaged = known.pop("damaged", 0) if "damaged" in known else 0
    assert {key: at_once[key] for key in known} == known
    assert any(f"{damaged} lines" in note for note in at_once["notes"]) == bool(damaged)
    content = (run / run_directory.METRICS_LOG).read_bytes()
    (run / run_directory.METRICS_LOG).write_bytes(b"")
    follower = MetricsFollower(run / run_directory.METRICS_LOG)
    for end in range(0, len(content), 97):
        with open(run / run_directory.METRICS_LOG, "ab") as f:
            f.write(content[end : end + 97])
        grown = watch.read_run_state(run, follower)
    if content:
        assert grown == at_once
    json.dumps(at_once, allow_nan=False)
    assert view.render_text(view.run_frame(at_once)) and view.run_line(at_once)


def replaced(file: Path, content: str) -> None:
    file.rename(file.with_suffix(".1"))
    file.write_text(content)


@pytest.mark.parametrize("how", [Path.write_text, replaced], ids=["cut off", "rotated"])
def test_a_file_that_begins_again(how, tmp_path):
    run = alive(write(tmp_path / "r", *(row(n) for n in range(1, 10)), state="running"))
    follower = MetricsFollower(run / run_directory.METRICS_LOG)
    assert watch.read_run_state(run, follower)["step"] == 9
    how(run / run_directory.METRICS_LOG, json.dumps(row(11)) + "\n")
    assert watch.read_run_state(run, follower) == state(run)
    assert state(run)["step"] == 11


def test_a_file_server_whose_clock_is_behind(tmp_path):
    """The lock then seems older than the process that holds it, as one of a process with the same number would be."""
    run = write(tmp_path / "r", row(3), state="running")
    with run_directory.lock_run_directory(run):
        os.utime(run / run_directory.LOCK, (0, 0))
        assert state(run)["pid"] == os.getpid()
    assert state(run)["pid"] is None


def test_a_file_that_is_away_for_a_moment_is_not_forgotten(tmp_path):
    run = alive(write(tmp_path / "r", row(3), state="running"))
    follower = MetricsFollower(run / run_directory.METRICS_LOG)
    watch.read_run_state(run, follower)
    (run / run_directory.METRICS_LOG).unlink()
    assert watch.read_run_state(run, follower)["step"] == 3


# ---- what state it is in ----


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("said", "facts", "lock", "found", "code"),
    [
        ("created", {}, None, ("created", False), DONE),
        ("created", {}, "alive", ("created", True), DONE),
        ("running", {}, "alive", ("running", True), DONE),
        ("running", {}, "dead", ("failed", False), FAILED),
        ("running", {}, None, ("failed", False), FAILED),
        ("running", {}, "rubbish", ("failed", False), FAILED),
        ("running", {}, "older", ("failed", False), FAILED),  # our number, but the lock is older than this process
        ("running", {"host": "elsewhere"}, "dead", ("running", None), DONE),
        ("stopped", {"step": 4}, "alive", ("stopped", False), STOPPED),
        ("failed", {"exit_code": 4, "problems": ["it broke\n  fix:   mend it"]}, None, ("failed", False), FAILED),
        ("failed", {"exit_code": 3}, None, ("failed", False), 3),
        ("done", {}, "dead", ("done", False), DONE),
        ("", {}, None, ("created", False), DONE),
    ],
)  # fmt: skip
def test_states(said, facts, lock, found, code, tmp_path, capsys):
    run = write(tmp_path / "r", begun(), row(1), row(2), state=said, **facts)
    if lock:
        numbers = {"alive": os.getpid(), "dead": dead(), "older": os.getpid(), "rubbish": "x"}
        (run / run_directory.LOCK).write_text(str(numbers[lock]))
    if lock == "older":
        os.utime(run / run_directory.LOCK, (1e9, 1e9))
    seen = state(run)
    assert (seen["state"], seen["alive"]) == found
    ended, shown = kit(run, "--once", capsys=capsys)
    assert ended == code and f"{run}  {found[0]}" in shown.replace("\n", "")
    assert ("mend it" in shown) == bool(facts.get("problems"))
    assert (f"kit resume {run}" in shown) == (found[0] == "stopped")


def test_a_quiet_run_says_so(tmp_path):
    run = alive(write(tmp_path / "r", row(1), state="running"))
    os.utime(run / run_directory.METRICS_LOG, (time.time() - 3600,) * 2)
    assert "nothing was written for 60 minutes" in state(run)["notes"][0]


def test_the_last_checkpoint_is_one_with_a_manifest(tmp_path):
    run = write(tmp_path / "r", row(1))
    for name, whole in (("checkpoint-9", True), ("checkpoint-10", True), ("checkpoint-20", False), ("best", True)):
        (run / "checkpoints" / name).mkdir(parents=True)
        if whole:
            (run / "checkpoints" / name / "manifest.json").write_text("{}")
    assert state(run)["checkpoint"] == "checkpoint-10"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"trainer": 3, "model": []}'])
def test_damaged_plan_and_status(content, tmp_path, capsys):
    run = write(tmp_path / "r", row(1))
    (run / run_directory.PLAN).write_text(content)
    (run / run_directory.STATUS).write_text(content)
    code, shown = kit(run, "--once", capsys=capsys)
    assert code == DONE and "loss" in shown


# ---- what is shown ----


def test_a_frame(tmp_path, capsys):
    rows = [begun(), *(row(n) for n in range(1, 41))]
    code, shown = kit(write(tmp_path / "r", *rows, state="failed", problems=["a\x1b[31mb"]), "--once", capsys=capsys)
    assert code == FAILED and "\x1b" not in shown and r"a\x1b[31mb" in shown
    figures = dict(line.split("  ", 1) for line in shown.splitlines() if re.match(r"\w[\w/]* ?\w*  ", line))
    figures = {name: value.strip() for name, value in figures.items()}
    assert figures["step"] == "40/40 (100 %), epoch 2.00" and figures["loss"] == "0.1"
    assert figures["tokens/s"] == "512" and figures["slowest rank"].startswith("1: 0.92 s of its own per step")
    assert figures["memory"] == "1.5 GiB resident on rank 1, 1.25 the least"
    assert "█" in shown and "step 1 " in shown


@pytest.mark.parametrize("points", [2, 3, 30, 5000])
@pytest.mark.parametrize("fine", [True, False])
def test_the_curve_falls_as_the_loss_does(points, fine):
    drawn = view.loss_curve([(10 * n, 4.0 / n) for n in range(1, points + 1)], 80, 6, fine)
    assert len(drawn) == 7 and max(map(len, drawn)) <= 80 + 12
    bars = [line[drawn[-1].index("step") :].ljust(80) for line in drawn[:-1]]
    heights = [sum(bar[column] != " " for bar in bars) for column in range(80)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 6 and 1 in heights
    assert fine == (not set("".join(bars)) <= {"*", " "})
    assert view.loss_curve([(1, 2.0), (2, 2.0)], 80, 6)  # level


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, ""), (0.2, "0 s"), (59.4, "59 s"), (61, "1:01"), (3661, "1:01:01"), (90061, "1 day 01:01:01")],
)
def test_durations(seconds, words):
    assert view.format_duration(seconds) == words


def test_json(tmp_path, capsys):
    run = write(tmp_path / "r", begun(), row(1), row(2, loss=math.nan))
    code, shown = kit(run, "--json", capsys=capsys)
    assert code == DONE and json.loads(shown) == state(run)


@pytest.mark.parametrize("argv", [["no-such-run"], ["r", "--interval", "0"], ["r", "--interval", "nan"]])
def test_refusals(argv, tmp_path, monkeypatch, capsys):
    write(tmp_path / "runs" / "r", row(1))
    monkeypatch.chdir(tmp_path)
    code, shown = kit(*argv, "--once", capsys=capsys)
    assert code == REFUSED and shown.startswith("refused: ")
    assert kit("r", "--once", capsys=capsys)[0] == DONE  # by its name, below runs/


def test_a_run_that_goes_away_while_it_is_watched(tmp_path, monkeypatch, capsys):
    run = alive(write(tmp_path / "r", row(1), state="running"))
    monkeypatch.setattr(time, "sleep", lambda _: run.rename(tmp_path / "moved"))
    code, shown = kit(run, "--interval", "1", capsys=capsys)
    assert code == REFUSED and "is gone" in shown


def test_a_line_per_interval_until_it_ends(tmp_path, monkeypatch, capsys):
    run = alive(write(tmp_path / "r", begun(), state="running"))
    left = [[row(1)], [row(2)], []]

    def train(seconds):
        assert seconds == 30
        with open(run / run_directory.METRICS_LOG, "a") as f:
            f.writelines(json.dumps(r) + "\n" for r in left.pop(0))
        if not left:
            run_directory.set_status(run, "done")

    monkeypatch.setattr(time, "sleep", train)
    code, shown = kit(run, capsys=capsys)
    lines = shown.splitlines()
    assert code == DONE and len(lines) == 4 and "\x1b" not in shown
    assert "step 0/40" in lines[0] and "step 1/40" in lines[1] and "loss 2 " in lines[2] and "done" in lines[3]
    assert "38 left" not in lines[2] and "1:16 left" in lines[2]


def test_a_sweep(tmp_path, capsys):
    sweep = tmp_path / "s-sweep-12345678"
    alive(write(sweep / "000-r-8", begun(), *(row(n) for n in range(1, 5)), state="running"))
    write(sweep / "001-r-4", begun(), row(40), state="done")
    write(sweep / "002-r-2", begun(), state="failed", problems=["no memory\n  fix:   less"])
    trials = [{"run": f"00{n}-r-{r}", "state": s, "problems": []} for n, r, s in ((0, 8, "running"), (1, 4, "pruned"))]
    trials.append({"run": "003-r-0", "state": "refused", "problems": [{"problem": "r is 0", "where": "peft.r"}]})
    (sweep / "sweep.json").write_text(json.dumps({"trials": trials}))
    code, shown = kit(sweep, "--once", capsys=capsys)
    assert code == FAILED and "1 running, 1 pruned, 1 failed, 1 refused" in shown
    cells = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip().startswith("00")}
    assert cells["000-r-8"][1:] == ["running", "4/40", "1", "512", "1.5", "GiB", "1:12"]
    assert cells["003-r-0"][1:] == ["refused"] and "003-r-0: r is 0" in shown and "002-r-2: no memory" in shown
    states = json.loads(kit(sweep, "--json", capsys=capsys)[1])["trials"]
    assert main.RunReader(sweep, True).line(states).endswith("1 refused; 000-r-8 4/40 loss 1")
    code, shown = kit(sweep, "--json", capsys=capsys)
    assert [t["state"] for t in json.loads(shown)["trials"]] == ["running", "pruned", "failed", "refused"]
    (sweep / "sweep.json").write_text('{"trials": [')
    assert kit(sweep, "--once", capsys=capsys)[0] == FAILED


def test_a_sweep_on_a_narrow_terminal(tmp_path, monkeypatch, capsys):
    """Whole columns are left out, the names and the states last."""
    write(tmp_path / "s" / "000-learning_rate-0.0001", begun(), *(row(n) for n in range(1, 5)), state="done")
    monkeypatch.setenv("COLUMNS", "40")
    shown = kit(tmp_path / "s", "--once", capsys=capsys)[1]
    assert "…" not in shown and "trial" in shown and "done" in shown and "4/40" in shown and "tokens/s" not in shown
    assert max(map(len, shown.splitlines()[2:])) <= 40
    monkeypatch.setenv("COLUMNS", "100")
    assert "tokens/s" in kit(tmp_path / "s", "--once", capsys=capsys)[1]


@pytest.mark.parametrize(
    ("jobs", "job"),
    [([{"verb": "train", "id": "7"}, {"verb": "merge", "id": "8"}], "7"), ([], ""), ("x", ""), ([3, {}], "")],
)
def test_a_job_that_waits_in_the_queue(jobs, job, tmp_path, capsys):
    write(tmp_path / "r", state="created")
    (tmp_path / "r" / "slurm.json").write_text(json.dumps({"jobs": jobs}))
    code, shown = kit(tmp_path / "r", "--once", capsys=capsys)
    assert code == DONE and ("SLURM job" in shown) is bool(job) and (not job or f"show job {job} " in shown)


def test_a_sweep_between_two_trials_goes_on(tmp_path, monkeypatch, capsys):
    sweep = tmp_path / "s-sweep-12345678"
    write(sweep / "000-r-8", begun(), row(40), state="done")
    alive(sweep)
    left = [lambda: write(sweep / "001-r-4", begun(), row(40), state="done"), (sweep / run_directory.LOCK).unlink]
    monkeypatch.setattr(time, "sleep", lambda _: left.pop(0)())
    code, shown = kit(sweep, capsys=capsys)
    assert code == DONE and [line.split("  ")[1] for line in shown.splitlines()] == ["1 done", "2 done", "2 done"]


# ---- on a terminal ----


def on_terminal(run: Path, keys: bytes, **env: str) -> tuple[int, str]:
    """`kit watch RUN` on a terminal of its own; the keys are typed once it has drawn a frame."""
    ours, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kit", "watch", str(run), "--interval", "0.2"], stdin=side, stdout=side, stderr=side,
        env={k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **env}.items() if v},
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(side)
    seen, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        if keys and b"grad_norm" in seen:
            os.write(ours, keys)
            keys = b""
        if process.poll() is not None and not select.select([ours], [], [], 0)[0]:
            break
    process.kill()
    os.close(ours)
    return process.wait(), seen.decode()


@pytest.mark.parametrize(("keys", "code"), [(b"q", DONE), (b"\x03", DONE)], ids=["q", "Ctrl-C"])
def test_leaving(keys, code, tmp_path):
    run = alive(write(tmp_path / "r", begun(), row(1), row(2), state="running"))
    ended, seen = on_terminal(run, keys, NO_COLOR="1")
    assert ended == code and "slowest rank" in seen and "Traceback" not in seen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", seen), "NO_COLOR"


def test_colour_and_the_end_of_the_run(tmp_path):
    run = write(tmp_path / "r", begun(), row(1), row(2), state="stopped")
    ended, seen = on_terminal(run, b"", NO_COLOR="")
    assert ended == STOPPED and re.search(r"\x1b\[[0-9;]*33m", seen)


def test_a_terminal_that_cannot_be_drawn_on(tmp_path):
    run = write(tmp_path / "r", begun(), row(1), row(2))
    ended, seen = on_terminal(run, b"", TERM="dumb")
    assert ended == DONE and "\x1b" not in seen and len(seen.splitlines()) == 1
