"""What a further trial of a sweep costs beyond its training: a process of its own (cold) beside a warm worker.

    python tests/benchmarks/warm_sweep.py --cpu --out results.json                     (tiny base, here)
    python tests/benchmarks/warm_sweep.py --shape 8b --out $OUT/warm.json              (a GPU of 80 GB, 20 GB of disk)
    python tests/benchmarks/warm_sweep.py --shape 8b --tiny --cpu --out /tmp/x.json    (rehearsal of the same)

`kit train -m trainer.learning_rate=...` with hparams_search.workers=cold, then warm, one trial at a time on a random
base; `again` is cold once more: where a GPU's sums do not repeat, it tells how far two equal runs lie apart. A trial's
seconds run from the end of the one before it to its own, as status.json tells; its training (`train_runtime`) is taken
off. The base's files are in the page cache: a cold start is as fast as it can be. JSON is written after each case; a
case that it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from arms import LORA, call, environment, failure, machine, make_base_apart, make_data

# base: rows a step, tokens a row
SIZES = {"tiny": (2, 64), "1b7": (1, 1024), "8b": (1, 1024)}


def case(workers: str, a: argparse.Namespace, base: Path, data: Path, length: int, rows: int) -> dict[str, Any]:
    folder = Path(a.work) / f"{a.shape}-{a.quantization}-{a.deterministic}-{workers}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rates = ",".join(f"{n + 1}e-4" for n in range(a.trials))
    trainer = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=1, max_length=length, seed=42,
                   max_steps=a.steps, logging_steps=1, save_strategy="no", report_to="none")  # fmt: skip
    trainer |= dict(use_cpu="true", bf16="false", fp16="false") if a.cpu else dict(bf16="true")
    if a.deterministic:
        trainer["full_determinism"] = "true"
    kind = "warm" if workers == "warm" else "cold"
    argv = [sys.executable, "-m", "kit", "train", "-m", f"trainer.learning_rate={rates}", "launch=local",
            "launch.num_gpus=1", f"hparams_search.workers={kind}", "hparams_search.parallel=1", "name=warm",
            f"quantization={a.quantization}", f"model.name_or_path={base}", f"dataset.path={data}",
            f"runs_dir={folder}",
            *(f"peft.{k}={v}" for k, v in LORA.items()),
            *(f"trainer.{k}={v}" for k, v in trainer.items())]  # fmt: skip
    start, log = time.time(), folder / "log"
    code, seconds = call(argv, environment(a.cpu), log, a.limit)
    trials = sorted(p.parent for p in folder.glob("*/*/metrics.json"))
    if code or len(trials) != a.trials:
        return failure(code, log)
    ends = [start, *((t / "status.json").stat().st_mtime for t in trials)]
    training = [json.loads((t / "metrics.json").read_text())["train_runtime"] for t in trials]
    beyond = [round(e - b - s, 2) for b, e, s in zip(ends, ends[1:], training, strict=False)]
    return {
        "first_seconds": beyond[0],
        "further_seconds": beyond[1:],
        "training_seconds": [round(s, 2) for s in training],
        "all_seconds": round(seconds, 1),
        "losses": [losses(t) for t in trials],
        "adapters": [files(t) for t in trials],
    }


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def files(run: Path) -> str:
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    return str(manifest["files"]["adapter_model.safetensors"]["sha256"])[:16]


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'base':<14}{'workers':<9}{'first trial, s':>15}{'a further one, s: median':>26}{'most':>8}"
        f"{'its training, s':>17}{'the sweep, s':>14}"
    ]
    for key, row in rows.items():
        shape, workers = key.split()
        if "failed" in row:
            lines.append(f"{shape:<14}{workers:<9} failed with {row['failed']}")
            continue
        more = row["further_seconds"]
        lines.append(
            f"{shape:<14}{workers:<9}{row['first_seconds']:>15.1f}{statistics.median(more):>26.2f}{max(more):>8.2f}"
            f"{statistics.median(row['training_seconds'][1:]):>17.2f}{row['all_seconds']:>14.1f}"
        )
    for shape in dict.fromkeys(key.split()[0] for key in rows):
        for other in ("again", "warm"):
            lines += compared(shape, other, rows.get(f"{shape} cold", {}), rows.get(f"{shape} {other}", {}))
    return "\n".join(lines)


def compared(shape: str, other: str, cold: dict[str, Any], row: dict[str, Any]) -> list[str]:
    if not (cold.get("adapters") and row.get("adapters")):
        return []
    pairs = zip(cold["losses"], row["losses"], strict=True)
    apart = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
    equal = "equal to the bit" if cold["adapters"] == row["adapters"] else "NOT equal"
    return [f"{shape}: cold and {other}: adapters {equal}, losses at most {apart:.1g} apart"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="tiny")
    parser.add_argument("--cases", nargs="+", choices=["cold", "again", "warm"], default=["cold", "warm"])
    parser.add_argument("--quantization", choices=["none", "nf4", "int8"], default="none")
    parser.add_argument("--deterministic", action="store_true", help="trainer.full_determinism")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--work", default="/tmp/kit-warm-sweep")
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=float, default=400, help="seconds for one sweep")
    parser.add_argument("--tiny", action="store_true", help="the tiny base in the place of the shape")
    parser.add_argument("--cpu", action="store_true")
    a = parser.parse_args()
    shape = "tiny" if a.tiny else a.shape
    rows, length = SIZES[a.shape]
    work, out = Path(a.work), Path(a.out)
    work.mkdir(parents=True, exist_ok=True)
    base, data = work / f"base-{shape}", work / f"data-{length}.jsonl"
    start = time.time()
    make_base_apart(base, shape, "cpu" if a.cpu else "cuda")
    print(f"base {shape}: {time.time() - start:.1f} s", flush=True)
    make_data(data, 2 * rows * a.steps, length + 8)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    results |= {"argv": sys.argv, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "load": os.getloadavg()}
    for workers in a.cases:
        name = "-".join([shape, *[a.quantization] * (a.quantization != "none"), *["exact"] * a.deterministic])
        key = f"{name} {workers}"
        if "failed" in results["rows"].get(key, {"failed": 0}):
            results["rows"][key] = case(workers, a, base, data, length, rows)
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(key, json.dumps(results["rows"][key]), flush=True)
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
