"""Saving and stopping with two processes under real launchers: one launch per engine, see ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from kit.launchers.command import free_port

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def run(request, tmp_path_factory, ops_dir):
    """(engine, folder, what each rank found) of one launch."""
    engine = request.param
    folder = tmp_path_factory.mktemp(engine)
    tiny.make_model(folder / "base")
    tiny.make_model(folder / "tied", tied=True)
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(ops_dir),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port = f"--master_port={free_port()}"
    if engine == "ddp":
        command = ["torchrun", "--nproc_per_node=2", port]
    else:
        command = ["deepspeed", "--num_gpus=2", "--no_local_rank", port]
    done = subprocess.run(
        [*command, str(HERE / "ranks.py"), str(folder), engine],
        env=environment, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return engine, folder, [json.loads((folder / f"rank{n}.json").read_text()) for n in range(2)]


def test_every_save_is_complete(run):
    _, _, ranks = run
    for found in ranks:
        assert found["end"]
        assert [found[k] for k in ("verify", "stopped verify", "head", "full", "full-tied")] == [[]] * 5
    assert ranks[0].get("equal", True)


def test_resume_is_bit_equal(run):
    _, _, ranks = run
    for found in ranks:
        assert found["losses"] == found["resumed"] and len(found["losses"]) == 4
        assert found["bytes"][0] == found["bytes"][1]


def test_signal_on_one_rank_stops_all_at_one_step(run):
    _, _, ranks = run
    assert ranks[0]["stopped"] == ranks[1]["stopped"]
    assert ranks[0]["stopped"][0] is True and ranks[0]["stopped"][1] in (3, 4)


def test_failure_on_the_writer_is_everybodys(run):
    _, _, ranks = run
    for found in ranks:
        assert found["broken"][0] == 4 and "No space left" in found["broken"][1]
    assert ranks[0]["broken left"] == []


def test_files_hold_whole_tensors(run):
    engine, folder, _ = run
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28 and all(t.ndim == 2 and t.numel() for t in adapter.values())
    head = load_file(folder / "head" / "checkpoint-2" / "adapter_model.safetensors")
    assert head["base_model.model.lm_head.weight"].shape == (64, 32) and len(head) == 29
    full = load_file(folder / "full" / "model" / "model.safetensors")
    tied = load_file(folder / "full-tied" / "model" / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in base.items()}
    assert tied.keys() == base.keys() - {"lm_head.weight"}
    moved = [k for k in base if not base[k].equal(full[k].to(base[k].dtype))]
    assert len(moved) == len(base)
    # The optimizer state is cut over the ranks; the frozen base is in no file of a LoRA checkpoint.
    if engine != "ddp":
        parts = list((folder / "whole" / "checkpoint-4").rglob("*optim_states.pt"))
        assert len(parts) == 2
    assert sum(p.stat().st_size for p in (folder / "whole" / "checkpoint-4").rglob("*.pt")) < 400_000
