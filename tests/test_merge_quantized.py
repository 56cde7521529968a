"""Merging what was trained over a quantized base: onto the stored weights, or onto what quantizing left of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from kit import api
from kit.cli import verbs as cli
from kit.errors import KitError
from kit.merging import merge
from kit.models.quantization import bnb_config, disable_cpu_repacking
from kit.storage import run_directory
from kit.storage.json_files import read_json_or_empty

KINDS = {
    "nf4": ["quantization=nf4"],
    "nf4 single": ["quantization=nf4", "quantization.bnb_4bit_use_double_quant=false"],
    "nf4 float storage": ["quantization=nf4", "quantization.bnb_4bit_quant_storage=float32"],
    "fp4": ["quantization=nf4", "quantization.bnb_4bit_quant_type=fp4"],
    "skipped": ["quantization=nf4", "quantization.llm_int8_skip_modules=[lm_head,down_proj]"],
    "int8": ["quantization=int8"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Wider than a block, in several shards, in no multiple of the usual sizes."""
    folder = tiny.make_model(tmp_path_factory.mktemp("quantized") / "base", hidden_size=96, intermediate_size=160)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def make_run(folder: Path, base: Path, chat: Path, *overrides: str) -> Path:
    """A run's directory with a plan and an adapter, as training leaves them, without the training."""
    plan = api.compose(
        f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={folder}", "trainer.use_cpu=true",
        "trainer.bf16=false", *overrides, here=True,
    )  # fmt: skip
    run = run_directory.create_run_directory(plan).run_path
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(run / "adapter")
    return run


def logits(model) -> torch.Tensor:
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_is_the_model_that_was_trained(base, chat, tmp_path, kind):
    """Equal to transformers' own dequantize() with the adapter; in 4 bits also to the quantized model itself."""
    run = make_run(tmp_path, base, chat, *KINDS[kind])
    report = merge(run, onto="dequantized", fsync=False)
    assert report["method"] == "streaming" and report["verification"]["logits"]
    fields = read_json_or_empty(run / "plan.json")["quantization"]
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32))

    def quantized():
        return AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=bnb_config(fields), device_map="cpu"
        )

    theirs = quantized().dequantize().float()
    expected = logits(PeftModel.from_pretrained(theirs, run / "adapter"))
    assert (merged - expected).abs().max() < 2e-4 * expected.std()
    if kind != "int8":  # LLM.int8() rounds the activations too: its own forward is not that of its weights
        trained = logits(PeftModel.from_pretrained(disable_cpu_repacking(quantized()), run / "adapter"))
        assert (merged - trained).abs().max() < 2e-3 * expected.std()
    original = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (merged - original).abs().max() > 0.05 * expected.std()
    # not only the adapter's layers start from what quantizing left
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(tensor(run / "merged", name), tensor(base, name))
    kept = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(tensor(run / "merged", kept), tensor(base, kept)) == (kind == "skipped")


def tensor(folder: Path, name: str) -> torch.Tensor:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], "pt") as f:
        return f.get_tensor(name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_original_says_how_far_it_is_from_the_trained_model(base, chat, tmp_path, capsys, kind):
    run = make_run(tmp_path, base, chat, *KINDS[kind])
    assert cli.run_verb(["merge", str(run), "--no-fsync"]) == 0
    said = capsys.readouterr().out
    report = read_json_or_empty(run / "merged" / "merge.json")
    assert report["onto"] == "original" and "--onto dequantized is" in said and "differs   from quantized" in said
    far = report["as_trained"]
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"))
    assert (merged - logits(full)).abs().max() < 1e-4
    assert far["mean_difference"] > 0.01 * far["logits_std"]
    assert cli.run_verb(["merge", str(run), "--no-fsync", "--overwrite", "--onto", "dequantized"]) == 0
    near = read_json_or_empty(run / "merged" / "merge.json")["as_trained"]
    assert near["mean_difference"] < far["mean_difference"]  # int8: its rounded activations stay a difference
    if kind == "nf4":
        assert near["max_difference"] < 1e-3 * near["logits_std"]


@pytest.mark.parametrize("fault", ["scale", "one layer", "skipped module"])
def test_a_planted_fault_is_caught(base, chat, tmp_path, monkeypatch, fault):
    """1 % on what is restored, a layer left as it was stored, or a module quantized that the run skipped."""
    from kit.merging import plan as planning
    from kit.merging import stream

    run = make_run(tmp_path, base, chat, *KINDS["skipped" if fault == "skipped module" else "nf4"])
    if fault == "scale":
        real = stream.make_restorer

        def scaled(*args):
            restore = real(*args)
            return lambda rows, n: restore(rows, n) * 1.01

        monkeypatch.setattr(stream, "make_restorer", scaled)
    else:
        real_modules = planning.quantized_modules
        calls = []

        def wrong(*a):
            found = real_modules(*a)
            calls.append(1)
            if len(calls) > 1:  # the verification plans again, rightly
                return found
            more = {"model.layers.0.mlp.down_proj"}
            return found | more if fault == "skipped module" else found - more

        monkeypatch.setattr(planning, "quantized_modules", wrong)
    with pytest.raises(KitError) as caught:
        merge(run, onto="dequantized", fsync=False)
    assert caught.value.code == 4 and not (run / "merged").exists()


def test_onto_without_a_quantized_base_is_refused(base, chat, tmp_path):
    run = make_run(tmp_path, base, chat)
    for onto in ("dequantized", "original"):
        try:
            merge(run, onto=onto, fsync=False)
        except KitError as error:
            assert error.code == 2 and "quantized" in str(error)
        else:
            assert onto == "original"
    with pytest.raises(KitError, match="onto='elsewhere' is not known"):
        merge(run, onto="elsewhere")


def test_scales_quantized_twice_hang_on_no_number_of_threads():
    """A mean of 900,000 scales in another order moves codes; writer and check sum in one (seen on an 8B base)."""
    from kit.merging.dequantize import quantize_scales
    from kit.merging.stream import map_in_threads

    scales = torch.rand(917_504, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.05
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = quantize_scales(scales)
        torch.set_num_threads(2)
        by_two = quantize_scales(scales)
        together = map_in_threads(quantize_scales, [scales, scales])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(alone, found) for found in together)
    assert not torch.equal(alone, by_two), "two threads sum as one does here: this test shows nothing"
