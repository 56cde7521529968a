"""sdpa_varlen against eager attention, document by document, and what it refuses; the kernels are chosen by rule."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from tiny_architectures import APART, LEAKING, WITHOUT_SDPA, model_of

from kit.inspection.architectures import architecture_table
from kit.inspection.attention import ATTENTION, FLEX, choose_attention
from kit.models import attention

torch.set_num_threads(1)
attention.register()
LENGTHS = (23, 41, 9, 30)  # one longer than the window of tiny_architectures
CLOSE = 1e-5  # float32, of logits around 1; a mask with the window one off is 1e-3 away and more
TABLE = architecture_table()["attention"]
KINDS = {k: v for k, v in {**APART, **LEAKING}.items() if k in TABLE[ATTENTION]} | WITHOUT_SDPA
WITH_STATE = ("minimax", "jamba", "recurrent_gemma")  # their other layers carry a state along the row
POSITIONS_ALONE = {*APART, "vaultgemma"}  # these make a mask of the positions; others need the collator's lengths


def pair(kind: str) -> tuple:
    """The same weights with eager attention and with ours."""
    mine = FLEX if kind in WITHOUT_SDPA else ATTENTION
    models = [model_of(kind, name, **KINDS[kind]).eval() for name in ("eager", mine)]
    models[1].load_state_dict(models[0].state_dict())
    return tuple(models)


def packed_batch(ids: torch.Tensor) -> dict:
    """What TRL's collator makes of documents of LENGTHS in one row."""
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    longest = max(LENGTHS)
    return {
        "input_ids": ids, "position_ids": positions, "use_cache": False,
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def draw_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(4, 96, (rows, tokens), generator=torch.Generator().manual_seed(5))


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits.pow(2).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in WITH_STATE])
def test_packed_documents_are_as_they_are_alone(kind):
    eager, ours = pair(kind)
    ids = draw_ids(1, sum(LENGTHS))
    alone = torch.cat([eager(document, use_cache=False).logits for document in ids.split(LENGTHS, dim=1)], 1)
    packed = ours(**packed_batch(ids)).logits
    torch.testing.assert_close(packed, alone, atol=CLOSE, rtol=0)
    for mine, theirs in zip(gradients(ours, packed), gradients(eager, alone), strict=True):
        torch.testing.assert_close(mine, theirs, atol=CLOSE, rtol=0)
    if kind in POSITIONS_ALONE:  # without the collator's lengths, as a model that does not hand them on
        batch = {k: v for k, v in packed_batch(ids).items() if not k.startswith(("cu_", "max_"))}
        torch.testing.assert_close(ours(**batch).logits, alone, atol=CLOSE, rtol=0)


def test_each_that_sdpa_cannot_compute_is_tried():
    assert {*WITHOUT_SDPA} == {*TABLE[FLEX]}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_full_and_padded(kind):
    """Rows longer than the window too; of padding tokens nobody asks."""
    eager, ours = pair(kind)
    ids, mask = draw_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, use_cache=False).logits, eager(ids, use_cache=False).logits, atol=CLOSE, rtol=0
        )
        mask[1, 25:], mask[2, 7:] = 0, 0
        padded = [m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (ours, eager)]
    torch.testing.assert_close(*padded, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "opt", "gemma2", "gpt_oss"])
def test_generation(kind):
    """With a cache, from prompts of several lengths: what evaluation and a user's own callbacks do."""
    eager, ours = pair(kind)
    ids, mask = draw_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 3}
    assert torch.equal(ours.generate(ids, **settings), eager.generate(ids, **settings))


@pytest.mark.parametrize("fault", ["window", "lengths"])
def test_planted_faults_exceed_the_tolerance(fault, monkeypatch):
    eager, ours = pair("mistral")
    ids = draw_ids(1, sum(LENGTHS))
    batch = packed_batch(ids)
    if fault == "window":  # flash attention's way of counting
        loop = attention.loop_over_documents
        monkeypatch.setattr(attention, "loop_over_documents", lambda *a: loop(*a[:5], a[5] + 1, a[6]))
    else:
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([eager(document, use_cache=False).logits for document in ids.split(LENGTHS, dim=1)], 1)
        difference = (ours(**batch).logits - alone).abs().max()
    assert difference > 100 * CLOSE


def states(tokens: int = 12, heads: int = 4, groups: int = 2, size: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, h, tokens, size) for h in (heads, groups, groups)]


def test_what_no_kernel_computes_is_refused():
    layer = types.SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    padded = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="padded rows or packed documents"):
        attention.attention_forward(layer, *states(), padded, cu_seq_lens_q=ends, max_length_q=7)
    with pytest.raises(ValueError, match="no softcap"):
        attention.attention_forward(layer, *states(), None, softcap=50.0)
    with pytest.raises(ValueError, match="causal self-attention"):
        attention.attention_forward(layer, *states(), None, cu_seq_lens_q=ends, is_causal=False)
    with pytest.raises(ValueError, match="position bias"):
        attention.attention_forward(layer, *states(), None, cu_seq_lens_q=ends, position_bias=torch.zeros(1))


