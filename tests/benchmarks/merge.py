"""Times `kit merge` against peft (load, merge_and_unload, save_pretrained) on one base, in fresh processes, in turn.

    python tests/benchmarks/merge.py --out results.json            # an 8B Llama shape: 16 GB, twice that free on disk
    python tests/benchmarks/merge.py --layers 4 --hidden 256 --inter 512 --vocab 1000 --shard-gb 0.005 --out r.json

The base is random, the page cache is warm, B is not zero. `results.json` is written anew after every arm.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEFT = """
    import json, sys, time
    begun = time.perf_counter()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    imported = time.perf_counter()
    base, adapter, out = sys.argv[1:4]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter)
    loaded = time.perf_counter()
    model = model.merge_and_unload()
    merged = time.perf_counter()
    model.save_pretrained(out, max_shard_size=sys.argv[4])
    saved = time.perf_counter()
    from kit.merging import peak_rss_gb
    print(json.dumps({
        "imports": imported - begun, "load": loaded - imported, "merge": merged - loaded, "save": saved - merged,
        "seconds": saved - imported,
        "peak_rss_gb": peak_rss_gb()}))
"""
KIT = """
    import json, sys, time
    begun = time.perf_counter()
    import torch, transformers
    from transformers import LlamaForCausalLM
    from kit.merging import merge, peak_rss_gb
    imported = time.perf_counter()
    report = merge(sys.argv[2], sys.argv[1], sys.argv[3], verify=False, fsync=sys.argv[5] == "fsync")
    done = time.perf_counter()
    print(json.dumps({
        "imports": imported - begun, "write": report["seconds"]["write"], "fsync": report["fsync_seconds"],
        "seconds": done - imported, "workers": report["workers"],
        "peak_rss_gb": peak_rss_gb()}))
