"""Each preset is the model that it names: parameters counted on the meta device, linear layers, composition."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_rows

from kit import api
from kit.inspection import architectures, model
from kit.schema.run_plan import Model
from kit.system import paths

FILES = {f.stem: f for f in sorted((paths.CONF / "model").glob("*.yaml")) if f.stem != "none"}
QUICKSTART = {"quickstart_base": 612_224, "quickstart_init": 612_224}
# As published, tied parameters once.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_7b_chat": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_8b_instruct": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "deepseek_r1_distill_llama_8b": 8_030_261_248,
    "qwen3_0b6": 596_049_920,
    "qwen3_1b7": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen2_5_7b": 7_615_616_512,
    "mistral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472,  # with the vision tower
    "gemma3_12b": 12_187_325_040,
    "gemma3_27b": 27_432_406_640,
    "phi4": 14_659_507_200,
    "opt_6b7": 6_658_473_984,
    "glm4_9b": 9_400_279_040,
    "gpt2": 124_439_808,
}
REFUSED = ["gemma3_4b", "gemma3_12b", "gemma3_27b", "llama3_2_11b", "llama3_2_90b"]
TRAINED = [name for name in FILES if name not in (*REFUSED, *QUICKSTART)]
# Listed in LINEARS, and no preset's: the smallest configs that have every kind of layer.
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
OTHERS = {t: {"model_type": t, **SMALL} for t in ("gemma", "glm", "phi")}


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load(FILES[name].read_text())


@functools.cache
def built(name: str) -> Any:
    """The model of a preset's config, of shapes alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = OTHERS.get(name) or preset(name)["config"]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", {**PUBLISHED, **QUICKSTART})
def test_parameters_are_as_many_as_published(name: str):
    found = built(name)
    assert sum(p.numel() for p in found.parameters()) == {**PUBLISHED, **QUICKSTART}[name]
    assert [type(found).__name__] == preset(name)["config"]["architectures"]


def test_no_preset_goes_uncounted():
    """mllama is refused by its model_type alone: its preset holds no shape."""
    assert set(FILES) == {*PUBLISHED, *QUICKSTART, "llama3_2_11b", "llama3_2_90b"}


@pytest.mark.parametrize("name", [*TRAINED, *OTHERS])
def test_linear_layers_are_called_what_the_model_calls_them(name: str):
    """Without this a check offline would refuse targets that exist, or pass targets that do not."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    known = architectures.module_names(OTHERS.get(name) or preset(name)["config"])
    own = {n for n, module in built(name).named_modules() if isinstance(module, nn.Linear | Conv1D)}
    embeddings = {n for n, module in built(name).named_modules() if isinstance(module, nn.Embedding)}
    assert known is not None and len(known) == len(set(known))
    assert set(known[1:]) == own
    assert known[0] in embeddings


def test_every_listed_architecture_is_looked_at():
    assert {preset(n)["config"]["model_type"] for n in TRAINED} | set(OTHERS) == set(architectures.LINEARS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"dataset.path={write_rows(tmp_path_factory.mktemp('data') / 'rows.jsonl', [{'text': 'a'}])}"


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Hub cache with nothing in it, and a place to stand."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", TRAINED)
def test_presets_check_offline(name: str, data: str):
    """Every "auto" of ZeRO-3 depends on the width, and targets on the names: both come from the preset."""
    plan = api.compose(f"model={name}", data, "deepspeed=zero3", "launch.num_gpus=2")
    held = preset(name)
    width = held["config"].get("hidden_size") or held["config"]["n_embd"]
    assert plan.deepspeed["zero_optimization"]["reduce_bucket_size"] == width * width
    assert plan.tokenizer.pad_token == plan.model.pad_token == held.get("pad_token")
    [problem] = api.check(f"model={name}", data, "peft.target_modules=[nothing]")
    assert "nothing" in problem.problem and "lm_head" not in problem.fix
    leaf = architectures.module_names(held["config"])[1]
    assert api.check(f"model={name}", data, f"peft.target_modules=[{leaf}]") == []


@pytest.mark.parametrize("name", TRAINED)
def test_the_first_line_says_what_it_is_and_who_may_have_it(name: str):
    line = FILES[name].read_text().splitlines()[0]
    assert "parameters" in line and "context" in line
    assert "gated" in line or "Apache-2.0" in line


def test_experts_are_named_as_peft_reaches_them(data: str):
    """Fused into one parameter for all, they keep the names that their matrices had (test_architectures.py)."""
    assert api.check("model=mixtral_8x7b", data, "peft.target_modules=[q_proj,w1]") == []
    [problem] = api.check("model=mixtral_8x7b", data, "peft.target_modules=[q_proj,w9]")
    assert "w9" in problem.problem and "q_proj" in problem.fix


def test_targets_as_expressions_see_every_layer(data: str):
    """A full name, as PEFT matches it; the layer count is the preset's."""
    for pattern, valid in ((r"model\.layers\.31\.self_attn\.q_proj", True), (r".*\.layers\.32\..*", False)):
        problems = api.check("model=llama3_1_8b", data, f"peft.target_modules='{pattern}'")
        assert (problems == []) is valid, problems


