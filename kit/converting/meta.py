"""`kit convert DIR OUT`: a download of Meta, or a folder with pickles, becomes one that transformers loads safely.

A download of Meta holds params.json, tokenizer.model and consolidated.NN.pth, one for each model-parallel rank that
its model was made for. Everything is checked before a byte is written; OUT appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.converting.config import MetaParams, build_model_config, read_meta_params
from kit.converting.pickles import copy_side_files, find_pickles, read_pickle, write_safetensors
from kit.converting.shards import STORED, join_slices, read_shards
from kit.converting.stream import drop_tied_output, write_shards
from kit.converting.tokenizer import Vocabulary, read_vocabulary, write_tokenizer
from kit.errors import KitError, Problem
from kit.merging import peak_rss_gb
from kit.storage import atomic_folder
from kit.storage.safetensors_header import META_PARAMS

REPORT = "convert.json"


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_gb: float = 4.0,
    max_position_embeddings: int | None = None,
    verify_checklist: bool = False,
    overwrite: bool = False,
    fsync: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Convert a Meta checkpoint, or a folder with pytorch_model*.bin, to safetensors; gives what convert.json holds.

    `dtype`: of all tensors, else as stored. `shard_gb`: largest file in 1e9 bytes. `progress(done, total)`: bytes.
    KitError: 2 for what cannot be converted, before anything is written; 3 for the disk; 4 for values not finite.
    """
    started = time.perf_counter()
    if dtype is not None and dtype not in STORED:
        raise KitError(f"dtype={dtype!r} is not known", "--dtype", f"one of {', '.join(STORED)}")
    if not shard_gb > 0:
        raise KitError(f"{shard_gb} GB is no size of a file", "--shard-gb", "a number above 0")
    if max_position_embeddings is not None and max_position_embeddings < 1:
        raise KitError(f"{max_position_embeddings} is no length", "--max-position-embeddings", "a number above 0")
    folder, target = Path(source).expanduser().absolute(), Path(out).expanduser().absolute()
    pickled = find_pickles(folder)
    if not pickled:
        files, params, vocabulary = open_checkpoint(folder)
    atomic_folder.check_output_folder(target, [folder], overwrite, REPORT, where="OUT")
    if pickled:
        if max_position_embeddings or verify_checklist:
            problem = f"{folder} has a config.json of its own and no checklist of Meta's"
            raise KitError(problem, "--max-position-embeddings, --verify-checklist", "leave them out")
        return convert_pickles(pickled, target, dtype, fsync, progress)
    if verify_checklist:
        verify_checklist_md5(folder)
    tensors = join_slices(read_shards(files), params, vocabulary, STORED[dtype] if dtype else None)
    tied = drop_tied_output(tensors)
    config, generation, notes = build_model_config(params, vocabulary, tensors, tied, max_position_embeddings)
    size = sum(t.nbytes for t in tensors)
    atomic_folder.check_free_space(size, target)
    with atomic_folder.output_folder(target, fsync) as staging:
        write_tokenizer(vocabulary, staging, params.use_scaled_rope, config.max_position_embeddings)
        config.save_pretrained(staging)
        generation.save_pretrained(staging)
        shards = write_shards(tensors, staging, shard_gb, progress)
        kept = str(config.dtype).removeprefix("torch.")
        contents = {
            "shards": shards,
            "parameters": sum(math.prod(t.shape) for t in tensors),
            "bytes": size,
            "dtype": kept,
        }
        report = write_report(staging, started, files, {**contents, "notes": notes, "params": params.given})
    return {**report, "out": str(target)}


def convert_pickles(
    files: list[Path], target: Path, dtype: str | None, fsync: bool, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """The safetensors twin of a folder with pytorch_model*.bin, one file for each; gives what convert.json holds."""
    started, folder = time.perf_counter(), files[0].parent
    atomic_folder.check_free_space(sum(f.stat().st_size for f in files), target)
    for file in files:
        read_pickle(file)  # all of them are looked at before one is written
    with atomic_folder.output_folder(target, fsync) as staging:
        copy_side_files(folder, staging)
        names, parameters, size, kind = write_safetensors(files, staging, dtype, progress)
        contents = {"shards": names, "parameters": parameters, "bytes": size, "dtype": kind, "notes": []}
        report = write_report(staging, started, files, contents)
    return {**report, "out": str(target)}


def write_report(staging: Path, started: float, files: list[Path], contents: dict[str, Any]) -> dict[str, Any]:
    """convert.json: what was read, what was found in it, and what it took."""
    report = {
        "source": str(files[0].parent),
        "files": [f.name for f in files],
        **contents,
        "seconds": time.perf_counter() - started,
        "peak_rss_gb": peak_rss_gb(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "tokenizers")},
    }
    (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def open_checkpoint(folder: Path) -> tuple[list[Path], MetaParams, Vocabulary]:
    """The shards in order, params.json and the tokenizer; KitError with everything that is missing or unreadable."""
    if not folder.is_dir():
        raise KitError(f"there is no folder {folder}", "DIR", "give the folder of consolidated.00.pth")
    problems: list[Problem] = []
    shard_files = {int(m[1]): f for f in folder.iterdir() if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", f.name))}
    if missing := sorted(set(range(max(shard_files, default=0) + 1)) - set(shard_files)):
        lacks = ", ".join(f"consolidated.{n:02}.pth" for n in missing)
        problems.append(Problem(f"{folder} lacks {lacks}", "DIR", "fetch all files of Meta's release"))
    params = vocabulary = None
    try:
        params = read_meta_params(folder / META_PARAMS)
    except KitError as error:
        problems += error.problems
    places = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    if place := next((p for p in places if p.is_file()), None):
        try:
            vocabulary = read_vocabulary(place)
        except KitError as error:
            problems += error.problems
    else:
        problems.append(
            Problem(f"there is no tokenizer.model in {folder} or its parent", "DIR", "fetch it with the weights")
        )
    if problems or params is None or vocabulary is None:
        raise KitError(problems)
    return [shard_files[n] for n in sorted(shard_files)], params, vocabulary


def verify_checklist_md5(folder: Path) -> None:
    """KitError where a file differs from its md5 in Meta's checklist.chk; reads every file once."""
    path = folder / "checklist.chk"
    if not path.is_file():
        raise KitError(f"there is no {path}", "--verify-checklist", "convert without it")
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    problems = []
    for digest, name in [(words[0], words[1].lstrip("*")) for words in lines if len(words) == 2]:
        file = folder / Path(name).name
        if not file.is_file():
            problems.append(Problem(f"{file} is missing, and {path.name} names it", "", "fetch the file"))
            continue
        with open(file, "rb") as handle:
            same = (
                hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == digest.lower()
            )
        if not same:
            problems.append(Problem(f"{file} is damaged: its md5 is not that of {path.name}", "", "fetch it again"))
    if problems:
        raise KitError(problems)
