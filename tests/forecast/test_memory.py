"""The forecast of a step's memory beside peaks that were measured, and what its terms must do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kit.forecast import memory
from kit.forecast.memory import Step, forecast_memory, measure_sizes

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}
ERROR = 0.03  # of the measured peaks
OFF, ALL = {"activation_checkpointing": False}, {"activation_checkpointing": True}


def zero(stage: int, offload: bool = False) -> dict[str, Any]:
    offload = {"device": "cpu" if offload else "none"}
    zero = {"stage": stage, "reduce_bucket_size": "auto", "overlap_comm": False}
    return {"zero_optimization": zero | {"offload_optimizer": offload, "offload_param": offload}}


def step(peft: dict[str, Any] | None = LORA, processes: int = 1, rows: int = 2, **more: Any) -> Step:
    given = {"quantization": None, "deepspeed": None, "weights": "bfloat16", "precision": "bfloat16", "trainer": OFF}
    tokens = more.pop("tokens", rows * 4096)
    return Step(peft=peft, processes=processes, rows=rows, tokens=tokens, **(given | more))


def peak(run: Step) -> float:
    sizes = measure_sizes(LLAMA_8B, run.peft)
    assert sizes
    found = forecast_memory(run, sizes)
    assert found
    return found.peak / 1e9


# GB of torch.cuda.max_memory_allocated: mostly TRL 1.16 on one or two H200s, torch 2.11, 2 rows of 4,096 tokens a GPU.
MEASURED = [
    (step(trainer=ALL), 21.6),
    (step(deepspeed=zero(2), processes=2), 66.3),
    (step(None, deepspeed=zero(3), processes=2, trainer=ALL), 72.4),
    (
        step(trainer=OFF | {"use_liger_kernel": True}),
        53.9,
    ),  # the kit's, tests/benchmarks/results/2026-11-30-h200-speed
]


@pytest.mark.parametrize("run, measured", MEASURED)
def test_measured_peaks(run: Step, measured: float):
    assert peak(run) == pytest.approx(measured, rel=ERROR)


def test_liger_is_more_than_the_error():
    without = replace(MEASURED[-1][0], trainer=OFF)
    assert peak(without) > (1 + 3 * ERROR) * MEASURED[-1][1]


def test_scores_are_kept_by_eager_attention_alone():
    scores = peak(step(attention="eager")) - peak(step(attention="sdpa_varlen"))
    assert scores == pytest.approx(32 * 8192 * 4096 * 8 * 32 / 1e9, rel=0.01)  # layers, tokens, a row's, bytes, heads


def test_a_lost_term_is_more_than_the_error(monkeypatch: pytest.MonkeyPatch):
    """Each of the terms that make a run: without one of them some measured peak is missed."""
    for name in ("_add_weights", "_add_training_state", "_add_activations"):
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, lambda *args: None)
            assert any(abs(peak(run) / measured - 1) > ERROR for run, measured in MEASURED), name


def test_every_term_says_where_it_comes_from():
    for run, _ in MEASURED:
        found = forecast_memory(run, measure_sizes(LLAMA_8B, run.peft))  # type: ignore[arg-type]
        assert found and found.exact and found.peak == max(found.peaks.values())
        assert all(term.bytes > 0 and term.formula and term.source for term in found.terms)
        assert found.outside_allocator > memory.CONTEXT_BYTES


def test_each_level_keeps_less_than_the_one_before():
    levels: list[dict[str, Any] | None] = [None, {"selective": True}, {"every_n_layers": 2}, {}, {"offload": True}]
    runs = [step(trainer={"activation_checkpointing": kwargs is not None, "activation_checkpointing_kwargs": kwargs})
            for kwargs in levels]  # fmt: skip
    peaks = list(map(peak, runs))
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_sharding_saves(stage: int):
    """ZeRO-2 splits what belongs to trained numbers, ZeRO-3 the base too."""
    one, four = (peak(step(None, deepspeed=zero(stage), processes=n, trainer=ALL)) for n in (1, 4))
    p = 8.03  # 10^9 parameters
    saved = (
        (2 + 12 + 4 + (2 if stage == 3 else 0)) * p * 3 / 4
    )  # the float32 gradients of the optimizer step are split
    assert one - four == pytest.approx(saved if stage == 2 else saved - 4 * p * 3 / 4, rel=0.05)


def test_a_quantized_base():
    """4.5 bits or 4.13 a weight with its scales, head and embedding in 16."""
    plain, double = (
        peak(step(quantization={"load_in_4bit": True, "bnb_4bit_use_double_quant": d})) for d in (False, True)
    )
    linears = 6.98  # 10^9, without head and embedding
    assert peak(step()) - plain == pytest.approx(linears * (2 - 0.5625), abs=0.5)  # TRL's adapter is smaller too
    assert plain - double == pytest.approx(linears * (0.5625 - 0.5159), abs=0.01)


def test_what_is_not_known_is_not_forecast():
    run = step()
    assert measure_sizes({"model_type": "unheard_of"}, None) is None
    assert measure_sizes(LLAMA_8B, {"peft_type": "IA3"}) is None
    odd = measure_sizes({**LLAMA_8B, "hidden_act": "relu"}, run.peft)
    found = forecast_memory(replace(run, deepspeed=None), odd)  # type: ignore[arg-type]
    assert found and not found.exact


def test_what_a_config_leaves_to_its_class():
    """A config.json with the sizes alone that its class has not by default is forecast as the whole one is."""
    short = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    whole = short | {"vocab_size": 32000, "intermediate_size": 11008, "hidden_act": "silu"}
    found = [forecast_memory(step(), measure_sizes(c, LORA)) for c in (short, whole)]  # type: ignore[arg-type]
    assert found[0] and found[1] and found[0].terms == found[1].terms
