"""The folder that a trainer saves into: complete, with a manifest, or not there at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from kit.errors import FAILED, KitError
from kit.storage import atomic_folder, manifest
from kit.training import checkpoint


@contextmanager
def atomic_save(
    final: Path, kind: str, args: Any, group: Any, step: int, provenance: dict[str, Any]
) -> Iterator[Path]:
    """A folder beside `final` to write into; on leaving, it is listed, flushed and renamed. Collective.

    args: the trainer's; group: its host-side group; provenance: {"plan": hash, "base": {...}}, for the manifest.
    Any failure removes it and leaves what stood at `final` before.
    """
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
                    error = save_error(problem, staging, step)
            checkpoint.raise_on_all_ranks(error, group)
            yield staging
            checkpoint.gather_objects(None, group)  # every rank's files are there
            files = checkpoint.hash_on_all_ranks(staging, group, writer, args.save_on_each_node)
            if writer:
                try:
                    write_manifest(staging, kind, files, step=step, args=args, provenance=provenance)
                    stack.close()  # flushed and renamed, before any rank goes on
                except (KitError, OSError) as problem:
                    error = save_error(problem, final, step)
            checkpoint.raise_on_all_ranks(error, group)
    except KitError:
        raise
    except (OSError, SafetensorError, RuntimeError) as problem:
        raise save_error(problem, final, step) from problem


def move_save(staging: Path, final: Path) -> None:
    """Put a saved adapter or model in its place: as a whole, or file by file among the files of others."""
    if not final.exists() or manifest.holds_only_a_save(final):
        atomic_folder.replace_folder(staging, final)
    else:
        manifest.move_save_into(staging, final)


def write_manifest(staging: Path, kind: str, files: dict[str, dict], step: int, args: Any, provenance: dict) -> None:
    """List what was written, with the step, the plan and the base that it belongs to, and what can go on from it."""
    stored = checkpoint.saved_tensor_headers(staging)
    resumes: Any = ("weights" if args.save_only_model else "training") if kind == "checkpoint" else None
    manifest.write_manifest(
        staging,
        kind=kind,
        step=step,
        world_size=args.world_size,
        resumes=resumes,
        plan=provenance.get("plan"),
        base=provenance.get("base"),
        tensors=len(stored),
        parameters=sum(math.prod(t.shape) for t in stored),
        files=files,
    )


def save_error(problem: BaseException, where: Path, step: int) -> KitError:
    if isinstance(problem, KitError):
        return problem
    return KitError(
        f"step {step} could not be saved: {problem}",
        where=str(where).replace(atomic_folder.STAGING, ""),
        fix="free disk space or choose another folder, then resume from the last complete checkpoint",
        code=FAILED,
    )


def rotate_checkpoints(folder: str, limit: int | None, best: str | None) -> None:
    """Delete all but `limit` checkpoints in a folder: the newest and the best always stay, then the newer ones."""
    if not limit or limit < 1:
        return
    oldest_first = sort_checkpoints(folder, use_mtime=True)
    kept = {oldest_first[-1], str(Path(best or oldest_first[-1]))}
    surplus = len(oldest_first) - max(limit, len(kept))
    for path in [p for p in oldest_first if p not in kept][: max(surplus, 0)]:
        atomic_folder.discard_folder(path)
