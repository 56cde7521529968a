"""A quantized base is the same model for training, generate and eval, and the checks of a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from merge_cases import adapt, write_manifest
from safetensors.torch import load_file, save_file

from kit import api
from kit.merging.dequantize import BaseQuantization
from kit.merging.logits import load_as_trained
from kit.merging.plan import plan_merge
from kit.models.inference import run_each_model
from kit.models.load import load_model, load_tokenizer
from kit.models.sources import locate_models
from kit.storage import run_directory

BF16 = ["model.dtype=bfloat16", "trainer.bf16=true", "quantization.bnb_4bit_compute_dtype=bfloat16"]
KINDS = {"nf4": ["quantization=nf4"], "int8": ["quantization=int8"], "nf4 bf16": ["quantization=nf4", *BF16]}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 40)[None], use_cache=False).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_generate_opens_the_base_as_it_was_trained(kind, chat, tmp_path):
    """Bit for bit, with widths that do not divide by 64: bitsandbytes' own CPU kernel for 4 bits refuses those."""
    base = tiny.make_model(tmp_path / "base", hidden_size=96, intermediate_size=160)
    args = [f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path}", "trainer.use_cpu=true"]
    plan = api.compose(*args, "trainer.bf16=false", *KINDS[kind], here=True)
    run = run_directory.create_run_directory(plan).run_path
    adapt(base, run / "adapter")
    file = run / "adapter" / "adapter_model.safetensors"
    save_file(
        {key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file
    )  # as TRL trains them (peft#2889)
    write_manifest(base, run / "adapter")

    tokenizer = load_tokenizer(plan)
    as_trained = logits(load_model(plan, tokenizer))
    source = locate_models(run)
    models = run_each_model(lambda _, model: logits(model), source, ["base", "adapter"], tokenizer)
    assert torch.equal(models["base"], as_trained)
    assert not torch.allclose(models["adapter"], as_trained, atol=1e-3)
    in_float32 = run_each_model(lambda _, model: logits(model), source, ["adapter"], tokenizer, dtype="float32")
    merge_plan = plan_merge(base, run / "adapter", trained_on=BaseQuantization(plan.quantization, plan.model.dtype))
    assert torch.equal(in_float32["adapter"], logits(load_as_trained(merge_plan, "cpu")))


def test_the_cpu_kernel_without_gradients_is_never_chosen(tmp_path):
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at their first evaluation (Linear4bit.forward)."""
    from bitsandbytes.nn import Linear4bit

    from kit.models.open import open_base

    base: Path = tiny.make_model(tmp_path / "base", hidden_size=96, intermediate_size=160)
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = open_base(base, dtype=torch.float32, quantization=fields, device="cpu")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
