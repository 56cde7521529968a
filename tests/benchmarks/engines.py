"""`kit train` under deepspeed beside plain TRL, in one run: tokens/s, peak GB, seconds per checkpoint, losses.

    python tests/benchmarks/engines.py --shape 8b --engines zero2 zero3 zero3_offload --out results.json
    python tests/benchmarks/engines.py --shape tiny --cpu --out /tmp/x.json            (rehearsal)

Arms: `kit` (the plan), `trl` (SFTTrainer as it comes: its own defaults, a string model, an "auto" JSON of the stage)
and `trl-same` (the same script with the plan's own settings and its resolved DeepSpeed JSON). The base is made once,
random, on disk. One process group per arm; JSON is written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0, max_position_embeddings=8192),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1024, max_position_embeddings=8192),
}  # fmt: skip
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")


def make_base(folder: Path, shape: str, device: str) -> None:
    """A random bf16 base with a word tokenizer, saved in shards; kept when it is there."""
    if (folder / "done").exists():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(1000))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(**SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_device(device)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    torch.set_default_device("cpu")
    (folder / "done").touch()


def make_data(path: Path, rows: int, words: int) -> None:
    draw = random.Random(0)
    with open(path, "w") as f:
        for _ in range(rows):
            f.write(json.dumps({"text": " ".join(f"w{draw.randrange(1000)}" for _ in range(words))}) + "\n")


def run(argv: list[str], env: dict[str, str], log: Path, limit: float) -> tuple[int, float]:
    start = time.time()
    with open(log, "w") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = -9
    return code, time.time() - start


def figures(raw: dict, tokens_per_step: int, skip: int, start: float) -> dict:
    """Median step time without the first `skip` steps and without the steps that follow a checkpoint."""
    ends = raw["step_ends"]
    deltas = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    saves = raw.get("save_steps", [])
    timed = [d for i, d in enumerate(deltas, 2) if i > skip and i - 1 not in saves]
    return {
        "tokens_per_second": round(tokens_per_step / statistics.median(timed), 1),
        "step_seconds": [round(d, 4) for d in deltas],
        "first_step_after_seconds": round(ends[0] - start, 1),
        "peak_gb": raw["peak_gb"] and round(raw["peak_gb"], 2),
        "checkpoint_seconds": [round(s, 3) for s in raw["checkpoint_seconds"]],
        "losses": [round(x, 5) for x in raw["losses"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--engines", nargs="+", default=["zero2", "zero3", "zero3_offload"])
    parser.add_argument("--arms", nargs="+", default=["trl", "kit", "trl-same"])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", default="/tmp/kit-engines")
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=float, default=240)
    parser.add_argument("--deadline", type=float, default=1e9, help="start no further arm after this many seconds")
    parser.add_argument("--cpu", action="store_true")
    a = parser.parse_args()
    began = time.time()
    work = Path(a.work)
    work.mkdir(parents=True, exist_ok=True)
    base, data = work / f"base-{a.shape}", work / "rows.jsonl"
    make_base(base, a.shape, "cpu" if a.cpu else "cuda")
    make_data(data, a.gpus * a.micro * a.steps, a.length + 8)
    results = {"argv": sys.argv, "made_base_seconds": round(time.time() - began, 1), "rows": {}}
    save_every = a.steps // 2
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    if a.cpu:
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    common = dict(per_device_train_batch_size=a.micro, max_length=a.length, max_steps=a.steps, logging_steps=1,
                  save_strategy="steps", save_steps=save_every, seed=42, report_to="none")  # fmt: skip
    tokens = a.gpus * a.micro * a.length

    for engine in a.engines:
        runs = work / f"runs-{engine}"
        shutil.rmtree(runs, ignore_errors=True)
        overrides = [
            f"model.name_or_path={base}", f"dataset.path={data}", f"deepspeed={engine}", f"runs_dir={runs}",
            "name=kit", f"launch.num_gpus={a.gpus}", "launch=deepspeed",
            f"launch.script={ROOT / 'tests/benchmarks/kit_clock.py'}",
            *(f"peft.{k}={v}" for k, v in LORA.items()), *(f"trainer.{k}={v}" for k, v in common.items()),
            *(["trainer.use_cpu=true"] if a.cpu else ["trainer.bf16=true"]),
        ]  # fmt: skip
        plan_path = None
        for arm in a.arms:
            key = f"{engine} {arm}"
            if time.time() - began > a.deadline:
                results["rows"][key] = {"skipped": "deadline"}
                continue
            log, start = work / f"{engine}-{arm}.log", time.time()
            if arm == "kit":
                code, seconds = run([sys.executable, "-m", "kit", "train", *overrides], env, log, a.limit)
                found = sorted(runs.glob("kit-*/clock.json"))
                if code == 0 and found:
                    metrics = json.loads((found[0].parent / "metrics.json").read_text())
                    history = [json.loads(x) for x in (found[0].parent / "metrics.jsonl").read_text().splitlines()]
                    raw = json.loads(found[0].read_text()) | {
                        "losses": [r["loss"] for r in history if "loss" in r],
                        "checkpoint_seconds": metrics["checkpoint_seconds"],
                        "peak_gb": metrics["peak_memory_gb"],
                    }
            else:
                if arm == "trl-same" and plan_path is None:
                    plan_path = next(iter(runs.glob("kit-*/plan.json")), None)
                out = work / f"{engine}-{arm}"
                shutil.rmtree(out, ignore_errors=True)
                if arm == "trl-same" and plan_path:
                    plan = json.loads(plan_path.read_text())
                    sft = {**plan["trainer"], "deepspeed": str(plan_path.parent / "ds_config.json")}
                    sft["model_init_kwargs"] = {"dtype": plan["model"]["dtype"]}
                else:
                    file = work / f"{engine}-auto.json"
                    file.write_text(json.dumps(auto_json(engine)))
                    sft = {**common, "deepspeed": str(file)}
                    if a.cpu:
                        sft |= {"use_cpu": True, "bf16": False}
                settings = work / f"{engine}-{arm}.json"
                figures_file = work / f"{engine}-{arm}.figures.json"
                figures_file.unlink(missing_ok=True)
                settings.write_text(json.dumps({
                    "sft": {**sft, "output_dir": str(out), "disable_tqdm": True}, "model": str(base),
                    "data": str(data), "peft": LORA, "out": str(figures_file),
                }))  # fmt: skip
                port = str(20000 + random.randrange(20000))
                argv = [sys.executable, "-m", "deepspeed.launcher.runner"]
                argv += ["--num_gpus", str(a.gpus), "--master_port", port]
                argv += [str(ROOT / "tests/benchmarks/trl_plain.py"), str(settings)]
                code, seconds = run(argv, env, log, a.limit)
                raw = json.loads(figures_file.read_text()) if figures_file.exists() else None
            if code == 0 and raw:
                raw["save_steps"] = [save_every, a.steps]
                row = figures(raw, tokens, 3, start) | {"all_seconds": round(seconds, 1)}
            else:
                row = {"failed": code, "tail": log.read_text(errors="replace")[-1500:]}
            results["rows"][key] = row
            Path(a.out).write_text(json.dumps(results, indent=1))
            print(key, json.dumps({k: v for k, v in row.items() if k not in ("step_seconds", "losses")}), flush=True)
    print(table(results["rows"]))


def auto_json(engine: str) -> dict:
    """The DeepSpeed JSON of the documentation's examples: everything that Transformers can fill is "auto"."""
    stage = 3 if "3" in engine else 2 if "2" in engine else 1
    zero: dict = {"stage": stage}
    if stage == 3:
        keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero |= dict.fromkeys(keys, "auto") | {"stage3_gather_16bit_weights_on_model_save": True}
    if "offload" in engine:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(keys, "auto")}


def table(rows: dict) -> str:
    lines = [f"{'engine':<16}{'arm':<10}{'tok/s':>10}{'peak GB':>9}{'checkpoint s':>20}{'to step 1, s':>14}"]
    for key, row in rows.items():
        engine, arm = key.split()
        if "tokens_per_second" not in row:
            lines.append(f"{engine:<16}{arm:<10} {row.get('skipped') or 'failed'}")
            continue
        saves = " ".join(f"{s:.2f}" for s in row["checkpoint_seconds"])
        peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-"
        first = row["first_step_after_seconds"]
        lines.append(f"{engine:<16}{arm:<10}{row['tokens_per_second']:>10,.0f}{peak:>9}{saves:>20}{first:>14.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
