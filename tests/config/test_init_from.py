"""`peft.init_from` in `kit check`: the adapter there against the run's own; no torch is needed for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from kit import api
from kit.inspection.model import identify_base
from kit.schema.run_plan import Model
from kit.storage import manifest

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
    "target_modules": ["v_proj", "q_proj"], "modules_to_save": None, "rank_pattern": {}, "init_lora_weights": True,
}  # fmt: skip
SAME = ["peft.r=4", "peft.lora_alpha=8", "peft.target_modules=[q_proj,v_proj]"]


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter folder with a manifest, as a run leaves it."""
    return write(tmp_path / "adapter", base)


def write(folder: Path, base: Path, **changed) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": "x/y", **changed}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.ones((4, 32), np.float32)}, str(folder / "adapter_model.safetensors"))
    manifest.write_manifest(folder, kind="adapter", base=identify_base(Model(name_or_path=str(base)), base))
    return folder


@pytest.fixture
def plan(base: Path, chat: Path):
    return lambda *more: api.compose(f"model.name_or_path={base}", f"dataset.path={chat}", *more)


@pytest.fixture
def check(base: Path, chat: Path):
    def problems(source, *more: str, same: bool = True):
        stock = [f"model.name_or_path={base}", f"dataset.path={chat}", f"peft.init_from={source}"]
        given = {o.partition("=")[0] for o in more}
        return api.check(*(s for s in stock if s.partition("=")[0] not in given), *(SAME if same else []), *more)

    return problems


def only(problems, *words: str) -> str:
    assert len(problems) == 1, problems
    assert "peft.init_from" in problems[0].where and problems[0].fix, problems
    for word in words:
        assert word in str(problems[0]), problems[0]
    return problems[0].fix


def test_an_adapter_of_the_same_settings_passes(plan, check, adapter):
    source = plan(f"peft.init_from={adapter}", *SAME).init_from
    assert (source.path, source.weights) == (str(adapter.resolve()), "adapter_model.safetensors")
    assert check(adapter, "peft.lora_dropout=0.3") == [], "dropout is training's own matter"
    run = adapter.parent / "run"
    run.mkdir()
    shutil.copytree(adapter, run / "adapter")
    assert check(run) == []


def test_the_name_follows_the_content_and_not_the_place(plan, adapter, tmp_path):
    cold = plan(*SAME)
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    hashes = [plan(f"peft.init_from={folder}", *SAME).hash for folder in (adapter, moved)]
    assert hashes[0] == hashes[1] != cold.hash
    save_file({"other": np.zeros((1, 1), np.float32)}, str(moved / "adapter_model.safetensors"))
    (moved / "manifest.json").unlink()
    assert plan(f"peft.init_from={moved}", *SAME).hash not in (hashes[0], cold.hash)


DIFFERENT = [
    ({}, ["peft.r=8"], "r is 4 there, 8 here", "peft.r=4"),
    ({}, ["peft.lora_alpha=16"], "lora_alpha is 8 there, 16 here", "peft.lora_alpha=8"),
    ({}, ["peft.target_modules=[q_proj]"], "target_modules", "peft.target_modules=[q_proj,v_proj]"),
    ({}, ["peft.target_modules=all-linear"], "target_modules", "peft.target_modules=[q_proj,v_proj]"),
    ({"use_dora": True}, [], "use_dora is true there", "peft.use_dora=true"),
    ({"use_rslora": True}, [], "use_rslora", "peft.use_rslora=true"),
    ({"bias": "all"}, [], "bias is all there", "peft.bias=all"),
    ({"modules_to_save": ["lm_head"]}, [], "modules_to_save", "peft.modules_to_save=[lm_head]"),
    ({"rank_pattern": {"q_proj": 2}}, [], "rank_pattern", "peft.rank_pattern={q_proj:2}"),
]


@pytest.mark.parametrize("case", DIFFERENT, ids=lambda c: f"{c[0]} {c[1]}")
def test_other_settings_are_refused_with_what_mends_them(case, check, adapter, base):
    theirs, ours, said, mend = case
    write(adapter, base, **theirs)
    fix = only(check(adapter, *ours), said)
    assert mend in fix
    assert check(adapter, *ours, *fix.split()) == [], "the fix mends it"


def test_everything_that_differs_is_said_at_once(check, adapter):
    fix = only(check(adapter, same=False), "r is 4 there, 16 here", "lora_alpha is 8 there", "target_modules")
    assert check(adapter, *fix.split(), same=False) == []


def test_another_method_is_refused(check, adapter, base):
    write(adapter, base, peft_type="IA3")
    only(check(adapter), "IA3", "LORA")
    write(adapter, base, init_lora_weights="pissa")
    only(check(adapter), "pissa")
    assert any("peft=none" in str(p) for p in check(adapter, "peft=none", same=False))


def test_another_base_is_refused(check, adapter, tmp_path):
    other = tiny.make_model(tmp_path / "other", seed=9)
    only(check(adapter, f"model.name_or_path={other}"), "other weights", "model.name_or_path=")


def test_an_adapter_without_a_manifest_is_taken_at_its_word(plan, adapter):
    (adapter / "manifest.json").unlink()
    assert any("x/y" in note for note in plan(f"peft.init_from={adapter}", *SAME).notes)


def test_damage_and_absence_are_named(check, adapter, tmp_path):
    only(check(tmp_path / "nothing"), "nothing")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x07")
    only(check(adapter), "SHA-256")
    file.write_bytes(whole[:-5])
    only(check(adapter), "cut short")
    file.unlink()
    only(check(adapter), "adapter_model.safetensors")
    (adapter / "adapter_config.json").unlink()
    only(check(adapter), "adapter_config.json")


def test_a_hub_id_is_known_where_the_run_starts(base, chat, plan):
    assert any("someone/lora-1.0" in note for note in plan("peft.init_from=someone/lora-1.0", *SAME).notes)
    args = [f"model.name_or_path={base}", f"dataset.path={chat}", *SAME, "peft.init_from=someone/lora-1.0"]
    with pytest.raises(Exception, match="hf download someone/lora-1.0"):
        api.compose(*args, here=True)


def test_a_pickle_needs_the_flag(check, plan, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "manifest.json").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"not looked into by kit check")
    assert "peft.init_from_pickle=true" in only(check(adapter), "pickle")
    made = plan(f"peft.init_from={adapter}", "peft.init_from_pickle=true", *SAME)
    assert made.init_from.weights == "adapter_model.bin" and "init_from" not in made.peft
    assert any(re.search("weights-only", note) for note in made.notes)


def test_a_resume_may_change_steps_after_the_source_has_gone(plan, adapter, base, chat):
    args = [f"model.name_or_path={base}", f"dataset.path={chat}", *SAME, f"peft.init_from={adapter}"]
    first = api.compose(*args, here=True)
    shutil.rmtree(adapter)
    later = api.override_plan(first, ["trainer.max_steps=9"])
    assert (later.init_from, later.hash, later.trainer["max_steps"]) == (first.init_from, first.hash, 9)
    assert later.composed["peft"]["init_from"] == str(adapter)
    with pytest.raises(Exception, match="another run"):
        api.override_plan(later, ["peft.init_from=somewhere/else"])
