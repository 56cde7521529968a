"""One pass over all rows before a model is loaded: checked, encoded, counted, packed, and kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from kit import __version__
from kit.data import load
from kit.data.encode import IGNORED, EncodedRow, Encoding, LongRow, encode_rows, end_of_turn_id, make_encoding
from kit.data.templates import run_template
from kit.errors import KitError, Problem
from kit.rows.files import BREAKS_OFF
from kit.rows.formats import resolve_train_on, row_kind, row_turns, turn_text
from kit.rows.turns import EmptyAnswer, RowProblem
from kit.schema.run_plan import Dataset, DataSource, RunPlan
from kit.storage.atomic_folder import output_folder, replace_folder
from kit.storage.digests import file_digests
from kit.storage.json_files import atomic_write_json, read_json
from kit.system.paths import kit_cache_folder
from kit.system.terminal import show_progress

LAYOUT = 3  # of a prepared folder; another one is made anew
REPORT, BAD_ROWS, SAMPLES = "report.json", "bad_rows.jsonl", "samples.json"
KEPT_DAYS = 30
PARALLEL_FROM = 2_000  # fewer rows are not worth the start of processes
BATCH = 500  # rows that are encoded together
COUNTED = ("notes", "lengths", "sources", "text")  # counts by kind, of those that encode_records makes
SHOWN = 3  # bad rows that a message names, of each reason
PACKAGES = ("transformers", "tokenizers", "trl", "datasets")
LENGTHS = (50, 90, 99, 100)  # percentiles
TRAINER_KEYS = (
    *("max_length", "truncation_mode", "packing", "packing_strategy", "eval_packing", "eval_strategy", "seed"),
    *("assistant_only_loss", "completion_only_loss", "shuffle_dataset", "dataset_text_field"),
)  # what of the trainer's settings the prepared rows depend on


@dataclass(frozen=True)
class PreparedData:
    """What the trainer is given: datasets with input_ids, labels and, where packed, seq_lengths.

    `test` is `validation` itself where the held-out rows serve for both.
    """

    train: Any
    validation: Any
    test: Any
    report: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None  # in the cache; None for streams


@dataclass(frozen=True)
class Preparation:
    """Everything that turns raw rows into tokens; it goes to each process that does so."""

    tokenizer: Any
    sources: Sequence[DataSource]
    encodings: Sequence[Encoding]  # one for each source
    ends: frozenset[int]  # the ids that end a turn


# ---- for the trainer ----


def prepare_data(plan: RunPlan, tokenizer: Any) -> Path:
    """Prepare the plan's rows, unless that has been done; return their folder. KitError with every kind of bad row."""
    folder = prepare_or_report(plan, tokenizer)
    if refused := read_report(folder)["refused"]:
        raise KitError([Problem(**p) for p in refused])
    return folder


def prepare_or_report(plan: RunPlan, tokenizer: Any) -> Path:
    """The same, but of rows that are refused the folder holds the report, the bad ones and the samples alone."""
    training, held_out = load.open_sources(plan.dataset)
    key = cache_key(plan, tokenizer, [*training, *([held_out] if held_out else [])])
    folder = kit_cache_folder() / "data" / key
    if not (folder / REPORT).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_unused(folder.parent)
        with output_folder(folder, False, keep_finished) as staging:
            staging.chmod(0o700)  # what stands in it is the user's data
            build(plan, tokenizer, training, held_out, staging)
    os.utime(folder / REPORT)
    return folder


def remove_unused(cache: Path) -> None:
    """Remove prepared folders that no run has asked for in KEPT_DAYS; files that are open stay readable."""
    for report in cache.glob(f"*/{REPORT}"):
        if time.time() - report.stat().st_mtime > KEPT_DAYS * 86400:
            shutil.rmtree(report.parent, ignore_errors=True)


def keep_finished(staging: Path, folder: Path) -> None:
    """Put a finished build in its place, unless another process has done so meanwhile: its files may be in use."""
    try:
        os.rename(staging, folder)
    except OSError:
        if not (folder / REPORT).is_file():
            replace_folder(staging, folder, fsync=False)


