"""Inspects the model, the tokenizer and the data that a run names, without loading them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kit.config.report import Report
from kit.config.sections import Sections
from kit.errors import KitError, Problem, with_rule
from kit.inspection import hub_dataset, row_template
from kit.inspection.data_files import find_data_files
from kit.inspection.model import Base, check_tokenizer_cached, inspect_model
from kit.rows.files import BREAKS_OFF, RawRow, is_whole, sample_rows
from kit.rows.formats import CanonicalRow, convert_row, detect_format, is_chat, row_kind
from kit.rows.turns import EmptyAnswer, RowProblem
from kit.schema.run_plan import Dataset, DataSource
from kit.storage import hub_cache
from kit.system import paths


@dataclass
class Inputs:
    """The base model and the data."""

    base: Base
    data: DataFormats


@dataclass(frozen=True)
class Sample:
    """The first rows of one data set that is on this machine."""

    source: DataSource
    split: str  # as the run names it: "train[:10%]"
    files: list[Path]
    raw: list[RawRow]  # as they were read
    rows: list[CanonicalRow]  # those of them that can be trained on, in the form that training reads


@dataclass
class DataFormats:
    """What the rows of a run are, as far as its data is on this machine."""

    formats: dict[str, str] = field(default_factory=dict)  # of each set that is here, by its key
    kinds: set[str] = field(default_factory=set)  # messages, prompt_completion, text, tokenized
    chats: bool | None = None  # whether a chat template renders any of them; None where no row is here
    few_rows: int | None = None  # of dataset.path, where its one file was read to its end
    samples: dict[str, Sample] = field(default_factory=dict)  # of each set that is here, by its key
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str | None:
        """What all sets are; None where they differ or none is here."""
        return next(iter(self.kinds)) if len(self.kinds) == 1 else None


def inspect_inputs(sections: Sections, report: Report, here: bool, bad_rows: bool = True) -> Inputs:
    """Inspect what is on this machine. `here`: the run is about to start on it, so that everything must be.

    bad_rows: those among the first rows are problems.
    """
    run = sections.run
    base, problems = inspect_model(run.model, here)
    report.add(problems, "model.name_or_path")
    report.add(check_tokenizer_cached(run.tokenizer, here))
    data, problems = inspect_data(run.dataset, here)
    report.add(p for p in problems if bad_rows or p.rule != "bad-rows")
    report.notes += [*base.notes, *dict.fromkeys(data.notes)]
    return Inputs(base, data)


def inspect_data(dataset: Dataset, here: bool) -> tuple[DataFormats, list[Problem]]:
    """Return what the first rows of each set are, and what is wrong with them."""
    if bool(dataset.path) == bool(dataset.mix):
        said = "dataset.path and dataset.mix are both given" if dataset.path else "no data set is named"
        return DataFormats(), [
            Problem(said, "dataset.path", "dataset.path=FILE, or sets in dataset.mix", "dataset-files")
        ]
    problems: list[Problem] = []
    data = DataFormats()
    for key, source, path, split in list_places(dataset):
        try:
            found, rows, sample = inspect_place(source, path, split, here)
            dropped = dataset.on_bad_row == "drop" and any(r.row for r in rows)
            problems += list_bad_rows(rows, key, dropped)
            one_file = isinstance(path, str) and Path(path).is_file()
            if key == "dataset.path" and one_file and sample and is_whole(sample.files, sample.raw):
                data.few_rows = len(rows)
            if found:
                data.formats.setdefault(key, found)
                data.kinds.add(row_kind(found, source.template))
            if not rows and isinstance(path, str) and not paths.is_made_by_quickstart(path):
                note = f"{path} is not on this machine: taken for a Hub data set, its rows are not looked at"
                if hub_cache.is_offline():
                    note += f"; {hub_cache.fetch_command('dataset.path', path)}"
                data.notes.append(note)
            if sample and split == source.split:
                data.samples[key] = sample
            if sample:
                data.chats = bool(data.chats) or any(map(is_chat, sample.rows))
        except KitError as error:
            ours = {"": key, "dataset.path": key, "dataset.split": split_key(key, dataset)}
            of_key = [Problem(p.problem, ours.get(p.where, p.where), p.fix, p.rule) for p in error.problems]
            problems += with_rule(of_key, "dataset-unreadable")
    return data, problems


def list_places(dataset: Dataset) -> list[tuple[str, DataSource, str | list[str], str]]:
    """(key, set, path, split) of all that a run reads: each set of a mix, or the one path, and what evaluates."""
    places: list[tuple[str, DataSource, str | list[str], str]] = []
    for number, source in enumerate(dataset.mix):
        places.append((f"dataset.mix.{number}.path", source, source.path, source.split))
    if dataset.path:
        places.append(("dataset.path", dataset, dataset.path, dataset.split))
    if dataset.eval_path:
        places.append(("dataset.eval_path", dataset, dataset.eval_path, dataset.split))
    elif dataset.path and dataset.eval_split:
        places.append(("dataset.path", dataset, dataset.path, dataset.eval_split))
    return places


def inspect_place(
    source: DataSource, path: str | list[str], split: str, here: bool
) -> tuple[str | None, list[RawRow], Sample | None]:
    """(format, the first rows in the form that training reads, the good ones as a sample) of one set.

    KitError where it makes no format; no sample where no row is here, or none is good.
    """
    data_format: str | None = None if source.format == "auto" else source.format
    if source.template:  # can be read without the data
        written = row_template.template_format(source.template)
        data_format = written if data_format is None or written != "messages" else data_format
        row_template.template_columns(source.template)
    if isinstance(path, str) and paths.is_made_by_quickstart(path) and not Path(path).exists() and not here:
        return data_format, [], None
    named = path == source.path  # the configuration and the revision are those of `path`, not of another `eval_path`
    files = find_data_files(path, split.partition("[")[0], source.name if named else None)
    if files is None:
        assert isinstance(path, str)
        files = hub_dataset.find_hub_files(source, path, source.revision if named else None, here)
    if files is None:
        return data_format, [], None
    raw = sample_rows(files)
    good = [row.row for row in raw if row.row is not None]
    if not good:
        return data_format, raw, None
    data_format = detect_format(good, source)
    rows = [convert(row, source.model_copy(update={"format": data_format})) for row in raw]
    converted = [row.row for row in rows if row.row]
    return data_format, rows, Sample(source, split, list(files), raw, converted) if converted else None


def convert(raw: RawRow, source: DataSource) -> RawRow:
    """The row in the form that training reads, or what is wrong with it; an empty answer is only left out."""
    if raw.row is None:
        return raw
    try:
        return replace(raw, row=convert_row(raw.row, source.format, source))
    except EmptyAnswer:
        return replace(raw, row=None)
    except RowProblem as problem:
        return replace(raw, row=None, problem=str(problem))


def list_bad_rows(rows: list[RawRow], key: str, dropped: bool) -> list[Problem]:
    """A problem for each of the first bad rows; where these are dropped, for what cannot be."""
    mend = "mend the row, or leave such rows out: dataset.on_bad_row=drop"
    problems: list[Problem] = []
    for row in rows:
        lost = row.problem and row.problem.startswith(BREAKS_OFF)
        if row.problem and (lost or not dropped):
            fix = "write or fetch the file again" if lost else mend
            problems.append(Problem(f"{row.file} row {row.number}: {row.problem}", key, fix, "bad-rows"))
    return problems[:3]


def split_key(key: str, dataset: Dataset) -> str:
    """The key that chose the split of a place."""
    by_eval = key == "dataset.path" and dataset.split == "train" and dataset.eval_split
    return "dataset.eval_split" if by_eval else key.replace("eval_path", "path").removesuffix("path") + "split"
