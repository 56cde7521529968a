"""Folds an adapter into its base: a whole model in a new folder, complete and verified, or no folder at all.

The folder is built beside its place under the name `<out>.staging-<pid>`, verified there and renamed last.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection.adapter import CONFIG, AdapterFolder, holds_adapter, read_adapter_folder
from kit.merging.dequantize import BaseQuantization
from kit.merging.parts import MergePlan
from kit.merging.plan import plan_merge
from kit.merging.side_files import check_tokenizer_fits, copy_side_files, write_config, write_index
from kit.storage.atomic_folder import check_free_space, check_output_folder, output_folder
from kit.storage.hub_cache import fetch_command
from kit.storage.json_files import read_json
from kit.storage.manifest import NAME as MANIFEST
from kit.storage.manifest import hash_file
from kit.storage.safetensors_header import find_model_folder, fingerprint_tensors

REPORT = "merge.json"
DTYPES = ("float32", "bfloat16", "float16")


def merge(
    source: str | Path,
    base: str | None = None,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    verify: bool | str = True,
    dtype: str | None = None,
    onto: str | None = None,
    fsync: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge a run's adapter, an adapter folder or a cached Hub adapter into its base; gives what merge.json holds.

    `onto`, for a run over a quantized base: "original" (the stored weights, the default) or "dequantized" (what
    quantizing left of them: the model that was trained).
    `verify`: True (logits for a base under 2 GB, else tensors), "tensors", "logits" or False.
    `progress(done, total)` counts bytes. KitError: 2 for what does not fit, 4 where the result is not right.
    """
    started = time.perf_counter()
    if verify not in (True, False, "auto", "tensors", "logits"):
        raise KitError(f"verify={verify!r} is not known", fix="use true, false, tensors or logits")
    if dtype is not None and dtype not in DTYPES:
        raise KitError(f"dtype={dtype!r} is not known", where="--dtype", fix=f"one of {', '.join(DTYPES)}")
    adapter, run = locate_adapter(source)
    opened = read_adapter_folder(adapter)
    run_plan = read_run_plan(adapter, run)
    trained_on = read_quantization(run_plan, onto)
    name, wanted, base_folder = locate_base(base, revision, opened, run_plan)
    proven = refuse_other_base(base_folder, name, opened.base)
    target = (Path(out).expanduser() if out else default_target(source, adapter, run)).absolute()
    check_output_folder(target, [base_folder, adapter, *([run] if run else [])], overwrite, REPORT)
    dequantize = onto == "dequantized"
    plan = plan_merge(base_folder, adapter, dtype=dtype, proven=proven, trained_on=trained_on, dequantize=dequantize)
    if trained_on and not dequantize:
        plan.notes.append(
            f"trained over the {trained_on.kind} base and merged onto the original weights: not quite the model that "
            "was trained (--onto dequantized is)"
        )
    check_free_space(sum(t.end - t.start for t in plan.tensors.values()), target)
    with output_folder(target, fsync) as staging:
        report = _write_model(plan, staging, dtype, fsync, progress)
        report["base"] = {"name_or_path": name, "revision": wanted, "fingerprint": fingerprint_tensors(base_folder)}
        report["peak_rss_gb"] = peak_rss_gb()
        if verify:
            begun = time.perf_counter()
            how = "auto" if verify is True else str(verify)
            figures = _verify_staging(staging, plan, how, run_plan.get("prompts") or [])
            report["as_trained"] = (figures.get("logits") or {}).pop("as_trained", None)
            report["verification"] = figures
            report["seconds"]["verify"] = time.perf_counter() - begun
            report["peak_rss_gb_verified"] = peak_rss_gb()
        else:
            report["verification"] = None
        report["seconds"]["all"] = time.perf_counter() - started
        (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report["out"] = str(target)
    return report


def locate_adapter(source: str | Path) -> tuple[Path, Path | None]:
    """The adapter's folder, and the run's where `source` is a run."""
    folder = find_model_folder(str(source))
    if folder is None:
        raise KitError(
            f"{source} is neither a folder nor an adapter in the local Hub cache",
            fix="give a run, an adapter folder or a Hub id that `hf download` has fetched",
        )
    if holds_adapter(folder):
        return folder, None
    if holds_adapter(folder / "adapter"):
        return folder / "adapter", folder
    if (folder / "model").is_dir():
        raise KitError(f"{folder} trained the whole model: there is no adapter to merge", fix="use its model/ folder")
    if (folder / "plan.json").is_file():
        raise KitError(
            f"{folder} has no finished adapter", fix="finish it with `kit resume`, or give one of its checkpoints"
        )
    raise KitError(
        f"{folder} is neither a run nor an adapter: it has no {CONFIG}", fix="give a run or an adapter folder"
    )


def read_run_plan(adapter: Path, run: Path | None) -> dict[str, Any]:
    """plan.json of the run, also of an adapter or a checkpoint that lies inside one; empty without it."""
    folders = [run] if run else list(adapter.parents)[:2]
    return next((read_json(p / "plan.json") for p in folders if (p / "plan.json").is_file()), {})


def read_quantization(run_plan: dict[str, Any], onto: str | None) -> BaseQuantization | None:
    """How the run quantized its base; KitError where `onto` asks for what there is not."""
    if onto not in (None, "original", "dequantized"):
        raise KitError(f"onto={onto!r} is not known", where="--onto", fix="original or dequantized")
    fields = run_plan.get("quantization")
    if fields:
        return BaseQuantization(fields, str((run_plan.get("model") or {}).get("dtype") or "float32"))
    if onto == "dequantized":
        raise KitError(
            "this run's base was not quantized: there is nothing to dequantize"
            if run_plan
            else "an adapter alone does not say how its base was quantized",
            where="--onto dequantized",
            fix="leave --onto out" if run_plan else "give the run, or leave --onto out",
        )
    return None


def default_target(source: str | Path, adapter: Path, run: Path | None) -> Path:
    """RUN/merged, or a folder beside the adapter; for a Hub id in the working directory, never in the cache."""
    if run:
        return run / "merged"
    if not Path(source).expanduser().is_dir():
        return Path(str(source).split("/")[-1] + "-merged")
    return adapter.with_name(adapter.name + "-merged")


def locate_base(
    base: str | None, revision: str | None, adapter: AdapterFolder, run_plan: dict
) -> tuple[str, str | None, Path]:
    """Name, revision and folder of the base: what was asked for, else what was written down when it was trained."""
    model = run_plan.get("model") or {}
    recorded, config = adapter.base, adapter.config
    choices = [
        (base, revision),
        (recorded.get("name_or_path"), revision or recorded.get("revision")),
        (model.get("name_or_path"), revision or model.get("revision")),
        (config.get("base_model_name_or_path"), revision or config.get("revision")),
    ]
    if model.get("random_init") and not base:
        raise KitError(
            "this run started from random weights that were never saved: there is no base to merge into",
            where="model.random_init",
            fix="give a saved base with --base",
        )
    name, wanted = next(((n, r) for n, r in choices if n), (None, None))
    if not name:
        raise KitError(f"{adapter.folder} does not say which base it belongs to", fix="name it with --base")
    folder = find_model_folder(name, wanted)
    if folder is None:
        raise KitError(
            f"the base {name}{f' at {wanted}' if wanted else ''} is not on this machine",
            where="--base" if base else str(adapter.folder / CONFIG),
            fix=f"{fetch_command('model.name_or_path', name, wanted)}; or give its folder with --base",
        )
    return name, wanted, folder


def refuse_other_base(folder: Path, name: str, recorded: dict) -> bool:
    """Whether the base is proven to be the one trained on; KitError where it is another of whatever shape."""
    config, weights = recorded.get("config_sha256"), recorded.get("fingerprint")
    differences = []
    if config and (folder / "config.json").is_file() and hash_file(folder / "config.json")["sha256"] != config:
        differences.append("its config.json differs")
    if weights and fingerprint_tensors(folder) != weights:
        differences.append("its weights differ")
    if differences:
        raise KitError(
            f"{name} is not the base that the adapter was trained on: {' and '.join(differences)}",
            where=f"{folder}, against {MANIFEST}",
            fix=f"give the base that was trained on ({recorded.get('name_or_path')}"
            + (f" at {recorded['revision']})" if recorded.get("revision") else ")"),
        )
    return bool(weights)


def _write_model(
    plan: MergePlan, staging: Path, dtype: str | None, fsync: bool, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Write the model's files into the staging folder; gives the report so far."""
    begun = time.perf_counter()
    if plan.through_peft:
        from kit.merging.through_peft import write_through_peft

        figures = write_through_peft(plan, staging, dtype)
    else:
        from kit.merging.stream import write_shards

        figures = write_shards(plan, staging, fsync=fsync, progress=progress)
        write_index(plan, staging)
        write_config(plan, staging)
    copy_side_files(plan, staging)
    check_tokenizer_fits(plan)
    opened = plan.adapter.opened
    changes = [f["relative_change"] for f in figures["tensors"] if f["relative_change"] is not None]
    return {
        "method": "peft" if plan.through_peft else "streaming",
        "reason": plan.through_peft or None,
        "onto": ("dequantized" if plan.dequantized else "original") if plan.trained_on else None,
        "quantization": plan.trained_on.fields if plan.trained_on else None,
        "adapter": {
            "path": str(plan.adapter.folder),
            "sha256": {path.name: hash_file(path)["sha256"] for path in (opened.weights, opened.folder / CONFIG)},
        },
        "changed_tensors": len(figures["tensors"]),
        "bytes": figures["bytes"],
        "workers": figures.get("workers"),
        "max_relative_change": max(changes, default=None),
        "mean_relative_change": sum(changes) / len(changes) if changes else None,
        "config_changes": plan.changes,
        "notes": plan.notes,
        "seconds": {"write": figures["seconds"], "build": time.perf_counter() - begun},
        "fsync_seconds": figures["fsync_seconds"],
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft", "safetensors")},
    }


def _verify_staging(staging: Path, plan: MergePlan, how: str, own: list[str]) -> dict[str, Any]:
    from kit.merging.compare import verify_merge
    from kit.merging.logits import PROMPTS

    dequantize = bool(plan.dequantized)
    prompts, adapter = [*PROMPTS, *own], plan.adapter.folder  # and the run's own questions
    return verify_merge(staging, plan.base, adapter, prompts, how, trained_on=plan.trained_on, dequantize=dequantize)


def peak_rss_gb() -> float:
    """The largest resident size of this process so far, in 1e9 bytes.

    From /proc where there is one: getrusage also counts what the parent held when it started this process.
    """
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def verify(out: str | Path, base: str | Path, adapter: str | Path, prompts: list[str] | None = None) -> dict[str, Any]:
    """Compare a merged model with base + adapter (see kit/merging/compare.py); KitError (4) where they differ."""
    from kit.merging.compare import verify_merge

    return verify_merge(Path(out), Path(base), Path(adapter), prompts)
