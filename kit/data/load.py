"""From the dataset section of a plan to what TRL trains on: rows with `messages`, `prompt`+`completion` or `text`."""

from __future__ import annotations

import re
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from kit.data.files import SUFFIXES, find_data_files, split_suffixes
from kit.errors import KitError, first_line
from kit.inspection import dataset_template, hub_dataset
from kit.inspection.dataset import FORMATS, detect_format
from kit.schema.run_plan import Dataset, RunPlan
from kit.storage import hub_cache
from kit.storage.run_directory import PLAN

MAX_STREAMED_ROWS = 10_000


class Splits(NamedTuple):
    """datasets.Dataset or IterableDataset each; `validation` is evaluated while training, `test` after it.

    Without a validation part of its own they are the same rows; both are None where nothing is held out.
    """

    train: Any
    validation: Any
    test: Any
    notes: list[str]


def load_datasets(plan: Any) -> Splits:
    """The parts of the plan's data set, in the columns that training needs; KitError where one cannot be had."""
    d: Dataset = plan.dataset
    train = load_split(d, d.path, d.split)
    validation = test = None
    if d.eval_path or d.eval_split:
        validation = test = load_split(d, d.eval_path or d.path, d.split if d.eval_path else d.eval_split)
    elif d.test_size:
        train, validation, test = split_rows(d, train)
    notes: list[str] = []
    same = test is validation
    train = prepare_rows(d, train, d.limit, "dataset.path", notes)
    validation = prepare_rows(d, validation, d.eval_limit, "dataset.eval_path", notes)
    test = validation if same else prepare_rows(d, test, d.eval_limit, "dataset.test_size", notes)
    return Splits(train, validation, test, notes)


def load_run_datasets(plan: dict[str, Any]) -> tuple[Any, Any]:
    """(train, test) of a run's plan as the training saw them before tokenizing; the second may be None.

    Of a stream the first STREAMED rows stand for all.
    """
    try:
        checked = RunPlan.model_validate(plan)
    except ValueError as error:
        raise KitError(f"{PLAN} is not a plan: {first_line(error)}", where=PLAN) from None
    parts = load_datasets(checked)
    if checked.dataset.streaming:
        return tuple(p and list(islice(p, MAX_STREAMED_ROWS)) for p in (parts.train, parts.test))  # type: ignore[return-value]
    return parts.train, parts.test


def split_rows(d: Dataset, rows: Any) -> tuple[Any, Any, Any]:
    """(train, validation, test). Both parts are held out together and then parted, with one seed.

    0.1 and 0.1 are what `train_test_split(test_size=0.2, seed)` and `train_test_split(test_size=0.5, seed)` of its
    "test" make, row for row.
    """
    if d.streaming:
        raise KitError("a stream cannot be split", "dataset.test_size", "dataset.eval_path=FILE")
    assert d.test_size is not None
    held_out = d.test_size + (d.validation_size or 0)
    if held_out >= 1 and held_out >= len(rows):
        raise KitError(f"{held_out} held out of {len(rows)} rows leave none to train on", "dataset.test_size", "0.1")
    try:
        parts = rows.train_test_split(test_size=held_out, seed=d.seed)
        if d.validation_size is None:
            return parts["train"], parts["test"], parts["test"]
        share = d.test_size / held_out if held_out < 1 else int(d.test_size)
        rest = parts["test"].train_test_split(test_size=share, seed=d.seed)
    except ValueError as error:  # a share of too few rows
        problem = f"{len(rows)} rows cannot be split: {first_line(error)}"
        raise KitError(problem, "dataset.test_size") from error
    return parts["train"], rest["train"], rest["test"]


def prepare_rows(d: Dataset, rows: Any, limit: int | None, key: str, notes: list[str]) -> Any:
    """Templates written out, rows with nothing to learn left out and counted, the limit applied."""
    if rows is None:
        return None
    if d.template:
        before = None if d.streaming else len(rows)
        rows = rows.filter(partial(dataset_template.has_trained_text, template=d.template))
        if before is not None and len(rows) < before:
            notes.append(f"{before - len(rows)} of {before} rows of {key} have an empty answer: left out")
        apart = d.format == "prompt_completion" and "assistant" in d.template
        write = partial(dataset_template.render_row, template=d.template, apart=apart)
        rows = rows.map(write, remove_columns=dataset_template.template_columns(d.template))
    if limit:
        rows = rows.take(limit) if d.streaming else rows.select(range(min(limit, len(rows))))
    if not d.streaming and len(rows) == 0:
        raise KitError("the data set holds no rows", key, "give a file with at least one row")
    return rows


def load_split(d: Dataset, path: str, split: str | None) -> Any:
    """One split of a file, folder or Hub id, with only the columns that training needs."""
    from datasets import load_dataset

    files = find_data_files(path, split or "train", d.name)
    place, name, revision = locate_hub_dataset(d, path) if files is None else (path, None, None)
    try:
        if files is None:
            rows = load_dataset(place, name, revision=revision, split=split, streaming=d.streaming)
        else:
            suffix = split_suffixes(files[0].name)[0]
            kind, options = SUFFIXES[suffix], {"delimiter": "\t"} if suffix == ".tsv" else {}
            rows = load_dataset(
                kind, data_files=[str(f) for f in files], split="train", streaming=d.streaming, **options
            )
    except Exception as error:  # datasets raises many kinds; every one of them means unreadable data
        raise KitError(f"{path} cannot be read: {first_line(error.__cause__ or error)}", "dataset.path") from error
    columns = list(rows.column_names or next(iter(rows)).keys())
    row_format = detect_format(columns, d)
    if d.template:
        return rows.select_columns(dataset_template.template_columns(d.template))
    rename = {column: name for name, column in d.columns.items() if column != name}
    clash = [name for name in rename.values() if name in columns and name not in rename]
    if clash:
        rows = rows.remove_columns(clash)
    if rename:
        rows = rows.rename_columns(rename)
    return rows.select_columns(list(FORMATS[row_format]))


def locate_hub_dataset(d: Dataset, path: str) -> tuple[str, str | None, str | None]:
    """What to load for a Hub id: its snapshot in the Hub cache, or the id; with its configuration and revision.

    The snapshot is taken where it cannot have been overtaken: offline, and at a commit hash. `datasets` reads the Hub
    online only, or its own cache. Configuration and revision belong to `dataset.path`, not to another `eval_path`.
    """
    name, revision = (d.name, d.revision) if path == d.path else (None, None)
    pinned = re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None
    if (hub_cache.is_offline() or pinned) and (folder := hub_dataset.find_dataset_snapshot(path, name, revision)):
        return str(folder), name, None
    return path, name, revision
