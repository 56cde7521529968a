"""The folder that a trainer saves into: complete, with a manifest, or not there at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kit.errors import FAILED, KitError
from kit.storage import atomic_folder, manifest
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
    staging = atomic_folder.staging_path(final)
    move = None if kind == "checkpoint" else move_save
    error = None
    try:
        with ExitStack() as stack:
            if writer:
                try:
                    stack.enter_context(atomic_folder.atomic_folder(final, staging, move=move))
                except OSError as problem:
                    error = as_failure(problem, staging, step)
            checkpoint.raise_together(error, ranks)
            yield staging
            checkpoint.exchange(None, ranks)  # every rank's files are there
            files = checkpoint.hash_together(staging, ranks, writer, args.save_on_each_node)
            if writer:
                try:
                    write_manifest(trainer, staging, kind, files)
                    stack.close()  # flushed and renamed, before any rank goes on
                except (KitError, OSError) as problem:
                    error = as_failure(problem, final, step)
            checkpoint.raise_together(error, ranks)
    except KitError:
        raise
    except (OSError, SafetensorError, RuntimeError) as problem:
        raise as_failure(problem, final, step) from problem


def move_save(staging: Path, final: Path) -> None:
    """Put a saved adapter or model in its place: as a whole, or file by file among the files of others."""
    if not final.exists() or manifest.holds_only_a_save(final):
        atomic_folder.replace_folder(staging, final)
    else:
        manifest.move_save_into(staging, final)


def write_manifest(trainer: ModifiedTrainer, staging: Path, kind: str, files: dict[str, dict]) -> None:
    """List what was written, with the step, the plan and the base that it belongs to."""
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


def as_failure(problem: BaseException, where: Path, step: int) -> KitError:
    if isinstance(problem, KitError):
        return problem
    return KitError(
        f"step {step} could not be saved: {problem}",
        where=str(where).replace(atomic_folder.STAGING, ""),
        fix="free disk space or choose another folder, then resume from the last complete checkpoint",
        code=FAILED,
    )
