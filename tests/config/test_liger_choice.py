"""When `trainer.use_liger_kernel=auto` is true, and what becomes of it in a plan, a trainer and an ejected script."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from soak import make_inputs
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from kit import api
from kit.ejecting import script
from kit.inspection import liger
from kit.models import kernels
from kit.models.kernels import describe_kernels, liger_kernel_config

LLAMA = {"model_type": "llama"}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(liger, "installed_version", lambda name: "0.8.5")


@pytest.mark.parametrize("text, trainer, precision, on_cpu, reason", [
    (LLAMA, {}, "bfloat16", False, ""),
    (LLAMA, {}, "float16", False, ""),
    (LLAMA, {}, "bfloat16", True, "Liger's are for GPUs"),
    (LLAMA, {}, "float32", False, "Liger's are for bfloat16 and float16"),
    (LLAMA, {"torch_compile": True}, "bfloat16", False, "torch.compile makes its own"),
    ({"model_type": "mixtral"}, {}, "bfloat16", False, "Liger's are not known to fit mixtral"),
    ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "m.M"}}, {}, "bfloat16", False,
     "Liger's are not known to fit llama"),
])  # fmt: skip
def test_why_not(text, trainer, precision, on_cpu, reason, installed):
    assert liger.why_not_liger(text, trainer, precision, on_cpu) == reason


@pytest.mark.parametrize("version, reason", [
    (None, "liger-kernel is not installed"), ("0.8.4", "liger-kernel 0.8.4 is older than 0.8.5"),
    ("0.10.0.dev1", ""),
])  # fmt: skip
def test_it_must_be_installed(version, reason, monkeypatch):
    monkeypatch.setattr(liger, "installed_version", lambda name: version)
    assert liger.why_not_liger(LLAMA, {}, "bfloat16", False) == reason


def test_a_plan_holds_a_plain_value(tmp_path, installed):
    on_gpu = [o for o in make_inputs(tmp_path) if "use_cpu" not in o and "bf16" not in o]
    on_gpu += ["trainer.use_cpu=false", "trainer.bf16=true"]
    plan = api.compose(*on_gpu, here=False)
    assert plan.trainer["use_liger_kernel"] is True and plan.composed["trainer"]["use_liger_kernel"] == "auto"
    off = api.compose(*on_gpu, "trainer.use_liger_kernel=false", here=False)
    assert off.trainer["use_liger_kernel"] is False and off.hash == plan.hash
    assert "liger" not in "\n".join(script.training_argument_lines(plan))
    asked = api.compose(*on_gpu, "trainer.use_liger_kernel=true", here=False)
    assert "use_liger_kernel=True" in "\n".join(script.training_argument_lines(asked))
    on_cpu = api.compose(*on_gpu, "trainer.use_cpu=true", here=False)
    assert on_cpu.trainer["use_liger_kernel"] is False


def test_an_ejected_script_has_no_selective_checkpointing(tmp_path):
    """TRL's would not reach the base below an adapter, and end in an error."""
    given = "trainer.activation_checkpointing_kwargs={selective: true}"
    lines = "\n".join(script.training_argument_lines(api.compose(*make_inputs(tmp_path), given)))
    assert "selective" not in lines and "activation_checkpointing_kwargs={}" in lines


@pytest.mark.parametrize("rule, given", [
    ("offload-cpu", ["trainer.activation_checkpointing_kwargs={offload: true}", "trainer.use_cpu=true"]),
    ("selective-checkpointing", ["trainer.activation_checkpointing_kwargs={selective: true}",
     "trainer.use_liger_kernel=true", "trainer.liger_kernel_config={rope: true}"]),
])  # fmt: skip
def test_what_would_fail_or_train_wrongly_is_refused(rule, given, tmp_path):
    stock = make_inputs(tmp_path)
    assert rule in {p.rule for p in api.check(*stock, *given)}
    harmless = ["trainer.use_cpu=false", "launch.num_gpus=1", "trainer.use_liger_kernel=false", given[0]]
    assert rule not in {p.rule for p in api.check(*stock, *harmless)}


def arguments(**values):
    defaults = {"use_liger_kernel": True, "liger_kernel_config": None, "activation_checkpointing_kwargs": None}
    return SimpleNamespace(**{**defaults, "device": SimpleNamespace(type="cuda"), **values})


def test_the_kernels_of_a_trainer(installed):
    """Losses are TRL's; RoPE that writes in place is not Liger's where selective checkpointing keeps its input."""
    no_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger_kernel_config(arguments()) == no_loss
    assert liger_kernel_config(arguments(liger_kernel_config={"swiglu": False})) == {**no_loss, "swiglu": False}
    selective = arguments(activation_checkpointing_kwargs={"selective": True})
    assert liger_kernel_config(selective) == {**no_loss, "rope": False}
    selective.liger_kernel_config = liger_kernel_config(selective)
    config = LlamaConfig()
    assert describe_kernels(selective, config, "bfloat16").endswith("activation, without rope")
    assert describe_kernels(arguments(use_liger_kernel=False), config, "bfloat16").endswith("use_liger_kernel=false")
    cpu = arguments(use_liger_kernel=False, device=SimpleNamespace(type="cpu"))
    assert describe_kernels(cpu, config, "float32") == "transformers' own: Liger's are for GPUs"


def test_a_later_trainer_finds_the_module_as_it_was(monkeypatch):
    """Liger's patch of a class is for the process; the next trainer may keep what its RoPE writes into."""
    monkeypatch.setattr(kernels, "UNPATCHED", {})
    rotary = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)  # put back whatever happens
    base = object.__new__(LlamaForCausalLM)
    kernels.undo_liger(base, use_liger_kernel=True)
    for with_liger in (True, False):
        modeling_llama.apply_rotary_pos_emb = print  # what training with Liger does
        kernels.undo_liger(base, with_liger)
        assert modeling_llama.apply_rotary_pos_emb is rotary
