"""Which files of a data set's Hub repository make its configurations and splits, by the rules of `datasets`.

A repository says it in the YAML head of its README.md (`configs:`), or names its files after the splits:
https://huggingface.co/docs/datasets/repository_structure
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from kit.errors import KitError
from kit.schema.run_plan import DataSource
from kit.storage import hub_cache

CARD = "README.md"
SUFFIXES = {  # of a file that holds rows, and the builder of `datasets` for it
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
PACKINGS = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # each may stand behind a suffix
NO_ROWS = re.compile(  # what lies beside data in a folder
    r"(readme|licen[cs]e|notice|changelog|citation|requirements|stats|metadata|package|schema)\.(txt|json)"
    r"|cache-.*\.arrow|__MACOSX|\..*", re.I)  # fmt: skip
NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
KEYWORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def split_suffixes(name: str) -> tuple[str, str]:
    """The suffix that says the kind, and that of the packing or "": (".jsonl", ".gz")."""
    path = Path(name.lower())
    return (Path(path.stem).suffix, path.suffix) if path.suffix in PACKINGS else (path.suffix, "")


def has_data_suffix(name: str) -> bool:
    return split_suffixes(name)[0] in SUFFIXES


def is_data_file(name: str) -> bool:
    """Whether a file, named below its folder or repository, holds rows; scripts never do: none is run."""
    path = Path(name)
    return has_data_suffix(name) and path.name not in NO_DATA and not any(map(NO_ROWS.fullmatch, path.parts))


def list_configurations(card: str) -> dict[str, dict[str, Any]]:
    """Name to entry of every configuration that a README.md lists; empty where it lists none with files."""
    head = re.match(r"---\s*\n(.*?)\n---", card, re.S)
    try:
        listed = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
        return {str(c["config_name"]): c for c in listed or [] if c.get("data_files")}
    except (yaml.YAMLError, AttributeError, TypeError, KeyError):
        return {}


def choose_configuration(card: str, name: str | None) -> dict[str, Any] | None:
    """The entry of configuration `name`, or of the default one; None where the README.md lists none. KitError
    where there are several and none is chosen, or `name` is not among them."""
    listed = list_configurations(card)
    if not listed:
        return None
    if name is None and len(listed) > 1:
        defaults = [c for n, c in listed.items() if n == "default" or c.get("default")]
        if defaults:
            return defaults[0]
    if (name or next(iter(listed))) not in listed or (name is None and len(listed) > 1):
        problem = f"the data set has no configuration {name}" if name else "the data set has several configurations"
        raise KitError(problem, "dataset.name", f"one of {', '.join(listed)}", rule="dataset-configuration")
    return listed[name or next(iter(listed))]


def configuration_files(names: list[str], card: str, config: str | None) -> list[str]:
    """The repository's files (`names`) that hold the rows of a configuration, of all its splits."""
    data = [n for n in names if is_data_file(n) or n.lower().endswith(".zip")]
    entry = choose_configuration(card, config)
    return data if entry is None else [n for n in data if matches_any(n, glob_patterns(entry, None))]


def split_files(names: list[str], card: str, config: str | None, split: str) -> list[str]:
    """Those of one split; empty where the names do not say it."""
    data = configuration_files(names, card, config)
    split = re.split(r"[\[+]", split)[0]  # "train[:10%]+test": the first part stands for all
    if entry := choose_configuration(card, config):
        return [n for n in data if matches_any(n, glob_patterns(entry, split))]
    known = {split}.union(*KEYWORDS.values())
    words = {n: (split_words(os.path.dirname(n)) & known) or (split_words(os.path.basename(n)) & known) for n in data}
    if any(words.values()):  # what a folder is called is heard before what the file is called
        return [n for n in data if words[n] & KEYWORDS.get(split, {split})]
    return data if split == "train" else []


def split_words(name: str) -> set[str]:
    return set(re.split(r"[-._ 0-9/]+", name.lower()))


def glob_patterns(entry: dict[str, Any], split: str | None) -> list[str]:
    """The glob patterns of a configuration's entry, of one split or of all."""
    files = entry["data_files"]
    paths: list[Any] = []
    for item in files if isinstance(files, list) else [files]:
        place, of = (item.get("path"), item.get("split")) if isinstance(item, dict) else (item, "train")
        if split in (None, of):
            paths += place if isinstance(place, list) else [place]
    folder = entry.get("data_dir")
    return [f"{folder}/{p}" if folder else str(p) for p in paths]


def matches_any(name: str, globs: list[str]) -> bool:
    try:
        return any(re.fullmatch(glob_to_regex(g.removeprefix("./")), name) for g in globs)
    except re.error:  # a bracket that is no set of characters
        return False


def glob_to_regex(glob: str) -> str:
    """A glob in which `**` crosses folders and `*` does not, as a regular expression."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(p) or (p if p[:1] == "[" else re.escape(p)) for p in re.split(
        r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob))  # fmt: skip


def find_dataset_snapshot(repo: str, config: str | None, revision: str | None) -> Path | None:
    """The cached snapshot of a data set that holds a configuration whole; None where it does not, or none can know.

    `datasets` itself leaves snapshots with a part of the files: training on those in silence would be wrong.
    """
    folder = hub_cache.find_snapshot(repo, hub_cache.DATASET, revision)
    names = hub_cache.cached_file_list(folder) if folder else None
    if folder is None or not names or (CARD in names and not (folder / CARD).is_file()):
        return None
    files = configuration_files(names, read_card(folder), config)
    return folder if files and all((folder / n).is_file() for n in files) else None


def snapshot_split_files(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split in a cached snapshot; empty where their names do not say it."""
    names = hub_cache.cached_file_list(folder) or []
    return [folder / name for name in split_files(names, read_card(folder), config, split)]


def read_card(folder: Path) -> str:
    file = folder / CARD
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def is_prepared(repo: str) -> bool:
    """Whether `datasets` has this data set in its own cache from an earlier load: it takes that one offline."""
    home = os.environ.get("HF_HOME") or str(hub_cache.hub_cache_folder().parent)
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")).expanduser()
    owner, _, name = repo.rpartition("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).lower()
    return any((folder / (f"{owner}___{snake}" if owner else snake)).glob("*/*/*"))


def find_hub_files(d: DataSource, repo: str, revision: str | None, here: bool) -> list[Path] | None:
    """The files of a Hub data set's split that is in the cache, None where it is not or its names do not say them.

    KitError where the run starts `here`, the environment forbids to ask the Hub, and the data set is not here.
    """
    config = d.name if repo == d.path else None
    folder = find_dataset_snapshot(repo, config, revision)
    if folder is None:
        if here and hub_cache.is_offline() and not is_prepared(repo):
            key = "dataset.path" if repo == d.path else "dataset.eval_path"
            cache = hub_cache.hub_cache_folder()
            problem = f"the data set {repo} is not, or not whole, in {cache}, and HF_HUB_OFFLINE is set"
            raise KitError(problem, key, hub_cache.fetch_command("dataset.path", repo, revision), rule="offline")
        return None
    files = snapshot_split_files(folder, config, d.split)
    return [file for file in files if file.suffix.lower() != ".zip"] or None
