"""From the dataset section of a plan to its raw rows: read, mixed, split, each with where it stands."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kit.errors import KitError, first_line
from kit.inspection import hub_dataset, row_template
from kit.inspection.data_files import find_data_files
from kit.rows.files import RawRow, read_rows
from kit.rows.formats import CanonicalRow, convert_row, detect_format
from kit.rows.turns import RowProblem, kind
from kit.schema.run_plan import Dataset, DataSource, RunPlan
from kit.storage import hub_cache
from kit.storage.run_directory import PLAN
from kit.system.terminal import show_progress

SAMPLED_ROWS = 200  # looked at to tell a format
MAX_STREAMED_ROWS = 10_000  # of a stream, where only some rows are wanted
BATCH = 1000
COLUMNS = ("source", "file", "number", "offset", "row", "problem", "hash")


@dataclass
class RawRows:
    """Rows as they stand in their files: a Dataset (or IterableDataset) with COLUMNS.

    `row` is JSON text, so that each row keeps its own keys and types wherever in a file it stands; `problem` says why
    a row could not be read. `source` counts `sources`, whose format is resolved; `hash` is the same for equal rows.
    """

    rows: Any
    sources: list[DataSource]
    folder: Any = None  # a TemporaryDirectory that goes with them

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CanonicalRow:
        """A row in the form that training reads; RowProblem where it cannot be had."""
        return canonical_row(self.rows[index], self.sources)


@dataclass
class Splits:
    """`validation` is evaluated while training, `test` after it.

    Without a validation part of its own they are the same object; both are None where nothing is held out."""

    train: RawRows
    validation: RawRows | None
    test: RawRows | None
    notes: list[str]

    def by_name(self) -> dict[str, RawRows]:
        """The parts that there are, each once."""
        parts = {"train": self.train, "validation": self.validation}
        if self.test is not self.validation:
            parts["test"] = self.test
        return {name: rows for name, rows in parts.items() if rows is not None}


def canonical_row(record: dict[str, Any], sources: Sequence[DataSource]) -> CanonicalRow:
    """One raw row in the form that training reads; RowProblem where it cannot be had."""
    if record["problem"]:
        raise RowProblem(record["problem"])
    source = sources[record["source"]]
    return convert_row(json.loads(record["row"]), source.format, source)


@dataclass(frozen=True)
class OpenSource:
    """One data set, found and its format known, before its rows are read."""

    source: DataSource  # with its format resolved
    key: str  # the dotted key that names it
    read: Callable[[Sequence[Any]], Iterator[RawRow]]
    shards: Sequence[Any]
    files: Sequence[Path]  # what its rows depend on


def open_sources(d: Dataset) -> tuple[list[OpenSource], OpenSource | None]:
    """The training sets of a run, and the held-out one where it is named by itself; KitError where one is missing."""
    training = [open_source(source, key, d.streaming) for source, key in training_sources(d)]
    if not (d.eval_path or d.eval_split):
        return training, None
    # Name and revision belong to dataset.path; its format, columns and template to both.
    update = {"path": d.eval_path, "name": None, "revision": None} if d.eval_path else {"split": d.eval_split}
    update |= {"limit": None, "format": d.format if not d.mix else "auto"}
    source = DataSource(**{k: v for k, v in d.model_dump().items() if k in DataSource.model_fields} | update)
    return training, open_source(source, "dataset.eval_path" if d.eval_path else "dataset.eval_split", d.streaming)


def open_all(d: Dataset) -> list[OpenSource]:
    """All sets that a run reads, the held-out one last."""
    training, held_out = open_sources(d)
    return [*training, held_out] if held_out else training


def training_sources(d: Dataset) -> list[tuple[DataSource, str]]:
    """Each training set and the dotted key that names it."""
    if d.mix:
        return [(source, f"dataset.mix.{n}.path") for n, source in enumerate(d.mix)]
    # The limit is of what is trained on: reading may stop there only where nothing is parted or left out before.
    parted = d.test_size and not (d.eval_path or d.eval_split)
    return [(d.model_copy(update={"limit": None}) if parted or d.template else d, "dataset.path")]


def read_splits(d: Dataset, training: Sequence[OpenSource], held_out: OpenSource | None, folder: Path) -> Splits:
    """Read, mix and split a run's data; KitError where a part cannot be had.

    folder: where the rows are kept on disk while they are used; not needed for a stream.
    """
    notes: list[str] = []
    if d.mix and (d.test_size or 0) >= 1:
        problem = "a number of rows cannot be held out of several data sets"
        raise KitError(problem, "dataset.test_size", "give a share, 0.1")
    sources = [opened.source for opened in training]
    train = [read_source(opened, folder / str(n), n, d.streaming) for n, opened in enumerate(training)]
    held: list[tuple[Any, Any]] = []
    if held_out is None and d.test_size:
        split = [split_rows(d, rows) for rows in train]
        train = [part[0] for part in split]
        held = [part[1:] for part in split]
    mixed = RawRows(take_answered(mix_rows(d, train), d.limit, sources), sources)
    validation = test = None
    if held:
        validation = test = RawRows(take_answered(concatenate([v for v, _ in held]), d.eval_limit, sources), sources)
        if d.validation_size is not None:
            test = RawRows(take_answered(concatenate([t for _, t in held]), d.eval_limit, sources), sources)
    elif held_out is not None:
        rows = read_source(held_out, folder / "eval", 0, d.streaming)
        validation = test = RawRows(take_answered(rows, d.eval_limit, [held_out.source]), [held_out.source])
    if not d.streaming:
        for key, part in (("dataset.path", mixed), ("dataset.eval_path", validation), ("dataset.test_size", test)):
            if part is not None and len(part) == 0:
                raise KitError("the data set holds no rows", key, "give a file with at least one row")
        if held:
            validation, test = _apart_from(mixed, validation, test, notes)
    return Splits(mixed, validation, test, notes)


def _apart_from(train: RawRows, validation: Any, test: Any, notes: list[str]) -> tuple[Any, Any]:
    """The held-out parts without rows that are also trained on: a duplicate stays on one side."""
    import numpy

    seen = numpy.unique(train.rows.with_format("numpy")["hash"][:])
    kept = []
    for part in [validation] if test is validation else [validation, test]:
        apart = numpy.flatnonzero(~numpy.isin(part.rows.with_format("numpy")["hash"][:], seen))
        if len(apart) < len(part):
            notes.append(f"{len(part) - len(apart)} held-out rows are also among the training rows: left out")
            if not len(apart):
                problem = "every held-out row is also among the training rows"
                raise KitError(problem, "dataset.test_size", "dataset.eval_path=FILE with rows of its own")
            part = replace(part, rows=part.rows.select(apart))
        kept.append(part)
    return kept[0], kept[-1]


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
        parts = rows.train_test_split(test_size=held_out, seed=d.seed, load_from_cache_file=False)
        if d.validation_size is None:
            return parts["train"], parts["test"], parts["test"]
        share = d.test_size / held_out if held_out < 1 else int(d.test_size)
        rest = parts["test"].train_test_split(test_size=share, seed=d.seed, load_from_cache_file=False)
    except ValueError as error:  # a share of too few rows
        problem = f"{len(rows)} rows cannot be split: {first_line(error)}"
        raise KitError(problem, "dataset.test_size", "a smaller dataset.test_size, or more rows") from error
    return parts["train"], rest["train"], rest["test"]


def mix_rows(d: Dataset, parts: list[Any]) -> Any:
    """The training rows of all sets: one behind the other, or drawn by their weights.

    KitError where only some of the sets have a weight.
    """
    from datasets import interleave_datasets

    weights = [source.weight for source in d.mix]
    if len(parts) == 1 or not any(weights):
        return concatenate(parts)
    if not all(weights):
        raise KitError("some of the data sets have a weight and some have none", "dataset.mix", "give each a weight")
    total = sum(w for w in weights if w)
    return interleave_datasets(
        parts, [w / total for w in weights if w], seed=d.seed, stopping_strategy=d.mix_until
    )  # fmt: skip


def concatenate(parts: list[Any]) -> Any:
    from datasets import concatenate_datasets

    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def take_answered(rows: Any, limit: int | None, sources: Sequence[DataSource]) -> Any:
    """The first rows up to a limit, which does not count those whose template would write an empty answer."""
    if limit is not None and any(source.template for source in sources):
        rows = rows.filter(partial(_is_answered, sources=sources))
    return take(rows, limit)


def _is_answered(record: dict[str, Any], sources: Sequence[DataSource]) -> bool:
    template = sources[record["source"]].template
    return not (template and record["row"]) or row_template.has_trained_text(json.loads(record["row"]), template)


def take(rows: Any, limit: int | None) -> Any:
    if limit is None:
        return rows
    return rows.select(range(min(limit, len(rows)))) if hasattr(rows, "select") else rows.take(limit)


# ---- one data set ----


def open_source(source: DataSource, key: str, streaming: bool) -> OpenSource:
    """Find the files of a data set and tell its format from the first rows; problems name `key`."""
    assert source.path is not None
    base, part = split_expression(source.split)
    if part and streaming:
        raise KitError("a part of a split cannot be streamed", "dataset.split", f"dataset.split={base}")
    try:
        read, shards, files = find_rows(source, source.path, base, streaming)
        first = list(islice(read(shards), SAMPLED_ROWS))
        sample = [r.row for r in first if r.row is not None]
        if not sample:
            raise _refuse_unreadable(first, files)
        form = detect_format(sample, source)
    except KitError as error:
        moved = [replace(p, where=key) if p.where == "dataset.path" else p for p in error.problems]
        raise KitError(moved, code=error.code) from error
    return OpenSource(source.model_copy(update={"format": form}), key, read, shards, files)


def _refuse_unreadable(first: Sequence[RawRow], files: Sequence[Path]) -> KitError:
    named = f"{files[0]} and what follows" if len(files) > 1 else f"{files[0]}" if files else "the data set"
    problem, fix = f"{named} holds no rows", "give a file with at least one row"
    if first:
        problem = f"none of the first {len(first)} rows can be read; {first[0].file} row 1: {first[0].problem}"
        fix = "check that it is what its name says"
    return KitError(problem, "dataset.path", fix, rule="dataset-rows")


def read_source(opened: OpenSource, folder: Path, number: int, streaming: bool) -> Any:
    """The rows of one data set with COLUMNS, its limit applied."""
    from datasets import Dataset as Rows
    from datasets import Features, IterableDataset, Value

    records = partial(_records, read=opened.read, number=number)
    if streaming:
        types = dict.fromkeys(COLUMNS, "int64") | {"row": "large_string", "problem": "string", "file": "string"}
        features = Features({name: Value(kind) for name, kind in types.items()})
        rows: Any = IterableDataset.from_generator(records, features, gen_kwargs={"shards": list(opened.shards)})
        return take(rows, opened.source.limit)
    rows = Rows.from_file(str(write_records(records(shards=opened.shards), folder)))
    base, part = split_expression(opened.source.split)
    if part:
        rows = rows.select(range(*slice_bounds(base, part, len(rows))))
    return take(rows, opened.source.limit)


def split_expression(split: str) -> tuple[str, str]:
    """ "train[:10%]" as ("train", "[:10%]"): the second may be empty."""
    base, bracket, rest = split.partition("[")
    return base, bracket + rest


def slice_bounds(base: str, part: str, count: int) -> tuple[int, int]:
    """First row and the one behind the last of a slice such as "[10%:20%]" or "[:500]"."""
    from datasets import ReadInstruction

    try:
        (absolute,) = ReadInstruction.from_spec(base + part).to_absolute({base: count})
    except (ValueError, AssertionError) as error:
        raise KitError(f"{base}{part}: {first_line(error)}", "dataset.split", "train[:10%] or train[:500]") from error
    return absolute.from_ or 0, count if absolute.to is None else absolute.to


def find_rows(source: DataSource, path: str | list[str], split: str, streaming: bool) -> tuple[Any, list[Any], Any]:
    """(function that reads rows from a list of shards, the shards, the files that the rows depend on).

    A snapshot in the Hub cache is read as its files. `datasets` reads streams of the Hub, and its own cache.
    """
    files = find_data_files(path, split, source.name)
    if files is None:
        assert isinstance(path, str)
        files = find_snapshot_files(source, path, split, streaming)
    if files is not None:
        return read_rows, list(files), files
    from datasets import load_dataset

    assert isinstance(path, str)
    try:
        rows = load_dataset(path, source.name, revision=source.revision, split=split, streaming=streaming)
    except Exception as error:  # datasets raises many kinds; every one of them means unreadable data
        problem = f"{path} cannot be read: {first_line(error.__cause__ or error)}"
        raise KitError(
            problem, "dataset.path", "check the id; kit fetch brings it where there is a network"
        ) from error
    files = [] if streaming else [Path(file["filename"]) for file in rows.cache_files]
    return _read_loaded, [(path, rows)], files


def _read_loaded(shards: Sequence[tuple[str, Iterable[dict[str, Any]]]]) -> Iterator[RawRow]:
    for path, rows in shards:
        for number, row in enumerate(rows, 1):
            yield RawRow(path, number, None, row, None)


def find_snapshot_files(source: DataSource, repo: str, split: str, streaming: bool) -> list[Path] | None:
    """The files of a split of a Hub data set, fetched where they are not here; None where `datasets` must read it.

    A snapshot is taken where it cannot have been overtaken: offline, and at a commit hash.
    """
    pinned = re.fullmatch(r"[0-9a-f]{40}", source.revision or "") is not None
    if hub_cache.is_offline() or pinned:
        folder = hub_dataset.find_dataset_snapshot(repo, source.name, source.revision)
        if folder:
            return hub_dataset.snapshot_split_files(folder, source.name, split) or None
    if hub_cache.is_offline() or streaming:
        return None
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    common: dict[str, Any] = {"repo_type": "dataset", "revision": source.revision}
    try:
        names = HfApi().list_repo_files(repo, **common)
        card = ""
        if hub_dataset.CARD in names:
            card = hub_dataset.read_card(Path(hf_hub_download(repo, hub_dataset.CARD, **common)).parent)
        wanted = [n for n in hub_dataset.split_files(names, card, source.name, split) if hub_dataset.is_data_file(n)]
        if not wanted:
            return None
        folder = Path(snapshot_download(repo, allow_patterns=[*wanted, hub_dataset.CARD], **common))
    except (HfHubHTTPError, OSError):
        return None  # `datasets` asks again, and its message is for people
    return [folder / name for name in wanted]


def _records(shards: Sequence[Any], read: Any, number: int) -> Iterator[dict[str, Any]]:
    """Each row as a record with COLUMNS; a shard is a file, so that a stream can be read by several processes."""
    return (make_record(raw, number) for raw in read(shards))


def make_record(raw: RawRow, number: int) -> dict[str, Any]:
    """A raw row with COLUMNS; `number`: that of its source."""
    text = "" if raw.row is None else json.dumps(raw.row, ensure_ascii=False, default=str)
    try:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    except UnicodeEncodeError:  # half of a surrogate pair: Arrow takes it only as an escape
        text = json.dumps(raw.row, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return {
        "source": number,
        "file": raw.file,
        "number": raw.number,
        "offset": -1 if raw.offset is None else raw.offset,
        "row": text,
        "problem": raw.problem or "",
        "hash": int.from_bytes(digest, "little", signed=True),
    }


def write_records(records: Iterator[dict[str, Any]], folder: Path) -> Path:
    """Write records to an Arrow file in `folder`, some at a time, so that memory does not grow with the data."""
    import pyarrow

    types = {"row": pyarrow.large_string(), "file": pyarrow.string(), "problem": pyarrow.string()}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.int64())) for name in COLUMNS])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.arrow"
    batches = 0
    with (
        show_progress("reading", "rows", None, lambda: batches * BATCH),
        pyarrow.OSFile(str(file), "wb") as sink,
        pyarrow.ipc.new_stream(sink, schema) as writer,
    ):
        while batch := list(islice(records, BATCH)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
            batches += 1
    return file


# ---- what evaluation reads ----


def load_run_datasets(plan: dict[str, Any]) -> tuple[RawRows, RawRows | None]:
    """(train, test) rows of a run's plan; of a stream its first rows stand for all. KitError where they are gone."""
    try:
        d = RunPlan.model_validate(plan).dataset
    except ValueError as error:
        raise KitError(f"{PLAN} is not a plan: {first_line(error)}", PLAN, "compose it again: kit check") from None
    d = first_of_stream(d) if d.streaming else d
    folder = tempfile.TemporaryDirectory(prefix="kit-rows-")
    splits = read_splits(d, *open_sources(d), Path(folder.name))
    train = replace(splits.train, folder=folder)
    return train, splits.test and replace(splits.test, folder=folder)


