"""How long the torch-free verbs take, beside the least that Hydra and pydantic cost by themselves.

    python tests/benchmarks/cli_latency.py [--runs 10] [--recipes NAME ...] [--json FILE]

Every figure is the wall time of a fresh process, the median of `--runs`; the arms take turns, so a change of the
machine's speed meets all of them. The floor is a process that imports Hydra and pydantic and composes the same recipe
from the same folders, DeepSpeed's files registered as a group as the kit does it, and then does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET_RATIO, TARGET_HELP = 1.4, 0.2  # of a check against its floor; seconds for `kit --help`
PLANNED, TARGET_PLAN = "llama3_1_70b_lora_zero3_offload", 0.5  # recipe; seconds of `kit plan` over the floor
QUIET = 1.5  # load average above which figures say little on two cores

LOOKS = ["check --deepspeed DS model=llama3_1_8b", "why learning_rate recipe=llama3_1_8b_lora",
         "diff llama3_1_8b_lora llama3_1_8b_qlora", "check --explain lm-head-target", "doctor"]  # fmt: skip

FLOOR = """
import json, sys
from pathlib import Path
from pydantic import BaseModel
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

root, recipe = Path(sys.argv[1]), sys.argv[2]
for file in sorted((root / "ds_configs").glob("*.json")):
    node = OmegaConf.create(json.loads(file.read_text()))
    ConfigStore.instance().store(group="deepspeed", name=file.stem, node=node)
with initialize_config_dir(config_dir=str(root / "hydra_conf"), version_base="1.3", job_name="floor"):
    compose("train", overrides=[f"recipe={recipe}"])
"""


def arms(recipes: list[str]) -> dict[str, list[str]]:
    """Arm to argv; a check stands next to its floor."""
    python = sys.executable
    found = {"python -c pass": [python, "-c", "pass"], "kit --help": [python, "-m", "kit", "--help"]}
    for line in LOOKS:
        found[f"kit {line}"] = [python, "-m", "kit", *line.replace("DS", str(ROOT / "ds_configs/zero3.json")).split()]
    for name in recipes:
        found[f"floor {name}"] = [python, "-c", FLOOR, str(ROOT), name]
        found[f"check {name}"] = [python, "-m", "kit", "check", f"recipe={name}"]
        if name == PLANNED:
            found[f"plan {name}"] = [python, "-m", "kit", "plan", f"recipe={name}", "hardware=8xh100_1000gb"]
    return found


def seconds(argv: list[str], folder: str) -> float:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    begun = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
    took = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{argv} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return took


def measure(recipes: list[str], runs: int) -> dict[str, list[float]]:
    """Arm to its times; one round that is thrown away fills the page cache and writes the .pyc files."""
    commands = arms(recipes)
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for argv in commands.values():
            seconds(argv, folder)
        for _ in range(runs):
            for name, argv in commands.items():
                times[name].append(seconds(argv, folder))
        times["from trl import SFTTrainer"] = [seconds([sys.executable, "-c", "from trl import SFTTrainer"], folder)]
    return times


def machine() -> dict[str, object]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        cpu = platform.processor()
    packages = ("hydra-core", "omegaconf", "pydantic", "trl", "transformers", "torch")
    versions = {name: metadata.version(name) for name in packages}
    return {"cores": len(os.sched_getaffinity(0)), "cpu": cpu, "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", default=sorted(f.stem for f in (ROOT / "recipes").glob("*.yaml")))
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    before = os.getloadavg()[0]
    times = measure(a.recipes, a.runs)
    load = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
    median = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {name: median[f"check {name}"] / median[f"floor {name}"] for name in a.recipes}

    print(f"{'arm':<44} {'median':>8} {'best':>8} {'worst':>8} {'x floor':>8}")
    for name, taken in times.items():
        ratio = f"{ratios[name.removeprefix('check ')]:8.2f}" if name.startswith("check ") else ""
        print(f"{name:<44} {median[name]:8.3f} {min(taken):8.3f} {max(taken):8.3f} {ratio}")
    worst = max(ratios.values())
    plan = round(median[f"plan {PLANNED}"] - median[f"floor {PLANNED}"], 3) if PLANNED in a.recipes else None
    print(f"\nworst check against its floor {worst:.2f} (target {TARGET_RATIO}); "
          f"--help {median['kit --help']:.3f} s (target {TARGET_HELP}); "
          f"plan over its floor {plan} s (target {TARGET_PLAN}); "
          f"load {load['before']} to {load['after']}")  # fmt: skip
    if before > QUIET:
        print(f"the machine was busy: figures taken above a load of {QUIET} are not worth keeping")
    if a.json:
        arms_seconds = {
            name: {"median": round(median[name], 4), "all": [round(t, 4) for t in taken]}
            for name, taken in times.items()
        }
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "load": load,
            "runs": a.runs,
            "targets": {
                "check_over_floor": TARGET_RATIO,
                "help_seconds": TARGET_HELP,
                "plan_seconds_over_floor": TARGET_PLAN,
            },
            "plan_seconds_over_floor": plan,
            "check_over_floor": {name: round(ratio, 3) for name, ratio in ratios.items()},
            "seconds": arms_seconds,
        }
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
