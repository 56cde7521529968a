"""`make quickstart`: the whole line on a tiny model, in minutes, without a network.

A base is trained once (full fine-tuning on plain text, recipe=quickstart_base) and kept in the cache; a LoRA is tuned
on it (recipe=quickstart), merged, verified, scored against the base, and shown side by side.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from kit import api
from kit.errors import DONE, KitError
from kit.launchers.supervise import launch
from kit.merging.report import format_merge
from kit.schema.run_plan import RunPlan
from kit.storage import manifest, run_directory
from kit.system import hardware, paths, terminal


def main(argv: list[str] | None = None) -> None:
    sys.exit(run_quickstart(sys.argv[1:] if argv is None else argv))


def run_quickstart(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kit.quickstart", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of recipe=quickstart")
    a = parser.parse_args(argv)
    started = time.monotonic()
    terminal.silence_libraries()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small gain nothing from a second thread
    try:
        quickstart(a.overrides)
    except KitError as error:
        terminal.print_problems(error.problems, refused=False)
        return error.code
    print(f"\nall of it took {time.monotonic() - started:.0f} s")
    return DONE


def quickstart(overrides: list[str]) -> dict[str, Any]:
    """Base, tune, merge, evaluate, generate; the evaluation's figures."""
    print_title("1. a base model: a tiny Llama trained on plain sentences (kept for the next time)")
    prepare_base()
    print_title("2. fine-tuning: LoRA on chats, answer-only loss")
    plan = train_plan("recipe=quickstart", *overrides)
    source = plan.run_dir
    print_title("3. merge, verified against base + adapter")
    from kit.evaluation.evaluate import evaluate, format_table
    from kit.evaluation.generate import format_samples, generate
    from kit.merging import merge

    print(format_merge(merge(source, verify="logits")))
    print_title("4. held-out questions: exact match of greedy answers")
    scores = evaluate(source, few_shot=5, max_new_tokens=8, batch_size=100)
    print(format_table(scores))
    print_title("5. side by side")
    samples = generate(source, max_new_tokens=8)
    print(format_samples(samples["samples"]))
    print(f"adapter and merged model agree token for token: {samples['adapter_equals_merged']}")
    run_dir = run_directory.path_from_here(plan.run_path)
    print(f"\nEverything is in {run_dir}. Next, the same run under DeepSpeed ZeRO-3 with two processes:")
    more = "" if len(hardware.list_gpus()) > 1 else " trainer.use_cpu=true"
    print(f"  {kit_command()} train recipe=quickstart launch=deepspeed launch.num_gpus=2 deepspeed=zero3{more}")
    question = "Which of Q, B, X, F comes first in the alphabet?"
    print(f"or ask it something:  {kit_command()} generate {run_dir} --prompt '{question}'")
    return scores


def prepare_base() -> None:
    """Train the base unless this very base is in the cache."""
    from kit.quickstart import data

    folder = paths.kit_cache_folder() / "quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    data.write_base_inputs(folder)
    plan = api.compose("recipe=quickstart_base", f"runs_dir={folder / 'runs'}", here=True)
    base = folder / "base"
    if base.is_dir() and not manifest.verify_folder(base) and manifest.read_manifest(base).get("plan") == plan.hash:
        print(f"kept from before: {base}")
        return
    plan = run_directory.create_run_directory(plan, fresh=True)
    if launch(plan) != DONE:
        raise KitError("the base was not trained to the end", fix="make quickstart")
    shutil.rmtree(base, ignore_errors=True)
    os.replace(plan.run_path / run_directory.MODEL, base)
    shutil.rmtree(folder / "runs", ignore_errors=True)


def train_plan(*args: str) -> RunPlan:
    """`kit train`, giving the plan with the directory it ran in; an unfinished earlier try is left where it is."""
    plan = run_directory.create_run_directory(api.compose(*args, here=True), fresh=True)
    code = launch(plan)
    if code != DONE:
        raise KitError(
            "the run was stopped", fix=f"kit resume {run_directory.path_from_here(plan.run_path)}", code=code
        )
    return plan


def kit_command() -> str:
    """How this user types `kit`: by name where it is on the PATH, else with its folder."""
    here = Path(sys.executable).with_name("kit")
    return "kit" if shutil.which("kit") else run_directory.path_from_here(here) if here.exists() else "python -m kit"


def print_title(text: str) -> None:
    print(f"\n--- {text}", flush=True)
