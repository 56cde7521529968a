"""The table of activations is what autograd keeps, to the byte; what it does not know is said, and not too small."""

from __future__ import annotations

import itertools
import json
import weakref
from typing import Any

import make_activations
import pytest
import torch
from make_activations import VARIANTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kit.forecast.activations import TABLE, read_table, saved_per_token
from kit.forecast.head import head_bytes

NEW = 1000  # shapes from here on are not the generator's


def measure(kind: str, variant: str, targets: Any, dropout: float, at: int, spoil: Any = None) -> tuple[Any, Any]:
    """What autograd keeps in a model of four layers, and what the table says of its config."""
    config, rank = make_activations.shape(kind, at)
    model = make_activations.make_model(kind, {**config, "num_hidden_layers": 4}, variant, targets, dropout, rank)
    if spoil is not None:
        spoil(model)
    base, adapter, autocast = VARIANTS[variant]
    text = (model if adapter is None else model.get_base_model()).config.to_dict()
    peft = None if adapter is None else {"r": rank, "target_modules": targets, "lora_dropout": dropout}
    dtypes = {"base_dtype": str(base)[6:], "adapter_dtype": str(adapter)[6:]}
    saved = saved_per_token(text, peft=peft, autocast=autocast, row_tokens=1000, **dtypes)
    return make_activations.measure(model, variant), saved


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("kind, variant, targets, dropout", [
    ("llama", "lora float32 autocast", SEVEN, 0.0),
    ("llama", "lora bfloat16", ["q_proj", "v_proj"], 0.1),
    ("qwen3", "lora float32 autocast", SEVEN, 0.1),
    ("gemma2", "lora bfloat16 autocast", SEVEN[:4], 0.0),
    ("gpt2", "lora float32 autocast", "all-linear", 0.1),
    ("gpt2", "full bfloat16", None, 0.0),
    ("mixtral", "lora bfloat16", SEVEN[:4], 0.1),
    ("mixtral", "lora bfloat16", "all-linear", 0.0),
    ("phi3", "full float32 autocast", None, 0.0),
])  # fmt: skip
def test_the_table_is_what_autograd_keeps(kind, variant, targets, dropout):
    measured, saved = measure(kind, variant, targets, dropout, NEW)
    assert saved.exact
    assert saved.bytes_per_token_layer == measured.token + 1000 * measured.squared
    assert saved.outside_per_token == measured.outside_token
    assert saved.bytes_per_layer + saved.copies_per_parameter * measured.matrices == measured.layer


def keep_one_more(model: Any) -> None:
    """Let each MLP square its result, as a kernel would that keeps one tensor more."""
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output * output)


def test_a_tensor_more_is_seen():
    measured, saved = measure("llama", "lora bfloat16", SEVEN, 0.0, NEW, keep_one_more)
    hidden = make_activations.shape("llama", NEW)[0]["hidden_size"]
    assert measured.token - saved.bytes_per_token_layer == 2 * hidden


def test_fake_tensors_keep_what_real_ones_do():
    """On the CPU, float32: differences between 2 and 4 layers and between 32 and 64 tokens."""
    config, rank = make_activations.shape("llama", NEW)
    kept = {}
    for layers, tokens in itertools.product((2, 4), (32, 64)):
        torch.manual_seed(0)
        model = make_activations.make_model(
            "llama", {**config, "num_hidden_layers": layers}, "lora float32", SEVEN, 0.1, rank, "cpu"
        )
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = model.get_base_model().base_model(input_ids=torch.ones(1, tokens, dtype=torch.long))
        kept[layers, tokens] = sum(s.nbytes() for key, s in seen.items() if key not in own)
        del output
    slope = (kept[4, 64] - kept[4, 32] - kept[2, 64] + kept[2, 32]) / (2 * 32)
    _, saved = measure("llama", "lora float32", SEVEN, 0.1, NEW)
    assert slope == saved.bytes_per_token_layer and saved.exact


