"""What a published folder must hold: size and SHA-256 of every file, written last, renamed into place as a whole.

A folder is complete when its manifest.json is there and every file it names has the stated size and hash. This shows
damage (a kill half-way, a full disk, a flipped bit); it does not show an attacker, who can rewrite the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from kit.errors import FAILED, KitError
from kit.storage.atomic_folder import fsync_path

NAME = "manifest.json"
FORMAT = 1
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class NewestCheckpoint(NamedTuple):
    """The newest complete checkpoint (None where there is none) and a sentence for each newer one that is damaged."""

    path: Path | None
    skipped: list[str]


def list_folder_files(folder: str | Path) -> list[str]:
    """Every regular file below `folder` except the manifest, as sorted POSIX names relative to it."""
    folder = Path(folder)
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != NAME)


def hash_file(path: Path, sync: bool = False) -> dict[str, int | str]:
    """{"bytes", "sha256"} of one file; with `sync` it is also flushed to the disk."""
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        return {"bytes": os.fstat(f.fileno()).st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def hash_files(folder: str | Path, names: Iterable[str], sync: bool = False) -> dict[str, dict[str, int | str]]:
    """`hash_file` of several files at once: hashlib and fsync both release the interpreter lock."""
    folder, names = Path(folder), list(names)
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 2)) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name, sync), names), strict=True))


def write_manifest(
    folder: str | Path,
    *,
    kind: str,
    step: int = 0,
    world_size: int = 1,
    plan: str | None = None,
    base: dict | None = None,
    tensors: int = 0,
    parameters: int = 0,
    resumes: Literal["training", "weights"] | None = None,
    files: dict[str, dict] | None = None,
) -> dict:
    """Hash, flush and list everything in `folder`, then write its manifest last.

    kind: "adapter", "model" or "checkpoint". resumes: what can go on from a checkpoint, the training or a new run that
    begins with its weights. files: the hashes, where the ranks made and flushed them already.
    """
    folder = Path(folder)
    if files is None:
        files = hash_files(folder, list_folder_files(folder), sync=True)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "step": step,
        "world_size": world_size,
        "plan": plan,
        "base": base,
        "tensors": tensors,
        "parameters": parameters,
        **({"resumes": resumes} if resumes else {}),
        "files": dict(sorted(files.items())),
    }
    with open(folder / NAME, "w", encoding="utf-8") as f:
        json.dump(manifest, f, indent=1)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    return manifest


def _load_manifest(folder: Path) -> tuple[dict | None, str]:
    """The manifest of a folder, or None and why not."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"{folder} has no {NAME}: it was not finished, or not written by this kit"
    except (OSError, ValueError) as error:
        return None, f"{folder / NAME} cannot be read: {error}"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None, f"{folder / NAME} is not a manifest of format {FORMAT}"
    files = manifest.get("files")
    whole = isinstance(files, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    )
    return (manifest, "") if whole else (None, f"{folder / NAME} does not list the folder's files")


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a folder; KitError (4) where it is missing or damaged. Hashes are `verify`'s matter."""
    manifest, reason = _load_manifest(Path(folder))
    if manifest is None:
        raise KitError(reason, where=str(folder), fix="use another checkpoint or save it again", code=FAILED)
    return manifest


def what_it_resumes(checkpoint: Path) -> str:
    """ "training", or "weights" where a checkpoint has no optimizer; older ones do not say it."""
    has_optimizer = any(any(checkpoint.glob(pattern)) for pattern in ("optimizer*", "global_step*"))
    return str(read_manifest(checkpoint).get("resumes", "training" if has_optimizer else "weights"))


def verify_folder(folder: str | Path) -> list[str]:
    """What is wrong with a published folder, one sentence each; an empty list means that it is complete.

    Files that the manifest does not name are no fault. Sizes are looked at before any hash is computed.
    """
    folder = Path(folder)
    manifest, reason = _load_manifest(folder)
    if manifest is None:
        return [reason]
    problems, same_size = [], []
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{folder / NAME} names {name}, which is outside the folder")
        elif not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        else:
            same_size.append(name)
    try:
        hashes = hash_files(folder, same_size)
    except OSError as error:
        return [*problems, f"{folder} cannot be read: {error}"]
    changed = [name for name in same_size if hashes[name]["sha256"] != manifest["files"][name]["sha256"]]
    return problems + [f"{folder / name} differs from the file that was saved (SHA-256)" for name in changed]


def move_save_into(staging: str | Path, final: str | Path) -> None:
    """Move the files of a finished `staging` one by one into `final`, which also holds files of others.

    The manifest goes first and comes back last, so a kill half-way is seen.
    """
    staging, final = Path(staging), Path(final)
    names = list_folder_files(staging)
    (final / NAME).unlink(missing_ok=True)
    for name in [*names, NAME]:
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, final / name)
    fsync_path(final)


def holds_only_a_save(folder: str | Path) -> bool:
    """Whether `folder` is empty or its manifest names everything in it: then it can be replaced as a whole."""
    manifest, _ = _load_manifest(Path(folder))
    return set(list_folder_files(folder)) <= set(manifest["files"] if manifest else ())


def newest_complete_checkpoint(checkpoints: str | Path) -> NewestCheckpoint:
    """The checkpoint-<step> of the highest step that verifies, and why newer ones were passed over."""
    folder = Path(checkpoints)
    steps = []
    if folder.is_dir():
        matches = ((CHECKPOINT_NAME.fullmatch(p.name), p) for p in folder.iterdir() if p.is_dir())
        steps = sorted(((int(m[1]), p) for m, p in matches if m), reverse=True)
    skipped: list[str] = []
    for _, path in steps:
        problems = verify_folder(path)
        if not problems:
            return NewestCheckpoint(path, skipped)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{path.name} was passed over: {problems[0]}{more}")
    return NewestCheckpoint(None, skipped)
