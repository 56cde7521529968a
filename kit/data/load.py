"""From the dataset section of a plan to what TRL trains on: rows with `messages`, `prompt`+`completion` or `text`."""

from __future__ import annotations

import re
from typing import Any

from kit import hub
from kit.config import hub_dataset
from kit.config.dataset import FORMATS, SUFFIXES, detect_format, find_files
from kit.config.schema import Dataset
from kit.errors import KitError


def load_datasets(plan: Any) -> tuple[Any, Any]:
    """The training rows and the held-out rows (None without any) as datasets.Dataset or IterableDataset."""
    d: Dataset = plan.dataset
    train = read(d, d.path, d.split)
    held_out = None
    if d.eval_path or d.eval_split:
        held_out = read(d, d.eval_path or d.path, d.split if d.eval_path else d.eval_split)
    elif d.test_size:
        if d.streaming:
            raise KitError("a stream cannot be split", "dataset.test_size", "dataset.eval_path=FILE")
        if isinstance(d.test_size, int) and d.test_size >= len(train):
            raise KitError(f"test_size {d.test_size} leaves no rows to train on", "dataset.test_size", "0.1")
        parts = train.train_test_split(test_size=d.test_size, seed=d.seed)
        train, held_out = parts["train"], parts["test"]
    if d.limit:
        train = train.take(d.limit) if d.streaming else train.select(range(min(d.limit, len(train))))
    if d.eval_limit and held_out is not None:
        held_out = (
            held_out.take(d.eval_limit) if d.streaming else held_out.select(range(min(d.eval_limit, len(held_out))))
        )
    for name, rows in (("dataset.path", train), ("dataset.eval_path", held_out)):
        if rows is not None and not d.streaming and len(rows) == 0:
            raise KitError("the data set holds no rows", name, "give a file with at least one row")
    return train, held_out


def read(d: Dataset, path: str, split: str | None) -> Any:
    """One split of a file, folder or Hub id, with only the columns that training needs."""
    from datasets import load_dataset

    files = find_files(path)
    place, name, revision = hub_place(d, path) if files is None else (path, None, None)
    try:
        if files is None:
            rows = load_dataset(place, name, revision=revision, split=split, streaming=d.streaming)
        else:
            kind = SUFFIXES[files[0].suffix.lower()]
            options = {"delimiter": "\t"} if files[0].suffix.lower() == ".tsv" else {}
            rows = load_dataset(
                kind, data_files=[str(f) for f in files], split="train", streaming=d.streaming, **options
            )
    except Exception as error:  # datasets raises many kinds; every one of them means unreadable data
        reason = str(error.__cause__ or error).strip().splitlines()
        raise KitError(
            f"{path} cannot be read: {reason[0] if reason else type(error).__name__}", "dataset.path"
        ) from error
    columns = list(rows.column_names or next(iter(rows)).keys())
    kept = FORMATS[detect_format(columns, d.columns, d.format)]
    rename = {theirs: ours for ours, theirs in d.columns.items() if theirs != ours}
    clash = [ours for theirs, ours in rename.items() if ours in columns and ours not in rename]
    if clash:
        rows = rows.remove_columns(clash)
    if rename:
        rows = rows.rename_columns(rename)
    return rows.select_columns([c for c in kept])


def hub_place(d: Dataset, path: str) -> tuple[str, str | None, str | None]:
    """What to load for a Hub id: its snapshot in the Hub cache, or the id; with its configuration and revision.

    The snapshot is taken where it cannot have been overtaken: offline, and at a commit hash. `datasets` reads the Hub
    online only, or its own cache. Configuration and revision belong to `dataset.path`, not to another `eval_path`.
    """
    name, revision = (d.name, d.revision) if path == d.path else (None, None)
    pinned = re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None
    if (hub.offline() or pinned) and (folder := hub_dataset.find_snapshot(path, name, revision)):
        return str(folder), name, None
    return path, name, revision
