"""`kit convert`: tiny checkpoints in Meta's format, written here, against a plain forward in Meta's own arithmetic."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kit.cli import verbs as cli
from kit.converting import convert
from kit.errors import KitError

ENV = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
DIM, LAYERS, HEADS, FEED = 64, 2, 4, 96
ROWS = (("wq", 0), ("wk", 0), ("wv", 0), ("w1", 0), ("w3", 0), ("output", 0), ("wo", 1), ("w2", 1))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    lines = ["the patient has pain in the left arm", "a doctor gives rest and water since two days"] * 50
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "t"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,  # as Llama's was
    )  # fmt: skip
    return folder / "t.model"


def tiktoken_text() -> str:
    """256 bytes and a few words' merges, each line a token and its rank."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"the", b" p", b" pa", b"in", b" pain", b"\xc3\xa4"]
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))


def weights(vocabulary: int, kv: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(*shape, generator=draw) / shape[-1] ** 0.5

    found = {"tok_embeddings.weight": matrix(vocabulary, DIM), "norm.weight": 1 + matrix(DIM)}
    found["output.weight"] = matrix(vocabulary, DIM)
    for i in range(LAYERS):
        for name, shape in {
            "attention.wq": (DIM, DIM), "attention.wk": (kv * DIM // HEADS, DIM), "attention.wo": (DIM, DIM),
            "attention.wv": (kv * DIM // HEADS, DIM), "feed_forward.w1": (FEED, DIM), "feed_forward.w3": (FEED, DIM),
            "feed_forward.w2": (DIM, FEED),
        }.items():  # fmt: skip
            found[f"layers.{i}.{name}.weight"] = matrix(*shape)
        for name in ("attention_norm", "ffn_norm"):
            found[f"layers.{i}.{name}.weight"] = 1 + matrix(DIM)
    return found


def write_meta(folder: Path, tokenizer: Path | str, *, kv=2, ranks=1, llama3=False, scaled=False, tied=False, seed=0):
    """A Meta folder with `ranks` shards; the whole tensors come back."""
    folder.mkdir(parents=True)
    if isinstance(tokenizer, Path):
        import sentencepiece

        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        size = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()
        size += -size % 2
    else:
        (folder / "tokenizer.model").write_text(tokenizer)
        size = len(tokenizer.splitlines()) + 256 + 1
    whole = weights(size, kv, seed)
    if tied:
        whole["output.weight"] = whole["tok_embeddings.weight"].clone()
    params = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": kv, "norm_eps": 1e-5, "multiple_of": 32}
    params |= {"vocab_size": size, "rope_theta": 500000.0} if llama3 else {"vocab_size": -1}
    params |= {"use_scaled_rope": True} if scaled else {}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        part = {}
        for name, tensor in whole.items():
            kind = name.split(".")[-2]
            axis = dict(ROWS).get(kind)
            if kind == "tok_embeddings":
                axis = 0 if llama3 else 1
            part[name] = (tensor if axis is None else tensor.chunk(ranks, axis)[rank]).clone()
        part["rope.freqs"] = torch.ones(DIM // HEADS // 2)
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return whole, params


def reference(w: dict[str, torch.Tensor], params: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits in Meta's arithmetic: neighbouring values of a head are one complex number that is rotated."""
    head, kv = DIM // HEADS, params["n_kv_heads"]
    steps = 1.0 / params.get("rope_theta", 10000.0) ** (torch.arange(0, head, 2).float() / head)
    angles = torch.polar(torch.ones(len(ids), head // 2), torch.outer(torch.arange(len(ids)).float(), steps))

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * w[name]

    def turn(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles[:, None]).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for i in range(LAYERS):
        p = f"layers.{i}."
        y = norm(x, p + "attention_norm.weight")
        q, k, v = ((y @ w[f"{p}attention.w{n}.weight"].T).view(len(ids), -1, head) for n in "qkv")
        k, v = (t.repeat_interleave(HEADS // kv, 1) for t in (turn(k), v))
        scores = torch.einsum("qhd,khd->hqk", turn(q), k) / head**0.5 + mask
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w[p + "attention.wo.weight"].T
        y = norm(x, p + "ffn_norm.weight")
        gate = functional.silu(y @ w[p + "feed_forward.w1.weight"].T) * (y @ w[p + "feed_forward.w3.weight"].T)
        x = x + gate @ w[p + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


def difference(folder: Path, w, params) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(ids[None]).logits[0] - reference(w, params, ids)).abs().max())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kv", [2, 4])
def test_llama2_logits_equal_metas_arithmetic(tmp_path, sentencepiece_file, ranks, kv):
    w, params = write_meta(tmp_path / "meta", sentencepiece_file, ranks=ranks, kv=kv)
    report = convert(tmp_path / "meta", tmp_path / "out", shard_gb=1e-4, fsync=False)
    assert difference(tmp_path / "out", w, params) < 1e-5
    assert len(report["shards"]) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["intermediate_size"]) == (4096, FEED)
    assert config["num_key_value_heads"] == kv and not list(tmp_path.glob("out.*"))


def test_llama3_logits_and_special_tokens(tmp_path):
    from transformers import AutoTokenizer

    w, params = write_meta(tmp_path / "meta", tiktoken_text(), ranks=2, llama3=True)
    convert(tmp_path / "meta", tmp_path / "out", fsync=False)
    assert difference(tmp_path / "out", w, params) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the pain,  3 days\n\tnaïve ä 🙂"
    ids = tokenizer(text).input_ids
    assert ids[0] == 263 == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert tokenizer("the").input_ids[1:] == [257] and tokenizer(" pain").input_ids[1:] == [261]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == 263 + 9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192


def test_llama3_2_is_tied_and_scaled(tmp_path):
    write_meta(tmp_path / "meta", tiktoken_text(), llama3=True, scaled=True, tied=True)
    convert(tmp_path / "meta", tmp_path / "out", fsync=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["max_position_embeddings"] == 131072
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, 500000.0)
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert "lm_head.weight" not in f.keys()
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert tokens[4]["content"] == "<|finetune_right_pad_id|>"


@pytest.mark.parametrize("fault", ["rotation", "swapped"])
def test_a_planted_fault_exceeds_the_tolerance(tmp_path, sentencepiece_file, monkeypatch, fault):
    from kit.converting import shards, stream

    w, params = write_meta(tmp_path / "meta", sentencepiece_file, ranks=2)
    if fault == "rotation":
        monkeypatch.setattr(stream, "_reorder", lambda rows, head: rows)
    else:  # keys for values: the same shapes
        monkeypatch.setattr(shards, "LAYER_TENSORS", {**shards.LAYER_TENSORS, "attention.wv": ("self_attn.k_proj", 0),
                                              "attention.wk": ("self_attn.v_proj", 0)})  # fmt: skip
    convert(tmp_path / "meta", tmp_path / "out", fsync=False)
    assert difference(tmp_path / "out", w, params) > 1e-3


def test_sentencepiece_ids_are_the_originals(tmp_path, sentencepiece_file):
    import sentencepiece
    from transformers import AutoTokenizer

    write_meta(tmp_path / "meta", sentencepiece_file)
    convert(tmp_path / "meta", tmp_path / "out", fsync=False)
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the patient has pain", "  two  spaces", "naïve 🙂\nline", "a"):
        assert tokenizer(text).input_ids == original.encode(text, add_bos=True)


@pytest.mark.launch
def test_dtype_overwrite_and_the_real_command(tmp_path, sentencepiece_file):
    write_meta(tmp_path / "meta", sentencepiece_file)
    argv = [sys.executable, "-m", "kit", "convert", "meta", "out", "--dtype", "bfloat16", "--no-fsync"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=ENV)
    assert done.returncode == 0 and "bfloat16" in done.stdout, done.stderr
    again = cli.run_verb(["convert", str(tmp_path / "meta"), str(tmp_path / "out")])
    assert again == 2  # exists
    assert cli.run_verb(["convert", str(tmp_path / "meta"), str(tmp_path / "out"), "--overwrite", "--no-fsync"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"  # as stored


def spoil(folder: Path, how: str) -> None:
    shard = folder / "consolidated.01.pth"
    held = torch.load(shard, weights_only=True)
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5000])
    elif how == "missing shard":
        (folder / "consolidated.00.pth").unlink()
    elif how == "too few":
        shard.unlink()
    elif how == "no params":
        (folder / "params.json").unlink()
    elif how == "bad params":
        (folder / "params.json").write_text("{")
    elif how == "lacking key":
        given = json.loads((folder / "params.json").read_text())
        del given["n_heads"]
        (folder / "params.json").write_text(json.dumps(given))
    elif how == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif how == "bad tokenizer":
        (folder / "tokenizer.model").write_bytes(b"\x00\x01nonsense")
    elif how == "unknown tensor":
        torch.save({**held, "layers.0.attention.bias": torch.ones(3)}, shard)
    elif how == "vision":
        torch.save({**held, "vision_model.x": torch.ones(3)}, shard)
    elif how == "wrong shape":
        torch.save({**held, "layers.1.feed_forward.w2.weight": torch.ones(3, 3)}, shard)
    elif how == "other norm":
        torch.save({**held, "norm.weight": held["norm.weight"] + 1}, shard)


@pytest.mark.parametrize(
    "how, said",
    [
        ("truncated", "consolidated.01.pth is damaged or cut short"),
        ("missing shard", "lacks consolidated.00.pth"),
        ("too few", "is one of 2 shards, and 1 are here"),
        ("no params", "has no params.json"),
        ("bad params", "is not JSON"),
        ("lacking key", "lacks n_heads"),
        ("no tokenizer", "there is no tokenizer.model"),
        ("bad tokenizer", "tokenizer.model is damaged"),
        ("unknown tensor", "holds unknown tensors: layers.0.attention.bias"),
        ("vision", "holds a vision model"),
        ("wrong shape", "layers.1.feed_forward.w2.weight is [3, 3]"),
        ("other norm", "norm.weight is not that of consolidated.00.pth"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, sentencepiece_file, capsys, how, said):
    write_meta(tmp_path / "meta", sentencepiece_file, ranks=2)
    spoil(tmp_path / "meta", how)
    assert cli.run_verb(["convert", str(tmp_path / "meta"), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta"]


def test_a_pickle_that_would_run_code_is_refused(tmp_path, sentencepiece_file):
    write_meta(tmp_path / "meta", sentencepiece_file)
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (canary,))

    torch.save({"tok_embeddings.weight": Evil()}, tmp_path / "meta" / "consolidated.00.pth", pickle_module=pickle)
    with pytest.raises(KitError, match="weights-only loader refuses it"):
        convert(tmp_path / "meta", tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_no_room_on_the_disk(tmp_path, sentencepiece_file, monkeypatch):
    import shutil
    from types import SimpleNamespace

    write_meta(tmp_path / "meta", sentencepiece_file)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(KitError) as refused:
        convert(tmp_path / "meta", tmp_path / "out")
    assert refused.value.code == 3 and "free" in str(refused.value)


def test_killed_half_way_leaves_nothing(tmp_path, sentencepiece_file, monkeypatch):
    from kit.converting import meta

    write_meta(tmp_path / "meta", sentencepiece_file)

    def broken(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(meta, "write_shards", broken)
    with pytest.raises(KitError, match="No space left"):
        convert(tmp_path / "meta", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta"]


def test_a_model_path_that_is_a_meta_folder_names_the_command(tmp_path, sentencepiece_file, chat, capsys):
    write_meta(tmp_path / "meta", sentencepiece_file)
    assert cli.run_verb(["check", f"model.name_or_path={tmp_path / 'meta'}", f"dataset.path={chat}"]) == 2
    said = capsys.readouterr().err
    assert "Meta's own checkpoint format" in said and f"kit convert {tmp_path / 'meta'}" in said


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_pickled_weights_become_safetensors(tmp_path, parts, tied):
    """Equal logits, tied matrices once, everything else of the folder copied but code."""
    import tiny
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old = tiny.make_model(tmp_path / "old", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(old)
    held = dict(model.state_dict())
    (old / "model.safetensors").unlink()
    (old / "modeling_x.py").write_text("raise SystemExit")
    names = list(held)
    groups = [names] if parts == 1 else [names[::2], names[1::2]]
    files = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for file, group in zip(files, groups, strict=True):
        torch.save({n: held[n] for n in group}, old / file)
    if parts == 2:
        places = {n: f for f, g in zip(files, groups, strict=True) for n in g}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    report = convert(old, tmp_path / "new", fsync=False)
    assert len(report["shards"]) == parts and not list((tmp_path / "new").glob("*.py"))
    assert not list((tmp_path / "new").glob("*.bin*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", use_safetensors=True)
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("the patient has pain", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, model(**ids).logits)
    with pytest.raises(KitError, match="has a config.json of its own"):
        convert(old, tmp_path / "other", max_position_embeddings=64)
    if parts == 1 and tied:
        assert report["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_pickled_model_that_would_run_code_is_refused(tmp_path, chat, capsys):
    import tiny

    old = tiny.make_model(tmp_path / "old")
    (old / "model.safetensors").unlink()
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (canary,))

    torch.save({"x": Evil()}, old / "pytorch_model.bin", pickle_module=pickle)
    assert cli.run_verb(["check", f"model.name_or_path={old}", f"dataset.path={chat}"]) == 2
    assert f"kit convert {old} OUT" in capsys.readouterr().err
    assert cli.run_verb(["convert", str(old), str(tmp_path / "new")]) == 2
    assert "weights-only loader refuses it" in capsys.readouterr().err
    (old / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    assert cli.run_verb(["convert", str(old), str(tmp_path / "new")]) == 2
    assert "damaged or cut short" in capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "new").exists()


BIG = """
import resource, sys, threading, time
from kit.converting import convert
peak = [0]
def watch():
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak[0] = max(peak[0], int(line.split()[1]))
        time.sleep(0.005)
import torch, transformers, tokenizers, sentencepiece
from transformers import LlamaConfig, GenerationConfig, PreTrainedTokenizerFast, LlamaTokenizer
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
before = peak[0]
convert(sys.argv[1], sys.argv[2], fsync=False)
print((peak[0] - before) / 1024)
"""


@pytest.mark.launch
def test_memory_does_not_grow_with_the_model(tmp_path, sentencepiece_file):
    """A checkpoint of 280 MB is converted within a few blocks of memory."""
    write_meta(tmp_path / "meta", sentencepiece_file, kv=4)
    shard = tmp_path / "meta" / "consolidated.00.pth"
    held = torch.load(shard, weights_only=True)
    wide = 400_000
    for i in range(LAYERS):
        held[f"layers.{i}.feed_forward.w2.weight"] = torch.randn(DIM, wide // 2)
        for n in ("w1", "w3"):
            held[f"layers.{i}.feed_forward.{n}.weight"] = torch.randn(wide // 2, DIM)
    torch.save(held, shard)
    size = shard.stat().st_size / 2**20
    done = subprocess.run([sys.executable, "-c", BIG, str(tmp_path / "meta"), str(tmp_path / "out")],
                          capture_output=True, text=True, timeout=200, env=ENV)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 120 < size / 2, (done.stdout, size)