"""
ARMS = {"kit": (KIT, "plain"), "kit_fsync": (KIT, "fsync"), "peft": (PEFT, "")}


def shapes(a: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Llama shape, in checkpoint order."""
    head = a.hidden // a.heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab, a.hidden)}
    for i in range(a.layers):
        layer = f"model.layers.{i}."
        found |= {layer + f"{n}.weight": (a.hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name in ("q_proj", "k_proj", "v_proj"):
            found[f"{layer}self_attn.{name}.weight"] = ((a.heads if name == "q_proj" else a.kv) * head, a.hidden)
        found[f"{layer}self_attn.o_proj.weight"] = (a.hidden, a.heads * head)
        found |= {f"{layer}mlp.{n}.weight": (a.inter, a.hidden) for n in ("gate_proj", "up_proj")}
        found[f"{layer}mlp.down_proj.weight"] = (a.hidden, a.inter)
    return found | {"model.norm.weight": (a.hidden,), "lm_head.weight": (a.vocab, a.hidden)}


def make_base(folder: Path, a: argparse.Namespace) -> int:
    """Write the base; its values come from one pool of random numbers read from another place each time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    pool = (torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards, size = [{}], 0
    for name, shape in shapes(a).items():
        need = 2 * math.prod(shape)
        if size and size + need > a.shard_gb * 1e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += need
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shard.items():
            count = math.prod(shape)
            start = sum(name.encode()) * 7919 % (1 << 24)
            rolled = pool.roll(-start)
            tensors[name] = rolled.repeat(-(-count // len(pool)))[:count].reshape(shape).contiguous()
            weight_map[name] = file
            total += 2 * count
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": a.hidden,
        "intermediate_size": a.inter,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv,
        "vocab_size": a.vocab,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def make_adapter(folder: Path, base: Path, a: argparse.Namespace) -> None:
    """An adapter on every linear layer, A and B random, in float32 as training saves it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, shape in shapes(a).items():
        if "_proj." in name:
            key = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{key}.lora_A.weight"] = torch.randn(a.rank, shape[1], generator=generator) / shape[1] ** 0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], a.rank, generator=generator) * 0.005
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": a.rank, "lora_alpha": 2 * a.rank}
    config |= {"target_modules": targets, "base_model_name_or_path": str(base), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def warm(folder: Path) -> None:
    """Read every file once, so that all arms find the page cache alike."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def accuracy(base: Path, adapter: Path, out: Path, a: argparse.Namespace) -> dict[str, float]:
    """How far sampled tensors are from the float32 sum rounded once, in units of the last place and in share."""
    from safetensors import safe_open

    from kit.storage.safetensors_header import read_tensors

    before, after = read_tensors(base), read_tensors(out)
    named = [n for n in before if "_proj." in n]
    worst, off, total = 0, 0, 0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as lora:
        for name in named[:: max(1, len(named) // 12)]:
            rows = slice(0, min(256, before[name].shape[0]))
            with safe_open(before[name].file, "pt") as f, safe_open(after[name].file, "pt") as g:
                w, merged = f.get_slice(name)[rows], g.get_slice(name)[rows]
            key = "base_model.model." + name.removesuffix(".weight")
            b, small = lora.get_tensor(f"{key}.lora_B.weight")[rows], lora.get_tensor(f"{key}.lora_A.weight")
            once = (w.float() + 2.0 * (b @ small)).bfloat16()
            steps = (_ordered(merged) - _ordered(once)).abs()
            worst, off, total = max(worst, int(steps.max())), off + int((steps > 0).sum()), total + steps.numel()
    return {"max_ulps": worst, "share_off": off / total, "values": total}


def _ordered(t: Any) -> Any:
    """bfloat16 bits as integers in the order of the values they stand for."""
    import torch

    bits = t.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def run_arm(arm: str, base: Path, adapter: Path, out: Path, a: argparse.Namespace) -> dict:
    code, extra = ARMS[arm]
    shutil.rmtree(out, ignore_errors=True)
    warm(base)
    os.sync()  # nothing of the arm before is still being written
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    size = f"{max(1, int(a.shard_gb * 1000))}MB"
    command = [sys.executable, "-c", textwrap.dedent(code), str(base), str(adapter), str(out), size, extra]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return {"arm": arm, "process_seconds": time.perf_counter() - begun, **figures, **accuracy(base, adapter, out, a)}


def table(rows: list[dict]) -> str:
    lines = [f"{'arm':<10} {'seconds':>8} {'process':>8} {'RSS GB':>7} {'ulps':>5} {'off':>9}"]
    for r in rows:
        lines.append(
            f"{r['arm']:<10} {r['seconds']:>8.2f} {r['process_seconds']:>8.2f} {r['peak_rss_gb']:>7.2f}"
            f" {r['max_ulps']:>5} {r['share_off']:>9.2e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"layers": 32, "hidden": 4096, "inter": 14336, "heads": 32, "kv": 8, "vocab": 128256, "rank": 16}
    for name, default in (numbers | {"repeats": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--work", type=Path, help="where base and outputs go (default: a temporary folder)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import peft
    import torch
    import transformers

    work = Path(tempfile.mkdtemp(prefix="merge-bench-", dir=a.work))
    try:
        begun = time.perf_counter()
        size = make_base(work / "base", a)
        make_adapter(work / "adapter", work / "base", a)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        result = {
            "shape": {n: getattr(a, n) for n in numbers} | {"shard_gb": a.shard_gb, "bytes": size},
            "machine": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform(), **versions},
            "date": time.strftime("%Y-%m-%d"),
            "setup_seconds": time.perf_counter() - begun,
            "rows": [],
        }
        for _ in range(a.repeats):
            for arm in a.arms:
                result["rows"].append(run_arm(arm, work / "base", work / "adapter", work / "merged", a))
                a.out.write_text(json.dumps(result, indent=2) + "\n")
                print(json.dumps(result["rows"][-1]), flush=True)
        print(table(result["rows"]))
        best = {arm: min(r["seconds"] for r in result["rows"] if r["arm"] == arm) for arm in a.arms}
        if {"kit", "peft"} <= best.keys():
            print(f"kit is {best['peft'] / best['kit']:.1f} times as fast as peft")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
