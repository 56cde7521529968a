"""`kit data`: what a file holds, and what a model will see of it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from kit.config.flags import parse_words
from kit.errors import DONE, REFUSED, KitError, Problem
from kit.system.terminal import print_problems, verb_parser

TRAINED = "green"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey
SHOWN = 1_500  # characters of a row or a sample


def data_verb(argv: list[str]) -> int:
    parser = verb_parser("data", "Reads and judges every row of a data set; with a model, also as it will see them.")
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | DATA | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="rendered rows that are shown; 3 by default"
    )
    parser.add_argument("--row", type=int, metavar="N", help="one row end to end, by its number in the file")
    parser.add_argument("--file", help="the file of --row, where there are several")
    parser.add_argument(
        "--fix-out", metavar="FILE.jsonl", help="write the rows that are kept, and beside them the bad"
    )
    parser.add_argument("--overwrite", action="store_true", help="--fix-out may replace what it wrote before")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    a = parse_words(parser, argv)
    if a.row is not None and a.row < 1:
        raise KitError(f"there is no row {a.row}", "--row", "rows are counted from 1")
    from kit import api

    options = {"row": a.row, "file": a.file, "fix_out": a.fix_out, "overwrite": a.overwrite}
    try:
        shown = api.data(*a.overrides, config_dir=a.config_dir, samples=max(0, a.samples), **options)
    except KitError as error:
        if not a.json:
            raise
        print(json.dumps({"problems": error.to_json(), "refused": True}, indent=1))
        return error.code
    if a.json:
        print(json.dumps(shown, indent=1, ensure_ascii=False, default=str))
    elif a.row is not None:
        print_row(shown["row"], shown["notes"])
    else:
        print_data(shown)
    return REFUSED if shown["refused"] else DONE


# ---- all rows ----


def print_data(shown: dict[str, Any]) -> None:
    console = make_console()
    for source in shown["sources"]:
        console.print(f"data       {describe_source(source)}")
        for raw in source["raw"]:
            console.print(f"  row {raw['row']}  ", end="")
            console.print(Text(shorten(json.dumps(raw["data"], ensure_ascii=False, default=str), 300)))
    for name, part in shown["splits"].items():
        console.print()
        for label, line in describe_split(name, part, shown.get("train_on")):
            console.print(Text(f"{label:<11}{line}"))
        print_bad_rows(console, part)
    if (epoch := shown.get("epoch")) and epoch["rows"]:
        console.print(f"\nepoch      {epoch['rows']:,} rows in {epoch['steps']:,} steps, {epoch['tokens']:,} tokens, "
                      f"{epoch['trained_tokens']:,} of them trained")  # fmt: skip
    for sample in shown.get("samples", ()):
        console.print(f"\nsample     {here(sample['file'])} row {sample['row']}   {legend(console)}")
        console.print(paint(console, sample["pieces"], SHOWN))
    console.print()
    for note in shown["notes"]:
        console.print(Text(f"note       {note}"))
    if written := shown.get("fix_out"):
        for key, what in written.items():
            console.print(Text(f"written    {here(what['file'])}: {what['rows']:,} rows {key}"))
    if cache := shown.get("cache"):
        console.print(Text(f"prepared   {cache['folder']}" + ("" if not shown["problems"] else " (the report alone)")))
    if shown["model"] is None:
        console.print("with model=NAME: rendered rows, tokens, lengths, what is cut and trained (kit list model)")
    problems = [Problem(**p) for p in shown["problems"]]
    listed = [replace(p, problem="bad rows, listed above") if "\n" in p.problem else p for p in problems]
    if listed:
        console.file.flush()
        print_problems(list(dict.fromkeys(listed)), refused=True)


def describe_source(source: dict[str, Any]) -> str:
    files = source["files"]
    name = here(files[0]) + (f" and {len(files) - 1} more" if files[1:] else "") if files else source["path"]
    said = [f"format {source['format']}"]
    said += [f"{theirs} as {ours}" for theirs, ours in source["roles"].items()]
    said += [f"column {theirs} as {ours}" for ours, theirs in source["columns"].items()]
    said += ["dataset.template"] if source["template"] else []
    return f"{name}: {', '.join(said)}"


def describe_split(name: str, part: dict[str, Any], train_on: str | None) -> list[tuple[str, str]]:
    """(label, line) of all that was counted of one split."""
    dropped = part["read"] - part["kept"]
    lines = [(name, f"{part['kept']:,} rows kept + {dropped:,} left out = {part['read']:,} read")]
    if part["duplicates"]:
        lines.append(("", f"exact duplicates of an earlier row: {part['duplicates']:,}"))
    if part.get("in_train"):
        lines.append(("", f"also among the training rows: {part['in_train']:,}"))
    if "lengths" not in part or not part["kept"]:
        return lines
    found, on = part["lengths"], (train_on or "").replace("_", " ")
    lines += [
        ("tokens", f"{part['tokens']:,}, {percent(part['trained_share'])} of them trained (loss on {on})"),
        ("lengths", f"median {found['median']:,}, p90 {found['p90']:,}, p99 {found['p99']:,}, max {found['max']:,}"),
    ]
    lines += [("", f"{count:,} rows: {note}") for note, count in part["notes"].items()]
    if part["no_end"]:
        lines.append(("", f"{part['no_end']:,} rows have no end token in the loss: the model may not learn to stop"))
    padding = f"{percent(part['pad_share'])} of batches of {part['batch_rows']}"
    if part["packed_pad_share"] is not None:
        did = "packed, as they are" if "packed" in part else "if packed by best fit"
        padding += f"; {percent(part['packed_pad_share'])} {did}"
    lines.append(("padding", padding))
    for width, letters in (("narrow", ""), ("wide", " with Chinese, Japanese or the like")):
        if figures := part["text"].get(width):
            per_byte, per_character = figures["tokens_per_byte"], figures["tokens_per_character"]
            line = f"{per_byte:.3g} tokens per byte, {per_character:.3g} per character in {figures['rows']:,} rows"
            lines.append(("text", f"{line}{letters}, the template's tokens included"))
    return lines


def print_bad_rows(console: Console, part: dict[str, Any]) -> None:
    """Each reason, how often it is given, and where the first of its rows stand."""
    from kit.data.prepare import reason_of

    for reason, count in part["dropped"].items():
        rows = [row for row in part["bad"] if reason_of({"problem": row["reason"]}) == reason]
        alike = len({row["reason"] for row in rows}) == 1
        console.print(Text(f"{rows[0]['kind']:<11}{count:,}: {rows[0]['reason'] if alike else reason}"))
        for row in rows:
            offset = "" if row["offset"] is None else f" (byte {row['offset']:,})"
            differs = "" if alike else f": {row['reason']}"
            console.print(Text(f"           {here(row['file'])} row {row['row']}{offset}{differs}"))


# ---- one row ----


def print_row(row: dict[str, Any], notes: list[str]) -> None:
    console = make_console()
    offset = "" if row["offset"] is None else f", byte {row['offset']:,}"
    console.print(Text(f"{here(row['file'])} row {row['row']}{offset}: format {row['format']}"))
    for title in ("raw", "canonical"):
        if row.get(title) is not None:
            console.print(f"\n{title}")
            console.print(Text(visible(json.dumps(row[title], ensure_ascii=False, indent=1, default=str))))
    if "pieces" in row:
        console.print(f"\nrendered   {legend(console)}")
        console.print(paint(console, row["pieces"], None))
        trained = sum(token["trained"] for token in row["tokens"])
        console.print(f"\ntokens     {len(row['tokens']):,}, {trained:,} of them trained ({row['train_on']})")
        for n, token in enumerate(row["tokens"]):
            mark = "trained" if token["trained"] else ""
            console.print(Text(f"{n:>6} {token['id']:>8}  {json.dumps(token['text'], ensure_ascii=False):<24} {mark}"))
    for note in [*row.get("notes", ()), *notes]:
        console.print(Text(f"note       {note}"))
    if row["problem"]:
        console.print(Text(f"\nbad        {row['problem']}"))


# ---- text ----


def make_console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def in_colours(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def legend(console: Console) -> Text:
    trained = Text("trained", TRAINED) if in_colours(console) else Text("«trained»")
    return Text("(").append_text(trained).append(")")


def paint(console: Console, pieces: list[tuple[str, bool]], limit: int | None) -> Text:
    """The pieces of a rendered row, those in the loss coloured, or between « and » where there are no colours."""
    painted = Text()
    length = sum(len(text) for text, _ in pieces)
    left = length if limit is None else limit
    for text, trained in pieces:
        part = visible(text[: max(0, left)])
        left -= len(text)
        if not part:
            continue
        if in_colours(console):
            painted.append(part, TRAINED if trained else "")
        else:
            painted.append(f"«{part}»" if trained else part)
    return painted if left >= 0 else painted.append(f" ... {-left:,} characters more")


def visible(text: str) -> str:
    """Text that a terminal only shows: control characters as escapes."""
    return CONTROLS.sub(lambda c: ascii(c[0])[1:-1], text)


def shorten(text: str, length: int) -> str:
    return visible(text if len(text) <= length else text[:length] + f" ... {len(text) - length:,} characters more")


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def here(path: str) -> str:
    """A path as it is typed from here, where it is below."""
    return os.path.relpath(path) if os.path.abspath(path).startswith(os.getcwd() + os.sep) else path