def test_a_model_that_does_not_support_sdpa_is_refused_by_transformers():
    with pytest.raises(ValueError, match="does not support"):
        model_of("gemma2", ATTENTION, **APART["gemma2"])


def test_masks():
    """None for whole rows, numbers for packed ones, sdpa's mask for the rest: padding, and what is not causal."""
    from transformers.masking_utils import (
        causal_mask_function,
        packed_sequence_compatibility_function,
        sliding_window_causal_mask_function,
    )  # fmt: skip

    size = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    assert attention.make_mask(**size, mask_function=causal_mask_function) is None
    assert attention.make_mask(**size, mask_function=sliding_window_causal_mask_function(3), local_size=3) is None
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    for window in (causal_mask_function, sliding_window_causal_mask_function(3)):
        packed = packed_sequence_compatibility_function(window, positions, numbers)
        made = attention.make_mask(**size, mask_function=packed, allow_is_causal_skip=False)
        assert made.dtype == torch.int32 and torch.equal(made[:, 0, 0], numbers.int())
    ends, longest = attention.boundaries(torch.zeros(2, 1, 6, 8), made)
    assert ends.tolist() == [0, 3, 6, 8, 12] and longest == 4
    both_ways = lambda b, h, q, k: numbers[b, q] == numbers[b, k]  # noqa: E731
    assert attention.make_mask(**size, mask_function=both_ways, allow_is_causal_skip=False).dtype == torch.bool
    padding = torch.ones(2, 6, dtype=torch.bool)
    assert attention.make_mask(**size, mask_function=causal_mask_function, attention_mask=padding) is None
    padding[0, 4:] = False
    assert attention.make_mask(**size, mask_function=causal_mask_function, attention_mask=padding).dtype == torch.bool
    chunked = types.SimpleNamespace(attention_chunk_size=4)
    made = attention.make_mask(**size, mask_function=causal_mask_function, allow_is_causal_skip=False, config=chunked)
    assert made.dtype == torch.bool


@pytest.mark.parametrize("words", [{}, {"enable_gqa": True}])  # torch 2.11 and 2.13
def test_the_signatures_of_varlen_attn(words, monkeypatch):
    calls = []
    real = inspect.signature(__import__("torch.nn.attention.varlen", fromlist=["varlen_attn"]).varlen_attn)
    assert {"window_size", "scale", "cu_seq_q", "max_q"} <= set(real.parameters)

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        calls.append((query.shape, key.shape, cu_seq_q.dtype, max_q, scale, window_size))
        return query

    def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
            enable_gqa=False):  # fmt: skip
        assert enable_gqa or key.shape == query.shape
        return old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if words else old)
    monkeypatch.setattr(attention, "takes_varlen", lambda *a: True)
    attention.varlen_arguments.cache_clear()
    assert attention.varlen_arguments() == words
    layer = types.SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    ends = torch.tensor([0, 5, 12])
    for window, expected in ((None, (-1, 0)), (3, (2, 0)), (9, (-1, 0))):
        output, _ = attention.attention_forward(
            layer, *states(), None, scaling=0.5, cu_seq_lens_q=ends, max_length_q=7, sliding_window=window
        )
        assert output.shape == (1, 12, 4, 8)
        assert calls.pop() == ((12, 4, 8), (12, 2, 8), torch.int32, 7, 0.5, expected)
    attention.varlen_arguments.cache_clear()


@pytest.mark.parametrize("change, takes", [
    ({}, True), ({"dtype": torch.float32}, False), ({"capability": (7, 5)}, False), ({"size": 264}, False),
    ({"size": 12}, False), ({"value": 16}, False), ({"tokens": 2**24}, False),
])  # fmt: skip
def test_what_varlen_attn_computes(change, takes, monkeypatch):
    given = {"dtype": torch.bfloat16, "capability": (9, 0), "size": 128, "tokens": 4096, **change}
    monkeypatch.setattr(attention, "capability", lambda device: given["capability"])
    shape = (1, 32, given["tokens"], given["size"])
    query = types.SimpleNamespace(is_cuda=True, dtype=given["dtype"], device=None, shape=shape)
    value = types.SimpleNamespace(shape=(*shape[:3], given.get("value", given["size"])))
    assert attention.takes_varlen(query, value, torch.zeros(9)) is takes
    assert attention.prefers_cudnn(query) is (given["dtype"] == torch.bfloat16 and given["capability"] >= (9, 0))


