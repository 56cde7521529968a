"""Rows that are read while training goes on: the first checked before the model is loaded, the rest as they come."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from kit.data import load, prepare
from kit.errors import KitError, Problem
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory

CHECKED_ROWS = 10_000  # of each split, before the model is loaded
LOG = "stream"  # below logs/: what each reading process counted, an entry for a batch


def check_streams(plan: RunPlan, tokenizer: Any) -> dict[str, Any]:
    """Look at the first rows of each split as training will; return their counts. KitError where rows are refused."""
    shutil.rmtree(log_folder(plan), ignore_errors=True)  # rows are read from the beginning again, also after a resume
    report: dict[str, Any] = {"notes": [], "splits": {}}
    problems: list[Problem] = []
    for name, raw in _read(plan).items():
        preparation = prepare.make_preparation(plan, tokenizer, raw.sources)
        tally = prepare.Tally()
        records = iter(raw.rows.take(CHECKED_ROWS))
        while batch := list(islice(records, prepare.BATCH)):
            _, counts, bad = prepare.encode_records(batch, preparation)
            tally.add(counts, bad)
        report["splits"][name] = tally.part() | {"streamed": True}
        problems += prepare.refuse_rows(plan.dataset, name, report["splits"][name])
    if problems:
        raise KitError(problems)
    return report


def open_streams(plan: RunPlan, tokenizer: Any, report: dict[str, Any]) -> prepare.PreparedData:
    """The plan's rows as streams of tokens; `report` is what check_streams found."""
    from datasets import Features, List, Value

    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    parts = {}
    for name, raw in _read(plan).items():
        preparation = prepare.make_preparation(plan, tokenizer, raw.sources)
        # With fewer shards than processes accelerate has each of them read everything: one of them counts.
        counts = raw.rows.num_shards >= plan.world_size or int(os.environ.get("RANK", "0")) == 0
        work = StreamWork(name, preparation, plan, log_folder(plan) if counts else None)
        rows = raw.rows.map(
            work, batched=True, batch_size=prepare.BATCH, remove_columns=list(load.COLUMNS), features=features
        )
        parts[name] = prepare.pack(plan, rows, "") if prepare.is_packed(plan, name) else rows
    validation = parts.get("validation")
    notes = [note for name, part in report["splits"].items() for note in prepare.describe_counts(name, part)]
    return prepare.PreparedData(parts["train"], validation, parts.get("test", validation), report, notes)


def _read(plan: RunPlan) -> dict[str, load.RawRows]:
    return load.read_splits(plan.dataset, *load.open_sources(plan.dataset), Path()).by_name()


def log_folder(plan: RunPlan) -> Path:
    return plan.run_path / run_directory.LOGS / LOG


class StreamWork:
    """Encodes a batch of a stream's records in whichever process reads them, and writes down what it counted.

    Rows that the plan refuses are left out, and written down as a refusal: `read_refusal` finds it, and the run then
    stops with a checkpoint.
    """

    def __init__(self, name: str, preparation: prepare.Preparation, plan: RunPlan, log: Path | None) -> None:
        self.name, self.preparation, self.plan, self.log = name, preparation, plan, log
        self.tally = prepare.Tally()

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pieces, counts, bad = prepare.encode_records(prepare.batch_records(batch), self.preparation)
        if self.log is not None:
            self.write_down(counts, bad)
        return {"input_ids": [p.input_ids for p in pieces], "labels": [p.labels for p in pieces]}

    def write_down(self, counts: dict[str, Any], bad: list[dict[str, Any]]) -> None:
        """Append an entry to the log of this process, with a refusal where the plan does not let these rows pass."""
        assert self.log is not None
        self.tally.add(counts, bad)
        entry: dict[str, Any] = {"split": self.name, "counts": counts, "bad": bad}
        part = self.tally.part()
        if bad and (part["read"] >= CHECKED_ROWS or self.plan.dataset.on_bad_row == "refuse"):
            entry["refused"] = [p.__dict__ for p in prepare.refuse_rows(self.plan.dataset, self.name, part)]
        self.log.mkdir(parents=True, exist_ok=True)
        with open(self.log / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")


class StreamCounts:
    """What all reading processes have written down so far, added up as it comes."""

    def __init__(self, plan: RunPlan) -> None:
        self.folder = log_folder(plan)
        self.read: dict[Path, int] = {}
        self.tallies: dict[str, prepare.Tally] = {}
        self.refused: list[Problem] = []

    def update(self) -> dict[str, Any]:
        """Read what is new; return the counts of each split."""
        for file in sorted(self.folder.glob("*.jsonl")):
            with open(file, encoding="utf-8") as f:
                f.seek(self.read.get(file, 0))
                while (line := f.readline()).endswith("\n"):
                    entry = json.loads(line)
                    self.tallies.setdefault(entry["split"], prepare.Tally()).add(entry["counts"], entry["bad"])
                    self.refused += [Problem(**p) for p in entry.get("refused", ()) if not self.refused]
                    self.read[file] = f.tell()
        return {name: tally.part() for name, tally in self.tallies.items()}
