"""What `kit check` says is trained is what transformers builds and PEFT makes of it, over all known architectures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import make_parameters
import pytest

from kit import api
from kit.inspection import trainable
from kit.inspection.trainable import abbreviate, count_trained, parameter_table

TYPES = sorted(parameter_table()["types"])
FOUR = ["q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "kv_b_proj"]


def make_config(model_type: str, seed: int) -> dict[str, Any]:
    """A small config.json of the type with other numbers than the table was made with."""
    draw = random.Random(seed)
    entry = parameter_table()["types"][model_type]
    heads, hidden = draw.choice([4, 8]), draw.choice([64, 128])
    sizes = {"hidden_size": hidden, "n_embd": hidden, "word_embed_proj_dim": hidden, "num_attention_heads": heads,
             "n_head": heads, "num_key_value_heads": draw.choice([1, 2]), "vocab_size": draw.choice([256, 320]),
             "head_dim": draw.choice([16, 32]), "intermediate_size": draw.choice([72, 144]), "ffn_dim": 144,
             "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64, "num_experts": 4,
             "num_local_experts": 4, "n_routed_experts": 8, "n_shared_experts": 2, "q_lora_rank": 24,
             "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16,
             "moe_num_experts": 4, "moe_num_shared_experts": 1, "n_positions": 256, "max_position_embeddings": 256,
             "rotary_dim": 8}  # fmt: skip
    kept = {k: v for k, v in sizes.items() if k in entry["defaults"]}
    flags = {k: draw.random() < 0.5 for k in make_parameters.FLAGS if k in entry["defaults"]}
    split = {"first_k_dense_replace": draw.choice([0, 1, 2]), "mlp_only_layers": draw.choice([[], [1]])}
    more = {k: v for k, v in split.items() if entry["split"] == k}
    more |= {"n_inner": 96} if "n_inner" in entry["defaults"] and draw.random() < 0.5 else {}
    more |= {"rotary_dim": 4, "n_head": heads} if model_type in ("gptj", "gpt2") else {}
    tied = {"tie_word_embeddings": draw.random() < 0.5}
    return {"model_type": model_type, entry["count"]: 3, **kept, **flags, **more, **tied, **make_parameters.TOKENS}


def build(config: dict[str, Any]) -> Any:
    kind = config["model_type"]
    return make_parameters.build_model(kind, {k: v for k, v in config.items() if k != "model_type"})[1]


def adapt(config: dict[str, Any], peft: dict[str, Any]) -> int:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build(config), LoraConfig(**{"task_type": "CAUSAL_LM", **peft}), low_cpu_mem_usage=True)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_is_counted(model_type: str):
    """The bases themselves, at sizes that the table has not seen: names and shapes."""
    for seed in (1, 2):
        config = make_config(model_type, seed)
        model = build(config)
        modules = trainable.list_modules(config)
        assert modules is not None, config
        mine = {f"{n}.{k}": s for n, m in modules.items() for k, s in m.shapes.items()}
        theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
        head = {n for n in mine if n.rpartition(".")[0].endswith(("lm_head", "embed_out"))}
        assert {n: s for n, s in mine.items() if n in theirs} == theirs, config
        assert set(mine) - set(theirs) <= head, config
        counted = count_trained(config, None)
        assert counted and counted.total == counted.numbers == sum(p.numel() for p in model.parameters()), config


@pytest.mark.parametrize("model_type", TYPES)
def test_what_peft_makes_of_it(model_type: str):
    config = make_config(model_type, 3)
    some = [t for t in FOUR if any(n.endswith(f".{t}") for n in trainable.list_modules(config) or {})]
    cases: list[dict[str, Any]] = [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": some[:2], "rank_pattern": {some[0]: 7}, "modules_to_save": ["lm_head"]},
    ]
    if model_type in ("llama", "gpt2", "qwen2"):
        cases += [
            {"r": 4, "target_modules": some, "use_dora": True},
            {"r": 4, "target_modules": some, "lora_bias": True},
            {"r": 4, "target_modules": some, "bias": "all"},
            {"r": 4, "target_modules": some, "bias": "lora_only"},
            {"r": 4, "target_modules": [*some, "embed_tokens", "wte"], "layers_to_transform": [0, 2]},
            {"r": 4, "target_modules": [*some, "embed_tokens", "wte"]},
            {"r": 4, "target_modules": rf".*\.1\..*({'|'.join(some)})"},
            {"r": 4, "target_modules": "all-linear", "exclude_modules": some[:1]},
        ]
    experts = [
        n for n, m in (trainable.list_modules(config) or {}).items() if any(len(s) == 3 for s in m.shapes.values())
    ]
    if experts:
        names = [".".join([*experts[0].split(".")[-2:], "gate_up_proj"])]
        cases.append({"r": 4, "target_modules": some[:1], "target_parameters": names})
    for peft in cases:
        if "lm_head" in peft.get("modules_to_save", ()) and config["tie_word_embeddings"]:
            config = config | {"tie_word_embeddings": False}
        counted = count_trained(config, peft)
        assert counted is not None and counted.numbers == adapt(config, peft), (config, peft)
        if counted.has_experts and parameter_table()["types"][model_type]["converted"]:
            everything = peft["target_modules"] == "all-linear"
            assert counted.router == everything and counted.experts == (
                everything or bool(peft.get("target_parameters"))
            )


def test_the_file_is_what_the_generator_writes():
    """After an upgrade: `python tests/config/make_parameters.py`, and read the diff. Two types stand for all."""
    for model_type in ("llama", "deepseek_v3"):
        assert make_parameters.build_type(model_type) == parameter_table()["types"][model_type]


def test_what_is_not_known_is_not_counted():
    llama = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}
    assert count_trained({"model_type": "newest", "num_hidden_layers": 2}, None) is None
    assert count_trained({**llama, "num_hidden_layers": 10**12}, None) is None
    assert count_trained({**llama, "hidden_size": "wide"}, None) is None
    assert count_trained(llama, {"peft_type": "LOKR", "target_modules": ["q_proj"]}) is None
    assert count_trained(llama, {"layer_replication": [[0, 2]], "target_modules": ["q_proj"]}) is None
    assert count_trained(llama, {"target_modules": ["input_layernorm"]}) is None


def test_check_says_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}\n')

    def notes(*args: str) -> str:
        return " ".join(n for n in api.compose("dataset.path=x.jsonl", *args).notes if n.startswith("trains "))

    attention = "peft.target_modules=[q_proj,k_proj,v_proj,o_proj]"
    moe = notes("model=qwen3_30b_a3b", "peft.r=16", attention)
    assert moe.startswith("trains 13.4 M of 30.5 B")
    assert moe.endswith("k_proj, o_proj, q_proj, v_proj of 48 layers; router: no; experts: no")
    everything = notes("model=qwen3_30b_a3b", "peft.r=16")  # PEFT's all-linear since the experts are fused
    assert everything.startswith("trains 996.5 M") and everything.endswith("router: yes; experts: yes")
    experts = notes("model=qwen3_30b_a3b", attention, "peft.target_parameters=[mlp.experts.gate_up_proj]")
    assert experts.endswith("router: no; experts: yes") and "gate_up_proj" in experts
    assert notes("model=llama3_1_8b", "peft=none", "trainer.learning_rate=1.0e-5") == "trains all 8.0 B parameters"
    assert notes("model=gpt2", "peft.target_modules=[c_attn]", "tokenizer.pad_token='!'").startswith(
        "trains 589.8 k of"
    )
    assert [abbreviate(n) for n in (999, 1000, 13_100_000, 30_500_000_000)] == ["999", "1.0 k", "13.1 M", "30.5 B"]
