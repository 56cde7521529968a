"""Quantized bases under every engine: losses agree with one process, packed weights stay as they were, adapters whole.

Three starts: one process, `torchrun` and `deepspeed` with two, each running its plans in sequence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launch.packed import packed_hashes
from safetensors.torch import load_file

from kit import api
from kit.launchers.command import free_port
from kit.storage import run_directory
from launch import harness

pytestmark = pytest.mark.launch
LOSS = 1e-5  # absolute, in float32
BF16 = 2e-2
STEPS = 6
SHORT = (f"trainer.max_steps={STEPS}", "trainer.eval_steps=3", "trainer.save_steps=6")
NF4, INT8 = "quantization=nf4", "quantization=int8"
SINGLE = "quantization.bnb_4bit_use_double_quant=false"
ALONE = {
    "nf4": [NF4],
    "int8": [INT8],
    "fp4": [NF4, "quantization.bnb_4bit_quant_type=fp4"],  # the planted fault: other bits
    "nf4_bf16": [NF4, "trainer.bf16=true"],
}
DDP = {"ddp_nf4": [NF4], "ddp_int8": [INT8]}
ZERO = {
    "zero1_nf4": [NF4, "deepspeed=zero1"],
    "zero1_int8": [INT8, "deepspeed=zero1"],
    "zero2_nf4": [NF4, "deepspeed=zero2"],
    "zero2_int8": [INT8, "deepspeed=zero2"],
    "zero3_nf4": [NF4, "deepspeed=zero3"],
    "zero2_nf4_bf16": [NF4, "deepspeed=zero2", "trainer.bf16=true"],
    "zero3_nf4_bf16": [NF4, "deepspeed=zero3", "trainer.bf16=true"],
}


def launch(work: Path, base: Path, chat: Path, cases: dict[str, list[str]], start: list[str], *more: str) -> None:
    """Compose every case into work/<case>, and run all of them in one start."""
    plans = []
    for name, given in cases.items():
        plan = api.compose(*harness.overrides(base, chat, work / name, *given, *SHORT, *more), here=True)
        plans.append(str(run_directory.create_run_directory(plan).run_path / run_directory.PLAN))
    script = str(harness.ROOT / "tests" / "launch" / "packed.py")
    done = harness.finish(harness.start([*start, script, *plans], work, DS_ACCELERATOR="cpu"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def work(tmp_path_factory, base, chat, ops_dir) -> Path:
    """All runs, in folders named like their cases."""
    folder = tmp_path_factory.mktemp("quantized")
    launch(folder, base, chat, ALONE, [sys.executable], "launch=local")
    two = ("launch.num_gpus=2",)
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    launch(folder, base, chat, DDP, torchrun, "launch=torchrun", *two)
    deepspeed = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port())]
    launch(folder, base, chat, ZERO, deepspeed, "launch=deepspeed", *two)
    return folder


def run_of(work: Path, case: str) -> Path:
    return harness.the_run(work / case)


def alone(case: str) -> str:
    return case.partition("_")[2] if case.startswith(("ddp", "zero")) else case


@pytest.mark.parametrize("case", [*DDP, *ZERO])
def test_losses_agree_with_one_process(work, case):
    one, many = harness.rows(run_of(work, alone(case))), harness.rows(run_of(work, case))
    assert one.keys() == many.keys() and len(one) == STEPS
    limit = BF16 if case.endswith("bf16") else LOSS
    assert max(abs(one[s] - many[s]) for s in one) <= limit


def test_other_bits_exceed_the_tolerance(work):
    right, wrong = harness.rows(run_of(work, "nf4")), harness.rows(run_of(work, "fp4"))
    assert max(abs(right[s] - wrong[s]) for s in right) > max(BF16, 1000 * LOSS)


@pytest.mark.parametrize("case", [*ALONE, *DDP, *ZERO])
def test_packed_weights_stay_as_they_were_loaded(work, base, case):
    """On every rank, bit for bit, after training and evaluating: no engine casts them, whatever their dtype says."""
    from transformers import AutoModelForCausalLM

    from kit.models.quantization import bnb_config

    run = run_of(work, case)
    plan = json.loads((run / "plan.json").read_text())
    dtype = getattr(torch, plan["model"]["dtype"])
    # As uint8, whatever the run calls it: the bits are the same.
    fields = {k: v for k, v in plan["quantization"].items() if k != "bnb_4bit_quant_storage"}
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=bnb_config(fields))
    expected = packed_hashes(fresh)
    assert len(expected) == 14
    for rank in range(plan["world_size"]):
        found = json.loads((run / f"packed-{rank}.json").read_text())
        assert found["hashes"] == expected
        assert found["dtypes"] == [f"torch.{plan['precision']}"]


@pytest.mark.parametrize("case", [*ALONE, *DDP, *ZERO])
def test_adapters_are_whole_and_moved(work, case):
    run = run_of(work, case)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 28  # A and B of seven linear layers in two blocks
    assert all(t.isfinite().all() and t.ndim == 2 and t.numel() for t in adapter.values())
    assert all(t.any() for k, t in adapter.items() if "lora_B" in k)
    assert json.loads((run / "adapter" / "manifest.json").read_text())["base"]["fingerprint"]
