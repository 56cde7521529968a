"""Inspects the model, the tokenizer and the data that a run names, without loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit.config.report import Report
from kit.config.sections import Sections
from kit.data import row_template
from kit.errors import KitError, Problem, with_rule
from kit.inspection import hub_dataset
from kit.inspection.dataset import detect_format, find_data_files, read_columns
from kit.inspection.model import Base, check_tokenizer_cached, inspect_model
from kit.schema.run_plan import Dataset
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
    """Return the data's format, from the first row of the file; None for a Hub id that is not in the cache."""
    problems: list[Problem] = []
    data_format: str | None = None if dataset.format == "auto" else dataset.format
    if dataset.template:  # can be read without the data
        try:
            written = row_template.template_format(dataset.template)
            data_format = written if data_format is None or written != "messages" else data_format
            row_template.template_columns(dataset.template)
        except KitError as error:
            return None, with_rule(error.problems, "dataset-template")
    for key, path in (("dataset.path", dataset.path), ("dataset.eval_path", dataset.eval_path)):
        if path is None or (paths.is_made_by_quickstart(path) and not Path(path).exists() and not here):
            continue
        try:
            if (files := find_data_files(path)) is None:
                revision = dataset.revision if path == dataset.path else None
                columns = hub_dataset.read_hub_columns(dataset, path, revision, here)
            else:
                columns = read_columns(files, path)
            if columns is not None:
                data_format = detect_format(columns, dataset)
        except KitError as error:
            of_key = [
                Problem(p.problem, key if p.where == "dataset.path" else p.where, p.fix, p.rule)
                for p in error.problems
            ]
            problems += with_rule(of_key, "dataset-unreadable")
    return data_format, problems
