"""Adapters that others saved: merge, generate, eval and init_from take and refuse the same layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from kit import api
from kit.errors import KitError
from kit.evaluation.evaluate import evaluate
from kit.evaluation.generate import generate
from kit.merging import merge
from kit.models.inference import run_each_model
from kit.models.initial_adapter import load_initial_adapter
from kit.models.sources import locate_models, open_source_tokenizer
from kit.schema.run_plan import InitFrom
from kit.storage import manifest

WEIGHTS = "adapter_model.safetensors"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ROWS = 64 + 8  # of the resized vocabulary


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("layouts") / "base")


def adapted(base: Path, rows: int | None = None, seed: int = 3, **settings):
    """Base + adapter with every tensor of the adapter moved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    if rows:
        model.resize_token_embeddings(rows)
    model = get_peft_model(model, LoraConfig(**{**LORA, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)
    return model


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapted(base).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    """Let `change` alter the tensors of an adapter in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def named_default(tensors: dict) -> None:
    for key in list(tensors):
        tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)


def stray(tensors: dict) -> None:
    tensors["base_model.model.model.layers.0.mixer.weight"] = torch.ones(2, 2)


def first_missing(tensors: dict) -> None:
    del tensors[sorted(tensors)[0]]


def emptied(tensors: dict) -> None:
    tensors.update({key: torch.zeros(0) for key in sorted(tensors)[1:]})


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def flipped(name: str):
    def flip(folder: Path) -> None:
        manifest.write_manifest(folder, kind="adapter")
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)

    return flip


def odd_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"base": None}))


def without(name: str):
    return lambda folder: (folder / name).unlink()


REFUSED = {
    "pickle": (as_pickle, "is a pickle, which can run any code when it is read"),
    "stray key": (stray, "the base has no module for 1 of the adapter's: model.layers.0.mixer.weight"),
    "missing key": (first_missing, "the adapter lacks 1 tensors that its config asks for"),
    "empty tensors": (emptied, "was saved under ZeRO-3 without gathering: 7 of its 8 tensors are empty"),
    "truncated": (cut_short, "is cut short or too long"),
    "no tensors": (dict.clear, "holds no tensors"),
    "empty config": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names no peft_type"),
    "no config": (without("adapter_config.json"), "it has no adapter_config.json"),
    "no weights": (without(WEIGHTS), f"has no {WEIGHTS}: the adapter was not saved whole"),
    "flipped weights": (flipped(WEIGHTS), "is not the file that was saved: its SHA-256 differs"),
    "flipped config": (flipped("adapter_config.json"), "is not the file that was saved: its SHA-256 differs"),
    "odd manifest": (odd_manifest, "is not a manifest of format 1"),
}


def change_folder(folder: Path, change) -> None:
    if change in (stray, first_missing, emptied, dict.clear):
        rewrite(folder, change)
    else:
        change(folder)


def of_file(folder: Path) -> InitFrom:
    """The plan's entry for an adapter, as if `kit check` had taken it."""
    file = next((folder / name for name in (WEIGHTS, "adapter_model.bin") if (folder / name).is_file()), None)
    return InitFrom(path=str(folder), weights=file and file.name, sha256=file and manifest.hash_file(file)["sha256"])


def planned(base: Path, chat: Path, folder: Path) -> None:
    overrides = ["peft.r=4", "peft.lora_alpha=8", "peft.target_modules=[q_proj,v_proj]", "trainer.use_cpu=true"]
    api.compose(
        f"model.name_or_path={base}", f"dataset.path={chat}", f"peft.init_from={folder}", "trainer.bf16=false",
        "launch=local", *overrides, here=True,
    )  # fmt: skip


@pytest.mark.parametrize("layout", REFUSED)
def test_what_one_verb_refuses_all_refuse_alike(layout, base, saved, chat, tmp_path):
    change, words = REFUSED[layout]
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    change_folder(folder, change)
    rows = [{"prompt": "the", "completion": " patient"}]
    verbs = {
        "merge": lambda: merge(folder, str(base), tmp_path / "out", verify=False, fsync=False),
        "generate": lambda: generate(folder, base=str(base), which=["adapter"], prompts=["the"], max_new_tokens=1),
        "eval": lambda: evaluate(folder, base=str(base), which=["adapter"], data=rows, max_new_tokens=1),
        "check": lambda: planned(base, chat, folder),
        "ranks": lambda: load_initial_adapter(adapted(base, seed=5), of_file(folder)),
    }
    if layout == "missing key":
        del verbs["check"]  # which tensors a config asks for is known where the model is
    if layout in ("no weights", "pickle"):
        del verbs["ranks"]  # no plan names a file that is not there, nor a pickle without peft.init_from_pickle
    problems = {}
    for verb, work in verbs.items():
        with pytest.raises(KitError) as refusal:
            work()
        assert refusal.value.problems[0].fix, verb
        problems[verb] = refusal.value.problems[0].problem
    assert words in problems["merge"] and len(set(problems.values())) == 1, problems
    assert not (tmp_path / "out").exists()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits


def opened(source: Path, name: str, base: Path) -> torch.Tensor:
    """Logits of one model of a source as generate and eval open it."""
    found = locate_models(source, str(base) if name == "adapter" else None)
    tokenizer = open_source_tokenizer(found)
    return run_each_model(lambda _, model: logits(model), found, [name], tokenizer, dtype="float32")[name]


def test_what_peft_loads_every_verb_takes(base, saved, tmp_path):
    """The adapter's name in the keys, and a resized vocabulary as PEFT's own rule writes it: with copies."""
    named = Path(shutil.copytree(saved, tmp_path / "named"))
    rewrite(named, named_default)
    resized = adapted(base, ROWS, modules_to_save=["embed_tokens", "lm_head"])
    resized.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    assert any("original_module" in key for key in load_file(tmp_path / "resized" / WEIGHTS))
    cases = {named: adapted(base), tmp_path / "resized": resized}
    for folder, model in cases.items():
        expected = logits(model.eval())
        report = merge(folder, str(base), tmp_path / "out", fsync=False, overwrite=True)
        assert report["method"] == "streaming" and report["verification"]["logits"]
        for source, name in ((folder, "adapter"), (tmp_path / "out", "model")):
            assert (opened(source, name, base) - expected).abs().max() < 1e-5 * expected.std(), (folder, name)
        rows = ROWS if folder.name == "resized" else None
        settings = {"modules_to_save": ["embed_tokens", "lm_head"]} if rows else {}
        other = adapted(base, rows, seed=8, **settings)
        load_initial_adapter(other, of_file(folder))
        assert torch.equal(logits(other.eval()), expected)


@pytest.mark.parametrize("config", [
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
], ids=lambda config: config.peft_type.value)  # fmt: skip
def test_trained_prompts_are_opened_and_not_merged(config, base, tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    expected, without = logits(model.eval()), logits(model.get_base_model())
    assert torch.equal(opened(tmp_path / "adapter", "adapter", base), expected)
    assert not torch.equal(expected[:, -without.shape[1] :], without)
    with pytest.raises(KitError, match="changes no weight of the base") as refusal:
        merge(tmp_path / "adapter", str(base), tmp_path / "out", fsync=False)
    assert refusal.value.problems[0].fix and not (tmp_path / "out").exists()


def test_a_vocabulary_resized_at_one_end_is_refused_by_all(base, tmp_path):
    adapted(base, ROWS, modules_to_save=["embed_tokens", "lm_head"]).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    rewrite(tmp_path / "adapter", lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"modules_to_save": ["embed_tokens"]})
    )
    problems = set()
    for work in (
        lambda: merge(tmp_path / "adapter", str(base), tmp_path / "out", fsync=False),
        lambda: opened(tmp_path / "adapter", "adapter", base),
    ):
        with pytest.raises(KitError, match="resized to \\[72\\] rows, but not everywhere: lm_head.weight") as refusal:
            work()
        problems.add((refusal.value.problems[0].problem, refusal.value.problems[0].fix))
    assert len(problems) == 1


def test_an_adapter_for_each_expert_of_mixtral_is_taken_by_all(base, tmp_path):
    """Saved before transformers 5 stored the experts of a layer as one parameter."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.2,
    )  # fmt: skip
    moe = tmp_path / "moe"
    MixtralForCausalLM(config).save_pretrained(moe)
    for file in (*base.glob("tokenizer*"), *base.glob("special*"), *base.glob("*.jinja")):
        shutil.copy(file, moe)
    shapes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    tensors, weights = {}, load_file(moe / "model.safetensors")
    for expert in range(2):
        for name, (rows, columns) in shapes.items():
            module = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            a, b = torch.randn(4, columns) * 0.2, torch.randn(rows, 4) * 0.2
            tensors |= {f"base_model.model.{module}.lora_{k}.weight": v for k, v in {"A": a, "B": b}.items()}
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 2 * b @ a
    folder = tmp_path / "adapter"
    LoraConfig(**{**LORA, "target_modules": list(shapes), "base_model_name_or_path": str(moe)}).save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    by_hand = Path(shutil.copytree(moe, tmp_path / "by-hand"))
    save_file(weights, by_hand / "model.safetensors", {"format": "pt"})
    expected = logits(AutoModelForCausalLM.from_pretrained(by_hand))

    merge(folder, str(moe), tmp_path / "out", fsync=False)
    for source, name in ((folder, "adapter"), (tmp_path / "out", "model")):
        assert (opened(source, name, moe) - expected).abs().max() < 1e-4 * expected.std(), name
    other = adapted(moe, seed=8, target_modules=list(shapes))
    load_initial_adapter(other, of_file(folder))
    assert (logits(other.eval()) - expected).abs().max() < 1e-4 * expected.std()
