"""What a data file holds, looked at without torch or datasets: does it exist, has it rows, which columns."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from kit.data import row_template
from kit.errors import KitError, first_line
from kit.schema.run_plan import Dataset

SUFFIXES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
FORMATS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


def find_data_files(path: str) -> list[Path] | None:
    """The data files behind a path (file or folder), None for a Hub id; KitError where there is nothing."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix.lower() not in SUFFIXES:
            raise KitError(
                f"{place} has a suffix that is not known",
                "dataset.path",
                f"use one of {' '.join(sorted(SUFFIXES))}",
                rule="dataset-files",
            )
        return [place]
    if place.is_dir():
        files = sorted(f for f in place.iterdir() if f.suffix.lower() in SUFFIXES)
        if not files:
            raise KitError(
                f"the folder {place} holds no data file",
                "dataset.path",
                f"put {', '.join(SUFFIXES)} in it",
                rule="dataset-files",
            )
        if len({SUFFIXES[f.suffix.lower()] for f in files}) > 1:
            raise KitError(
                f"the folder {place} mixes file kinds",
                "dataset.path",
                "name one file, or keep one kind",
                rule="dataset-files",
            )
        return files
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and place.suffix.lower() not in SUFFIXES and not path.startswith("."):
        return None
    raise KitError(
        f"there is no data file {place}",
        "dataset.path",
        "check the path; it is taken from where you stand",
        rule="dataset-files",
    )


def read_columns(files: list[Path], path: str) -> list[str] | None:
    """The columns of the first row in `files`, those of the data set `path`; None where they cannot be known.

    KitError where there is no row, or where a file cannot be read.
    """
    empty = KitError(f"{path} holds no rows", "dataset.path", "give a file with at least one row", rule="dataset-rows")
    file = next((f for f in files if f.stat().st_size > 0), None)
    if file is None:
        raise empty
    kind = SUFFIXES[file.suffix.lower()]
    try:
        if kind == "csv":
            with open(file, encoding="utf-8", newline="") as f:
                reader = csv.reader(f, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                header, row = next(reader, None), next(reader, None)
            if not header or row is None:
                raise empty
            return header
        if kind == "parquet":
            try:
                import pyarrow.parquet as parquet
            except ImportError:
                return None
            table = parquet.ParquetFile(file)
            if table.metadata.num_rows == 0:
                raise empty
            return list(table.schema_arrow.names)
        first = first_json_row(file)
        if first is None:
            raise empty
        return list(first)
    except KitError:
        raise
    except Exception as error:  # pyarrow and csv have no common base; every one of them means an unreadable file
        raise KitError(
            f"{file} cannot be read: {first_line(error)}", "dataset.path", "check the file", rule="dataset-unreadable"
        ) from None


def first_json_row(file: Path) -> dict | None:
    """The first row of JSON lines or of a JSON list; KitError naming the line where it is not JSON."""
    with open(file, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):
                f.seek(0)
                rows = json.load(f)
                row = rows[0] if rows else None
            else:
                try:
                    row = json.loads(line)
                except ValueError as error:
                    if file.suffix.lower() != ".json":
                        raise KitError(
                            f"{file} line {number} is not JSON: {error}",
                            "dataset.path",
                            "mend the line",
                            rule="dataset-unreadable",
                        ) from None
                    f.seek(0)  # one pretty-printed object
                    row = json.load(f)
            if row is not None and not isinstance(row, dict):
                raise KitError(
                    f"{file} line {number} holds {type(row).__name__}, not an object",
                    "dataset.path",
                    "one object per row",
                    rule="dataset-unreadable",
                )
            return row
    return None


def detect_format(columns: list[str], d: Dataset) -> str:
    """Which of FORMATS the columns make, after `columns` or `template` has renamed or written them; KitError else."""
    if d.template:
        if d.columns:
            raise KitError(
                "both dataset.columns and dataset.template are given",
                "dataset.template",
                "keep one",
                rule="dataset-template",
            )
        made = row_template.template_format(d.template)
        row_template.check_template_columns(d.template, columns)
        if (made, d.format) == ("messages", "prompt_completion"):
            return d.format
        if d.format not in ("auto", made):
            raise KitError(
                f"the template makes {made}, not {d.format}",
                "dataset.format",
                "dataset.format=auto",
                rule="dataset-format",
            )
        return made
    missing = [theirs for theirs in d.columns.values() if theirs not in columns]
    if missing:
        raise KitError(
            f"the data has no column {', '.join(map(repr, missing))}; it has {', '.join(columns)}",
            "dataset.columns",
            "name columns that exist",
            rule="dataset-columns",
        )
    ours = {c for c in columns if c not in d.columns.values()} | set(d.columns)
    if d.format != "auto":
        lacking = [c for c in FORMATS[d.format] if c not in ours]
        if lacking:
            raise KitError(
                f"format {d.format} needs the column {', '.join(map(repr, lacking))}; "
                f"the data has {', '.join(columns)}",
                "dataset.format",
                f"dataset.columns.{lacking[0]}=THEIR_COLUMN",
                rule="dataset-format",
            )
        return d.format
    for name, needs in FORMATS.items():
        if all(c in ours for c in needs):
            return name
    raise KitError(
        f"the columns {', '.join(columns)} are none of messages | prompt + completion | text",
        "dataset.columns",
        "map them, e.g. dataset.columns.text=" + (columns[0] if columns else "COLUMN") + ", or write dataset.template",
        rule="dataset-columns",
    )