def test_the_file_is_what_the_generator_writes():
    """Of one family, the rows of one variant; all: `python tests/forecast/make_activations.py`, and read the diff."""
    known = next(g for g in read_table() if "llama" in g["types"])
    group = next(g for g in read_table() if "gpt2" in g["types"])
    rows = make_activations.rows_of("gpt2", list(known["rows"].values()), only="lora float32 autocast all")
    assert len(rows) == 2 and rows.items() <= group["rows"].items()
    assert group["targets"] == make_activations.linears_of("gpt2")
    assert group["outputs"] == make_activations.outputs_of("gpt2")
    assert group["types"]["gpt2"] == make_activations.switches_of("gpt2")
    assert TABLE.read_text() == make_activations.dump(json.loads(TABLE.read_text()))


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
}  # fmt: skip
LORA = {"r": 16, "target_modules": SEVEN, "lora_dropout": 0.0}


@pytest.mark.parametrize("text, peft", [
    ({"model_type": "never_seen"}, LORA),
    ({"hidden_act": "gelu_new"}, LORA),
    ({}, {**LORA, "use_dora": True}),
    ({}, {**LORA, "target_modules": r".*_proj"}),
    ({}, {**LORA, "target_modules": ["q_proj", "down_proj"]}),
])  # fmt: skip
def test_what_was_not_measured_is_not_called_exact(text, peft):
    exact = saved_per_token(LLAMA_8B, peft=LORA)
    nearest = saved_per_token({**LLAMA_8B, **text}, peft=peft)
    assert exact.exact and exact.formula == "12h+8i+4q+4kv+4H+14r+8"
    assert not nearest.exact and nearest.bytes_per_token_layer >= exact.bytes_per_token_layer


def test_selective_checkpointing_keeps_the_results_of_linear_layers_and_of_attention():
    saved = saved_per_token(LLAMA_8B, peft=LORA, selective=True)
    hidden, mlp, heads, kv = 4096, 14336, 32, 1024
    outputs = hidden + 2 * kv + hidden + 2 * mlp + hidden
    assert saved.bytes_per_token_layer == 2 * hidden + 2 * (outputs + hidden) + 4 * heads
    assert saved.recomputed_per_token == saved_per_token(LLAMA_8B, peft=LORA).bytes_per_token_layer


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that live at once, those of `own` left out."""

    def __init__(self, *own: torch.Tensor):
        super().__init__()
        self.own, self.live, self.peak = {t.untyped_storage()._cdata for t in own}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.own and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("tokens, hidden, vocabulary, trains_head, dtype, fused", [
    (300, 64, 5000, False, "float32", True),
    (300, 64, 5000, True, "float32", True),
    (40, 16, 40000, False, "float32", True),
    (300, 64, 5000, False, "bfloat16", False),
    (300, 64, 5000, False, "float32", False),
    (20, 500, 5000, True, "float32", False),
])  # fmt: skip
def test_the_peak_of_head_and_loss(tokens, hidden, vocabulary, trains_head, dtype, fused):
    from transformers.loss.loss_utils import ForCausalLMLoss
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    number = getattr(torch, dtype)
    states = torch.randn(tokens, hidden, dtype=number, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=number, requires_grad=trains_head)
    labels = torch.randint(0, vocabulary, (1, tokens))
    with Peak(states, weight, labels) as measured:
        if fused:
            asked = ("log_probs", "entropy", "is_top1")  # SFTTrainer's
            size = _CHUNKED_LOGPROB_CHUNK_SIZE
            chances = ChunkedLogProbFunction.apply(states, weight, None, labels[0], 1.0, size, None, 1.0, asked)
            (-chances[0].sum()).backward()
        else:
            logits = (states @ weight.T)[None]
            ForCausalLMLoss(logits, labels, vocabulary).backward()
    text = {"hidden_size": hidden, "vocab_size": vocabulary, "num_attention_heads": 1}
    settings = {"trains_head": trains_head, "base_dtype": dtype, "autocast": False, "triton": False, "fused": fused}
    assert head_bytes(text, tokens, **settings)[0] == pytest.approx(measured.peak, rel=0.003)
    assert head_bytes(text, tokens + tokens // 20, **settings)[0] != pytest.approx(measured.peak, rel=0.003)
