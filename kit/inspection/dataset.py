"""Which format the columns of a data set make."""

from __future__ import annotations

from kit.errors import KitError
from kit.inspection import dataset_template
from kit.schema.run_plan import Dataset

FORMATS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


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
        made = dataset_template.template_format(d.template)
        dataset_template.check_template_columns(d.template, columns)
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
