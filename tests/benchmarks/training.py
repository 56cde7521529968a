"""`kit train` beside plain TRL, in one run: tokens/s, peak GB, losses, what loading takes; and a merge of an nf4 run.

    python tests/benchmarks/training.py --cases lora nf4 int8 doctor full --out results.json       (2 GPUs of 80 GB)
    python tests/benchmarks/training.py --tiny --cpu --cases lora nf4 zero2 --out /tmp/x.json      (rehearsal)

Arms: `kit` (the plan), `trl` (SFTTrainer as it comes: its own defaults, a string model, an "auto" JSON of the stage)
and `same` (the same script with the plan's own settings and its resolved DeepSpeed JSON). Bases are random, made once.
One process group per arm. Cases of one GPU run side by side, one on each; the others alone, the base's files dropped
from the page cache before each arm. JSON is written after each arm; an arm that it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arms import (
    LORA,
    Results,
    call,
    environment,
    make_base_apart,
    make_data,
    run_kit,
    run_trl,
    same_settings,
    table,
)

LORA_RUN = [*(f"peft.{k}={v}" for k, v in LORA.items()), "trainer.bf16=true"]
FULL = ["recipe=llama3_1_8b_full_zero3", "trainer.assistant_only_loss=false", "trainer.gradient_accumulation_steps=1"]
DOCTOR = ["recipe=llama2_7b_lora_zero2_doctor", "trainer.eval_strategy=no", "trainer.warmup_steps=2"]
T4 = ["recipe=qwen3_1b7_qlora_t4", "trainer.assistant_only_loss=false", "trainer.gradient_accumulation_steps=1"]
# name: GPUs, base, rows a step on each GPU, tokens a row, overrides of the kit
CASES: dict[str, tuple[int, str, int, int, list[str]]] = {
    "lora": (1, "8b", 2, 4096, LORA_RUN),
    "nf4": (1, "8b", 2, 4096, [*LORA_RUN, "quantization=nf4"]),
    "int8": (1, "8b", 2, 4096, [*LORA_RUN, "quantization=int8"]),
    "t4": (1, "1b7", 2, 2048, T4),
    "doctor": (2, "7b", 16, 512, DOCTOR),
    "full": (2, "8b", 1, 2048, FULL),
    "nf4_zero2": (2, "8b", 2, 4096, [*LORA_RUN, "quantization=nf4", "deepspeed=zero2"]),
    "nf4_zero3": (2, "8b", 2, 4096, [*LORA_RUN, "quantization=nf4", "deepspeed=zero3",
                                     "quantization.bnb_4bit_quant_storage=bfloat16"]),
    **{e: (2, "8b", 2, 4096, [*LORA_RUN, f"deepspeed={e}"]) for e in ("zero1", "zero2", "zero3", "zero3_offload")},
}  # fmt: skip
PROMPTS = [" ".join(f"w{(7 * i * i + 31 * j) % 1000}" for i in range(48)) for j in range(4)]


class Bench:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.work = a, Path(a.work)
        self.results = Results(self.work, Path(a.out), a.deadline)

    def case(self, name: str, arms: Sequence[str], gpu: int | None) -> None:
        """All arms of one case; `gpu`: the only one that it may use."""
        a = self.a
        gpus, shape, micro, length, overrides = CASES[name]
        if a.tiny:
            shape, length = "tiny", 128
        base, data = self.work / f"base-{shape}", self.work / f"{name}.{'parquet' if name == 'doctor' else 'jsonl'}"
        make_data(data, 2 * gpus * micro * a.steps, length + 8)
        saves = name.startswith("zero")
        common = dict(per_device_train_batch_size=micro, max_length=length, max_steps=a.steps, logging_steps=1,
                      seed=42, report_to="none", save_strategy="steps" if saves else "no")  # fmt: skip
        if saves:
            common["save_steps"] = a.steps // 2
        env = environment(a.cpu)
        if gpu is not None and not a.cpu:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        plan: Path | None = next(self.work.glob(f"{name}-kit/kit-*/plan.json"), None)
        for arm in arms:
            key, folder = f"{name} {arm}", self.work / f"{name}-{arm}"
            if self.results.done(key):
                continue
            if gpu is None:
                evict(base)
            if arm.startswith("kit"):
                settings = [*overrides, f"model.name_or_path={base}", f"dataset.path={data}"]
                settings += [f"launch.num_gpus={gpus}"]
                settings += [f"trainer.{k}={v}" for k, v in common.items()]
                settings += ["launch=local"] if gpus == 1 else ["launch=deepspeed"]
                settings += [f"prompts={json.dumps(PROMPTS)}"]
                if "recipe=" in overrides[0] and name != "doctor":  # its model and data are not these
                    settings += ["model=none", "dataset.test_size=null"]
                if a.cpu:
                    settings += ["trainer.use_cpu=true", "trainer.bf16=false", "trainer.fp16=false"]
                row, run = run_kit(folder, settings, env, a.limit)
                plan = run / "plan.json" if run else plan
            elif plan is None:
                row = {"skipped": "needs the kit's plan"}
            else:
                chosen = same_settings(plan)
                if arm.startswith("trl"):
                    chosen["sft"] = {**common, **as_it_comes(name, self.work, a.cpu)}
                chosen |= {"data": str(data), "save": name != "full"}
                if name == "doctor":
                    template = "Description: {Description} Patient: {Patient} Doctor: {Doctor}"
                    chosen |= {"template": template, "split": True}
                row = run_trl(folder, chosen, gpus, gpus > 1, env, a.limit)
            self.results.keep(key, row)

    def merge(self, onto: str, gpu: int) -> None:
        """`kit merge` of the nf4 run, with the prompts' logits compared."""
        key = f"merge_nf4 {onto}"
        run = next(self.work.glob("nf4-kit/kit-*/plan.json"), None)
        if run is None or self.results.done(key):
            return
        out, log = self.work / f"merged-{onto}", self.work / f"merge-{onto}.log"
        argv = [sys.executable, "-m", "kit", "merge", str(run.parent), "--onto", onto, "--out", str(out)]
        env = environment(self.a.cpu) | ({} if self.a.cpu else {"CUDA_VISIBLE_DEVICES": str(gpu)})
        code, seconds = call([*argv, "--overwrite", "--verify", "logits"], env, log, self.a.limit)
        report = out / "merge.json"
        row: dict[str, Any] = {"all_seconds": round(seconds, 1), "said": log.read_text(errors="replace")[-1500:]}
        row |= {"report": json.loads(report.read_text())} if code == 0 and report.exists() else {"failed": code}
        self.results.keep(key, row)