def open_prepared(folder: Path) -> PreparedData:
    """The datasets of a prepared folder, mapped from its files."""
    from datasets import Dataset, concatenate_datasets

    report = read_report(folder)
    parts: dict[str, Any] = {}
    for name, part in report["splits"].items():
        files = [Dataset.from_file(str(folder / file)) for file in part["files"]]
        parts[name] = files[0] if len(files) == 1 else concatenate_datasets(files)
        if len(parts[name]) != part.get("packed", part["rows"]):  # cut off: Arrow reads such a file without a word
            raise KitError(f"the prepared data in {folder} are not whole", "dataset.path", f"rm -r {folder}")
        if report["shuffle_seed"] is not None:
            parts[name] = parts[name].shuffle(seed=report["shuffle_seed"], keep_in_memory=True)
    validation = parts.get("validation")
    notes = [*report["notes"], *(n for name, part in report["splits"].items() for n in describe_counts(name, part))]
    return PreparedData(parts["train"], validation, parts.get("test", validation), report, notes, folder)


def read_report(folder: Path) -> dict[str, Any]:
    """What is known of the rows of a prepared folder."""
    return read_json(folder / REPORT)


def split_counts(report: dict[str, Any]) -> dict[str, Any]:
    """What became of the rows of each split, as data.json and metrics.json hold it: kept + dropped = read."""
    keys = ("read", "kept", "dropped", "sources", "rows", "packed", "tokens", "trained", "duplicates")
    return {name: {k: part[k] for k in keys if k in part} for name, part in report["splits"].items()}


def describe_counts(name: str, part: dict[str, Any]) -> list[str]:
    """What became of the rows of one split, where not all are trained on as they are: lines for the banner."""
    lines = []
    dropped = sum(part["dropped"].values())
    if dropped:
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in part["dropped"].items())
        lines.append(f"{name}: {part['kept']:,} kept + {dropped:,} dropped = {part['read']:,} read: {reasons}")
    lines += [f"{name}: {count:,} rows: {note}" for note, count in part["notes"].items()]
    if part["no_end"]:
        lines.append(f"{name}: {part['no_end']:,} rows have no end token in the loss: the model may not learn to stop")
    if "packed" in part:
        lines.append(f"{name}: {part['rows']:,} documents packed into {part['packed']:,} rows")
    return lines


# ---- the key ----


