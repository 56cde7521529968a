"""What the training benchmarks share: a random base, rows, and one run of the kit or of plain TRL with its figures."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0, max_position_embeddings=8192),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=32, vocab_size=32000, rope_theta=10000.0, max_position_embeddings=4096),
    "1b7": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, head_dim=128,
                num_key_value_heads=8, vocab_size=151936, rope_theta=1000000.0, max_position_embeddings=40960,
                model_type="qwen3", tie_word_embeddings=True),
    "mistral16": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=32000, rope_theta=10000.0, max_position_embeddings=32768,
                      model_type="mistral", sliding_window=None),
    "0b6": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, head_dim=128,
                num_key_value_heads=8, vocab_size=151936, rope_theta=1000000.0, max_position_embeddings=40960,
                model_type="qwen3", tie_word_embeddings=True),
    "mistral7b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=8, head_dim=128, vocab_size=32768, rope_theta=1000000.0,
                      max_position_embeddings=32768, sliding_window=None, model_type="mistral"),
    "qwen7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                   num_key_value_heads=4, vocab_size=152064, rope_theta=1000000.0, max_position_embeddings=32768,
                   model_type="qwen2"),
    "gemma9b": dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                    num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256, vocab_size=256000,
                    sliding_window=4096, max_position_embeddings=8192, model_type="gemma2", tie_word_embeddings=True),
    "gemma2b": dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
                    num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, vocab_size=256000,
                    sliding_window=4096, max_position_embeddings=8192, model_type="gemma2", tie_word_embeddings=True),
    "gpt2xl": dict(n_embd=1600, n_layer=48, n_head=25, n_positions=1024, vocab_size=50257, model_type="gpt2",
                   tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1024, max_position_embeddings=8192),
}  # fmt: skip
TINY = "tiny-"  # before a shape's name: the same architecture with these sizes, for a rehearsal
SMALL = dict(SHAPES["tiny"], head_dim=16, query_pre_attn_scalar=16, n_embd=64, n_layer=2, n_head=4)
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")


def shape_fields(shape: str) -> dict[str, Any]:
    """Return the config.json of a shape, the small one of its architecture where its name begins with TINY."""
    fields: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False, **SHAPES[shape.removeprefix(TINY)]}
    small = {k: SMALL[k] for k in SMALL if k in fields and k != "max_position_embeddings"}
    return fields | (small if shape.startswith(TINY) else {})


def make_base(folder: Path, shape: str, device: str, steps: int = 0) -> None:
    """A random bf16 base with a word tokenizer, saved in shards; kept when it is there. steps: of pre-training."""
    if (folder / "done").exists():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(1000))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")  # AutoTokenizer makes another one of it beside Qwen2's config.json
    config = AutoConfig.for_model(**shape_fields(shape), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if steps else torch.bfloat16)
    if steps:
        import learning

        losses = learning.pretrain(model, steps, *((8, 64) if shape.startswith("tiny") else (16, 512)), device)
        (folder / "pretraining.json").write_text(json.dumps(losses))
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    (folder / "done").touch()


def make_base_apart(folder: Path, shape: str, device: str, steps: int = 0) -> None:
    """`make_base` in a process of its own: no GPU memory stays taken."""
    words = f"import sys; sys.path.insert(0, {str(HERE)!r}); import arms; from pathlib import Path; "
    words += f"arms.make_base(Path({str(folder)!r}), {shape!r}, {device!r}, {steps})"
    subprocess.run([sys.executable, "-c", words], check=True)


def make_data(path: Path, rows: int, words: int) -> None:
    """Rows of random words, as JSON lines of `text`, or as parquet of Description, Patient and Doctor."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(1000)}" for _ in range(count))

    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = [{"Description": text(16), "Patient": text(words // 2), "Doctor": text(words)} for _ in range(rows)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
        return
    with open(path, "w") as f:
        for _ in range(rows):
            f.write(json.dumps({"text": text(words)}) + "\n")


def make_documents(path: Path, rows: int, words: int) -> None:
    """Documents as people have them: lognormal(5.6, 0.9) in length where `words` is 4096, else as much shorter."""
    draw = random.Random(0)
    with open(path, "w") as f:
        for _ in range(rows):
            count = max(2, min(words, int(draw.lognormvariate(5.6, 0.9) * words / 4096)))
            f.write(json.dumps({"text": " ".join(f"w{draw.randrange(1000)}" for _ in range(count))}) + "\n")


def machine() -> dict[str, Any]:
    """Return the card, driver and versions, without making a context on a GPU that an arm is to use."""
    import torch

    sys.path.append(str(ROOT))
    from kit.system.hardware import list_gpus

    found: dict[str, Any] = {"gpus": [gpu.name for gpu in list_gpus()], "driver": driver(), "cores": os.cpu_count()}
    found |= {"cuda": torch.version.cuda}
    packages = ("torch", "transformers", "trl", "peft", "deepspeed", "bitsandbytes", "liger-kernel", "flash-attn")
    return found | {"python": platform.python_version()} | {name: installed(name) for name in packages}


def driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0].strip() or None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Results:
    """The JSON of a benchmark: written after each arm, and read again by a later call, which goes on with the rest."""

    def __init__(self, work: Path, out: Path, deadline: float, earlier: Iterable[Path] = ()) -> None:
        self.out, self.began, self.deadline, self.lock = out, time.time(), deadline, threading.Lock()
        work.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.kept = work / "results.json"  # outlives `out`, where that is emptied between calls
        self.json: dict[str, Any] = {"rows": {}}
        for file in (*earlier, self.kept):
            if file.exists():
                before = json.loads(file.read_text())
                self.json = {**before, "rows": {**self.json["rows"], **before["rows"]}}
        self.json |= {"argv": sys.argv, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
        self.rows: dict[str, Any] = self.json["rows"]

    def keep(self, key: str, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows[key] = row
            self.write()
        hidden = ("step_seconds", "losses", "settings")
        print(key, json.dumps({k: v for k, v in row.items() if k not in hidden}), flush=True)

    def write(self) -> None:
        for file in (self.kept, self.out):
            file.write_text(json.dumps(self.json, indent=1) + "\n")

    def done(self, key: str) -> bool:
        """Whether an arm need not start: it ran and did not fail, or the time is up."""
        if time.time() - self.began > self.deadline:
            print(key, "not started: past the deadline", flush=True)
            return True
        return key in self.rows and "failed" not in self.rows[key]


def environment(cpu: bool = False) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    return env | ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if cpu else {})


def call(argv: Sequence[str], env: Mapping[str, str], log: Path, limit: float) -> tuple[int, float]:
    """Run in a process group of its own; exit code (-9: past `limit`) and seconds."""
    start = time.time()
    with open(log, "w") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = -9
    return code, time.time() - start


def run_kit(
    folder: Path, overrides: Sequence[str], env: Mapping[str, str], limit: float
) -> tuple[dict[str, Any], Path | None]:
    """`kit train` with a clock in it: its figures and its run directory, which lies in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, start = folder / "log", time.time()
    script = f"launch.script={HERE / 'kit_clock.py'}"
    argv = [sys.executable, "-m", "kit", "train", *overrides, f"runs_dir={folder}", "name=kit", script]
    code, seconds = call(argv, {**env, "KIT_BENCH_OUT": str(folder)}, log, limit)
    run = next((f.parent for f in folder.glob("kit-*/metrics.json")), None)
    if code or run is None:
        return failure(code, log, *folder.glob("kit-*/logs/*")), None
    metrics = json.loads((run / "metrics.json").read_text())
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    raw = json.loads((folder / "clock.json").read_text()) | {
        "losses": [row["loss"] for row in history if "loss" in row],
        "checkpoint_seconds": metrics["checkpoint_seconds"],
        "peak_gb": metrics["peak_memory_gb"],
        "peak_reserved_gb": metrics["memory_gb"] and metrics["memory_gb"]["reserved"],
        "memory_gb": metrics["memory_gb"],
        "forecast_phases_gb": metrics["forecast_gb"],
    }
    return figures(raw, start, seconds, folder), run


def run_trl(
    folder: Path, settings: Mapping[str, Any], ranks: int, deepspeed: bool, env: Mapping[str, str], limit: float
) -> dict[str, Any]:
    """trl_plain.py with these settings, under `deepspeed` where asked for."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, out, file = folder / "log", folder / "figures.json", folder / "settings.json"
    sft = {**settings["sft"], "output_dir": str(folder / "out"), "disable_tqdm": True}
    file.write_text(json.dumps({**settings, "sft": sft, "out": str(out)}))
    argv = [sys.executable]
    if deepspeed:
        port = str(20000 + random.randrange(20000))
        argv += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    start = time.time()
    code, seconds = call(
        [*argv, str(HERE / "trl_plain.py"), str(file)], {**env, "KIT_BENCH_OUT": str(folder)}, log, limit
    )
    if code or not out.exists():
        return failure(code, log)
    return figures(json.loads(out.read_text()), start, seconds, folder)


def same_settings(plan_file: Path) -> dict[str, Any]:
    """What a plan says, as settings of trl_plain.py: an expert's own script for the same run."""
    plan = json.loads(plan_file.read_text())
    init = {"dtype": plan["model"]["dtype"]}
    sft = {**plan["trainer"], "model_init_kwargs": init}
    if plan.get("deepspeed"):
        sft["deepspeed"] = str(plan_file.parent / "ds_config.json")
    return {
        "sft": sft, "model": plan["model"]["name_or_path"], "peft": plan.get("peft"),
        "quantization": plan.get("quantization"),
    }  # fmt: skip


def failure(code: int, log: Path, *more: Path) -> dict[str, Any]:
    """Return the exit code and the end of a log; `out_of_memory` where it, or one of the other files, says so."""
    texts = [file.read_text(errors="replace") for file in (log, *more)]
    full = any("OutOfMemoryError" in text or "CUDA out of memory" in text for text in texts)
    return {"failed": code, "tail": texts[0][-1500:], **({"out_of_memory": True} if full else {})}


def figures(raw: dict, start: float, seconds: float, folder: Path) -> dict[str, Any]:
    """Step times without the first 3 steps and without those that follow a checkpoint; what loading took.

    tokens_per_second: all tokens of a step, padding too, by the median time, over all processes.
    useful_tokens_per_second: tokens that are no padding, of one process, summed over the timed steps.
    """
    ends, saves = raw["step_ends"], raw.get("save_steps", [])
    deltas = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    chosen = [i for i in range(len(deltas)) if i > 1 and i + 1 not in saves] or range(len(deltas))
    timed, useful = [deltas[i] for i in chosen], [raw["useful_tokens"][i + 1] for i in chosen]
    loads = [json.loads(f.read_text()) for f in sorted(folder.glob("load-*.json"))]
    return {
        "tokens_per_second": round(raw["tokens_per_step"] / statistics.median(timed), 1),
        "useful_tokens_per_second": round(sum(useful) / sum(timed), 1),
        "useful_tokens": raw["useful_tokens"],
        "median_step_seconds": round(statistics.median(timed), 4),
        "step_seconds": [round(d, 4) for d in deltas],
        "first_step_after_seconds": round(ends[0] - start, 1),
        "start_seconds": {  # since the command
            "imported": round(raw["begun"] - start, 1),
            "base loaded": round(max((one.pop("ended") for one in loads), default=start) - start, 1),
            "training began": round(raw["training_began"] - start, 1),
        },
        "all_seconds": round(seconds, 1),
        "peak_gb": raw["peak_gb"] and round(raw["peak_gb"], 2),
        "peak_reserved_gb": raw["peak_reserved_gb"] and round(raw["peak_reserved_gb"], 2),
        **{k: raw[k] for k in ("resident_parameter_gb", "memory_gb", "forecast_phases_gb") if k in raw},
        "checkpoint_seconds": [round(s, 3) for s in raw["checkpoint_seconds"]],
        "losses": [round(x, 5) for x in raw["losses"]],
        "load": loads,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = f"{'tok/s':>10}{'peak GB':>9}{'to step 1, s':>14}{'load s':>8}{'host GB a rank':>16}"
    lines = [f"{'case':<16}{'arm':<10}{heads}"]
    for key, row in rows.items():
        case, arm = key.split()
        if "tokens_per_second" not in row:
            lines.append(f"{case:<16}{arm:<10} {row.get('skipped') or 'failed'}")
            continue
        peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-"
        load = max((one["seconds"] for one in row["load"]), default=0.0)
        host = " ".join(f"{one['peak_anonymous_gb']:.1f}" for one in row["load"])
        lines.append(
            f"{case:<16}{arm:<10}{row['tokens_per_second']:>10,.0f}{peak:>9}{row['first_step_after_seconds']:>14.1f}"
            f"{load:>8.1f}{host:>16}"
        )
    return "\n".join(lines)
