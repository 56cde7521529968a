"""What the three tools' data sets have in common: where a set of several goes in a recipe, and what is no text SFT."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.foreign.report import Reading
from kit.foreign.tree import KeyPath

ROLES = ("system", "developer", "user", "assistant", "tool", "tool_call")
KNOWN_ROLES = {  # theirs that mean ours without a word
    "human": "user", "gpt": "assistant", "observation": "tool", "function_call": "tool_call", **{r: r for r in ROLES},
}  # fmt: skip
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # `datasets`' own, which read files under any suffix
REMOTE = re.compile(r"(s3|gs|gcs|adl|abfs|abfss|az|oci|https?|hf)://")
COPY_IT = "copy the files here, and dataset.path=FILE"


def section_of(number: int, count: int) -> str:
    """Where the keys of a set go: the data set of the run, or one of dataset.mix (which report.py makes a list)."""
    return "dataset" if count == 1 else f"dataset.mix.{number}"


def file_or_place(block: dict[str, Any]) -> str | list[str] | None:
    """The path of a `datasets.load_dataset` block: its files where one of the builders reads them, else its path."""
    place, files = block.get("path"), block.get("data_files")
    if isinstance(files, dict):  # by split
        files = files.get(str(block.get("split") or "train").partition("[")[0])
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if isinstance(files, str) or (isinstance(files, list) and files and all(isinstance(f, str) for f in files)):
        if place in (*BUILDERS, None) or place == files:
            return files
        if isinstance(place, str) and is_folder(place):
            return [str(Path(place) / f) for f in ([files] if isinstance(files, str) else files)]
    if files:
        return None  # some files of a Hub repository
    if place in BUILDERS and isinstance(block.get("data_dir"), str):
        return str(block["data_dir"])
    return place if isinstance(place, str) and place not in BUILDERS else None


def is_folder(place: str) -> bool:
    try:
        return Path(place).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def no_place(block: dict[str, Any]) -> tuple[str, str]:
    """Why `file_or_place` gives nothing, and what to do."""
    if block.get("path") and block.get("data_files"):
        return f"single files of {block['path']}", "hf download the files, and dataset.path=FILE"
    return "it names neither a file nor a Hub id", "dataset.path=FILE"


def carry_place(r: Reading, prefix: KeyPath, block: dict[str, Any], to: str) -> None:
    """path, data_files, data_dir, name and revision of one set."""
    place = file_or_place(block)
    keys = [k for k in ("path", "data_files", "data_dir") if block.get(k) not in (None, [], {})]
    of_place = next((k for k in ("path", "data_dir") if place == block.get(k)), "data_files")
    for key in keys:
        if not r.has(*prefix, key):
            continue
        if key == of_place:
            r.carry((*prefix, key), f"{to}.path", place)
        elif of_place != "path" and key == "path":
            r.mark_default((*prefix, key), "the suffix of the file says it")
        elif block[key] == place:
            r.mark_default((*prefix, key), "the path says it")
        else:
            r.leave((*prefix, key), "one part of a data set", "dataset.path=FILE, or a folder of its own")
    r.carry_all({"name": f"{to}.name", "revision": f"{to}.revision"}, *prefix)


def carry_split(r: Reading, path: KeyPath, to: str) -> None:
    """A split; `train[:1000]` is its first rows, which dataset.limit says."""
    if not r.has(*path) or r.skip_null(*path):
        return
    split = str(r.get(*path)).strip()
    if first := re.fullmatch(r"([^\[\]+]+)\[:(\d+)\]", split):
        r.carry(path, f"{to}.split", first[1])
        r.carry(path, f"{to}.limit", int(first[2]))
    else:
        r.carry(path, f"{to}.split", split)


def carry_split_and_share(r: Reading, prefix: KeyPath, to: str) -> None:
    """`split`, and `weight` where it is a share of this set's rows, whatever the others have."""
    split, weight = str(r.get(*prefix, "split") or "train"), (*prefix, "weight")
    part = split_of_share(split, r.get(*weight))
    if not r.has(*weight) or r.skip_null(*weight) or part is None or part == split:
        if r.has(*weight):
            r.mark_default(weight, "all of its rows")
        carry_split(r, (*prefix, "split"), to)
        return
    if r.has(*prefix, "split"):
        r.carry((*prefix, "split"), f"{to}.split", part)
    r.carry(weight, f"{to}.split", part, "its first rows, there some at random")


def split_of_share(split: str, share: Any) -> str | None:
    """A share of a split in the words of `datasets`, which know whole percents; None where it cannot be said."""
    if share is None or share == 1:
        return split
    percent = round(share * 100, 6) if isinstance(share, int | float) and not isinstance(share, bool) else 0.5
    return f"{split}[:{int(percent)}%]" if percent == int(percent) and 0 < percent < 100 and "[" not in split else None


def no_share(share: Any) -> tuple[str, str]:
    return f"NOT carried: the share {share} of the rows of one set", "put it into dataset.mix with limit=ROWS"


def other_roles(roles: dict[str, str]) -> dict[str, str]:
    """Of (theirs, ours) what the kit does not know by itself."""
    return {theirs: ours for theirs, ours in roles.items() if KNOWN_ROLES.get(theirs) != ours}


def one_mask(wanted: Iterable[str | None]) -> str | None:
    """dataset.train_on for all sets: assistant turns are what a completion is too. None where nothing need be said."""
    masks = {mask for mask in wanted if mask}
    if masks <= {"completion"}:
        return None
    return next(iter(masks)) if len(masks) == 1 else "assistant_turns" if "everything" not in masks else "everything"


def refuse_other_method(r: Reading, what: str, where: str) -> None:
    """This is not the supervised fine-tuning of text."""
    raise KitError(
        f"{what}: this is no supervised fine-tuning of text", f"{r.name}: {where}", "the kit trains SFT alone"
    )
