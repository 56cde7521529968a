"""Checks the kit's own values beyond their types: paths, counts, what is held out of a data set."""

from __future__ import annotations

from pathlib import Path

from kit.config.report import Report
from kit.schema.run_plan import Dataset, Launch, RunInput

PATHS = (  # (section, key) of what is looked for on the disk
    ("model", "name_or_path"), ("model", "revision"), ("tokenizer", "name_or_path"), ("tokenizer", "chat_template"),
    ("dataset", "path"), ("dataset", "eval_path"), ("launch", "script"), ("launch", "hostfile"), ("", "runs_dir"),
)  # fmt: skip


def check_values(run: RunInput, report: Report) -> None:
    """Report paths that the disk cannot even be asked about and counts below one."""
    check_paths(run, report)
    check_counts(run.launch, report)
    check_held_out(run.dataset, report)


def check_paths(run: RunInput, report: Report) -> None:
    named = [(f"dataset.mix[{n}].path", source.path) for n, source in enumerate(run.dataset.mix)]
    for section, name in PATHS:
        key = f"{section}.{name}" if section else name
        named.append((key, getattr(getattr(run, section), name) if section else getattr(run, name)))
    for key, text in [(k, t) for k, value in named for t in (value if isinstance(value, list) else [value])]:
        try:
            exists = Path(text or ".").expanduser().exists()
            if not exists and key == "launch.script":
                report.problem(key, f"there is no file {text}", "check the path", "script")
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            report.problem(key, f"{key} is no path that can be looked at: {reason}", "check it", "path")


def check_counts(launch: Launch, report: Report) -> None:
    for name, count in (("num_gpus", launch.num_gpus), ("num_nodes", launch.num_nodes)):
        if isinstance(count, int) and count < 1:
            key = f"launch.{name}"
            report.problem(key, f"{key} must be at least 1, not {count}", f"{key}=auto", "count")


def check_held_out(dataset: Dataset, report: Report) -> None:
    """Report sizes of the test and validation parts that are no sizes, or that do not go together."""
    test, validation = dataset.test_size, dataset.validation_size
    impossible = False
    for name, size in (("test_size", test), ("validation_size", validation)):
        if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
            key, impossible = f"dataset.{name}", True
            text = f"{key} must be a share between 0 and 1 or a whole number of rows, not {size}"
            report.problem(key, text, f"{key}=0.1, or leave it out", "held-out")
    if impossible or validation is None:
        return
    key = "dataset.validation_size"
    if test is None:
        text = "dataset.validation_size without dataset.test_size"
        report.problem(key, text, "dataset.test_size holds rows out", "held-out")
    elif (test < 1) != (validation < 1):
        text = "one of test_size and validation_size is a share, the other a number"
        report.problem(key, text, "give one kind", "held-out")
    elif test < 1 <= test + validation:
        report.problem(key, "test_size and validation_size leave no rows to train on", "0.1 and 0.1", "held-out")
