"""The memory and time that `kit plan` foretells beside what runs take, on this machine's GPUs.

    python tests/benchmarks/forecast_runs.py --draw                                  (writes the runs, once)
    python tests/benchmarks/forecast_runs.py --out results/DATE-CARD-forecast.json   (makes them; again: it goes on)
    python tests/benchmarks/forecast_runs.py --cpu --tiny --limit-runs 4 --out /tmp/x.json          (a rehearsal)
    python tests/benchmarks/forecast_runs.py --table results/DATE-CARD-forecast.json

forecast_runs.json holds the runs, drawn from GRID by SEED before the first was made; a draw that composition refuses
is passed over, nothing else. No run is made again, and one that failed stays in the table. Runs of one GPU go on as
many GPUs at once as there are (`--gpus`). Four steps each, random weights of real shapes; memory is that of torch's
allocator and of the whole card, time the median of the steps after the second.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from arms import SHAPES, TINY, Results, environment, make_base_apart, make_data, run_kit  # noqa: E402

from kit import api  # noqa: E402
from kit.config.memory_choice import GPU_SHARE  # noqa: E402
from kit.errors import KitError  # noqa: E402
from kit.explain.plan import forecast_run  # noqa: E402
from kit.forecast.hosts import find_host, parse_host  # noqa: E402
from kit.launchers import ops  # noqa: E402
from kit.system import hardware  # noqa: E402

DRAWN, SEED, COUNT = HERE / "forecast_runs.json", 20261130, 45
Found = dict[str, Any]
GRID: dict[str, list[str]] = {
    "shape": ["8b", "mistral16", "1b7", "gemma2b", "gpt2xl"],
    "method": ["full", "full", "lora", "lora qv", "nf4"],
    "engine": ["none 1", "none 2", "zero1 2", "zero2 1", "zero2 2", "zero3 2", "zero3 2", "zero2_offload 1",
               "zero3_offload 2", "none 1", "none 1", "zero2 2"],
    "length": ["512", "1024", "2048", "4096", "8192"],
    "rows": ["1", "2", "4"],
    "checkpointing": ["off", "all", "selective", "every 2"],
}  # fmt: skip
METHODS = {
    "full": ["peft=none", "trainer.learning_rate=1e-5"],
    "lora": ["peft.r=16", "peft.target_modules=all-linear"],
    "lora qv": ["peft.r=8", "peft.target_modules=[q_proj,v_proj]"],
    "nf4": ["peft.r=16", "peft.target_modules=all-linear", "quantization=nf4"],
}
LEVELS = {
    "off": ["trainer.activation_checkpointing=false"],
    "all": ["trainer.activation_checkpointing=true"],
    "selective": ["trainer.activation_checkpointing=true", "trainer.activation_checkpointing_kwargs={selective:true}"],
    "every 2": ["trainer.activation_checkpointing=true", "trainer.activation_checkpointing_kwargs={every_n_layers:2}"],
}
STEPS = 4


def overrides(run: dict[str, str], base: Path, data: Path) -> list[str]:
    """Return what `kit train` is told for a run."""
    engine, gpus = run["engine"].split()
    method = METHODS[run["method"]]
    if run["shape"].endswith("gpt2xl"):
        method = [word.replace("[q_proj,v_proj]", "[c_attn]") for word in method]
    words = [f"model.name_or_path={base}", f"tokenizer.name_or_path={base}/tokenizer", f"dataset.path={data}"]
    words += [f"deepspeed={engine}", f"launch.num_gpus={gpus}", *method, *LEVELS[run["checkpointing"]]]
    words += [f"launch={'deepspeed' if engine != 'none' else 'local' if gpus == '1' else 'torchrun'}"]
    words += [f"trainer.max_length={run['length']}", f"trainer.per_device_train_batch_size={run['rows']}"]
    return words + ["trainer.gradient_accumulation_steps=1", f"trainer.max_steps={STEPS}", "trainer.logging_steps=1",
                    "trainer.report_to=none", "trainer.save_strategy=no", "launch.ignore_memory_forecast=true",
                    "rehearsal=false"]  # fmt: skip


# Presets of the same architectures, by which a draw is composed: no weights are needed.
PRESETS = {
    "8b": "llama3_1_8b",
    "mistral16": "mistral_7b",
    "1b7": "qwen3_1b7",
    "gemma2b": "gemma2_2b",
    "gpt2xl": "gpt2",
}


def draw_runs() -> list[dict[str, str]]:
    """Draw COUNT different runs that compose. The lengths fit the positions."""
    draw, runs = random.Random(SEED), []
    for _ in range(100 * COUNT):
        if len(runs) == COUNT:
            break
        run = {key: draw.choice(values) for key, values in GRID.items()}
        if run in runs or int(run["length"]) > SHAPES[run["shape"]].get("n_positions", 8192):
            continue
        words = [w for w in overrides(run, Path("base"), Path("rows.jsonl")) if "name_or_path" not in w]
        words = [w for w in words if not w.startswith("dataset.path")]
        try:
            with hardware.assume_gpus(parse_host("2xh200").gpus):
                api.compose(*words, f"model={PRESETS[run['shape']]}", "dataset.path=trl-lib/Capybara")
        except KitError:
            continue
        runs.append(run)
    return runs


class Bench:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.folder = a, Path(a.work_dir)
        self.results = Results(self.folder, Path(a.out), a.budget, [Path(f) for f in a.earlier])
        self.results.json |= {"seed": SEED, "grid": GRID}
        self.env = environment(a.cpu)
        self.env["TORCH_EXTENSIONS_DIR"] = str(ops.extensions_dir())
        self.lock = threading.Lock()

    def base(self, shape: str) -> Path:
        folder = self.folder / f"base-{shape}"
        with self.lock:
            make_base_apart(folder, shape, "cpu" if self.a.cpu else "cuda")
        return folder

    def make(self, number: int, run: dict[str, str], gpu: int) -> None:
        key = " ".join([f"{number:02d}", *(value.replace(" ", "_") for value in run.values())])
        if self.results.done(key) or key in self.results.rows:
            return
        shape = TINY + run["shape"] if self.a.tiny else run["shape"]
        length = int(run["length"]) // (16 if self.a.tiny else 1)
        run = run | {"shape": shape, "length": str(length)}
        try:
            base, gpus = self.base(shape), int(run["engine"].split()[1])
            data = self.folder / f"rows-{length}.jsonl"
            with self.lock:
                if not data.exists():
                    make_data(data, 2 * STEPS * 8, length + 8)
            words = overrides(run, base, data)
            env = dict(self.env)
            if self.a.cpu:
                words += ["trainer.use_cpu=true", "trainer.bf16=false", "model.dtype=float32"]
            elif gpus == 1:
                env["CUDA_VISIBLE_DEVICES"] = str(gpu)
            row, _ = run_kit(self.folder / f"run-{number:02d}", words, env, self.a.limit)
            row |= {"run": run, "forecast": self.forecast(words)}
        except Exception as error:  # it stays in the table
            row = {"run": run, "failed": f"{type(error).__name__}: {error}"}
        self.results.keep(key, row)

    def forecast(self, words: Sequence[str]) -> Found:
        """Return what `kit plan` says of the run on this machine."""
        found = hardware.list_gpus()
        host = find_host(found, 0.0) if found else parse_host("2xh200")
        assert host
        figures = forecast_run([w for w in words if not w.startswith(("trainer.use_cpu", "trainer.bf16"))], host)
        memory, step = figures["memory"], figures["step"]
        return {
            "allocated_gb": round(memory["allocated"] / 2**30, 3), "needed_gb": round(memory["needed"] / 2**30, 3),
            "usable_gb": round(memory["usable"] / 2**30, 3), "exact": memory["exact"],
            "seconds": [round(step["fastest"], 4), round(step["slowest"], 4)],
        }  # fmt: skip


def summarize(rows: dict[str, Found]) -> Found:
    """Return errors of allocated memory, of the verdict and of the step's time over the runs that were made."""
    memory, times, wrong, made = [], [], {"fits": 0, "does not fit": 0}, 0
    for row in rows.values():
        forecast = row.get("forecast")
        if not forecast:
            continue
        said = forecast["needed_gb"] <= GPU_SHARE * forecast["usable_gb"]
        if row.get("out_of_memory"):
            wrong["fits"] += said
            made += 1
        if not row.get("peak_gb"):
            continue
        made += 1
        wrong["does not fit"] += not said
        memory.append(forecast["allocated_gb"] / row["peak_gb"] - 1)
        middle = math.sqrt(math.prod(forecast["seconds"]))
        times.append(middle / row["median_step_seconds"] - 1)
    size = [abs(error) for error in memory]
    return {
        "runs": len(rows), "made": made,
        "failed": sum("failed" in row and not row.get("out_of_memory") for row in rows.values()),
        "memory_median": size and round(statistics.median(size), 4),
        "memory_95": size and round(sorted(size)[max(0, math.ceil(0.95 * len(size)) - 1)], 4),
        "memory_worst": memory and [round(min(memory), 4), round(max(memory), 4)],
        "false_fits": wrong["fits"], "false_does_not_fit": wrong["does not fit"],
        "time_median": times and round(statistics.median(map(abs, times)), 4),
    }  # fmt: skip