def test_dropout_is_drawn_within_documents():
    """As often as asked, and never across a border."""
    q, k, v = [s[0].transpose(0, 1) for s in states(12, 4, 4)]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.manual_seed(1)
    dropped = [attention.loop_over_documents(q, k, v, ends, None, None, 0.5) for _ in range(400)]
    whole = attention.loop_over_documents(q, k, v, ends, None, None, 0.0)
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(torch.stack(dropped).mean(0), whole, atol=0.3, rtol=0)
    v[5:] = 0
    assert (attention.loop_over_documents(q, k, v, ends, None, None, 0.5)[5:] == 0).all()


def test_the_operator_with_dropout_has_these_arguments(monkeypatch):
    """Its kernel needs a GPU; by position and name this torch's schema must take what it is handed."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    places = [a.name for a in schema.arguments if not a.kwarg_only]
    assert places[3:] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"]
    assert {"scale", "window_size_left", "window_size_right"} <= {a.name for a in schema.arguments if a.kwarg_only}
    handed = []

    def forward(query, *words, **named):
        handed.append((words[4:8], named))
        return query, None, None, None, None

    monkeypatch.setattr(attention, "takes_varlen", lambda *a: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    layer = types.SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    words = {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "max_length_q": 7, "scaling": 0.5}
    for window, sides in ((None, (None, None)), (3, (2, 0))):
        attention.attention_forward(layer, *states(), None, 0.1, sliding_window=window, **words)
        named = {"scale": 0.5, "window_size_left": sides[0], "window_size_right": sides[1]}
        assert handed.pop() == ((7, 7, 0.1, True), named)


@pytest.mark.parametrize("kind", [k for k in WITHOUT_SDPA if k not in attention.WITHOUT_FLEX])
@torch.no_grad()
def test_flex_attention_is_eager_attention(kind, monkeypatch):
    """Full, padded and packed rows; gradients need a GPU, where tests/benchmarks/attention.py compares them."""
    monkeypatch.setattr(attention, "compile_flex", lambda compiled: attention.flex_attention)
    monkeypatch.setattr(attention, "takes_flex", lambda *a: True)
    used, forward = [], attention.attend_by_blocks
    monkeypatch.setattr(attention, "attend_by_blocks", lambda *a, **k: used.append(1) or forward(*a, **k))
    eager, ours = pair(kind)
    ids, mask = draw_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    full = [m(ids, use_cache=False).logits for m in (ours, eager)]
    torch.testing.assert_close(*full, atol=CLOSE, rtol=0)
    mask[1, 25:], mask[2, 7:] = 0, 0
    padded = [m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (ours, eager)]
    torch.testing.assert_close(*padded, atol=CLOSE, rtol=0)
    ids = draw_ids(1, sum(LENGTHS))
    alone = torch.cat([eager(document, use_cache=False).logits for document in ids.split(LENGTHS, dim=1)], 1)
    packed = ours(**packed_batch(ids)).logits
    torch.testing.assert_close(packed, alone, atol=CLOSE, rtol=0)
    assert len(used) == 3 * ours.config.num_hidden_layers


def test_flex_attention_caps_and_has_sinks(monkeypatch):
    """Not compiled, which needs a GPU (tests/benchmarks/attention.py), against eager attention."""
    monkeypatch.setattr(attention, "compile_flex", lambda compiled: attention.flex_attention)
    q, k, v = states(24)
    seen = torch.ones(24, 24, dtype=torch.bool).tril()
    mask = attention.causal_blocks(24, None, torch.device("cpu"))
    for softcap, sinks in ((None, None), (2.0, None), (None, torch.tensor([1.0, -1.0, 0.5, 3.0]))):
        scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) / 8**0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[None, :, None, None].expand(1, 4, 24, 1)], -1)
        expected = scores.softmax(-1)[..., :24] @ v.repeat_interleave(2, 1)
        with torch.no_grad():
            found = attention.attend_by_blocks(q, k, v, mask, 8**-0.5, softcap, sinks)
        torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("text, trainer, deepspeed, chosen", [
    ({"model_type": "llama"}, {}, None, ATTENTION),
    ({"model_type": "gemma2"}, {}, None, FLEX),
    ({"model_type": "gemma2"}, {"packing": True}, None, FLEX),
    ({"model_type": "gpt_oss"}, {"padding_free": True}, None, FLEX),
    ({"model_type": "qwen2_moe"}, {}, None, None),  # its layers do not say their window
    ({"model_type": "falcon"}, {}, None, None),
    ({}, {}, None, None),
    ({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}, {}, None, None),
    ({"model_type": "llama"}, {"torch_compile": True}, None, None),
    ({"model_type": "llama"}, {"parallelism_config": {"cp_size": 2}}, None, None),
    ({"model_type": "llama"}, {}, {"sequence_parallel_size": 2}, None),
    ({"model_type": "llama"}, {}, {"sequence_parallel_size": 1}, ATTENTION),
])  # fmt: skip
def test_the_choice(text, trainer, deepspeed, chosen):
    assert choose_attention(text, trainer, deepspeed) == chosen
