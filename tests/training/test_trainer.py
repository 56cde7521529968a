"""ModifiedTrainer against SFTTrainer: the same numbers, other saves and stops. One process, float32, CPU."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from kit.errors import KitError
from kit.storage import atomic_folder, manifest
from kit.training import checkpoint, signals
from kit.training.trainer import ModifiedTrainer

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tied", tied=True)


def config(out, **changes):
    settings = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
        "max_length": 64,
        "disable_tqdm": True,
        "seed": 7,
    }
    return SFTConfig(**{**settings, **changes})


def lora(**changes):
    settings = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **changes})


def build(cls, out, model, rows=None, peft="lora", args=None, **more):
    peft_config = lora() if peft == "lora" else peft
    rows = tiny.dataset(tiny.text_rows()) if rows is None else rows
    kind = {} if peft_config is None else {"peft_config": peft_config}
    return cls(model=model, args=config(out, **(args or {})), train_dataset=rows, **kind, **more)


def losses(trainer):
    names = ("loss", "grad_norm", "eval_loss", "eval_a_loss", "eval_b_loss", "eval_share", "num_tokens")
    return [{k: h[k] for k in names if k in h} for h in trainer.state.log_history if "train_runtime" not in h]


def weights(trainer):
    model = trainer.model
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other):
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.equal(one[name], other[name]), name


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---- the same numbers as SFTTrainer ----


def share(prediction):
    labels = prediction.label_ids[prediction.label_ids != -100]
    return {"share": float((labels > 10).mean())}


class Counter(TrainerCallback):
    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            object.__getattribute__(self, "seen").append(name)
        return object.__getattribute__(self, name)


def rows_of(maker):
    return lambda: tiny.dataset(maker())


def streamed():
    return tiny.dataset(tiny.text_rows()).to_iterable_dataset()


EVAL = {"eval_strategy": "steps", "eval_steps": 3}
CASES = {
    "plain text": {},
    "packing bfd": {"args": {"packing": True, "packing_strategy": "bfd", "max_length": 32}},
    "padding-free": {"args": {"padding_free": True, "max_length": None}},
    "prompt-completion": {"rows": rows_of(tiny.prompt_rows)},
    "completion only": {"rows": rows_of(tiny.prompt_rows), "args": {"completion_only_loss": True}},
    "whole prompt-completion": {"rows": rows_of(tiny.prompt_rows), "args": {"completion_only_loss": False}},
    "conversation": {"rows": rows_of(tiny.chat_rows)},
    "assistant only": {"rows": rows_of(tiny.chat_rows), "args": {"assistant_only_loss": True}},
    "iterable": {"rows": streamed},
    "evaluation": {"args": EVAL, "more": lambda: {"eval_dataset": tiny.dataset(tiny.text_rows(6))}},
    "two evaluations": {
        "args": EVAL,
        "more": lambda: {"eval_dataset": {k: tiny.dataset(tiny.text_rows(n)) for k, n in (("a", 4), ("b", 6))}},
    },
    "metrics": {
        "args": EVAL,
        "more": lambda: {"eval_dataset": tiny.dataset(tiny.text_rows(6)), "compute_metrics": share},
    },
    "accumulation and checkpointing": {
        "args": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 3}
    },
    "epochs": {
        "args": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
        "rows": rows_of(lambda: tiny.text_rows(8)),
    },
    "full fine-tuning": {"peft": None},
    "dora": {"peft": lambda: lora(use_dora=True)},
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_equal(name, base, tmp_path):
    case = {"rows": rows_of(tiny.text_rows), "args": {}, "more": dict, "peft": lora, **CASES[name]}
    found = []
    for cls in (SFTTrainer, ModifiedTrainer):
        trainer = build(
            cls,
            tmp_path / cls.__name__,
            str(base),
            case["rows"](),
            case["peft"]() if case["peft"] else None,
            case["args"],
            **case["more"](),
        )
        trainer.train()
        found.append((losses(trainer), weights(trainer), trainer.state.global_step))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert all(math.isfinite(h["loss"]) for h in found[0][0] if "loss" in h)
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("given", ["object", "peft model"])
def test_model_given_as(given, base, tmp_path):
    found = []
    for cls in (SFTTrainer, ModifiedTrainer):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if given == "peft model":
            model = get_peft_model(model, lora())
        changes = {"model_init_kwargs": None}
        trainer = build(cls, tmp_path / "out", model, None, None if given == "peft model" else "lora", changes)
        trainer.train()
        found.append((losses(trainer), weights(trainer)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_callbacks_are_called_alike(base, tmp_path):
    seen = []
    for cls in (SFTTrainer, ModifiedTrainer):
        counter = Counter()
        args = {"save_strategy": "steps", "save_steps": 2, **EVAL}
        more = {"callbacks": [counter], "eval_dataset": tiny.dataset(tiny.text_rows(4))}
        build(cls, tmp_path / cls.__name__, str(base), args=args, **more).train()
        seen.append(counter.seen)
    assert seen[0] == seen[1] and "on_save" in seen[0]


@pytest.mark.parametrize("peft", ["lora", None])
def test_best_model_and_early_stopping(peft, base, tmp_path):
    found = []
    args = {
        **EVAL, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
        "max_steps": 20, "learning_rate": 0.3, "save_total_limit": 2,
    }  # fmt: skip
    for cls in (SFTTrainer, ModifiedTrainer):
        out = tmp_path / cls.__name__
        more = {"callbacks": [EarlyStoppingCallback(2)], "eval_dataset": tiny.dataset(tiny.text_rows(6))}
        trainer = build(cls, out, str(base), peft=peft, args=args, **more)
        trainer.train()
        state = trainer.state
        found.append(
            (losses(trainer), weights(trainer), state.best_global_step, sorted(p.name for p in out.glob("c*")))
        )
        assert Path(state.best_model_checkpoint) == out / f"checkpoint-{state.best_global_step}"
        last = json.loads((out / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
        assert last["best_model_checkpoint"] == state.best_model_checkpoint
    assert found[0][0] == found[1][0] and found[0][2:] == found[1][2:] and state.global_step < 20
    assert_same(found[0][1], found[1][1])


# ---- resume ----


@pytest.mark.parametrize("peft", ["lora", None])
def test_resume_is_bit_equal(peft, base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 4, "max_steps": 14}  # 12 steps an epoch: resumed within the first
    whole = build(ModifiedTrainer, tmp_path / "a", str(base), peft=peft, args=args)
    whole.train()
    name = ADAPTER if peft else "model.safetensors"
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    for cls, source in ((ModifiedTrainer, True), (SFTTrainer, str(tmp_path / "a" / "checkpoint-4"))):
        random.seed(0), np.random.seed(1), torch.manual_seed(2)
        again = build(cls, tmp_path / "b", str(base), peft=peft, args=args)
        again.train(resume_from_checkpoint=source)
        values = [(h["loss"], h["grad_norm"]) for h in again.state.log_history if "loss" in h]
        assert values == [(h["loss"], h["grad_norm"]) for h in whole.state.log_history if "loss" in h]
        assert sha(tmp_path / "a" / "checkpoint-14" / name) == sha(tmp_path / "b" / "checkpoint-14" / name)


@pytest.mark.parametrize("save_at", [3, 5, 7, 11])
def test_a_stream_resumes_in_every_pass(save_at, base, tmp_path):
    """10 rows by twos: 5 steps a pass. Within the first, at its end, within the second, and within the third."""
    rows = tiny.dataset(tiny.text_rows(10)).to_iterable_dataset(num_shards=2)
    args = {"save_strategy": "steps", "save_steps": save_at, "max_steps": 13, "per_device_train_batch_size": 2}
    whole = build(ModifiedTrainer, tmp_path / "a", str(base), rows.shuffle(seed=3, buffer_size=4), args=args)
    whole.train()
    shutil.copytree(tmp_path / "a" / f"checkpoint-{save_at}", tmp_path / "b" / f"checkpoint-{save_at}")
    again = build(ModifiedTrainer, tmp_path / "b", str(base), rows.shuffle(seed=3, buffer_size=4), args=args)
    again.train(resume_from_checkpoint=True)
    seen = [[(h["loss"], h["grad_norm"]) for h in run.state.log_history if "loss" in h] for run in (whole, again)]
    assert seen[0] == seen[1] and len(seen[0]) == 13
    assert_same(weights(whole), weights(again))
    position = again.stream_position
    assert (position.passes, position.steps) == (2, 3)
    other = build(SFTTrainer, tmp_path / "c", str(base), rows, args={**args, "max_steps": 2, "save_steps": 2})
    other.train()
    with pytest.raises(KitError, match="does not say where in its stream"):
        build(ModifiedTrainer, tmp_path / "c", str(base), rows, args=args).train(resume_from_checkpoint=True)


def test_resume_over_a_quantized_base_is_bit_equal(base, tmp_path):
    """TRL trains such an adapter in bfloat16; upstream loads it as float32 and goes on with other numbers."""
    from transformers import BitsAndBytesConfig

    from kit.models.quantization import disable_cpu_repacking

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "bf16": True, "model_init_kwargs": None,
            "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}  # fmt: skip

    def run(out, resume=None):
        model = disable_cpu_repacking(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=nf4)
        )
        rows = tiny.dataset(tiny.text_rows())
        trainer = build(ModifiedTrainer, out, model, args=args, eval_dataset=rows.select(range(4)))
        trainer.train(resume_from_checkpoint=resume)
        assert {p.dtype for p in weights(trainer).values()} == {torch.bfloat16}
        return [h["loss"] for h in trainer.state.log_history if "loss" in h]

    whole = run(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    assert run(tmp_path / "b", True) == whole and len(whole) == 4
    assert sha(tmp_path / "a" / "checkpoint-4" / ADAPTER) == sha(tmp_path / "b" / "checkpoint-4" / ADAPTER)


def test_resume_of_a_finished_run_adds_no_step(base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    first = build(ModifiedTrainer, tmp_path, str(base), args=args)
    first.train()
    again = build(ModifiedTrainer, tmp_path, str(base), args=args)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert_same(weights(first), weights(again))


def test_resume_passes_over_damage(base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    first = build(ModifiedTrainer, tmp_path, str(base), args=args)
    first.train()
    file = tmp_path / "checkpoint-6" / ADAPTER
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "differs" in manifest.verify_folder(file.parent)[0]
    assert manifest.newest_complete_checkpoint(tmp_path).path == tmp_path / "checkpoint-4"
    with pytest.raises(KitError, match="differs") as refused:
        build(ModifiedTrainer, tmp_path, str(base), args=args).train(resume_from_checkpoint=str(file.parent))
    assert refused.value.code == 4
    again = build(ModifiedTrainer, tmp_path, str(base), args=args)
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 4 and manifest.verify_folder(file.parent) == []
    assert_same(weights(first), weights(again))


# ---- what is saved ----


def resized(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(72)
    return model


KINDS = {
    "lora": lora,
    "all-linear": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    "embeddings and head": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora bias": lambda: lora(lora_bias=True),
    "bias all": lambda: lora(bias="all"),
    "tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "embedding adapter": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "resized": lora,
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_equals_what_peft_saves(kind, base, tmp_path):
    torch.manual_seed(0)
    model = resized(base) if kind == "resized" else AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "bias all":
        for layer in model.model.layers:  # a Llama has no biases of its own
            layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    trainer = build(
        ModifiedTrainer, tmp_path, model, peft=KINDS[kind](), args={"max_steps": 2, "model_init_kwargs": None}
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "ours"))
    trainer.model.save_pretrained(str(tmp_path / "peft"))
    ours, theirs = (load_file(tmp_path / who / ADAPTER) for who in ("ours", "peft"))
    assert_same(ours, theirs)
    one, other = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "peft"))
    assert one == other and one["base_model_name_or_path"] == str(base)
    found = manifest.read_manifest(tmp_path / "ours")
    assert (found["kind"], found["tensors"]) == ("adapter", len(ours))
    assert found["parameters"] == sum(t.numel() for t in ours.values())
    if kind == "resized":
        assert ours["base_model.model.model.embed_tokens.weight"].shape == (72, 32)
        return
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "bias all":
        return
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        plain = trainer.model.eval().base_model.model
        assert torch.equal(loaded.base_model.model.model(ids)[0], plain.model(ids)[0])


def test_saved_files(base, tmp_path):
    provenance = {"plan": "abc", "base": {"name_or_path": "x"}}
    args = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "hub_token": "hf_secret"}
    trainer = build(ModifiedTrainer, tmp_path / "run", str(base), args=args, provenance=provenance)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["checkpoint-6"]
    names = {p.name for p in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", ADAPTER, "manifest.json"} <= names
    assert not list(tmp_path.rglob("training_args.bin"))
    assert not any(b"hf_secret" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    found = manifest.read_manifest(tmp_path / "adapter")
    assert found["plan"] == "abc" and found["base"] == {"name_or_path": "x"} and found["step"] == 6
    assert {"tokenizer.json", "chat_template.jinja", "adapter_config.json"} <= set(found["files"])
    before = (tmp_path / "adapter").stat().st_ino
    trainer.save_model(str(tmp_path / "adapter"))  # again: replaced as a whole
    assert (tmp_path / "adapter").stat().st_ino != before and manifest.verify_folder(tmp_path / "adapter") == []
    trainer.save_model()  # into the folder that also holds the checkpoints
    assert manifest.verify_folder(tmp_path / "run") == [] and (tmp_path / "run" / "checkpoint-6").is_dir()
    assert not [p for p in tmp_path.rglob(".*") if p.is_dir()]


def test_only_model(base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 6, "save_only_model": True}
    build(ModifiedTrainer, tmp_path, str(base), args=args).train()
    names = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert "optimizer.pt" not in names and "trainer_state.json" in names
    assert manifest.verify_folder(tmp_path / "checkpoint-6") == []


def test_frozen_base_is_never_copied(base, tmp_path, monkeypatch):
    trainer = build(ModifiedTrainer, tmp_path, str(base), args={"max_steps": 1})
    trainer.train()
    monkeypatch.setattr(
        type(trainer.model), "state_dict", lambda *a, **k: pytest.fail("state_dict of the whole model")
    )
    tensors, expected, _ = checkpoint.trainable_state_dict(trainer.model)
    assert all("lora_" in name for name in tensors) and len(tensors) == len(expected["default"])
    assert checkpoint.trainable_state_dict(trainer.model, writer=False)[0] == {}


def test_check_adapter_finds(tmp_path):
    a, b = "m.lora_A.weight", "m.lora_B.weight"
    good = {a: torch.ones(2, 4), b: torch.ones(4, 2)}
    expected = {k: tuple(v.shape) for k, v in good.items()}
    assert checkpoint.check_saved_adapter(good, expected, trained=True) == []
    assert "zero" in checkpoint.check_saved_adapter({a: good[a], b: torch.zeros(4, 2)}, expected, trained=True)[0]
    for bad, said in [
        ({a: good[a]}, "missing"),
        ({**good, "x": good[a]}, "should not be there"),
        ({a: torch.ones(0), b: good[b]}, "empty"),
        ({a: torch.ones(8), b: good[b]}, "shape"),
        ({a: torch.full((2, 4), float("nan")), b: good[b]}, "NaN"),
    ]:
        with pytest.raises(KitError, match=said) as refused:
            checkpoint.check_saved_adapter(bad, expected)
        assert refused.value.code == 4
    with pytest.raises(KitError, match="2"):
        checkpoint.check_saved_adapter({a: torch.ones(8)}, {a: (8,)})
    with pytest.raises(KitError, match="no tensors"):
        checkpoint.check_saved_adapter({}, {})
    (tmp_path / ADAPTER).write_bytes(b"short")
    with pytest.raises(KitError, match="cannot be read back"):
        checkpoint.check_saved_adapter(tmp_path, expected)


@pytest.mark.parametrize("given", ["name", "object"])
@pytest.mark.parametrize("which", ["base", "tied"])
def test_full_model_is_loadable_and_its_config_unharmed(which, given, base, tied, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tied if which == "tied" else base, source)
    text = json.loads((source / "config.json").read_text())
    text.update(eos_token_id=[2, 9], pad_token_id=None)  # as Llama 3.1 has them
    (source / "config.json").write_text(json.dumps(text))
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 9], "temperature": 0.6, "do_sample": True})
    )
    model = str(source) if given == "name" else AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    args = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    args["model_init_kwargs"] = {"dtype": "float32"} if given == "name" else None
    trainer = build(ModifiedTrainer, tmp_path / "out", model, peft=None, args=args)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    for folder in (tmp_path / "model", tmp_path / "out" / "checkpoint-3"):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "plain" / name).read_text())
        assert manifest.verify_folder(folder) == []
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_same(dict(loaded.named_parameters()), {n: p for n, p in trainer.model.named_parameters()})
    assert loaded.config.use_cache is True and trainer.model.config.use_cache is False
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (which == "base")


# ---- failing saves ----


def test_rotation_keeps_best_and_newest(base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-5")
    trainer.args.save_total_limit = 1
    trainer.saved_step, trainer.state.global_step = None, 7
    trainer._save_checkpoint(trainer.model, None)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-7"]
    assert all(manifest.verify_folder(p) == [] for p in tmp_path.glob("checkpoint-*"))


@pytest.mark.launch
@pytest.mark.parametrize(
    "moment", ["_save_optimizer_and_scheduler", "_save_state", "write_manifest", "replace_folder"]
)
def test_killed_save_leaves_the_older_checkpoint(moment, base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 6}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args)
    trainer.train()
    child = os.fork()
    if child == 0:
        try:
            owner = next(o for o in (manifest, atomic_folder, trainer) if hasattr(o, moment))
            setattr(owner, moment, lambda *a, **k: os._exit(137))
            trainer.saved_step, trainer.state.global_step = None, 7
            trainer._save_checkpoint(trainer.model, None)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
    assert (tmp_path / ".staging-checkpoint-7").is_dir()
    assert manifest.newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-6", [])
    again = build(ModifiedTrainer, tmp_path, str(base), args={**args, "max_steps": 7})
    again.train(resume_from_checkpoint=True)
    assert manifest.newest_complete_checkpoint(tmp_path).path == tmp_path / "checkpoint-7"
    assert not (tmp_path / ".staging-checkpoint-7").exists()


@pytest.mark.parametrize("where", ["tokenizer", "optimizer", "manifest"])
def test_full_disk_leaves_the_older_checkpoint(where, base, tmp_path, monkeypatch):
    trainer = build(ModifiedTrainer, tmp_path, str(base), args={"save_strategy": "steps", "save_steps": 6})
    trainer.train()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target, name = {
        "tokenizer": (trainer.processing_class, "save_pretrained"),
        "optimizer": (torch, "save"),
        "manifest": (manifest, "write_manifest"),
    }[where]
    monkeypatch.setattr(target, name, full)
    trainer.saved_step, trainer.state.global_step = None, 7
    with pytest.raises(KitError, match="No space left") as failed:
        trainer._save_checkpoint(trainer.model, None)
    assert failed.value.code == 4
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint-6"]
    assert manifest.verify_folder(tmp_path / "checkpoint-6") == []
    assert trainer.staging is None


class Poison(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize("peft", ["lora", None])
def test_nan_stops_the_run(peft, base, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = build(ModifiedTrainer, tmp_path, str(base), peft=peft, args=args, callbacks=[Poison(3)])
    with pytest.raises(KitError, match="NaN or infinity") as refused:
        trainer.train()  # the save of step 3 refuses before the loss of step 4 shows it
    assert refused.value.code == 4
    assert manifest.newest_complete_checkpoint(tmp_path).path == tmp_path / "checkpoint-2"
    with pytest.raises(KitError):
        trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


def test_nan_loss_names_the_step(base, tmp_path):
    args = {"logging_nan_inf_filter": True}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args, callbacks=[Poison(3)])
    with pytest.raises(KitError, match="loss is nan at step 4") as refused:
        trainer.train()
    assert refused.value.code == 4


# ---- stopping ----


@pytest.fixture
def handlers():
    before = {name: signal.getsignal(getattr(signal, name)) for name in signals.SIGNALS}
    signals.install_handlers()
    yield
    signals.forget_signals()
    signals._installed = False
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


class Kill(TrainerCallback):
    def __init__(self, step, number=signal.SIGTERM, event="on_step_begin"):
        self.step, self.number = step, number
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_stops(number, base, tmp_path, handlers):
    args = {"max_steps": 10, "save_strategy": "epoch", "eval_strategy": "epoch"}
    more = {"eval_dataset": tiny.dataset(tiny.text_rows(4))}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args, callbacks=[Kill(3, number)], **more)
    trainer.train()
    assert trainer.stopped_by_signal and trainer.state.global_step == 4
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not [h for h in trainer.state.log_history if "eval_loss" in h]
    signals.forget_signals()
    rest = build(ModifiedTrainer, tmp_path, str(base), args=args, **more)
    rest.train(resume_from_checkpoint=True)
    assert not rest.stopped_by_signal and rest.state.global_step == 10
    whole = build(ModifiedTrainer, tmp_path / "whole", str(base), args=args, **more)
    whole.train()
    assert_same(weights(rest), weights(whole))


def test_signal_keeps_the_checkpoint_at_limit_one(base, tmp_path, handlers):
    """Upstream would load the best one and delete the one just saved."""
    args = {
        **EVAL, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
        "save_total_limit": 1, "learning_rate": 3.0,
    }  # fmt: skip
    more = {"eval_dataset": tiny.dataset(tiny.text_rows(4)), "callbacks": [Kill(4)]}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args, **more)
    trainer.train()
    assert trainer.stopped_by_signal and trainer.state.best_global_step < 5
    assert manifest.newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-5", [])
    assert_same(
        {k: v for k, v in get_peft_model_state_dict(trainer.model, save_embedding_layers=False).items()},
        load_file(tmp_path / "checkpoint-5" / ADAPTER),
    )


def test_signal_in_the_last_step_ends_a_finished_run(base, tmp_path, handlers):
    args = {"save_strategy": "steps", "save_steps": 100}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args, callbacks=[Kill(5)])
    trainer.train()
    assert not trainer.stopped_by_signal and trainer.state.global_step == 6
    assert manifest.newest_complete_checkpoint(tmp_path).path == tmp_path / "checkpoint-6"


def test_signal_during_a_save(base, tmp_path, handlers, monkeypatch):
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = build(ModifiedTrainer, tmp_path, str(base), args=args)
    write = manifest.write_manifest

    def interrupted(*a, **k):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*a, **k)

    monkeypatch.setattr(manifest, "write_manifest", interrupted)
    trainer.train()
    assert trainer.stopped_by_signal and trainer.state.global_step == 3
    assert manifest.newest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", [])
    assert manifest.verify_folder(tmp_path / "checkpoint-2") == []


def test_second_interrupt_is_at_once(handlers):
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.received_signal() == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# ---- upstream ----

FOLLOWED = {
    "Trainer._save_checkpoint": (Trainer._save_checkpoint, "_save_checkpoint: order of the parts, best checkpoint"),
    "SFTTrainer._save_checkpoint": (SFTTrainer._save_checkpoint, "_save_checkpoint: the model card"),
    "Trainer.save_model": (Trainer.save_model, "save_model, _write_model: who writes under which engine"),
    "Trainer._save": (Trainer._save, "_write_model: which files go with a model"),
    "Trainer._finalize_training": (Trainer._finalize_training, "_finalize_training: best model, deletion at limit 1"),
    "SFTTrainer._prepare_dataset": (SFTTrainer._prepare_dataset, "kit/data: encode.py, prepare.pack: what it does"),
    "Trainer._run_epoch": (Trainer._run_epoch, "_run_epoch, StopOnSignalCallback: when the loop looks at control"),
    "Trainer._init_training_state": (Trainer._init_training_state, "_init_training_state: where it resumes"),
    "Trainer._maybe_log_save_evaluate": (
        Trainer._maybe_log_save_evaluate,
        "log, on_step_end: order of log and save; _maybe_log_save_evaluate: when all ranks gather the loss",
    ),
    "Trainer.get_batch_samples": (Trainer.get_batch_samples, "get_batch_samples: it reads rows by the iterator alone"),
    "Trainer._load_best_model": (Trainer._load_best_model, "what a checkpoint must hold to be loaded as the best"),
    "Trainer._load_from_checkpoint": (Trainer._load_from_checkpoint, "what a checkpoint must hold to be resumed"),
    "Trainer._prepare_for_training": (Trainer._prepare_for_training, "_prepare_for_training, _load_rng_state"),
    "Trainer._load_rng_state": (Trainer._load_rng_state, "_load_rng_state"),
    "PeftModel.save_pretrained": (PeftModel.save_pretrained, "_write_adapter"),
    "get_peft_model_state_dict": (get_peft_model_state_dict, "trainable_state_dict, embeddings_changed"),
}
HASHES = json.loads((Path(__file__).parent / "upstream.json").read_text())


@pytest.mark.parametrize("name", FOLLOWED)
def test_upstream_is_as_it_was_read(name):
    function, concerns = FOLLOWED[name]
    found = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    assert found == HASHES[name], (
        f"{name} changed: re-read it against kit/training ({concerns}), then update upstream.json"
    )
