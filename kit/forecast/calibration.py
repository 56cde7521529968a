"""What finished runs measured beside their forecast, kept in the kit's cache, and what a new forecast takes from them.

Both are compared by kind of run on the same GPU: memory by architecture, method and engine, time by method and engine.
A forecast of the past is not kept: it is made anew from the run's plan, by today's formulas.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.forecast.hosts import Host, find_host, find_key
from kit.forecast.memory import measure_sizes
from kit.forecast.of_plan import forecast_plan, step_of_plan
from kit.forecast.step_time import forecast_time
from kit.inspection.model import inspect_model
from kit.schema.run_plan import RunPlan, load_plan
from kit.storage import run_directory
from kit.storage.json_files import atomic_write_json, read_json_or_empty
from kit.system.hardware import Gpu
from kit.system.paths import kit_cache_folder

FILE = "calibration.json"
FIRST_STEPS = 3  # that are no measure of the others: kernels compile, the allocator grows


@dataclass(frozen=True)
class Measured:
    """One run: allocated memory and seconds as shares of the forecast, bytes outside torch's allocator.

    seconds: of the forecast's range the fastest; None where the run logged too few steps.
    """

    run: str
    gpu: str
    architecture: str
    method: str
    allocated: float
    outside: float
    seconds: float | None


def method_of(plan: RunPlan) -> str:
    """Name what memory and time depend on most: the adapter, quantization, engine and offloads."""
    zero = (plan.deepspeed or {}).get("zero_optimization") or {}
    away = [what for what in ("optimizer", "param") if (zero.get(f"offload_{what}") or {}).get("device") not in
            (None, "none")]  # fmt: skip
    words = [(plan.peft or {}).get("peft_type", "full"), (plan.quantization or {}).get("quant_method", "")]
    return " ".join(str(word) for word in (*words, f"zero{plan.zero_stage}", *away) if word).lower()


def measure_run(folder: Path) -> Measured:
    """Read a finished run; KitError where it has no figures of a GPU, or none of its forecast."""
    plan = load_plan(folder)
    metrics = read_json_or_empty(folder / run_directory.METRICS)
    memory = metrics.get("memory_gb")
    if not isinstance(memory, dict):
        fix = "a finished run on a GPU, of this version or later"
        raise KitError(f"{folder} has no memory figures of a GPU in {run_directory.METRICS}", "--calibrate", fix)
    text = inspect_model(plan.model, here=False)[0].text
    forecast, base = forecast_plan(plan, text), measure_sizes(text, plan.peft)
    count = plan.launch.num_gpus if isinstance(plan.launch.num_gpus, int) else 1
    gpu = Gpu(metrics["device"], memory["gpu"], (8, 0))
    key, host = find_key(gpu), find_host((gpu,) * count, 0.0)
    if forecast is None or base is None or host is None or key is None:
        raise KitError(f"the memory of {folder} is not forecast, or its GPU not known", "--calibrate", "leave it out")
    step = step_of_plan(plan, plan.trainer)
    time = forecast_time(step, base, host, plan.trainer["gradient_accumulation_steps"], step.tokens // step.rows)
    seconds = seconds_per_step(folder / run_directory.METRICS_LOG)
    return Measured(
        run=plan.hash, gpu=key, architecture=str(text.get("model_type")), method=method_of(plan),
        allocated=memory["allocated"] * 2**30 / forecast.peak,
        outside=max(0.0, memory["on_the_gpu"] - memory["allocated"]) * 2**30,
        seconds=seconds and seconds / time.fastest,
    )  # fmt: skip


def seconds_per_step(log: Path) -> float | None:
    """Return the median seconds of a step between two lines of metrics.jsonl; None where too few are there."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    at = [(row["step"], row["seconds"]) for row in rows if "loss" in row and row["step"] >= FIRST_STEPS]
    each = [(t - s) / (n - m) for (m, s), (n, t) in zip(at, at[1:], strict=False) if n > m]
    return statistics.median(each) if each else None


def calibrate(folders: Sequence[str | Path]) -> list[Measured]:
    """Measure runs, add them to what is kept, a run once, and return them."""
    found = [measure_run(Path(folder)) for folder in folders]
    kept = {row.run: row for row in (*read_measured(), *found)}
    kit_cache_folder().mkdir(parents=True, exist_ok=True)
    atomic_write_json(kit_cache_folder() / FILE, [asdict(row) for row in kept.values()])
    return found


def read_measured() -> list[Measured]:
    """Return the runs that are kept; none where the file is of another version."""
    file = kit_cache_folder() / FILE
    try:
        return [Measured(**row) for row in json.loads(file.read_text())] if file.exists() else []
    except (TypeError, ValueError):
        return []


def find_correction(plan: RunPlan, architecture: str, host: Host) -> dict[str, Any] | None:
    """Return medians of the kept runs of this kind on this GPU, and how many they are; None without any."""
    gpu = find_key(host.gpus[0])
    alike = [row for row in read_measured() if row.gpu == gpu and row.method == method_of(plan)]
    memory = [row for row in alike if row.architecture == architecture]
    times = [row.seconds for row in alike if row.seconds is not None]
    if not memory and not times:
        return None
    return {
        "memory_runs": len(memory),
        "allocated": statistics.median(row.allocated for row in memory) if memory else None,
        "outside": statistics.median(row.outside for row in memory) if memory else None,
        "time_runs": len(times),
        "seconds": (min(times), max(times)) if times else None,
    }
