"""Packed documents are proven apart on the model that trains: what passes, what is refused, what stays as it was."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tiny_architectures import APART, EAGER_ONLY, LEAKING, REFUSING, WITHOUT_SDPA, model_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from kit.config.rules.model import MASKED_BY_ROW, RECURRENT
from kit.errors import KitError
from kit.inspection.attention import ATTENTION, FLEX
from kit.models import attention
from kit.training import packing_proof
from kit.training.packing_proof import PackingProofCallback, prove_packing
from kit.training.trainer import ModifiedTrainer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packing"


def trainer_of(base, out, model=None, peft=None, **changes):
    args = SFTConfig(
        output_dir=str(out), report_to="none", logging_steps=1, save_strategy="no",
        per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, disable_tqdm=True, seed=7,
        gradient_checkpointing=False, **{"packing": True, "max_length": 64, "bf16": False, "use_cpu": True, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base) if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = tiny.dataset(tiny.text_rows())
    return ModifiedTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", APART)
def test_attention_keeps_documents_apart(kind, attention, base, tmp_path):
    if kind in EAGER_ONLY and attention == "sdpa":
        with pytest.raises(ValueError, match="does not support"):
            model_of(kind, attention, **APART[kind])
        return
    proof = prove_packing(trainer_of(base, tmp_path, model_of(kind, attention, **APART[kind])))
    assert proof["difference"] <= proof["allowed"] < 1e-4


@pytest.mark.parametrize("kind", LEAKING)
def test_a_leak_is_refused(kind, base, tmp_path, cache):
    with pytest.raises(KitError, match="leak into each other.*largest difference") as refused:
        prove_packing(trainer_of(base, tmp_path, model_of(kind, **LEAKING[kind])))
    assert refused.value.problems[0].where == "trainer.packing"
    assert not cache.exists()  # a failure is proven anew each time


@pytest.mark.parametrize("kind", ["opt", "afmoe", "biogpt", "granitemoehybrid", "gpt_oss"])
def test_lengths_keep_apart_what_a_mask_does_not(kind, base, tmp_path):
    """With attention of the kit's own; an adapter in between hands the lengths on too."""
    attention.register()
    name = FLEX if kind in WITHOUT_SDPA else ATTENTION
    for peft in (None, LoraConfig(target_modules="all-linear", r=2)):
        proof = prove_packing(trainer_of(base, tmp_path, model_of(kind, name, **LEAKING[kind]), peft))
        assert proof["difference"] <= proof["allowed"] < 1e-4


def test_the_rule_names_what_leaks():
    """`kit check` warns of each before anything is loaded."""
    named = {*RECURRENT, *MASKED_BY_ROW}
    assert {*LEAKING, *REFUSING} <= named
    assert not named & {*APART} and {*MASKED_BY_ROW} <= {*LEAKING}


@pytest.mark.parametrize("kind", REFUSING)
def test_a_model_that_takes_no_packed_rows_is_refused(kind, base, tmp_path):
    with pytest.raises(KitError, match="takes no packed documents: .*causal_conv1d"):
        prove_packing(trainer_of(base, tmp_path, model_of(kind, **REFUSING[kind])))


@pytest.mark.parametrize("changes", [{"packing": False, "padding_free": True, "max_length": None}, {"bf16": True}])
def test_other_ways_of_packing(changes, base, tmp_path):
    proof = prove_packing(trainer_of(base, tmp_path, **changes))
    assert 0 <= proof["difference"] <= proof["allowed"] < 0.3
    trainer = trainer_of(base, tmp_path, packing=False)
    trainer.model = None  # not looked at
    assert prove_packing(trainer) is None


def test_half_precision_weights(base, tmp_path):
    for kind in ("llama", "qwen3_moe"):
        proof = prove_packing(trainer_of(base, tmp_path, model_of(kind, "sdpa", **APART[kind]).to(torch.bfloat16)))
        assert proof["difference"] <= proof["allowed"] < 0.3
    with pytest.raises(KitError, match="leak into each other"):
        prove_packing(trainer_of(base, tmp_path, model_of("jamba", **LEAKING["jamba"]).to(torch.bfloat16)))


