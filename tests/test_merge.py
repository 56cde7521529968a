"""kit.merging: equal to base + adapter in every supported form, refused where it cannot be, whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from merge_cases import VOCAB, adapt, gpt2, llama, logits_of, trained, write_manifest
from safetensors.torch import load_file, save_file

import kit.merging.adapter
import kit.merging.plan
import kit.merging.stream
import kit.storage.atomic_folder
from kit.errors import KitError
from kit.merging import merge, verify

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name -> base, adapter; each is merged and compared with peft in float32
CASES = {
    "plain": ({}, {}),
    "all_linear": ({}, {"target_modules": LINEAR}),
    "rslora": ({}, {"use_rslora": True}),
    "dora": ({}, {"use_dora": True}),
    "dora_rslora_patterns": ({}, {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "patterns": (
        {},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 16},
        },
    ),
    "bias_all": ({}, {"bias": "all"}),
    "bias_lora_only": ({}, {"bias": "lora_only"}),
    "lora_bias": ({}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "modules_to_save": ({}, {"modules_to_save": ["lm_head", "norm"]}),
    "embedding": ({}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding_dora": ({}, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "tokens": ({}, {"trainable_token_indices": [1, 5, 9]}),
    "tokens_both": ({}, {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "some_layers": ({}, {"layers_to_transform": [1]}),
    "tied": ({"tie": True}, {}),
    "tied_tokens": ({"tie": True}, {"trainable_token_indices": [1, 5]}),
    "tied_head_saved": ({"tie": True}, {"modules_to_save": ["lm_head"]}),
    "tied_embedding_saved": ({"tie": True}, {"modules_to_save": ["embed_tokens"]}),
    "tied_saved_ensured": ({"tie": True}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied_lora": ({"tie": True}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied_lora_ensured": ({"tie": True}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "resized": ({}, {"vocabulary": VOCAB + 7}),
    "resized_tied": ({"tie": True}, {"vocabulary": VOCAB + 7}),
    "resized_embedding": ({"tie": True}, {"vocabulary": VOCAB + 7, "target_modules": ["q_proj", "embed_tokens"]}),
    "sharded": ({"shard": "20KB"}, {"target_modules": LINEAR}),
    "sharded_tied_saved": ({"shard": "20KB", "tie": True}, {"modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2_dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "gpt2_embedding": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    "gpt2_old_names": ("gpt2_old", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
}
TIED_AFTER = {"tied", "tied_tokens", "tied_saved_ensured", "tied_lora_ensured", "resized_tied"}
# Base + adapter is the reference everywhere. peft's merge is a second one, but not where LoRA sits on tied matrices:
# it adds the change to both ends, or twice, which is not the model that was trained.
PEFT_DIFFERS = {"tied_lora", "tied_lora_ensured", "resized_embedding", "gpt2_embedding"}


def make_base(folder: Path, spec) -> Path:
    if isinstance(spec, str):
        return gpt2(folder, prefix=spec == "gpt2")
    return llama(folder, **spec)


@pytest.mark.parametrize("name", CASES)
def test_equals_peft_in_float32(name, tmp_path):
    spec, fields = CASES[name]
    base = make_base(tmp_path / "base", spec)
    adapter = adapt(base, tmp_path / "adapter", **fields)
    report = merge(adapter, str(base), tmp_path / "out", verify=name in ("plain", "embedding_dora"), fsync=False)
    assert report["method"] == "streaming"
    expected, weights = trained(base, adapter, fields.get("vocabulary"))
    ours, mine = logits_of(tmp_path / "out")
    assert (expected - ours).abs().max() < 2e-5 * expected.std()
    assert verify(tmp_path / "out", base, adapter)["tensors"]["named_by_the_adapter"] > 0
    for key, value in {} if name in PEFT_DIFFERS else mine.items():
        assert torch.allclose(value, weights[key], rtol=1e-5, atol=1e-6), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    if isinstance(spec, dict) and spec.get("tie"):
        assert config["tie_word_embeddings"] is (name in TIED_AFTER)
    assert config["vocab_size"] == (fields.get("vocabulary") or VOCAB)
    if not report["config_changes"]:
        assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["plain", "dora", "embedding_dora", "lora_bias", "resized", "gpt2_dora"])
def test_bfloat16_is_the_float32_result_rounded_once(name, tmp_path):
    spec, fields = CASES[name]
    base = (
        gpt2(tmp_path / "base", dtype=torch.bfloat16)
        if spec == "gpt2"
        else llama(tmp_path / "base", dtype=torch.bfloat16, **spec)
    )
    adapter = adapt(base, tmp_path / "adapter", **fields)
    report = merge(adapter, str(base), tmp_path / "out", fsync=False)
    _, weights = trained(base, adapter, fields.get("vocabulary"))
    _, mine = logits_of(tmp_path / "out")
    off = total = 0
    for key, value in mine.items():
        once = weights[key].bfloat16().float()
        assert ((value - once).abs() <= 2.0**-7 * once.abs()).all(), key
        off, total = off + int((value != once).sum()), total + value.numel()
    assert off <= 1e-4 * total + 2
    assert report["verification"]["logits"]["argmax_agreement"] > 0.5


def test_a_resized_vocabulary_that_was_saved_in_part_is_refused(tmp_path):
    base = llama(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", vocabulary=VOCAB + 7, target_modules=["q_proj", "embed_tokens"])
    refused("not everywhere: lm_head.weight", adapter, str(base))
    config = json.loads((adapter / "adapter_config.json").read_text())
    fields = config | {"trainable_token_indices": [VOCAB + 1]}
    tensors = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "q_proj" in k}
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.zeros(1, 32)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    refused("lies beyond the 64 rows", adapter, str(base))


def test_layout_of_shards_and_index_is_kept(tmp_path):
    base = llama(tmp_path / "base", shard="20KB", tie=True)
    adapter = adapt(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge(adapter, str(base), tmp_path / "out", fsync=False)
    before, after = (json.loads((p / "model.safetensors.index.json").read_text()) for p in (base, tmp_path / "out"))
    assert len(set(before["weight_map"].values())) > 2
    assert {k: after["weight_map"][k] for k in before["weight_map"]} == before["weight_map"]
    assert set(after["weight_map"]) - set(before["weight_map"]) == {"lm_head.weight"}
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + VOCAB * 32 * 4


def test_output_dtype_can_be_chosen(tmp_path):
    base = llama(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter")
    merge(adapter, str(base), tmp_path / "out", dtype="bfloat16", fsync=False)
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_what_alters_the_base_goes_through_peft(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapt(base, tmp_path / "adapter", init_lora_weights="pissa")
    report = merge(adapter, str(base), tmp_path / "out", fsync=False)
    assert report["method"] == "peft" and "pissa" in report["reason"]
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert report["verification"]["logits"]["max_difference"] > 0


def run_folder(tmp_path: Path, **fields) -> tuple[Path, Path]:
    base = llama(tmp_path / "base")
    run = tmp_path / "run"
    adapt(base, run / "adapter", record=True, **fields)
    (run / "plan.json").write_text(json.dumps({"model": {"name_or_path": str(base)}}))
    (run / "adapter/chat_template.jinja").write_text("{{ messages }}")
    return run, base


def test_a_run_needs_nothing_else(tmp_path):
    run, base = run_folder(tmp_path)
    seen = []
    report = merge(run, progress=lambda done, total: seen.append((done, total)))
    out = run / "merged"
    assert report["out"] == str(out) and seen[-1] == (report["bytes"], report["bytes"]) and len(seen) > 5
    assert (out / "chat_template.jinja").is_file() and (out / "generation_config.json").is_file()
    saved = json.loads((out / "merge.json").read_text())
    assert saved["base"]["name_or_path"] == str(base) and saved["fsync_seconds"] is not None
    assert all(isinstance(found, dict) for found in saved["verification"].values())
    assert saved["verification"]["logits"]["argmax_agreement"] == 1.0 and saved["peak_rss_gb"] > 0
    assert sorted(p.name for p in run.iterdir()) == ["adapter", "merged", "plan.json"]
    with pytest.raises(KitError, match="exists"):
        merge(run)
    assert merge(run, overwrite=True, verify="tensors")["verification"].keys() >= {"tensors"}


def refused(match: str, *args, code: int = 2, **kwargs) -> None:
    with pytest.raises(KitError, match=match) as error:
        merge(*args, **kwargs)
    assert error.value.code == code


def test_wrong_bases_are_refused(tmp_path):
    run, base = run_folder(tmp_path)
    twin = llama(tmp_path / "twin", seed=7)
    refused("its weights differ", run, str(twin))
    other = llama(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    refused("its config.json differs", run, str(other))
    foreign = adapt(base, tmp_path / "foreign")
    refused("no module for", foreign, str(llama(tmp_path / "shallow", layers=1)), tmp_path / "o")
    refused("does not know: model.layers.2", foreign, str(llama(tmp_path / "deep", layers=3)), tmp_path / "o")
    refused("the adapter is for", foreign, str(llama(tmp_path / "wide", hidden=64)), tmp_path / "o")
    refused("not on this machine", foreign, "nobody/nothing", tmp_path / "o")
    assert not (tmp_path / "o").exists() and not (run / "merged").exists()


def test_damaged_and_missing_files_are_refused(tmp_path):
    run, base = run_folder(tmp_path)
    weights = run / "adapter/adapter_model.safetensors"
    good = weights.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for data, match in ((good[:-10], "SHA-256"), (bytes(flipped), "SHA-256")):
        weights.write_bytes(data)
        refused(match, run)
    (run / "adapter/manifest.json").unlink()
    weights.write_bytes(good[:-10])
    refused("cut short", run)
    weights.write_bytes(good[:4])
    refused("damaged", run)
    weights.rename(run / "adapter/adapter_model.bin")
    refused("pickle", run)
    weights.write_bytes(good)
    (run / "adapter/adapter_config.json").write_text("{")
    refused("cannot be read", run)
    refused("neither a run nor an adapter", base)
    refused("neither a folder nor", tmp_path / "absent")
    full = tmp_path / "full"
    (full / "model").mkdir(parents=True)
    refused("no adapter to merge", full)


def test_damaged_bases_are_refused(tmp_path):
    base = llama(tmp_path / "base", shard="20KB")
    adapter = adapt(base, tmp_path / "adapter")
    shard = sorted(base.glob("*.safetensors"))[0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    refused("cut short", adapter, str(base))
    shard.unlink()
    refused("lacks", adapter, str(base))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    refused("a pickle", adapter, str(pickled))
    shard.write_bytes(good)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    refused("stored quantized", adapter, str(base))


def test_nothing_that_is_not_finite_is_published(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.float16)
    adapter = adapt(base, tmp_path / "adapter", strength=400.0)
    refused("not finite", adapter, str(base), code=4)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    refused("not finite", adapter, str(base), code=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def wrong_scale(monkeypatch):
    right = kit.merging.plan.rank_and_scale
    monkeypatch.setattr(kit.merging.plan, "rank_and_scale", lambda c, m: (right(c, m)[0], right(c, m)[1] * 1.01))


def module_left_out(monkeypatch):
    def without(plan, shards, edits, dtype):
        edits.pop("model.layers.1.self_attn.q_proj.weight")
        lay_out(plan, shards, edits, dtype)

    lay_out = kit.merging.plan._lay_out
    monkeypatch.setattr(kit.merging.plan, "_lay_out", without)


def other_layer(monkeypatch):
    def swapped(plan):
        found = edits(plan)
        a, b = (found[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (0, 1))
        a.lora, b.lora = b.lora, a.lora
        return found

    edits = kit.merging.plan._plan_edits
    monkeypatch.setattr(kit.merging.plan, "_plan_edits", swapped)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def sound(request, tmp_path_factory):
    """A base and an adapter whose merge passes both checks."""
    folder = tmp_path_factory.mktemp("sound")
    base = llama(folder / "base", dtype=request.param, hidden=64)
    adapter = adapt(base, folder / "adapter", strength=0.05)
    report = merge(adapter, str(base), folder / "out", fsync=False)
    assert set(report["verification"]) >= {"tensors", "logits"}
    return base, adapter


@pytest.mark.parametrize("fault", [wrong_scale, module_left_out, other_layer])
def test_verification_finds_planted_faults(fault, sound, tmp_path, monkeypatch):
    base, adapter = sound
    fault(monkeypatch)
    refused("is not base \\+ adapter", adapter, str(base), tmp_path / "out", code=4, verify="tensors")
    monkeypatch.setattr("kit.merging.compare.check_tensors", lambda *args: {})
    refused("does not answer as", adapter, str(base), tmp_path / "out", code=4, verify="logits")
    assert not list(tmp_path.iterdir())


def dies(function, after: int):
    """`function`, except that its process is gone when it is called once more than `after` times."""
    calls = []

    def counted(*args, **kwargs):
        if len(calls) == after:
            os._exit(9)
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def killed_merge(point: str, adapter: Path, base: Path, out: Path) -> int:
    """Merge in a forked child that ends without warning at a point; gives its exit code."""

    def run() -> None:
        module, name, after = {
            "block": (kit.merging.stream, "_write_changed_tensor", 2),
            "publish": (kit.storage.atomic_folder, "replace_folder", 0),
        }[point]
        setattr(module, name, dies(getattr(module, name), after))
        merge(adapter, str(base), out, verify=False, fsync=False)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def child(code: str, *args: object) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_killed_half_way_leaves_nothing_or_everything(tmp_path):
    base = llama(tmp_path / "base", shard="20KB")
    adapter = adapt(base, tmp_path / "adapter")
    out = tmp_path / "out"
    for point in ("block", "publish"):
        assert killed_merge(point, adapter, base, out) == 9
        assert not out.exists() and len(list(tmp_path.glob("out.staging-*"))) == 1
    merge(adapter, str(base), out, verify=False, fsync=False)  # a new start sweeps the remains
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
    before = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    moved = tmp_path / "out.replaced-999999999"
    out.rename(moved)  # as a kill between the two renames of an overwrite leaves it
    refused("exists", adapter, str(base), out)
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == before and not moved.exists()


MEMORY = """
    import json, sys
    from pathlib import Path
    from kit.merging import merge, peak_rss_gb
    from kit.merging.plan import plan_merge
    plan_merge(Path(sys.argv[2]), Path(sys.argv[1]))  # all imports
    start = peak_rss_gb()
    merge(sys.argv[1], sys.argv[2], sys.argv[3], verify=False, fsync=False)
    print(json.dumps([start, peak_rss_gb()]))
