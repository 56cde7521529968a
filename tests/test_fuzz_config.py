"""Spoiled command lines and files end in a plan or in a list of problems, never in another exception.

A small instance of `make soak`, the same every time; a failure prints the command line that brings it about.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import VALID, make_inputs, mutations, outcome

from kit import api


def test_the_lists_that_are_spoiled_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    stock = make_inputs(tmp_path)
    for args in VALID:
        assert api.check(*stock, *args) == [], args


def test_spoiled_command_lines_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    seen = {"valid": 0, "refused": 0}
    for args in mutations(110, seed=0, folder=tmp_path):
        verdict, details = outcome(args)
        assert verdict in seen, f"{args}\n{details}"
        seen[verdict] += 1
    # Most mutations are wrong and a few are harmless: if either count is 0 the generator does not do its work.
    assert seen["refused"] > 60 and seen["valid"] > 3, seen
    assert [p.name for p in tmp_path.iterdir() if p.name in ("runs", "outputs", "elsewhere")] == []


@pytest.mark.parametrize(
    "args",
    [
        ["launch=1"], ["model=null"], ["peft=[1,2]"], ["fsdp=[null]"], ["model=[[],{}]"], ["~deepspeed=0"],
        ["=5"], ["="], [""], ["name=" + "[" * 300 + "]" * 300], ["deepspeed=zero2", "deepspeed.zero_optimization=-1"],
        ["global_batch_size=32", "trainer.per_device_train_batch_size=1000000000000000000000"],
        ["dataset.path=a\0b"], ["dataset.path=" + "x" * 5000], ["model.name_or_path=~nobody-here/x"],
    ],
    ids=lambda args: " ".join(args)[:40].replace("\0", "0"),
)  # fmt: skip
def test_found_by_the_fuzz(args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of these once ended in a traceback or did not end; nothing here may take longer than a blink."""
    monkeypatch.chdir(tmp_path)
    stock = [o for o in make_inputs(tmp_path) if o.partition("=")[0] != args[0].partition("=")[0]]
    verdict, details = outcome([*stock, *args])
    assert verdict == "refused", details


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe", b"a: [", b"- 1", b"a: &a [*a]", b"trainer: \0", b"defaults: 7", b"peft: [1]", b"trainer: 5",
        b"model: [a]", b"deepspeed: [a]", b"quantization: 3", b"launch: 1.5", b"recipe: [a]", b"1: 2",
        b"tracking: 4", b"prompts: 4", b"fsdp: true", b"defaults: [a: b: c]", b"defaults: {}", b"hydra: 1",
    ],
    ids=repr,
)  # fmt: skip
def test_run_files_that_are_none(content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_bytes(content)
    verdict, details = outcome([*make_inputs(tmp_path), "run.yaml"])
    assert verdict == "refused", details