def cache_key(plan: RunPlan, tokenizer: Any, sources: Sequence[load.OpenSource]) -> str:
    """A hash over all that prepared rows depend on: contents, tokenizer, template, options, versions."""
    parts = {
        "layout": LAYOUT,
        "dataset": plan.dataset.model_dump(exclude={"report_samples"}),
        "formats": [opened.source.format for opened in sources],
        "trainer": {key: plan.trainer.get(key) for key in TRAINER_KEYS},
        "date": plan.tokenizer.date,
        "contents": file_digests([file for opened in sources for file in opened.files]),
        "tokenizer": tokenizer_digest(tokenizer),
        "versions": [__version__, *(metadata.version(p) for p in PACKAGES)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash over what a tokenizer does: its vocabulary and rules, special tokens, settings and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        rules = backend.to_str()
    else:
        rules = json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template]
    settings += [getattr(tokenizer, "add_bos_token", None), getattr(tokenizer, "add_eos_token", None)]
    return hashlib.sha256((rules + json.dumps(settings, sort_keys=True, default=str)).encode()).hexdigest()


# ---- the pass ----


def build(
    plan: RunPlan, tokenizer: Any, training: Sequence[load.OpenSource], held_out: Any, folder: Path
) -> dict[str, Any]:
    """Prepare every split into `folder` and write its report; `refused` there are the problems of rows.

    No tokens are kept of data that is refused.
    """
    import numpy

    with tempfile.TemporaryDirectory(dir=folder, prefix=".raw-") as raw:
        splits = load.read_splits(plan.dataset, training, held_out, Path(raw))
        seed = plan.trainer["seed"] if plan.trainer.get("shuffle_dataset") else None
        report: dict[str, Any] = {"layout": LAYOUT, "notes": splits.notes, "shuffle_seed": seed, "splits": {}}
        hashes = row_hashes(splits.train)
        problems: list[Problem] = []
        for name, rows in splits.by_name().items():
            part = prepare_split(plan, tokenizer, rows, folder, name)
            if name != "train":
                part["in_train"] = int(numpy.isin(row_hashes(rows), hashes).sum())
            problems += refuse_rows(plan.dataset, name, part)
            report["splits"][name] = part
        if count := plan.dataset.report_samples:
            shown = sample_rows(splits.train.rows, make_preparation(plan, tokenizer, splits.train.sources), count)
            atomic_write_json(folder / SAMPLES, {"samples": shown})
    if problems:
        for file in folder.glob("*.arrow"):
            file.unlink()
    atomic_write_json(folder / REPORT, report | {"refused": [asdict(p) for p in problems]})
    return report


def row_hashes(raw: load.RawRows) -> Any:
    return raw.rows.with_format("numpy")["hash"][:]


def make_preparation(plan: RunPlan, tokenizer: Any, sources: Sequence[DataSource]) -> Preparation:
    t = plan.trainer
    assistant_only = bool(t.get("assistant_only_loss"))
    # With a train_on of the plan's own the tokenizer's template is kept as it is.
    template = run_template(tokenizer, assistant_only and plan.dataset.train_on is None, plan.tokenizer.date)
    split = t.get("packing") and t.get("packing_strategy") == "bfd_split"
    common = make_encoding(
        tokenizer,
        template,
        max_length=t.get("max_length", 1024),
        truncation_mode=t.get("truncation_mode") or "keep_start",
        on_long_row="split" if split and plan.dataset.on_long_row == "truncate" else plan.dataset.on_long_row,
    )
    encodings = []
    for source in sources:
        kind = row_kind(source.format, source.template)
        train_on, answers_only = resolve_train_on(
            plan.dataset.train_on, assistant_only, t.get("completion_only_loss"), kind
        )
        encodings.append(replace(common, train_on=train_on, answers_only=answers_only))
    ends = {tokenizer.eos_token_id, end_of_turn_id(tokenizer, template)} - {None}
    return Preparation(tokenizer, list(sources), encodings, frozenset(ends))


def prepare_split(plan: RunPlan, tokenizer: Any, raw: load.RawRows, folder: Path, name: str) -> dict[str, Any]:
    """Encode the rows of one split into Arrow files in `folder`; return their names and all counts."""
    import numpy
    from datasets import Features, List, Value

    log = folder / f"{name}.log"
    log.mkdir()
    preparation = make_preparation(plan, tokenizer, raw.sources)
    work = partial(_prepare_batch, preparation=share_with_processes(preparation), log=str(log))
    tokens = {name: List(Value("int32")) for name in ("input_ids", "labels")}
    features = Features({**tokens, "length": Value("int32")})  # `length` is what group_by_length reads
    count = process_count(plan.trainer.get("dataset_num_proc"), len(raw))
    with same_environment(), show_progress(name, "rows", len(raw), partial(_count_done, log, {})):
        rows = raw.rows.map(
            work,
            batched=True,
            batch_size=BATCH,
            with_rank=True,
            num_proc=count,
            remove_columns=list(load.COLUMNS),
            features=features,
            load_from_cache_file=False,
            cache_file_name=str(folder / f"{name}.arrow"),
            new_fingerprint=name,
        )
    part = add_counts(log, folder / f"{name}-{BAD_ROWS}")
    part["duplicates"] = len(raw) - len(numpy.unique(row_hashes(raw)))
    if is_packed(plan, name) and len(rows):
        rows = pack(plan, rows, str(folder / f"{name}-packed.arrow"))
        part["packed"] = len(rows)
    part["files"] = [Path(file["filename"]).name for file in rows.cache_files]
    part["sha256"] = token_digest(rows)
    return part


def token_digest(rows: Any) -> str:
    """A hash over the tokens of a split and where its rows end, whatever made them."""
    digest = hashlib.sha256()
    if len(rows):
        columns = sorted({"input_ids", "labels", "seq_lengths"} & set(rows.column_names))
        for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
            for column in map(table.column, columns):
                digest.update(column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False).tobytes())
                digest.update(column.combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _count_done(log: Path, read: dict[Path, tuple[int, int]]) -> int:
    """Rows that the processes have written down so far; `read`: of each file how far it was read, and its entries."""
    for file in log.glob("*.jsonl"):
        place, entries = read.get(file, (0, 0))
        with open(file, "rb") as f:
            f.seek(place)
            new = f.read()
        read[file] = place + len(new), entries + new.count(b"\n")
    return BATCH * sum(entries for _, entries in read.values())


def process_count(asked: int | None, rows: int) -> int | None:
    """Processes that encode rows: as many as asked for, else what the machine has, where there is enough to do."""
    if asked:
        return asked
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(usable, 32, rows // PARALLEL_FROM)
    return count if count > 1 else None


@contextmanager
def same_environment() -> Iterator[None]:
    """Keep os.environ the object that it was: datasets puts a copy in its place where it starts processes."""
    environ, before = os.environ, dict(os.environ)
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003 - whoever holds it would see no later change
        for name in environ.keys() - before.keys():
            del environ[name]
        environ.update(before)


def is_packed(plan: RunPlan, name: str) -> bool:
    """Whether the rows of a split are packed: eval_packing speaks of what is held out, where it says anything."""
    of_eval = plan.trainer.get("eval_packing")
    return bool(plan.trainer.get("packing") if name == "train" or of_eval is None else of_eval)


def pack(plan: RunPlan, rows: Any, file: str) -> Any:
    """Whole documents packed into rows of max_length by TRL, with `seq_lengths`; shuffled before and after, as there.

    bfd_split comes with its documents in pieces already: these are shuffled, where TRL shuffles whole documents.
    file: where they are kept; "" for a stream.
    """
    from trl import pack_dataset

    t = plan.trainer
    rows = rows.select_columns(["input_ids", "labels"])
    if t.get("shuffle_dataset"):
        rows = rows.shuffle(seed=t["seed"], **({"keep_in_memory": True} if file else {}))
    options: dict[str, Any] = {}
    if file:
        options = {"cache_file_name": file, "load_from_cache_file": False, "new_fingerprint": Path(file).stem}
    return pack_dataset(rows, t.get("max_length", 1024), t.get("packing_strategy", "bfd"), options)


_shared: list[Preparation] = []  # the last one; a forked process has it too


def share_with_processes(preparation: Preparation) -> Preparation | None:
    """None where processes are forked: they find it in `_shared`, and a vocabulary is not copied for each of them."""
    import multiprocess  # what datasets starts its processes with

    _shared[:] = [preparation]
    return None if multiprocess.get_start_method() == "fork" else preparation


def _prepare_batch(
    batch: dict[str, list[Any]], rank: int | None, preparation: Preparation | None, log: str
) -> dict[str, list[Any]]:
    """Encode raw records; what happened to them is appended to a file of this process in `log`."""
    preparation = preparation or _shared[0]
    pieces, counts, bad = encode_records(batch_records(batch), preparation)
    with open(Path(log, f"{rank or 0:04d}.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps({"counts": counts, "bad": bad}) + "\n")
    columns = {"input_ids": [p.input_ids for p in pieces], "labels": [p.labels for p in pieces]}
    return {**columns, "length": [len(p.input_ids) for p in pieces]}


def describe_bad_row(record: dict[str, Any], problem: RowProblem) -> dict[str, Any]:
    """Where a record stands, what is wrong with it and its kind, of which `refuse_rows` speaks."""
    kind = {EmptyAnswer: "empty", LongRow: "long"}.get(type(problem), "bad")
    kind = "lost" if str(problem).startswith(BREAKS_OFF) else kind
    return {k: record[k] for k in ("file", "number", "offset")} | {"problem": str(problem), "kind": kind}


def batch_records(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The records of a batch that `map` gives as columns."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def encode_records(
    records: Sequence[dict[str, Any]], preparation: Preparation
) -> tuple[list[EncodedRow], dict[str, Any], list[dict[str, Any]]]:
    """(pieces to train on, counts, bad rows) of raw records: the one function of files and of streams."""
    results: list[list[EncodedRow] | RowProblem] = [RowProblem("")] * len(records)
    by_source: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for n, record in enumerate(records):
        try:
            row = load.canonical_row(record, preparation.sources)
            by_source.setdefault(record["source"], []).append((n, row))
        except RowProblem as problem:
            results[n] = problem
    text: Counter[str] = Counter()
    for source, rows in by_source.items():
        encoded = encode_rows(preparation.tokenizer, [row for _, row in rows], preparation.encodings[source])
        for (n, row), made in zip(rows, encoded, strict=True):
            results[n] = made
            if not isinstance(made, RowProblem) and "cut" not in made[-1].notes:
                text.update(measure_text(row, sum(len(piece.input_ids) for piece in made)))
    pieces: list[EncodedRow] = []
    bad: list[dict[str, Any]] = []
    counts = {"read": len(records), "kept": 0, "tokens": 0, "trained": 0, "no_end": 0}
    notes: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    per_source: Counter[int] = Counter()
    for record, made in zip(records, results, strict=True):
        if isinstance(made, RowProblem):
            bad.append(describe_bad_row(record, made))
            continue
        counts["kept"] += 1
        per_source[record["source"]] += 1
        notes.update({note for piece in made for note in piece.notes})
        for piece in made:
            pieces.append(piece)
            counts["tokens"] += len(piece.input_ids)
            counts["trained"] += piece.trained
            lengths[len(piece.input_ids)] += 1
        if "cut" not in made[-1].notes and all(preparation.ends.isdisjoint(p.labels) for p in made):
            counts["no_end"] += 1
    return pieces, {**counts, "notes": notes, "lengths": lengths, "sources": per_source, "text": text}, bad


def measure_text(row: dict[str, Any], tokens: int) -> dict[str, int]:
    """Bytes, characters and tokens of a row; "wide" where a character has two bytes or more on average, as Chinese."""
    text = "".join(map(turn_text, row_turns(row)))
    size = len(text.encode())
    width = "wide" if size >= 2 * len(text) else "narrow"
    figures = {"rows": 1, "bytes": size, "characters": len(text), "tokens": tokens}
    return {f"{width}_{what}": figure for what, figure in figures.items()} if text else {}


def sample_rows(rows: Sequence[dict[str, Any]], preparation: Preparation, count: int) -> list[dict[str, Any]]:
    """At most `count` good rows among raw records, spread over them: where each stands, and its text in pieces."""
    found: list[dict[str, Any]] = []
    step = max(1, len(rows) // max(1, count))
    for record in (rows[n] for start in range(min(step, 20)) for n in range(start, len(rows), step)):
        if len(found) >= count:
            break
        pieces, _, _ = encode_records([record], preparation)
        if pieces:
            shown = text_pieces(preparation.tokenizer, pieces[0])
            found.append({"file": record["file"], "row": record["number"], "pieces": shown})
    return found


def text_pieces(tokenizer: Any, row: EncodedRow) -> list[tuple[str, bool]]:
    """The text of a row as the model sees it, special tokens written out, in pieces that are in the loss or not."""
    pieces: list[tuple[str, bool]] = []
    before = ""
    for trained, group in groupby(range(len(row.labels)), lambda n: row.labels[n] != IGNORED):
        *_, last = group  # decoded from the beginning: a word by itself may lose the blank before it
        text = tokenizer.decode(row.input_ids[: last + 1], clean_up_tokenization_spaces=False)
        pieces.append((text[len(before) :], trained))
        before = text
    return pieces


# ---- what was counted ----


class Tally:
    """The sums of what `encode_records` counted about the rows of one split."""

    def __init__(self) -> None:
        self.figures: Counter[str] = Counter()
        self.sums: dict[str, Counter[Any]] = {name: Counter() for name in (*COUNTED, "dropped", "kinds")}
        self.examples: dict[str, list[dict[str, Any]]] = {}

    def add(self, counts: dict[str, Any], bad_rows: Sequence[dict[str, Any]]) -> None:
        for name, value in counts.items():
            if name in COUNTED:
                self.sums[name].update({str(key): count for key, count in value.items()})
            else:
                self.figures[name] += value
        for bad in bad_rows:
            reason = reason_of(bad)
            self.sums["dropped"][reason] += 1
            self.sums["kinds"][bad["kind"]] += 1
            if len(seen := self.examples.setdefault(reason, [])) < SHOWN:
                seen.append(bad)

    def part(self) -> dict[str, Any]:
        """The sums as a split's entry in the report."""
        figures = {name: self.figures[name] for name in ("read", "kept", "tokens", "trained", "no_end")}
        sums = {name: dict(counter.most_common()) for name, counter in self.sums.items()}
        return {**figures, "rows": self.sums["lengths"].total(), **sums, "examples": self.examples}


def add_counts(log: Path, bad_rows: Path) -> dict[str, Any]:
    """Add up what the processes wrote about a split; every bad row goes into `bad_rows`, in the order of the data."""
    tally = Tally()
    with open(bad_rows, "w", encoding="utf-8") as out:
        for file in sorted(log.glob("*.jsonl")):
            with open(file, encoding="utf-8") as f:
                for entry in map(json.loads, f):
                    tally.add(entry["counts"], entry["bad"])
                    out.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in entry["bad"])
    shutil.rmtree(log)
    if not tally.examples:
        bad_rows.unlink()
    return tally.part()


def reason_of(bad: dict[str, Any]) -> str:
    """What a bad row has in common with others: its problem without the numbers."""
    return re.sub(r"\d[\d,]*", "N", bad["problem"])


def percentiles(lengths: dict[str, int]) -> dict[int, int]:
    """Lengths in tokens that 50, 90, 99 and 100 % of the rows do not exceed; from length to how many have it."""
    total, reached, found = sum(lengths.values()), 0, {}
    marks = list(LENGTHS)
    for length, count in sorted((int(n), c) for n, c in lengths.items()):
        reached += count
        while marks and reached * 100 >= marks[0] * total:
            found[marks.pop(0)] = length
    return found


def refuse_rows(d: Dataset, name: str, part: dict[str, Any]) -> list[Problem]:
    """The problems of one split: bad rows where they are refused, or more of them than may be dropped.

    A row that stands for all that a damaged file lost behind it is refused in any case: nobody knows how many.
    """
    kinds, read = part["kinds"], part["read"]
    allowed = d.max_bad_rows * read if d.max_bad_rows < 1 else d.max_bad_rows
    problems: list[Problem] = []
    for kind, refused in (("lost", True), ("bad", d.on_bad_row == "refuse"), ("long", d.on_long_row == "refuse")):
        if not kinds.get(kind) or not (refused or kinds[kind] > allowed):
            continue
        key, fix = "dataset.on_bad_row", "mend them, or leave them out: dataset.on_bad_row=drop"
        if kind == "lost":
            key, fix = "dataset.path", "write or fetch the file again"
        if kind == "long":
            key, fix = "trainer.max_length", "raise trainer.max_length, or dataset.on_long_row=truncate|split|drop"
        if not refused:
            mend = "raise trainer.max_length" if kind == "long" else "mend them"
            fix = f"{mend}, or dataset.max_bad_rows={kinds[kind]} (now {d.max_bad_rows:g})"
        for reason, rows in part["examples"].items():
            if rows[0]["kind"] == kind:
                problems.append(
                    Problem(describe_bad_rows(reason, rows, part["dropped"][reason], read, name), key, fix)
                )
    if not part["kept"] and not problems:
        reasons = "; ".join(part["dropped"]) or "it holds no rows"
        text = f"none of the {read:,} rows of {name} can be trained on: {reasons}"
        problems.append(Problem(text, "dataset.path", "kit data FILE shows its rows and how they are read"))
    return [replace(p, rule="bad-rows") for p in problems]


def describe_bad_rows(reason: str, rows: Sequence[dict[str, Any]], count: int, read: int, name: str) -> str:
    """One reason, how many rows have it, and where the first of them stand."""
    places = [f"{row['file']} row {row['number']}: {row['problem']}" for row in rows]
    more = f"\n  and {count - len(rows):,} more" if count > len(rows) else ""
    share = f"{count:,} of {read:,} rows of {name}"
    return f"{share} cannot be trained on\n  " + "\n  ".join(places) + more