def first_of_stream(d: Dataset) -> Dataset:
    """The first rows of a stream as a data set of its own."""
    limit = min(d.limit or MAX_STREAMED_ROWS, MAX_STREAMED_ROWS)
    return d.model_copy(update={"streaming": False, "limit": limit})


def load_rows(data: str | Path | Sequence[dict[str, Any]], place: str) -> list[CanonicalRow | RowProblem]:
    """Rows of a file, or rows given, in the form that training reads; what is wrong with a row in its stead.

    KitError where there are none, where a row cannot be read, or where they are of no known format.
    """
    if isinstance(data, str | Path):
        files = find_data_files(str(data))
        if files is None:
            raise KitError(f"there is no data file {data}", place, "check the path")
        raw = list(read_rows(files))
    else:
        told = [None if isinstance(row, dict) else f"{kind(row)}, not an object" for row in data]
        raw = [
            RawRow(place, n, None, row, problem) for n, (row, problem) in enumerate(zip(data, told, strict=True), 1)
        ]
    if unread := next((r for r in raw if r.problem), None):
        raise KitError(f"{unread.file} row {unread.number}: {unread.problem}", place, "mend the row")
    if not raw:
        raise KitError("the data hold no rows", place, "give a file with rows")
    source = DataSource(path=str(data) if isinstance(data, str | Path) else place)
    rows = [r.row for r in raw if r.row is not None]
    source = source.model_copy(update={"format": detect_format(rows[:SAMPLED_ROWS], source)})
    converted: list[CanonicalRow | RowProblem] = []
    for row in rows:
        try:
            converted.append(convert_row(row, source.format, source))
        except RowProblem as problem:
            converted.append(problem)
    return converted