# --- the padding token ---------------------------------------------------------------------------------------------


def test_a_padding_token_of_ones_own_wins(data: str):
    plan = api.compose("model=llama2_7b", data, 'tokenizer.pad_token="</s>"')
    assert (plan.model.pad_token, plan.tokenizer.pad_token) == ("<unk>", "</s>")
    assert api.compose("model=llama2_7b", data, "tokenizer.pad_token=null").tokenizer.pad_token is None


def test_models_of_ones_own_need_no_padding_token(data: str, tmp_path: Path):
    """A run.yaml on model=none, and a model file in --config-dir that was written before the key was there."""
    (tmp_path / "run.yaml").write_text("model:\n  name_or_path: org/some-model\n")
    assert api.compose("run.yaml", data).tokenizer.pad_token is None
    (tmp_path / "run.yaml").write_text("model:\n  name_or_path: org/some-model\n  pad_token: <pad>\n")
    assert api.compose("run.yaml", data).tokenizer.pad_token == "<pad>"
    mine = tmp_path / "conf" / "model"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("name_or_path: org/some-model\n")
    assert api.compose("model=mine", data, config_dir=str(tmp_path / "conf")).tokenizer.pad_token is None


# --- a config.json that is here ------------------------------------------------------------------------------------


def notes(config: dict[str, Any], preset_config: dict[str, Any], folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    given = Model(name_or_path=str(folder), random_init=True, config=preset_config)
    base, problems = model.inspect_model(given, here=False)
    assert problems == [] and base.config == config
    return [note for note in base.notes if "differs" in note]


def test_a_config_that_disagrees_wins_and_is_reported(base: Path, data: str):
    plan = api.compose("model=llama3_1_8b", data, f"model.name_or_path={base}", "model.pad_token=null")
    [note] = [n for n in plan.notes if "differs" in n]
    held = json.loads((base / "config.json").read_text())
    assert f"hidden_size 4096 against {held['hidden_size']}" in note
    assert f"vocab_size 128256 against {held['vocab_size']}" in note
    assert "model_type" not in note and str(base / "config.json") in note


def test_a_config_in_the_hub_cache_counts_as_one_that_is_here(nothing_cached: Path, data: str):
    folder = nothing_cached / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("abc")
    held = preset("llama3_1_8b")["config"]
    (folder / "config.json").write_text(json.dumps({**held, "num_hidden_layers": 30}))
    plan = api.compose("model=llama3_1_8b", data)
    assert [n for n in plan.notes if "num_hidden_layers 32 against 30" in n]
    (folder / "config.json").write_text(json.dumps(held))
    assert not [n for n in api.compose("model=llama3_1_8b", data).notes if "differs" in n]


def test_differences_inside_nested_parts_are_reported(tmp_path: Path):
    """transformers 5 writes rope_parameters; a model that came with towers keeps its text part in text_config."""
    from transformers import AutoConfig

    llama = preset("llama3_2_1b")["config"]
    saved = json.loads(AutoConfig.for_model(**llama).to_json_string(use_diff=False))
    assert "rope_theta" not in saved  # else the branch under test is not taken
    assert notes(saved, llama, tmp_path / "m") == []
    saved["rope_parameters"] |= {"rope_theta": 1.0, "factor": 8.0}
    [note] = notes(saved, llama, tmp_path / "m")
    assert "rope_theta 500000.0 against 1.0" in note and "rope_scaling.factor 32.0 against 8.0" in note

    text = {"model_type": "qwen3_5_text", "hidden_size": 64, "num_hidden_layers": 2}
    nested = {"model_type": "qwen3_5", "text_config": {**text, "hidden_size": 32}}
    for given in ({"hidden_size": 64, "num_hidden_layers": 2}, {"text_config": text}):
        [note] = notes(nested, given, tmp_path / "m")
        assert note.endswith("hidden_size 64 against 32")
    assert notes(nested, {"text_config": nested["text_config"]}, tmp_path / "m") == []


def test_null_means_derived_for_two_keys_only(tmp_path: Path):
    config = {"model_type": "llama", "head_dim": None, "num_key_value_heads": None, "sliding_window": None}
    [note] = notes(config, {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 512}, tmp_path / "m")
    assert note.endswith("wins: sliding_window 512 against None")