def table(rows: dict[str, Found]) -> str:
    """Return a line for each run."""
    lines = [f"{'run':<58} {'forecast':>9} {'measured':>9} {'error':>7} {'s, forecast':>13} {'s':>7}"]
    for key, row in rows.items():
        forecast, peak = row.get("forecast") or {}, row.get("peak_gb")
        word = "out of memory" if row.get("out_of_memory") else "failed" if "failed" in row else ""
        gb = (
            f"{forecast.get('allocated_gb', 0):>9.2f} {peak:>9.2f} {forecast['allocated_gb'] / peak - 1:>+7.1%}"
            if peak
            else f"{forecast.get('allocated_gb', 0):>9.2f} {word:>17}"
        )
        low, high = forecast.get("seconds", (0, 0))
        lines.append(f"{key:<58} {gb} {f'{low:.2f} to {high:.2f}':>13} {row.get('median_step_seconds', 0):>7.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="that runs of one GPU share")
    parser.add_argument("--limit-runs", type=int, default=COUNT)
    parser.add_argument("--budget", type=float, default=1e9, help="start no further run after so many seconds")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one run")
    parser.add_argument("--work-dir", default="/tmp/kit-forecast-runs")
    parser.add_argument("--earlier", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    a = parser.parse_args()
    if a.draw:
        if DRAWN.exists():
            sys.exit(f"{DRAWN.name} is there: the runs are drawn once")
        runs = draw_runs()
        DRAWN.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
        return 0
    if a.table:
        rows = json.loads(a.table.read_text())["rows"]
        print(table(rows), json.dumps(summarize(rows), indent=1), sep="\n")
        return 0
    if not a.out:
        parser.error("--out FILE")
    bench, runs = Bench(a), list(enumerate(json.loads(DRAWN.read_text())))[: a.limit_runs]
    runs.sort(key=lambda item: list(SHAPES).index(item[1]["shape"]))  # a base is made once
    alone = [item for item in runs if item[1]["engine"].endswith(" 1")]

    def lane(gpu: int) -> None:
        while True:
            with bench.lock:
                if not alone:
                    return
                number, run = alone.pop(0)
            bench.make(number, run, gpu)

    together = [item for item in runs if item not in alone]
    if any("offload" in run["engine"] for _, run in runs) and not a.cpu:
        ops.build_missing_ops(["cpu_adam"], 900, print, bench.env)
    for number, run in together:
        bench.make(number, run, 0)
    threads = [threading.Thread(target=lane, args=(gpu,)) for gpu in range(a.gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.results.json["summary"] = summarize(bench.results.rows)
    bench.results.write()
    print(table(bench.results.rows), json.dumps(bench.results.json["summary"], indent=1), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
