"""`make quickstart`'s own line, run whole, and the same task from a second generator seed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import harness

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[tuple[Path, str, float]]:
    """The run directory, what was printed, and the seconds it took."""
    work = tmp_path_factory.mktemp("quickstart")
    start = time.monotonic()
    argv = [harness.sys.executable, "-m", "kit.quickstart", f"runs_dir={work / 'runs'}"]
    os.environ["KIT_CACHE"] = str(work / "cache")  # nothing is kept from before: the base is trained here
    done = harness.finish(harness.start(argv, work), 420)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    yield harness.the_run(work / "runs"), done.stdout, time.monotonic() - start
    del os.environ["KIT_CACHE"]


def scores(run: Path) -> dict[str, float]:
    models = json.loads((run / "eval.json").read_text())["models"]
    return {name: found["exact_match"] for name, found in models.items()}


def test_tuned_beats_what_needs_no_tuning(whole):
    """Most frequent answer, base with 5 worked examples, base as it is: at least 50 points below the tuned model."""
    run, printed, _ = whole
    found = scores(run)
    others = [v for name, v in found.items() if name not in ("adapter", "merged")]
    assert len(others) == 3, found
    assert found["adapter"] - max(others) >= 0.5, found
    assert found["merged"] == found["adapter"]
    for name in ("most frequent answer", "base", "5 examples", "adapter", "merged"):
        assert name in printed


def test_it_stops_and_merged_equals_tuned_token_for_token(whole):
    run, printed, _ = whole
    models = json.loads((run / "eval.json").read_text())["models"]
    assert models["adapter"]["unstopped"] == models["merged"]["unstopped"] == 0
    samples = json.loads((run / "samples.json").read_text())
    samples = samples["samples"] if isinstance(samples, dict) else samples
    assert len(samples) >= 4
    for sample in samples:
        outputs = sample["outputs"]
        assert outputs["adapter"]["tokens"] == outputs["merged"]["tokens"] and outputs["adapter"]["stopped"]
    assert "token for token: True" in printed


def test_merge_was_verified(whole):
    run, _, _ = whole
    report = json.loads((run / "merged" / "merge.json").read_text())
    assert report["method"] == "streaming" and report["verification"]["logits"]["max_difference"] < 1e-3


def test_it_names_the_next_command_and_takes_minutes(whole):
    run, printed, seconds = whole
    assert seconds < 300, seconds
    assert "train recipe=quickstart launch=deepspeed launch.num_gpus=2 deepspeed=zero3" in printed
    harness.assert_nothing_left(run)


def test_a_second_generator_seed_agrees(whole, tmp_path):
    """Other letters, other questions, another initialisation: within 5 points of exact match."""
    from kit.quickstart.data import write_chats

    write_chats(tmp_path, seed=1)
    args = ["recipe=quickstart", "trainer.seed=1", f"runs_dir={tmp_path / 'runs'}"]
    args += [f"dataset.path={tmp_path}/letters_train.jsonl", f"dataset.eval_path={tmp_path}/letters_heldout.jsonl"]
    done = harness.kit("train", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = harness.the_run(tmp_path / "runs")
    done = harness.kit("eval", str(run), "--which", "adapter", "--max-new-tokens", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert abs(scores(run)["adapter"] - scores(whole[0])["adapter"]) <= 0.05
