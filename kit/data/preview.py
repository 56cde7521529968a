"""What `kit data` tells: every row read and judged, some of them as the model will see them; without a model, raw."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kit.data import load, prepare
from kit.errors import KitError, Problem
from kit.rows.turns import EmptyAnswer, RowProblem, map_role
from kit.schema.run_plan import Dataset, RunPlan
from kit.storage.json_files import read_json_or_empty
from kit.system.terminal import show_progress

RAW_ROWS = 3  # shown as they stand in the file
SIMULATED = 50_000  # rows that stand for all of a split, where batches and packing are tried out
GROUPED = 50  # batches within which group_by_length sorts: transformers' LengthGroupedSampler


def preview_raw(d: Dataset, folder: Path) -> dict[str, Any]:
    """Format, counts and bad rows of data without a model; the bad rows are written into `folder`."""
    training, held_out = load.open_sources(d)
    parts = {"train": training} | ({"validation": [held_out]} if held_out else {})
    shown: dict[str, Any] = {"sources": describe_sources(sum(parts.values(), [])), "splits": {}, "notes": []}
    seen: dict[int, str] = {}
    problems: list[Problem] = []
    for name, opened in parts.items():
        part = judge_rows(opened, folder / f"{name}-{prepare.BAD_ROWS}", name, seen)
        problems += prepare.refuse_rows(d, name, part)
        shown["splits"][name] = count_rows(part)
    if d.test_size and not held_out:
        shown["notes"].append("what is held out of them (dataset.test_size) is counted with a model")
    return shown | {"problems": problems}


def judge_rows(opened: Sequence[load.OpenSource], bad_rows: Path, name: str, seen: dict[int, str]) -> dict[str, Any]:
    """Convert each row of one split and count what became of it; `seen`: the split in which a row was met first."""
    tally, sources = prepare.Tally(), [o.source for o in opened]
    duplicates: Counter[str] = Counter()
    progress = show_progress(name, "rows", None, lambda: tally.figures["read"])
    with progress, open(bad_rows, "w", encoding="utf-8") as out:
        for record in iterate_records(opened):
            bad = []
            try:
                load.canonical_row(record, sources)
            except RowProblem as problem:
                bad = [prepare.describe_bad_row(record, problem)]
                out.write(json.dumps(bad[0], ensure_ascii=False) + "\n")
            tally.add({"read": 1, "kept": 1 - len(bad)}, bad)
            if not record["problem"]:
                duplicates[seen.setdefault(record["hash"], name)] += 1
    own = sum(1 for split in seen.values() if split == name)
    part = tally.part() | {"duplicates": duplicates[name] - own}
    return part if name == "train" else part | {"in_train": duplicates["train"]}


def iterate_records(opened: Sequence[load.OpenSource]) -> Iterator[dict[str, Any]]:
    """The rows of data sets as records, one set behind the other, each up to its limit."""
    for number, one in enumerate(opened):
        for raw in islice(one.read(one.shards), one.source.limit):
            yield load.make_record(raw, number)


def preview_tokens(plan: RunPlan, tokenizer: Any, samples: int) -> tuple[dict[str, Any], Path]:
    """The same with a model's tokens, from the rows that a run prepares and finds ready then; and their folder."""
    folder = prepare.prepare_or_report(plan, tokenizer)
    report = prepare.read_report(folder)
    shown = {"sources": describe_sources(load.open_all(plan.dataset)), "notes": report["notes"]}
    shown["splits"] = {n: count_rows(part) | count_tokens(plan, n, part) for n, part in report["splits"].items()}
    stored = read_json_or_empty(folder / prepare.SAMPLES).get("samples", [])
    if len(stored) < samples:
        training, _ = load.open_sources(plan.dataset)
        first = [r for n in range(len(training)) for r in islice(iterate_records([training[n]]), load.SAMPLED_ROWS)]
        preparation = prepare.make_preparation(plan, tokenizer, [o.source for o in training])
        stored = prepare.sample_rows(first, preparation, samples)
    train = report["splits"]["train"]
    rows = train.get("packed", train["rows"])
    per_rank = -(-rows // (plan.trainer["per_device_train_batch_size"] * plan.world_size))
    steps = -(-per_rank // plan.trainer["gradient_accumulation_steps"])
    shown["epoch"] = {"rows": rows, "steps": steps, "tokens": train["tokens"], "trained_tokens": train["trained"]}
    shown["samples"] = stored[:samples]
    shown["cache"] = {"key": folder.name, "folder": str(folder)}
    return shown | {"problems": [Problem(**p) for p in report["refused"]]}, folder


def describe_sources(opened: Sequence[load.OpenSource]) -> list[dict[str, Any]]:
    """Each data set: its files, its format and what of it is mapped, and its first rows as they stand."""
    described = []
    for one in opened:
        first = list(islice(one.read(one.shards), load.SAMPLED_ROWS))
        roles: dict[str, str] = {}
        lists = [value for raw in first for value in (raw.row or {}).values() if isinstance(value, list)]
        for turn in itertools.chain(*lists):
            role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
            try:
                roles |= {role: map_role(role, one.source)} if isinstance(role, str) else {}
            except RowProblem:  # said of the row
                continue
        source = one.source.model_dump(include={"path", "split", "format", "columns", "template"})
        good = [r for r in first if r.row is not None][:RAW_ROWS]
        raw = [{"file": r.file, "row": r.number, "offset": r.offset, "data": r.row} for r in good]
        mapped = {theirs: ours for theirs, ours in roles.items() if theirs != ours}
        files = [str(f) for f in one.files]
        described.append({"key": one.key, **source, "roles": mapped, "files": files, "raw": raw})
    return described


def count_rows(part: dict[str, Any]) -> dict[str, Any]:
    """What became of the rows of one split: kept + dropped = read."""
    bad = [name_bad_row(row) for rows in part["examples"].values() for row in rows]
    counts = {key: part[key] for key in ("read", "kept", "dropped", "duplicates", "in_train") if key in part}
    return counts | {"bad": bad}


def name_bad_row(row: dict[str, Any]) -> dict[str, Any]:
    offset = None if row["offset"] < 0 else row["offset"]
    return {"file": row["file"], "row": row["number"], "offset": offset, "reason": row["problem"], "kind": row["kind"]}


def count_tokens(plan: RunPlan, name: str, part: dict[str, Any]) -> dict[str, Any]:
    """Lengths, what was cut, padding with and without packing, and tokens per byte of one split."""
    lengths = {int(length): count for length, count in part["lengths"].items()}
    found = prepare.percentiles(part["lengths"])
    batch = plan.trainer["per_device_train_batch_size" if name == "train" else "per_device_eval_batch_size"]
    grouped = name == "train" and plan.trainer.get("train_sampling_strategy") == "group_by_length"
    text: dict[str, Any] = {}
    for width in ("narrow", "wide"):
        if rows := part["text"].get(f"{width}_rows"):
            size, letters, tokens = (part["text"][f"{width}_{what}"] for what in ("bytes", "characters", "tokens"))
            text[width] = {
                "rows": rows,
                "bytes": size,
                "tokens_per_byte": round(tokens / size, 4),
                "tokens_per_character": round(tokens / letters, 4),
            }
    return {
        **{key: part[key] for key in ("rows", "tokens", "trained", "no_end", "notes", "packed") if key in part},
        "trained_share": share(part["trained"], part["tokens"]),
        "lengths": {key: found.get(at, 0) for key, at in zip(("median", "p90", "p99", "max"), found, strict=False)},
        "batch_rows": batch,
        "pad_share": pad_share(lengths, batch, plan.trainer["seed"], grouped),
        "packed_pad_share": packed_pad_share(lengths, plan.trainer.get("max_length", 1024), part.get("packed")),
        "text": text,
    }


def share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def spread_lengths(lengths: dict[int, int]) -> list[int]:
    """The lengths of all rows in order, or of every n-th where there are more than SIMULATED."""
    step = -(-sum(lengths.values()) // SIMULATED)
    return [length for length, count in sorted(lengths.items()) for _ in range(count)][:: step or 1]


def pad_share(lengths: dict[int, int], batch: int, seed: int, grouped: bool) -> float | None:
    """How much of the batches is padding where rows are drawn at random, or grouped by length."""
    drawn = spread_lengths(lengths)
    random.Random(seed).shuffle(drawn)
    if grouped:
        size = GROUPED * batch
        drawn = [n for at in range(0, len(drawn), size) for n in sorted(drawn[at : at + size], reverse=True)]
    batches = [drawn[at : at + batch] for at in range(0, len(drawn), batch)]
    return share(sum(max(b) * len(b) - sum(b) for b in batches), sum(max(b) * len(b) for b in batches))


def packed_pad_share(lengths: dict[int, int], limit: int | None, packed: int | None) -> float | None:
    """How much of rows of `limit` tokens stays empty: of the `packed` ones that there are, else packed by best fit."""
    if not limit or not lengths:
        return None
    if packed:
        return share(packed * limit - sum(n * c for n, c in lengths.items()), packed * limit)
    rooms: list[int] = []  # what is left in each row, in order
    for length in reversed(spread_lengths(lengths)):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else limit
        bisect.insort(rooms, room - length)
    return share(sum(rooms), len(rooms) * limit)


# ---- one row ----


def preview_row(
    d: Dataset, plan: RunPlan | None, tokenizer: Any, number: int, file: str | None
) -> tuple[dict[str, Any], bool]:
    """One row end to end: raw, canonical, rendered, token by token; and whether the plan refuses it."""
    record, one = find_record(load.open_all(d), number, file)
    place = name_bad_row(record | {"kind": None})
    shown: dict[str, Any] = {key: place[key] for key in ("file", "row", "offset")}
    shown |= {"format": one.source.format, "problem": None, "raw": json.loads(record["row"] or "null")}
    try:
        shown["canonical"] = load.canonical_row(record, [one.source])
    except RowProblem as problem:
        return shown | {"problem": str(problem)}, not isinstance(problem, EmptyAnswer) and d.on_bad_row == "refuse"
    if plan is None:
        return shown, False
    preparation = prepare.make_preparation(plan, tokenizer, [one.source])
    made, counts, bad = prepare.encode_records([record], preparation)
    if bad:
        refused = {"bad": d.on_bad_row, "long": d.on_long_row}.get(bad[0]["kind"]) == "refuse"
        return shown | {"problem": bad[0]["problem"]}, refused
    shown["notes"], shown["train_on"] = list(counts["notes"]), preparation.encodings[0].train_on
    shown["pieces"] = [piece for row in made for piece in prepare.text_pieces(tokenizer, row)]
    ids = [(i, label != prepare.IGNORED) for row in made for i, label in zip(row.input_ids, row.labels, strict=True)]
    shown["tokens"] = [{"id": i, "text": tokenizer.decode([i]), "trained": trained} for i, trained in ids]
    return shown, False


def find_record(opened: Sequence[load.OpenSource], number: int, file: str | None) -> tuple[Any, load.OpenSource]:
    """The record of row `number`, as bad rows are numbered; KitError where it is not there, or in several files."""
    named: dict[str, tuple[load.OpenSource, Any]] = {}
    for one in opened:
        for shard in one.shards:
            named.setdefault(str(shard[0] if isinstance(shard, tuple) else shard), (one, shard))
    wanted = [n for n in named if file is None or os.path.abspath(file) == n or f"/{n}".endswith(f"/{file}")]
    if len(wanted) != 1:
        said = f"{file} is none of the files" if not wanted else f"{len(wanted)} files have rows"
        raise KitError(said, "--row", f"--file with one of {', '.join(map(os.path.relpath, list(named)[:5]))}")
    one, shard = named[wanted[0]]
    last = 0
    for raw in one.read([shard]):
        if raw.number == number:
            return load.make_record(raw, 0), one
        last = raw.number
        if last > number:
            raise KitError(f"row {number} of {raw.file} is blank", "--row", f"--row {last}")
    raise KitError(f"{wanted[0]} has no row {number}", "--row", f"its last is {last}")


# ---- the good rows ----


def check_clean_file(out: Path, d: Dataset, overwrite: bool) -> None:
    """KitError where the kept rows cannot be written to `out`: looked at before the long pass."""
    fix = ""
    if out.suffix not in (".jsonl", ".ndjson"):
        problem, fix = f"{out} is written as JSON lines", "give a name that ends in .jsonl"
    elif d.mix:
        problem, fix = "rows of several sets do not belong in one file", "name one set: kit data FILE --fix-out ..."
    elif d.limit or "[" in d.split:
        problem, fix = "only a part of the rows is looked at", "leave out dataset.limit and the slice of dataset.split"
    elif taken := [p for p in (out, bad_file(out)) if p.exists()]:
        problem = f"{taken[0]} exists"
        if any(os.path.samefile(f, p) for one in load.open_all(d) for f in one.files for p in taken):
            problem, fix = f"{taken[0]} is read: it is not written over", "choose another name"
        elif not overwrite:
            fix = "choose another name, or --overwrite"
    elif not out.parent.is_dir():
        problem, fix = f"there is no folder {out.parent}", "make it"
    if fix:
        raise KitError(problem, "--fix-out", fix)


def bad_file(out: Path) -> Path:
    return out.with_name(out.stem + ".bad.jsonl")


def write_clean(d: Dataset, folder: Path, out: Path) -> dict[str, Any]:
    """Write the training rows that are kept, as they stand in their files, and beside them the bad ones."""
    reasons: dict[tuple[str, int], dict[str, Any]] = {}
    for file in folder.glob(f"*-{prepare.BAD_ROWS}"):
        with open(file, encoding="utf-8") as f:
            reasons |= {(bad["file"], bad["number"]): name_bad_row(bad) for bad in map(json.loads, f)}
    counts: Counter[str] = Counter()
    names = {"kept": out, "bad": bad_file(out)}
    parts = {key: path.with_name(f".{path.name}.{os.getpid()}") for key, path in names.items()}
    try:
        with open(parts["kept"], "w", encoding="utf-8") as kept, open(parts["bad"], "w", encoding="utf-8") as bad:
            for record in iterate_records(load.open_sources(d)[0]):
                reason = reasons.get((record["file"], record["number"]))
                counts["bad" if reason else "kept"] += 1
                if reason is None:
                    kept.write(record["row"] + "\n")
                else:
                    raw = json.loads(record["row"] or "null")
                    bad.write(json.dumps(reason | {"data": raw}, ensure_ascii=False, default=str) + "\n")
        for key, path in names.items():
            os.replace(parts[key], path)
    finally:
        for path in parts.values():
            path.unlink(missing_ok=True)
    return {key: {"file": str(path), "rows": counts[key]} for key, path in names.items()}
