"""The files behind `dataset.path`, a file, a folder, a glob or a list of these, and the splits that they make."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from kit.errors import KitError, first_line
from kit.inspection.hub_dataset import (
    CARD,
    KEYWORDS,
    NO_ROWS,
    PACKINGS,
    SUFFIXES,
    choose_configuration,
    has_data_suffix,
    is_data_file,
    read_card,
    split_files,
    split_suffixes,
    split_words,
)
from kit.storage.json_files import read_json, read_json_or_empty

# What people call folders of data: `data/chats` that is not there is a path mistyped and no Hub id.
FOLDER_NAMES = set(
    "data dataset datasets my_data mydata train training test val valid validation eval raw processed input inputs "
    "output outputs file files corpus corpora chats jsonl json csv parquet tmp temp home mnt opt srv var scratch work "
    "workspace content kaggle root users media volumes shared storage downloads desktop documents examples samples "
    "assets resources src project local".split()
)
SPLIT_WORDS: set[str] = set().union(*KEYWORDS.values())


def find_data_files(path: str | list[str], split: str = "train", config: str | None = None) -> list[Path] | None:
    """The files of a split: of a file, a folder, a glob or a list of these, in a fixed order; None for a Hub id.

    KitError where there are none, where the split is not there (naming those that are), or where kinds are mixed.
    """
    if isinstance(path, list):
        found = {p: find_data_files(p, split, config) for p in path}
        if not found or None in found.values():
            hub = [p for p, files in found.items() if files is None]
            problem = f"{hub[0]} in a list of files is a Hub id" if hub else "the list of files is empty"
            raise refuse_path(problem, "name files and folders; several data sets are dataset.mix")
        return list(dict.fromkeys(file for files in found.values() for file in files or ()))
    splits = find_splits(path, config)
    if splits is None:
        return None
    if split not in splits:
        has = ", ".join(splits)
        problem, fix = f"{path} has no split {split}; it has {has}", f"one of {has}, or name the files themselves"
        raise KitError(problem, "dataset.split", fix, rule="dataset-split")
    kinds = sorted({split_suffixes(f.name)[0].replace("ndjson", "jsonl") for f in splits[split]})
    if len(kinds) > 1:
        raise refuse_path(f"{path} mixes file kinds: {', '.join(kinds)}", "name the files of one kind: FOLDER/*.jsonl")
    return splits[split]


def list_splits(path: str | list[str], config: str | None = None) -> list[str] | None:
    """The splits that a path on this machine offers, "train" alone where it says none; None for a Hub id."""
    found = [find_splits(p, config) for p in ([path] if isinstance(path, str) else path)]
    return None if None in found else list(dict.fromkeys(s for splits in found for s in splits or ()))


def find_splits(path: str, config: str | None) -> dict[str, list[Path]] | None:
    """Split to its files. A file that is named itself is its own split's, and "train" whatever its name says."""
    try:
        place = Path(path).expanduser()
        if place.is_file():
            if not has_data_suffix(place.name):
                raise refuse_suffix(place)
            return {"train": [place]} | {s: [place] for s in KEYWORDS if split_files([place.name], "", None, s)}
        if place.is_dir():
            return find_splits_of_folder(place, config)
        if glob.has_magic(path):
            return find_splits_of_glob(str(place))
        parent, named = Path(path).parent, has_data_suffix(path)
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not named and not parent.exists():
            if parent.name.lower() not in FOLDER_NAMES:
                return None
            looked = f"there is no data file or folder {path}: looked for in {Path.cwd()}, where there is no {parent}"
            raise refuse_path(looked, "check the path; it is taken from where you stand. A Hub id is OWNER/NAME")
    except (OSError, RuntimeError, ValueError) as error:  # no home, a name that is too long, a folder that is closed
        raise refuse_path(f"{path} cannot be looked at: {first_line(error)}", "check the path") from None
    here = f" (no Hub id either: the folder {parent} is here)" if path.count("/") == 1 and parent.is_dir() else ""
    raise refuse_path(f"there is no data file {path}{here}", "check the path; it is taken from where you stand")


def find_splits_of_folder(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """The splits that `datasets` finds: saved by save_to_disk, listed in README.md, or said by the files' names."""
    if (folder / "dataset_dict.json").is_file():
        return {s: find_saved_files(folder / s) for s in read_json(folder / "dataset_dict.json").get("splits", [])}
    if read_json_or_empty(folder / "state.json").get("_data_files"):
        return {"train": find_saved_files(folder)}
    card = read_card(folder)
    listed = choose_configuration(card, config)
    names = list_data_files(folder, everywhere=listed is not None)
    if not names:
        raise refuse_path(f"the folder {folder} holds no data file", f"put {' '.join(SUFFIXES)} in it")
    entries = listed["data_files"] if listed else []
    entries = entries if isinstance(entries, list) else [entries]
    splits = [e["split"] for e in entries if isinstance(e, dict) and "split" in e] or list(KEYWORDS)
    found = {s: [folder / n for n in split_files(names, card, config, s)] for s in dict.fromkeys(["train", *splits])}
    found = {s: files for s, files in found.items() if files}
    if not found:
        raise refuse_path(f"{folder / CARD} lists files that are not there", "mend its configs, or name the files")
    return found


def find_splits_of_glob(pattern: str) -> dict[str, list[Path]]:
    """The splits among a glob's files; a pattern that says a split's name itself has chosen: all is "train"."""
    parts = Path(pattern).parts
    base = Path(*parts[: next(i for i, p in enumerate(parts) if glob.has_magic(p))])
    matches = [Path(m) for m in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(m)]
    names = [n for n in (m.relative_to(base).as_posix() for m in matches) if is_data_file(n)]
    if not names:
        raise refuse_path(f"{pattern} matches no data file", "check the pattern; it is taken from where you stand")
    found = {s: [base / n for n in split_files(names, "", None, s)] for s in KEYWORDS}
    chosen = split_words(re.sub(r"[][*?!]", " ", pattern.removeprefix(str(base)))) & SPLIT_WORDS
    return {"train": [base / n for n in names]} if chosen else {s: files for s, files in found.items() if files}


def find_saved_files(folder: Path) -> list[Path]:
    """The files of a data set that `save_to_disk` wrote, in their order; KitError where one is missing."""
    listed = read_json(folder / "state.json").get("_data_files") or []
    files = [folder / str(f.get("filename")) for f in listed if isinstance(f, dict)]
    missing = next((f for f in files if not f.is_file()), None)
    if missing:
        raise refuse_path(f"{folder} is not whole: {missing.name} is missing", "save the data set again")
    return files


def list_data_files(folder: Path, everywhere: bool) -> list[str]:
    """The names of the data files below a folder, sorted. Nested folders are looked into `everywhere`, where there
    is none at the top, and where they are named after a split."""
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=raise_error, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        base = Path(place).relative_to(folder)
        found += [n for n in ((base / name).as_posix() for name in names) if is_data_file(n)]
        if place == str(folder) and found and not everywhere:
            folders[:] = [f for f in folders if split_words(f) & SPLIT_WORDS]
        folders[:] = [f for f in folders if not NO_ROWS.fullmatch(f)]
    return sorted(found)


def raise_error(error: OSError) -> None:
    raise error  # a folder that may not be read is no empty one


def refuse_path(problem: str, fix: str) -> KitError:
    return KitError(problem, "dataset.path", fix, rule="dataset-files")


def refuse_suffix(file: Path) -> KitError:
    known = f"one of {' '.join(SUFFIXES)}, each also with {' '.join(PACKINGS)}"
    return refuse_path(f"{file} has a suffix that is not known", f"use {known}; unpack archives")