@pytest.mark.parametrize("lost", [("position_ids", "cu_seq_lens_q", "cu_seq_lens_k"), ("position_ids",)])
def test_a_collator_that_loses_the_positions_is_found(lost, base, tmp_path):
    trainer = trainer_of(base, tmp_path)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k not in lost}
    trainer.data_collator.pad_token_id = 3
    with pytest.raises(KitError, match="leak into each other"):
        prove_packing(trainer)


def test_positions_without_a_mask_are_found(base, tmp_path):
    """Every position is right and only the attention goes across."""
    trainer = trainer_of(base, tmp_path)
    inner = trainer.model.model.forward
    trainer.model.model.forward = lambda input_ids, **kwargs: inner(
        input_ids, **{"attention_mask": torch.ones_like(input_ids), **kwargs}
    )
    with pytest.raises(KitError, match="leak into each other"):
        prove_packing(trainer)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_trained_prompts_are_refused(kind, base, tmp_path):
    """PEFT puts one prompt before the whole row and lets go of the positions."""
    with pytest.raises(KitError, match="packed documents"):
        prove_packing(trainer_of(base, tmp_path, peft=kind(num_virtual_tokens=4, task_type="CAUSAL_LM")))


def test_a_base_without_finite_numbers_is_no_leak(base, tmp_path):
    trainer = trainer_of(base, tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[5] = torch.nan
    with pytest.raises(KitError, match="not finite") as refused:
        prove_packing(trainer)
    assert refused.value.code == 4


def test_what_was_proven_is_remembered(base, tmp_path, cache, monkeypatch, capsys):
    first = prove_packing(trainer_of(base, tmp_path))
    assert "documents stay apart (largest difference" in capsys.readouterr().out
    (file,) = cache.iterdir()
    monkeypatch.setattr(packing_proof, "compare_documents", None)
    assert prove_packing(trainer_of(base, tmp_path)) == first
    assert "proven before" in capsys.readouterr().out
    for other in (model_of("llama"), model_of("qwen3"), model_of("llama").bfloat16()):
        with pytest.raises(TypeError):  # another attention, architecture, precision: not this proof
            prove_packing(trainer_of(base, tmp_path, other))
    known = json.loads(file.read_text())
    assert known["proof"] == first and known["setting"]["attention"] == "sdpa"
    for damage in ("{damaged", "[]", '{"proof": null}'):
        file.write_text(damage)
        with pytest.raises(TypeError):
            prove_packing(trainer_of(base, tmp_path))


def test_code_of_the_bases_own_is_proven_each_time(base, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        trainer = trainer_of(base, tmp_path)
        monkeypatch.setattr(type(trainer.model), "__module__", "transformers_modules.base.modeling")
        prove_packing(trainer)
        monkeypatch.undo()
        assert "proven before" not in capsys.readouterr().out


def state_of(trainer):
    arrays = np.random.get_state()[1].tolist()
    modes = [m.training for m in trainer.model.modules()]
    buffers = {n: b.clone() for n, b in trainer.model.named_buffers()}
    return [
        random.getstate(),
        arrays,
        torch.get_rng_state().tolist(),
        modes,
        [p.grad for p in trainer.model.parameters()],
    ], buffers


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")])
def test_training_is_bit_equal_with_the_proof(peft, base, tmp_path, monkeypatch):
    found = []
    for proves in (False, True):
        model = model_of("llama", "sdpa", attention_dropout=0.1)
        model.model.layers[0].mlp.eval()  # a mode that is not its parent's stays
        trainer = trainer_of(base, tmp_path, model, peft)
        if proves:
            before, buffers = state_of(trainer)
            assert prove_packing(trainer)
            after, left = state_of(trainer)
            assert before == after and all(torch.equal(buffers[n], b) for n, b in left.items())
            trainer.add_callback(PackingProofCallback(trainer))
            monkeypatch.setenv("KIT_CACHE", str(tmp_path / "another"))
        trainer.train()
        losses = [(h["loss"], h["grad_norm"]) for h in trainer.state.log_history if "loss" in h]
        found.append((losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}))
        assert len(losses) == 2
    assert trainer.packing_proof["difference"] < 1e-4 and list((tmp_path / "another" / "packing").iterdir())
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, found[1][1][n]) for n, p in found[0][1].items())