def as_it_comes(name: str, work: Path, cpu: bool) -> dict[str, Any]:
    """SFTConfig's own defaults; the DeepSpeed JSON of the documentation's examples, "auto" where it can be."""
    sft: dict[str, Any] = {"use_cpu": True, "bf16": False} if cpu else {"fp16": True} if name == "t4" else {}
    engine = {"doctor": "zero2", "full": "zero3", "nf4_zero2": "zero2", "nf4_zero3": "zero3"}.get(name, name)
    if not engine.startswith("zero"):
        return sft
    zero: dict[str, Any] = {"stage": int(engine[4])}
    if zero["stage"] == 3:
        keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero |= dict.fromkeys(keys, "auto") | {"stage3_gather_16bit_weights_on_model_save": True}
    if "offload" in engine:
        zero |= {k: {"device": "cpu", "pin_memory": True} for k in ("offload_optimizer", "offload_param")}
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    file = work / f"{name}-auto.json"
    file.write_text(
        json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(keys, "auto")})
    )
    return sft | {"deepspeed": str(file)}


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that loading reads the disk."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_lanes(jobs: Sequence[Callable[[int], None]], lanes: int) -> None:
    """Each job on the first lane that is free."""
    waiting, lock = list(jobs), threading.Lock()

    def lane(gpu: int) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                job = waiting.pop(0)
            job(gpu)

    threads = [threading.Thread(target=lane, args=(gpu,)) for gpu in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "merge_nf4"], default=["lora", "nf4", "int8"])
    parser.add_argument("--arms", nargs="+", default=["kit", "same", "trl"], help="kit2, trl2 ... run one once more")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lanes", type=int, default=2, help="GPUs that cases of one GPU share")
    parser.add_argument("--work", default="/tmp/kit-training")
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=float, default=240, help="seconds for one arm")
    parser.add_argument("--deadline", type=float, default=1e9, help="start no further arm after this many seconds")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    a = parser.parse_args()
    bench = Bench(a)
    for shape in dict.fromkeys("tiny" if a.tiny else CASES[c][1] for c in a.cases if c in CASES):
        start = time.time()
        make_base_apart(bench.work / f"base-{shape}", shape, "cpu" if a.cpu else "cuda")
        print(f"base {shape}: {time.time() - start:.1f} s", flush=True)
    alone = [c for c in a.cases if c in CASES and CASES[c][0] == 1]
    in_lanes([lambda gpu, c=c: bench.case(c, a.arms, gpu) for c in alone], a.lanes)
    if "merge_nf4" in a.cases:
        in_lanes([lambda gpu, o=o: bench.merge(o, gpu) for o in ("original", "dequantized")], a.lanes)
    for name in a.cases:
        if name in CASES and name not in alone:
            bench.case(name, a.arms, None)
    print(table({k: v for k, v in bench.results.rows.items() if not k.startswith("merge")}))


if __name__ == "__main__":
    main()
