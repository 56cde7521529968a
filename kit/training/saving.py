"""The folder that a trainer saves into: complete, with a manifest, or not there at all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kit.errors import FAILED, KitError
from kit.storage import manifest
from kit.training import checkpoint

if TYPE_CHECKING:
    from kit.training.trainer import ModifiedTrainer


@contextmanager
def published(trainer: ModifiedTrainer, final: Path, kind: str) -> Iterator[Path]:
    """A folder beside `final` to write into; on leaving, it is listed, flushed and renamed. Collective.

    Any failure removes it and leaves what stood at `final` before.
    """
    args, ranks, step = trainer.args, trainer.ranks, trainer.state.global_step
    writer = args.should_save
    staging = manifest.staging_path(final)
    try:
        error = None
        if writer:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            except OSError as problem:
                error = as_failure(problem, staging, step)
        checkpoint.raise_together(error, ranks)
        yield staging
        checkpoint.exchange(None, ranks)  # every rank's files are there
        files = checkpoint.hash_together(staging, ranks, writer, args.save_on_each_node)
        if writer:
            try:
                close(trainer, staging, final, kind, files)
            except (KitError, OSError) as problem:
                error = as_failure(problem, final, step)
        checkpoint.raise_together(error, ranks)
    except BaseException as problem:
        if writer:
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(problem, OSError | SafetensorError | RuntimeError) and not isinstance(problem, KitError):
            raise as_failure(problem, final, step) from problem
        raise


def close(trainer: ModifiedTrainer, staging: Path, final: Path, kind: str, files: dict[str, dict]) -> None:
    """List what was written, and let it take the place of `final`."""
    stored = checkpoint.stored_tensors(staging)
    manifest.write_manifest(
        staging,
        kind=kind,
        step=trainer.state.global_step,
        world_size=trainer.args.world_size,
        plan=trainer.provenance.get("plan"),
        base=trainer.provenance.get("base"),
        tensors=len(stored),
        parameters=sum(math.prod(t.shape) for t in stored),
        files=files,
    )
    if kind == "checkpoint" or not final.exists() or manifest.holds_only_a_save(final):
        manifest.publish(staging, final, replace=True)
    else:
        manifest.publish_into(staging, final)


def as_failure(problem: BaseException, where: Path, step: int) -> KitError:
    if isinstance(problem, KitError):
        return problem
    return KitError(
        f"step {step} could not be saved: {problem}",
        where=str(where).replace(manifest.STAGING, ""),
        fix="free disk space or choose another folder, then resume from the last complete checkpoint",
        code=FAILED,
    )