"""


@pytest.mark.launch
def test_memory_stays_far_below_the_base(tmp_path):
    small = llama(tmp_path / "small")
    adapter = adapt(small, tmp_path / "small-adapter")
    torch.manual_seed(0)
    config = json.loads((small / "config.json").read_text())
    width, wide, vocabulary = 1024, 4096, 20000
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shapes["model.norm.weight"] = (width,)
    lora = {}
    for i in range(8):
        name = f"model.layers.{i}."
        for part, rows, columns in [("gate_proj", wide, width), ("up_proj", wide, width), ("down_proj", width, wide)]:
            shapes[f"{name}mlp.{part}.weight"] = (rows, columns)
            lora[f"base_model.model.{name}mlp.{part}.lora_A.weight"] = torch.randn(4, columns) * 0.01
            lora[f"base_model.model.{name}mlp.{part}.lora_B.weight"] = torch.randn(rows, 4) * 0.01
        for part, rows in [("q_proj", width), ("k_proj", width // 2), ("v_proj", width // 2), ("o_proj", width)]:
            shapes[f"{name}self_attn.{part}.weight"] = (rows, width)
        shapes |= {f"{name}{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    big, big_adapter = tmp_path / "big", tmp_path / "big-adapter"
    big.mkdir(), big_adapter.mkdir()
    changed = {"hidden_size": width, "intermediate_size": wide, "vocab_size": vocabulary, "num_hidden_layers": 8}
    changed |= {"head_dim": width // 4, "attention_bias": False}
    (big / "config.json").write_text(json.dumps(config | changed))
    save_file({k: torch.full(s, 0.5, dtype=torch.bfloat16) for k, s in shapes.items()}, big / "model.safetensors")
    save_file(lora, big_adapter / "adapter_model.safetensors")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (big_adapter / "adapter_config.json").write_text(json.dumps(fields))
    size = (big / "model.safetensors").stat().st_size / 1e9
    run = child(MEMORY, big_adapter, big, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    start, peak = json.loads(run.stdout.strip().splitlines()[-1])
    assert size > 0.28 and peak - start < 0.35 * size, (size, start, peak)


def test_manifest_helper_matches_the_contract(tmp_path):
    base = llama(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter")
    write_manifest(base, adapter)
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert set(manifest["base"]) == {"name_or_path", "revision", "config_sha256", "fingerprint"}
    assert kit.merging.adapter.read_sorted_adapter(adapter).manifest == manifest
