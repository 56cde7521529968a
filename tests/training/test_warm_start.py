"""Another adapter's tensors into a PEFT model: all or none, and never code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kit.errors import KitError
from kit.models.initial_adapter import adapter_parameters, load_initial_adapter
from kit.schema.run_plan import InitFrom
from kit.storage import manifest


def adapted(base: Path, seed: int, **settings):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def saved(model, folder: Path) -> InitFrom:
    model.save_pretrained(folder)
    return of(folder / "adapter_model.safetensors")


def of(file: Path) -> InitFrom:
    return InitFrom(path=str(file.parent), weights=file.name, sha256=str(manifest.hash_file(file)["sha256"]))


SETTINGS = [
    {},
    {"use_dora": True},
    {"bias": "lora_only"},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"rank_pattern": {"q_proj": 2}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_tensor_arrives(base, tmp_path, settings):
    theirs, ours = adapted(base, 1, **settings), adapted(base, 2, **settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    ids = torch.arange(8).reshape(1, 8)
    before = ours(ids).logits
    load_initial_adapter(ours, saved(theirs, tmp_path))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not torch.allclose(before, theirs(ids).logits, atol=1e-3)


def spoil(tensors: dict, how: str) -> None:
    key = sorted(tensors)[0]
    if how.startswith("lacks"):
        del tensors[key]
    elif how.startswith("no module"):
        tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()
    elif how == "has shape":
        tensors[key] = tensors[key][:1].clone()
    else:
        tensors[key][0, 0] = float("nan")


@pytest.mark.parametrize("how", ["lacks 1 tensors", "no module for 1 of", "has shape", "NaN"])
def test_what_does_not_fit_changes_nothing(base, tmp_path, how):
    saved(adapted(base, 1), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors, how)
    save_file(tensors, file)
    ours = adapted(base, 2)
    before = {k: v.clone() for k, v in adapter_parameters(ours).items()}
    with pytest.raises(KitError, match=how):
        load_initial_adapter(ours, of(file))
    assert all(torch.equal(v, before[k]) for k, v in adapter_parameters(ours).items())


def test_a_file_that_changed_since_the_plan_is_refused(base, tmp_path):
    source = saved(adapted(base, 1), tmp_path)
    with pytest.raises(KitError, match="changed since"):
        load_initial_adapter(adapted(base, 2), source.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(KitError, match="no adapter on this machine"):
        load_initial_adapter(adapted(base, 2), InitFrom(path="someone/lora"))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_read_weights_only(base, tmp_path):
    theirs, ours = adapted(base, 1), adapted(base, 2)
    saved(theirs, tmp_path)
    file, canary = tmp_path / "adapter_model.bin", tmp_path / "canary"
    good = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(good, file)
    load_initial_adapter(ours, of(file))
    assert all(torch.equal(v, good[k]) for k, v in adapter_parameters(ours).items())

    torch.save({**good, "extra": Canary(canary)}, file)
    with pytest.raises(KitError, match="is refused"):
        load_initial_adapter(ours, of(file))
    file.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(KitError, match="is refused"):
        load_initial_adapter(ours, of(file))
    assert not canary.exists()
    pickle.loads(file.read_bytes())
    assert canary.exists(), "read as a pickle it runs: the canary is a real one"

    torch.save([1, 2], file)
    with pytest.raises(KitError, match="other things than tensors"):
        load_initial_adapter(ours, of(file))
