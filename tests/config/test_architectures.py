"""The table of architectures is transformers' own; what cannot be trained here is refused with what can be done."""

from __future__ import annotations

import json
from pathlib import Path

import make_architectures
import pytest

from kit import api
from kit.errors import KitError
from kit.inspection import architectures


def test_the_file_is_what_the_generator_writes():
    """After an upgrade: `python tests/config/make_architectures.py`, and read the diff."""
    assert make_architectures.TARGET.read_text() == make_architectures.dump(make_architectures.build())


def test_every_causal_model_of_transformers_has_a_kind():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    kinds = {model_type: architectures.model_kind(model_type) for model_type in names}
    assert None not in kinds.values()
    assert {t for t, k in kinds.items() if k == "causal"} >= {"llama", "qwen3_5", "llama4", "gemma3_text", "gpt2"}
    assert [kinds[t] for t in ("mllama", "gemma3", "bert", "bart")] == [
        "multimodal", "multimodal", "encoder", "encoder_decoder"
    ]  # fmt: skip
    assert set(architectures.LINEARS) <= {t for t, k in kinds.items() if k == "causal"}


def test_gemma_3_with_a_tower_has_no_class_that_loads_its_text_part(tmp_path: Path):
    """Why it is refused. When this fails, transformers has learnt it: lift the refusal, make presets of the sizes."""
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    text = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert hasattr(AutoModelForCausalLM.from_pretrained(tmp_path).model, "vision_tower")
    _, info = Gemma3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any("self_attn" in name for name in info["missing_keys"])


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             vocab_size=64)  # fmt: skip
EXPERTS: dict[str, dict[str, object]] = {
    "llama": {}, "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip
# (architecture, PEFT method, its keys, whether what is named is all trained, none of it passed over or refused)
TRAINED = [
    ("llama", "LORA", {"target_modules": SEVEN}, True),
    ("llama", "LORA", {"target_modules": ["gate"]}, False),
    ("llama", "LORA", {"target_modules": ["q_proj", "gate"]}, False),
    ("llama", "LORA", {"target_modules": ["input_layernorm"]}, False),
    ("llama", "LORA", {"target_modules": ["mlp"]}, False),
    ("llama", "LORA", {"target_modules": ["embed_tokens"]}, True),
    ("llama", "LORA", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}, False),
    ("llama", "LORA", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}, True),
    ("llama", "LORA", {"target_modules": ["q_proj"], "modules_to_save": ["q_norm"]}, False),
    ("llama", "LORA", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, True),
    ("llama", "LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}, True),
    ("llama", "LN_TUNING", {"target_modules": ["q_norm"]}, False),
    *((base, "LORA", keys, True) for base in ("mixtral", "qwen3_moe") for keys in (
        {"target_modules": ["gate"]}, {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]})),
    ("mixtral", "LORA", {"target_modules": ["w1", "w2", "w3"]}, True),
    ("mixtral", "LORA", {"target_modules": SEVEN}, False),
    ("qwen3_moe", "LORA", {"target_modules": SEVEN}, True),
    ("qwen3_moe", "LOKR", {"target_modules": ["gate"]}, False),
    ("qwen3_moe", "LOKR", {"target_modules": ["q_proj"]}, True),
    ("qwen3_moe", "LN_TUNING", {"target_modules": ["post_attention_layernorm", "q_norm"]}, True),
]  # fmt: skip


@pytest.mark.parametrize("base, kind, keys, whole", TRAINED, ids=lambda v: str(v)[:50])
def test_what_is_named_is_what_peft_trains(base, kind, keys, whole, tmp_path: Path, chat: Path):
    """Refused, or warned of, where PEFT refuses a name or passes over it, and nowhere else."""
    from peft import get_peft_config, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(base, **SIZES, **EXPERTS[base])
    try:
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config),
            get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM"} | keys),
        )
        names = [f".{n}" for n, p in model.named_parameters() if p.requires_grad]
        experts = architectures.FUSED_EXPERTS.get(base, ())
        asked = [t for named in keys.values() for t in named]
        took = all(any(f".{t}." in n or (t in experts and ".experts." in n) for n in names) for t in asked)
    except (ValueError, TypeError):
        took = False
    assert took == whole
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"pad_token": "<pad>", "eos_token": "</s>", "chat_template": "x"}'
    )
    given = [f"peft.{k}=[{','.join(v)}]" for k, v in keys.items()]
    group = ["peft=lora"] if kind == "LORA" else ["peft=none", f"peft.peft_type={kind}"]
    stock = [f"model.name_or_path={tmp_path}", "model.random_init=true", f"dataset.path={chat}"]
    try:
        plan = api.compose(*stock, *group, *given)
        found = {w["rule"] for w in plan.warnings} & {"experts-missed"}
    except KitError as error:
        found = {p.rule for p in error.problems}
        assert found <= {"targets-match", "saved-match"}, error
    assert bool(found) != whole, found


