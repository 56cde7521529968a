"""What a run is trained on is written down, and a resume is refused where any of it has changed since."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny

from kit import api
from kit.errors import KitError
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory
from kit.storage.manifest import what_it_resumes
from kit.training import fingerprints, run

STEP = "checkpoint-3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data and a run of 6 steps over two files, which saved a checkpoint after 3."""
    folder = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KIT_CACHE", str(folder / "cache"))
        tiny.make_model(folder / "base")
        for part in "ab":
            rows = [{"text": tiny.sentence(ord(part) + n, 5 + n % 9)} for n in range(24)]
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plan = api.compose(*ARGUMENTS)
        plan = run_directory.create_run_directory(plan)
        assert run.train(plan) == 0
    return folder


ARGUMENTS = [
    *("model.name_or_path=base", "dataset.path=[a.jsonl,b.jsonl]", "trainer.use_cpu=true", "name=t"),
    *("trainer.max_length=64", "trainer.max_steps=6", "trainer.save_steps=3", "trainer.warmup_steps=2"),
]


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it was when the run had been stopped after its first checkpoint."""
    monkeypatch.setenv("KIT_CACHE", str(trained / "cache"))
    monkeypatch.chdir(trained)
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept, ignore=shutil.ignore_patterns("cache"))
    path = the_run(trained)
    shutil.rmtree(path / "checkpoints" / "checkpoint-6")
    run_directory.set_status(path, "stopped", exit_code=75, step=3)
    yield trained
    for folder in ("base", "runs"):
        shutil.rmtree(trained / folder)
    for file in trained.glob("*.jsonl"):
        file.unlink()
    shutil.copytree(kept, trained, dirs_exist_ok=True)


def the_run(folder: Path) -> Path:
    return next((folder / "runs").glob("t-*"))


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(KitError) as refused:
        api.resume(str(the_run(folder)), *overrides)
    assert refused.value.code == 2
    assert all(p.fix and p.where for p in refused.value.problems)
    return str(refused.value)


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=1))


def replace_text(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def tokenizer_words(folder: Path) -> None:
    edit_json(folder / "base" / "tokenizer_config.json", eos_token="<s>")


CHANGES = {
    "rows cut off": (
        lambda f: os.truncate(f / "b.jsonl", 300),
        ["the data have changed since checkpoint-3", "b.jsonl", "-> 300 bytes"],
    ),
    "one letter": (lambda f: flip_last_byte(f / "a.jsonl"), ["the data have changed", "a.jsonl", "sha256"]),
    "a file gone": (lambda f: (f / "b.jsonl").unlink(), ["b.jsonl", "is missing"]),
    "a weight": (
        lambda f: flip_last_byte(f / "base" / "model.safetensors"),
        ["the base has changed", "model.safetensors"],
    ),
    "the shape": (
        lambda f: edit_json(f / "base" / "config.json", rope_theta=5.0),
        ["the base has changed", "config.json"],
    ),
    "the template": (
        lambda f: (f / "base" / "chat_template.jinja").write_text("{{ eos_token }}"),
        ["the chat template has changed", "chat_template.jinja"],
    ),
    "the tokenizer": (tokenizer_words, ["the tokenizer has changed", "tokenizer_config.json"]),
    "the plan": (
        lambda f: edit_json(the_run(f) / "plan.json", global_batch_size=4),
        ["plan.json was edited", "global_batch_size 8 -> 4"],
    ),
    "a value of the plan": (
        lambda f: replace_text(the_run(f) / "plan.json", '"learning_rate": 0.0002', '"learning_rate": 0.1'),
        ["trainer.learning_rate 0.0002 -> 0.1"],
    ),
    "the optimizer gone": (
        lambda f: edit_json(the_run(f) / "checkpoints" / STEP / "manifest.json", resumes="weights"),
        ["holds weights alone", "peft.init_from="],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_is_refused_where_it_would_go_on_with_something_else(change: str, work: Path):
    act, words = CHANGES[change]
    act(work)
    said = refusal(work)
    assert all(word in said for word in words), said


def test_what_has_not_changed_is_compared_and_let_pass(work: Path):
    """A copy under the same name, a new date, a reformatted file that nobody reads: nothing of it matters."""
    plan = read_plan(work)
    os.utime(work / "a.jsonl")
    shutil.copy(work / "base" / "model.safetensors", work / "copy")
    os.replace(work / "copy", work / "base" / "model.safetensors")
    (work / "base" / "README.md").write_text("words")
    edit_json(work / "base" / "tokenizer_config.json", note="a tokenizer that does the same")
    tokenizer = api.open_tokenizer(plan)[0]
    fingerprints.compare_plan(plan.run_path)
    assert fingerprints.compare_inputs(plan, Path(STEP), lambda: tokenizer, {}) == []
    assert what_it_resumes(plan.run_path / "checkpoints" / STEP) == "training"


def read_plan(folder: Path) -> RunPlan:
    return run_directory.load_plan(the_run(folder))


def test_the_ranks_compare_tokens_where_no_file_has_changed(work: Path):
    """Another version of a library can make other tokens of the same files: said with the versions."""
    plan = read_plan(work)
    recorded = json.loads((plan.run_path / run_directory.FINGERPRINTS).read_text())
    report = {"splits": {"train": {"sha256": recorded["data"]["rows"]["train"]}}}
    tokenizer = api.open_tokenizer(plan)[0]
    edit_json(plan.run_path / run_directory.FINGERPRINTS, versions={**recorded["versions"], "trl": "1.0.0"})
    (note,) = fingerprints.compare_inputs(plan, Path(STEP), lambda: tokenizer, {}, report)
    assert "trl 1.0.0 ->" in note
    report["splits"]["train"]["sha256"] = "0" * 64
    with pytest.raises(KitError, match="the tokens have changed.*trl 1.0.0 ->"):
        fingerprints.compare_inputs(plan, Path(STEP), lambda: tokenizer, {}, report)


def test_a_variable_that_changes_numbers_must_be_the_same(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    said = refusal(work)
    assert "NVIDIA_TF32_OVERRIDE, which changes numbers" in said and "not set -> 0" in said
    assert "unset NVIDIA_TF32_OVERRIDE" in said


def test_a_run_that_an_earlier_version_began_resumes_with_a_note(work: Path):
    plan = read_plan(work)
    (plan.run_path / run_directory.FINGERPRINTS).unlink()
    os.truncate(work / "b.jsonl", 300)
    fingerprints.compare_plan(plan.run_path)
    (note,) = fingerprints.compare_inputs(plan, Path(STEP), lambda: None, {})
    assert "kept no fingerprints" in note


def test_more_steps_are_told_with_the_learning_rates(work: Path, capfd: pytest.CaptureFixture[str]):
    """6 steps become 12: warned. The same number asked for and another found: refused."""
    plan = api.override_plan(read_plan(work), ["trainer.max_steps=12"])
    run_directory.write_plan(plan)
    assert run.train(plan, resume=STEP) == 0
    said = capfd.readouterr().err
    assert "the run was one of 6 steps and goes on to 12: at step 3 the learning rate jumps from" in said
    assert "peft.init_from=" in said
    schedule = fingerprints.recorded_schedule(plan)
    assert schedule["steps"] == 12
    with pytest.raises(KitError, match="the schedule has changed.*steps 12 -> 9"):
        fingerprints.compare_schedule(plan, Path(STEP), {**schedule, "steps": 9})
