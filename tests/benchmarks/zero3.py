"""A LoRA step under ZeRO-3 beside ZeRO-2: seconds, what DeepSpeed's hooks do in it, and what the link moves.

    python tests/benchmarks/zero3.py --shape mistral16 --out results.json            (2 GPUs)
    python tests/benchmarks/zero3.py --shape tiny --cpu --out /tmp/x.json            (2 processes; their Python's time)

Arms: `zero2`; `modules` (ZeRO-3, each module gathered by itself); `layers` (decoder layers are leaf modules, sizes are
those that transformers makes of "auto"); `resident` (and LoRA's matrices are whole); `ahead` (and the next layer is
gathered while one computes: as the kit resolves it). `--full` trains all parameters: there are no LoRA matrices then.
The link is measured first: all-gather of 1 GB and of one layer, `nvidia-smi topo -m`. JSON is written after each arm;
an arm that it holds is not run again. KIT_BENCH_PROFILE=FOLDER: see profiling.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from arms import LORA, SHAPES, call, environment, failure, make_base_apart, make_data, run_kit

ARMS = ("zero2", "modules", "layers", "resident", "ahead")
ZERO = "deepspeed.zero_optimization"


def layer_numbers(shape: str) -> int:
    """Parameters of one decoder layer: attention, MLP and norms."""
    s: dict[str, Any] = SHAPES[shape]
    width, inside = s["hidden_size"], s["intermediate_size"]
    head = s.get("head_dim", width // s["num_attention_heads"])
    attention = 2 * width * head * (s["num_attention_heads"] + s["num_key_value_heads"])
    return attention + 3 * width * inside + 2 * width


def arm_settings(arm: str, shape: str) -> list[str]:
    if arm in ("zero2", "ahead"):
        return ["deepspeed=zero2" if arm == "zero2" else "deepspeed=zero3"]
    width = SHAPES[shape]["hidden_size"]
    settings = ["deepspeed=zero3", f"{ZERO}.stage3_prefetch_bucket_size={int(0.9 * width * width)}"]
    settings += [f"{ZERO}.stage3_max_live_parameters=1000000000"]
    if arm != "resident":
        settings += [f"{ZERO}.stage3_param_persistence_threshold={10 * width}"]
    return settings + [f"{ZERO}.leaf_module.classes=[]"] * (arm == "modules")


def measure_link(out: Path, sizes: list[int]) -> None:
    """On each rank: GB/s into a GPU of all-gathers that end with this many bytes; rank 0 writes them."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    world, rates = dist.get_world_size(), {}
    for size in sizes:
        whole = torch.empty(size // 2 // world * world, dtype=torch.bfloat16, device=device)
        part = torch.empty(whole.numel() // world, dtype=torch.bfloat16, device=device)
        seconds = []
        for _ in range(15):
            dist.barrier()
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            dist.all_gather_into_tensor(whole, part)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        moved = size * (world - 1) / world
        rates[str(size)] = round(moved / statistics.median(seconds[5:]) / 1e9, 2)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rates))
    dist.destroy_process_group()


def link(work: Path, shape: str, cpu: bool, gpus: int) -> dict[str, Any]:
    out, log = work / "link.json", work / "link.log"
    sizes = [2**20 if cpu else 10**9, 2 * layer_numbers(shape)]
    argv = ["torchrun", "--standalone", "--nproc_per_node", str(gpus), __file__, "--link", str(out), *map(str, sizes)]
    code, _ = call(argv, environment(cpu), log, 120)
    found = {"GB/s of an all-gather, by bytes": json.loads(out.read_text())} if not code else failure(code, log)
    if not cpu:
        found["topology"] = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'arm':<18}{'s a step':>10}{'peak GB':>9}{'modules':>9}{'late':>6}{'gathers':>9}{'apart':>9}"]
    first = next((r["losses"] for r in rows.values() if "losses" in r), [])
    for arm, row in rows.items():
        if "step_seconds" not in row:
            lines.append(f"{arm:<18}{'failed':>10}")
            continue
        peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-"
        apart = max((abs(a - b) for a, b in zip(row["losses"], first, strict=False)), default=0.0)
        count = row.get("hooks") or {"fetches": 0, "late": 0, "gathers": 0}
        lines.append(
            f"{arm:<18}{statistics.median(row['step_seconds'][2:]):>10.3f}{peak:>9}{count['fetches']:>9}"
            f"{count['late']:>6}{count['gathers']:>9}{apart:>9.0e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "mistral16", "8b"], default="mistral16")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--checkpointing", choices=["on", "off"], default="on")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--gpus", type=int, default=2, help="processes, with --cpu")
    parser.add_argument("--rows", type=int, default=2, help="rows a step on each GPU")
    parser.add_argument("--length", type=int, default=3004)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", default="/tmp/kit-zero3")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one arm")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", required=True)
    a = parser.parse_args()
    work, out = Path(a.work), Path(a.out)
    work.mkdir(parents=True, exist_ok=True)
    length = 32 if a.cpu else a.length
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"argv": sys.argv, "arms": {}}

    def keep(key: str, value: Any) -> None:
        results[key] = value
        out.write_text(json.dumps(results, indent=1) + "\n")

    if "link" not in results:
        keep("link", link(work, a.shape, a.cpu, a.gpus))
        print(json.dumps(results["link"], indent=1), flush=True)
    make_base_apart(work / f"base-{a.shape}", a.shape, "cpu" if a.cpu else "cuda")
    data = work / f"{a.shape}.jsonl"
    make_data(data, 2 * a.gpus * a.rows * a.steps, length + 8)
    for arm in a.arms:
        if "losses" in results["arms"].get(arm, {}):
            continue
        common = {"per_device_train_batch_size": a.rows, "max_length": length, "max_steps": a.steps,
                  "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": not a.cpu,
                  "gradient_checkpointing": a.checkpointing == "on", "use_cpu": a.cpu}  # fmt: skip
        settings = [f"model.name_or_path={work / f'base-{a.shape}'}", f"dataset.path={data}", "launch=deepspeed"]
        settings += [f"launch.num_gpus={a.gpus}", *(f"trainer.{k}={str(v).lower()}" for k, v in common.items())]
        settings += ["peft=none"] if a.full else [f"peft.{k}={v}" for k, v in LORA.items()]
        folder = work / arm
        counts = folder / "hooks.json"
        env = environment(a.cpu) | {"KIT_BENCH_HOOKS": str(counts)}
        row, _ = run_kit(folder, [*settings, *arm_settings(arm, a.shape)], env, a.limit)
        if counts.exists():
            row["hooks"] = json.loads(counts.read_text())
        keep("arms", results["arms"] | {arm: row})
        print(arm, json.dumps(row.get("tail") or row["step_seconds"]), flush=True)
    print(table(results["arms"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--link"]:
        measure_link(Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
    else:
        main()
