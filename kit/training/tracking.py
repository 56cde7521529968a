"""Trackers write in threads and processes of their own, and a rank ends without waiting for those: they are closed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from kit.schema import trackers
from kit.schema.run_plan import RunPlan


@contextlib.contextmanager
def closing_trackers(plan: RunPlan) -> Iterator[None]:
    """Close the plan's trackers when the block ends, also by an error. Only rank 0 has open ones."""
    failed = True
    try:
        yield
        failed = False
    finally:
        try:
            close_trackers(loaded_trackers(plan), failed)
        except Exception as error:  # a finished run stays one
            print(f"kit: a tracker could not be closed: {error}", file=sys.stderr, flush=True)


def loaded_trackers(plan: RunPlan) -> dict[str, Any]:
    """The modules of the plan's trackers; a tracker that did not come as far as its import has nothing to close."""
    return {n: sys.modules[n] for n in trackers.tracker_names(plan.trainer.get("report_to")) if n in sys.modules}


def reopen_mlflow(plan: RunPlan) -> None:
    """MLflow's run ends with training: the last evaluation belongs to it, not to a second, nameless run."""
    mlflow = loaded_trackers(plan).get("mlflow")
    if mlflow and mlflow.active_run() is None and (run := mlflow.last_active_run()):
        mlflow.start_run(run_id=run.info.run_id)


def close_trackers(modules: dict[str, Any], failed: bool) -> None:
    if (wandb := modules.get("wandb")) and wandb.run is not None:
        wandb.finish(exit_code=int(failed))
    if (mlflow := modules.get("mlflow")) and mlflow.active_run() is not None:
        mlflow.flush_async_logging()
        mlflow.end_run("FAILED" if failed else "FINISHED")
    if (trackio := modules.get("trackio")) and trackio.context_vars.current_run.get() is not None:
        trackio.finish()
