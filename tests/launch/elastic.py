"""Runs on two processes and on one, and resumes of each by the other: `elastic.py JSON`.

All ranks are forks of one start, which pays the imports once. JSON: a list of stages, each
{"world": 2, "runs": [{"folder", "plan", "checkpoint", "overrides", "fault"}, ...]}. A run with a checkpoint goes on
from it in a copy, "folder", of the finished run of "plan". Every run leaves rows.json: {step: hashes of the rows that
its optimizer step has seen, of all ranks}.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from kit.schema.run_plan import load_plan


def prepare(run: dict[str, Any]) -> tuple[str, str | None]:
    """Copy a run to go on from one of its checkpoints with other overrides, as `kit resume` does."""
    from kit import api
    from kit.storage import run_directory

    if not run.get("checkpoint"):
        return run["plan"], None
    source, folder = Path(run["plan"]).parent, Path(run["folder"])
    shutil.copytree(source, folder)
    plan = load_plan(folder / "plan.json").model_copy(update={"run_dir": str(folder)})
    run_directory.write_plan(api.override_plan(plan, run["overrides"]))
    return str(folder / "plan.json"), run["checkpoint"]


def spoil(fault: str) -> Any:
    """Plant a fault of a resume; what undoes it."""
    import deepspeed.utils
    import transformers.trainer

    if fault == "momentum":  # the first moment is left at zero
        held = deepspeed.utils.safe_set_full_optimizer_state
        deepspeed.utils.safe_set_full_optimizer_state = lambda p, v, key: held(p, v * (key != "exp_avg"), key)
        return lambda: setattr(deepspeed.utils, "safe_set_full_optimizer_state", held)
    if fault == "rows":  # one batch too few is skipped
        skip = transformers.trainer.skip_first_batches
        transformers.trainer.skip_first_batches = lambda loader, count: skip(loader, count - 1)
        return lambda: setattr(transformers.trainer, "skip_first_batches", skip)
    return lambda: None


def watch_rows(seen: dict[int, list[str]]) -> None:
    """Note the rows of every micro-batch by the step that they belong to."""
    from kit.training.trainer import ModifiedTrainer

    step_before = ModifiedTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            kept = ids[(labels != -100) | (ids != 3)].tolist()  # 3 is the tiny tokenizer's padding
            seen.setdefault(self.state.global_step, []).append(hashlib.sha256(str(kept).encode()).hexdigest()[:12])
        return step_before(self, model, inputs, *args, **kwargs)

    ModifiedTrainer.training_step = training_step


def one_rank(rank: int, world: int, port: int, runs: list[tuple[str, str | None, str]]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    import kit.training.run as training
    from kit.training.checkpoint import gather_objects
    from kit.worker import prepare_process

    log = prepare_process(load_plan(runs[0][0]), rank)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    dist.destroy_process_group = lambda *a, **k: None  # it must outlive a run here
    seen: dict[int, list[str]] = {}
    watch_rows(seen)
    for path, checkpoint, fault in runs:
        seen.clear()
        undo = spoil(fault)
        plan = load_plan(path)
        assert training.train(plan, resume=checkpoint) == 0
        undo()
        group = dist.group.WORLD if dist.is_initialized() and world > 1 else None
        ranks = gather_objects(dict(seen), group)
        if rank == 0:
            rows = {step + 1: sum((r.get(step, []) for r in ranks), []) for step in ranks[0]}
            (plan.run_path / "rows.json").write_text(json.dumps(rows))
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    os._exit(0)


def main(stages: list[dict[str, Any]]) -> None:
    from kit.launchers.command import free_port

    for stage in stages:
        runs = [(*prepare(run), run.get("fault", "")) for run in stage["runs"]]
        port, ranks = free_port(), []
        for rank in range(stage["world"]):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                torch.set_num_threads(1)  # makes torch's thread pool anew; two threads that call at once find none
                try:
                    one_rank(rank, stage["world"], port, runs)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    os._exit(1)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        if any(codes):
            sys.exit(f"{codes}: {runs}")


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import kit.training.run
    import kit.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
