"""A seeded slice of tests/field_values.py: what check accepts of odd values, the libraries take and train with."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import field_values
import pytest

SLICE = {"SFTConfig": (1, 5), "LORA,BOFT,VBLORA,PROMPT_TUNING,GRALORA": (2, 3), "BitsAndBytesConfig": (4, 2)}
# Fails in a step, and nobody can know before: memory, the network, numbers that overflow.
IN_A_STEP = ("memory", "nan", "NaN", "overflow")


@pytest.mark.parametrize("tables", SLICE)
def test_what_check_accepts_is_neither_late_nor_lost(tables: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for key in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(key, os.environ.get(key, "1" if key != "DS_ACCELERATOR" else "cpu"))
    field_values.prepare_process()
    per_field, runs = SLICE[tables]
    rows = field_values.campaign(tmp_path, seed=11, per_field=per_field, count=runs, only=tables)
    bad = [r for r in rows if r["outcome"] in ("late", "crashed", "lost", "silent", "died")]
    bad += [r for r in rows if r["outcome"] == "step" and not any(word in r["error"] for word in IN_A_STEP)]
    assert not bad, [(r["key"], r["value"], r["outcome"], r.get("error")) for r in bad]
    counts = Counter(r["outcome"] for r in rows)
    assert counts["fine"] and counts["early"] > 0 and counts["refused"] > 0, counts


def test_planted_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the rules and ranges a value comes late, and one is silent."""
    from kit.config.rules import table

    field_values.prepare_process()
    runs = field_values.Runs(tmp_path)
    late = ("VBLORA", "peft.vector_length", 5)
    assert field_values.judge(runs, *late, train=False)["outcome"] in ("refused", "early")
    monkeypatch.setattr(table, "CHECKS", [])
    judged = field_values.judge(runs, *late, train=False)
    assert judged["outcome"] == "late" and "divisible" in judged["error"]
    frozen = field_values.judge(runs, "LORA", "peft.inference_mode", True, train=False)
    assert frozen["outcome"] == "step" and "empty parameter list" in frozen["error"]