def write_config(folder: Path, **config: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "chat_template": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return f"model.name_or_path={folder}"


@pytest.fixture
def refusal(tmp_path: Path, chat: Path, monkeypatch: pytest.MonkeyPatch):
    """The one problem of a run; None where it is valid."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def ask(*args: str):
        problems = api.check(f"dataset.path={chat}", "model.random_init=true", *args)
        assert len(problems) < 2, problems
        return problems[0] if problems else None

    return ask


NAMED = [
    (["model=llama3_2_11b"], "vision tower", "model=llama3_1_8b"),
    (["model=llama3_2_90b"], "vision tower", "model=llama3_1_70b"),
    (["model.name_or_path=meta-llama/Llama-3.2-90B-Vision-Instruct"], "vision tower", "model=llama3_1_70b"),
    (["model.name_or_path=someone/llama-3.2-11b-vision-tuned"], "vision tower", "model=llama3_1_8b"),
    (["model=gemma3_4b"], "vision tower", "model=gemma2_9b"),
    (["model.name_or_path=THUDM/chatglm-6b"], "transformers 4", "model=glm4_9b"),
    (["model.name_or_path=THUDM/chatglm2-6b-32k"], "transformers 4", "glm4_9b_int8_lora"),
    (["model.name_or_path=zai-org/chatglm3-6b", "model.trust_remote_code=true"], "transformers 4", "model=glm4_9b"),
    (["model=llama3_1_8b", "model.config.model_type=lama"], "'lama'", "did you mean llama?"),
    (["model=llama3_1_8b", "model.config.model_type=[1]"], "'[1]'", "kit list model"),
]


@pytest.mark.parametrize("args, problem, fix", NAMED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_refused_by_name_or_preset(args, problem, fix, refusal):
    found = refusal(*args)
    assert problem in found.problem and fix in found.fix and "model." in found.where


CONFIGS = [
    ({"model_type": "mllama", "text_config": {"hidden_size": 8192}}, "vision tower", "model=llama3_1_70b"),
    ({"model_type": "mllama", "text_config": {"hidden_size": 4096}}, "vision tower", "model=llama3_1_8b"),
    ({"model_type": "qwen2_audio"}, "audio tower", "kit list model"),
    ({"model_type": "chatglm", "auto_map": {"AutoModel": "m.M"}}, "transformers 4", "model=glm4_9b"),
    ({"model_type": "t5"}, "encoder-decoder", "Seq2SeqTrainer"),
    ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder", "Seq2SeqTrainer"),
    ({"model_type": "bert"}, "encoder (bert)", "transformers' own Trainer"),
    ({"model_type": "qwen33"}, "'qwen33'", "did you mean qwen3?"),
    ({"model_type": "vit"}, "'vit'", ""),
    ({"model_type": "newest", "auto_map": {"AutoModel": "m.M"}}, "'newest'", "model.trust_remote_code=true"),
]


@pytest.mark.parametrize("config, problem, fix", CONFIGS, ids=lambda v: str(v)[:40])
def test_refused_by_config_json(config, problem, fix, refusal, tmp_path: Path):
    found = refusal(write_config(tmp_path / "m", **config))
    assert problem in found.problem and fix in found.fix and "model.name_or_path" in found.where


def test_what_can_be_trained_is_not_refused(refusal, tmp_path: Path):
    """A decoder made of an encoder's layers, a text part that transformers takes out by itself, allowed code."""
    assert refusal(write_config(tmp_path / "m", model_type="bert", is_decoder=True)) is None
    assert refusal(write_config(tmp_path / "m", model_type="qwen3_5", text_config={"hidden_size": 64})) is None
    own = write_config(tmp_path / "m", model_type="newest", auto_map={"AutoModelForCausalLM": "m.M"})
    assert refusal(own, "model.trust_remote_code=true") is None
    plain = write_config(tmp_path / "Llama-3.2-11B-Vision-text", model_type="llama", hidden_size=64)
    assert refusal(plain) is None  # a folder is what its config.json says, whatever it is called


def test_a_transformers_that_is_not_the_tables_may_know_more(refusal, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(architectures, "version", lambda name: "99.0")
    newest = write_config(tmp_path / "m", model_type="newest")
    assert refusal(newest) is None
    notes = architectures.refuse_config("m", {"model_type": "newest"}, remote_code=False)[1]
    assert len(notes) == 1 and "'newest'" in notes[0] and "99.0" in notes[0]


def test_names_of_a_model_without_bounds_are_not_listed():
    """A typed layer count of 10^12 must not become a list."""
    assert architectures.module_names({"model_type": "llama", "num_hidden_layers": 10**12}) is None
    dense_between = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "mlp_only_layers": [0]}
    assert architectures.module_names(dense_between) is None
