"""Inspects the model, the tokenizer and the data that a run names, without loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit.config.report import Report
from kit.config.sections import Sections
from kit.data import row_template
from kit.data.files import find_data_files, sample_rows
from kit.data.formats import detect_format
from kit.errors import KitError, Problem, with_rule
from kit.inspection import hub_dataset
from kit.inspection.model import Base, check_tokenizer_cached, inspect_model
from kit.schema.run_plan import Dataset, DataSource
from kit.system import paths


@dataclass
class Inputs:
    """The base model, and the format of the data: None where the data is not on this machine."""

    base: Base
    data_format: str | None


def inspect_inputs(sections: Sections, report: Report, here: bool) -> Inputs:
    """Inspect what is on this machine. `here`: the run is about to start on it, so that everything must be."""
    run = sections.run
    base, problems = inspect_model(run.model, here)
    report.add(problems, "model.name_or_path")
    report.add(check_tokenizer_cached(run.tokenizer, here))
    data_format, problems = find_data_format(run.dataset, here)
    report.add(problems)
    report.notes += base.notes
    return Inputs(base, data_format)


def find_data_format(dataset: Dataset, here: bool) -> tuple[str | None, list[Problem]]:
    """Return the data's format, from the first rows of the files; None where sets differ, and for a Hub id that is not
    in the cache."""
    if bool(dataset.path) == bool(dataset.mix):
        said = "dataset.path and dataset.mix are both given" if dataset.path else "no data set is named"
        return None, [Problem(said, "dataset.path", "dataset.path=FILE, or sets in dataset.mix", "dataset-files")]
    problems: list[Problem] = []
    formats: dict[str | None, None] = {}
    for key, source, path, split in list_places(dataset):
        try:
            found, bad = inspect_place(key, source, path, split, here, drop=dataset.on_bad_row == "drop")
            formats[found], problems = None, problems + bad
        except KitError as error:
            ours = {"": key, "dataset.path": key, "dataset.split": split_key(key, dataset)}
            of_key = [Problem(p.problem, ours.get(p.where, p.where), p.fix, p.rule) for p in error.problems]
            problems += with_rule(of_key, "dataset-unreadable")
    known = [f for f in formats if f]
    return known[0] if len(known) == 1 else None, problems


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
    key: str, source: DataSource, path: str | list[str], split: str, here: bool, drop: bool
) -> tuple[str | None, list[Problem]]:
    """(format, bad rows among the first) of one set; KitError where it cannot be read or makes no format."""
    data_format: str | None = None if source.format == "auto" else source.format
    if source.template:  # can be read without the data
        written = row_template.template_format(source.template)
        data_format = written if data_format is None or written != "messages" else data_format
        row_template.template_columns(source.template)
    if isinstance(path, str) and paths.is_made_by_quickstart(path) and not Path(path).exists() and not here:
        return data_format, []
    named = path == source.path  # the configuration and the revision are those of `path`, not of another `eval_path`
    files = find_data_files(path, split.partition("[")[0], source.name if named else None)
    if files is None:
        assert isinstance(path, str)
        files = hub_dataset.find_hub_files(source, path, source.revision if named else None, here)
    if files is None:
        return data_format, []
    rows = sample_rows(files)
    bad = [r for r in rows if r.problem]
    good = [r.row for r in rows if r.row is not None]
    problems = [
        Problem(f"{r.file}, row {r.number}: {r.problem}", key, "mend the row, or dataset.on_bad_row=drop",
                "dataset-unreadable")
        for r in bad[:3]
    ]  # fmt: skip
    if good:
        data_format = detect_format(good, source)
    return data_format, [] if drop and good else problems


def split_key(key: str, dataset: Dataset) -> str:
    """The key that chose the split of a place."""
    by_eval = key == "dataset.path" and dataset.split == "train" and dataset.eval_split
    return "dataset.eval_split" if by_eval else key.replace("eval_path", "path").removesuffix("path") + "split"
