"""Raw rows of files, one by one, as they were written: no value depends on another row.

No torch, no datasets; pyarrow only for what needs it: Parquet, Arrow, .zst and .lz4.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from kit.errors import KitError, first_line
from kit.inspection.data_files import refuse_suffix
from kit.inspection.hub_dataset import has_data_suffix, split_suffixes
from kit.rows.tables import count_table_rows, read_table
from kit.storage.json_text import JsonText

MAX_ROW = 64 << 20  # bytes: a longer row is no text to train on
TOO_LONG = f"longer than {MAX_ROW >> 20} MB"
CHUNK = 1 << 20  # bytes read at once
SAMPLE, SAMPLE_BYTES = 200, 1_000_000  # rows and bytes that a look at a data set reads at most
UNPACKED = 8 << 20  # bytes by which the ratio of a packed file is told
BREAKS_OFF = "the file breaks off after row"  # begins the problem of a last row behind which more was lost
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises
OF_A_ROW = {"messages", "conversations", "prompt", "completion", "text", "instruction", "output", "question", "answer"}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in its file, or why it cannot be read."""

    file: str  # path as found
    number: int  # 1-based: line of JSON lines and text, record otherwise (a CSV's header is none)
    offset: int | None  # byte at which the row begins, unpacked; None for tables, CSV and lists within an object
    row: dict[str, Any] | None
    problem: str | None  # in words: "not JSON: Expecting ',' delimiter at column 17"


def read_rows(files: Sequence[Path]) -> Iterator[RawRow]:
    """The rows of the files, in order, in bounded memory; blank lines are none.

    What is wrong with one row is its `problem`; a file that ends too early ends with a row that says so (BREAKS_OFF).
    KitError where nothing of a file can be read, or its shape is not one of rows.
    """
    for file in files:
        number = 0
        try:
            if os.path.getsize(file) == 0:
                continue
            for raw in open_rows(file):
                number = raw.number
                yield raw
        except ImportError:
            problem = "this needs pyarrow, which is not installed"
            raise refuse_file(file, problem, "pip install pyarrow") from None
        except DAMAGE as error:
            if number == 0:
                raise refuse_file(file, first_line(error)) from None
            yield RawRow(str(file), number + 1, None, None, f"{BREAKS_OFF} {number}: {first_line(error)}")


def sample_rows(files: Sequence[Path], count: int = SAMPLE, max_bytes: int = SAMPLE_BYTES) -> list[RawRow]:
    """The first rows of the first file that has any, and the first row of up to 20 further ones: fast whatever the
    files' size. KitError where none has a row."""
    rows: list[RawRow] = []
    size = 0
    for file in files:
        for raw in islice(read_rows([file]), 1 if rows else count):
            rows.append(raw)
            size += len(str(raw.row))
            if max(size, raw.offset or 0) > max_bytes:
                break
        if len({raw.file for raw in rows}) > 20:
            break
    if rows:
        return rows
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and the {len(files) - 1} files after it"
    raise KitError(f"{name}: no rows", "dataset.path", "give a file with at least one row", rule="dataset-rows")


def is_whole(files: Sequence[Path], sample: Sequence[RawRow]) -> bool:
    """Whether the rows that sample_rows read are surely all of one file."""
    read = sum(len(str(raw.row)) for raw in sample)
    return len(files) == 1 and len(sample) < SAMPLE and read < SAMPLE_BYTES // 2


def estimate_rows(files: Sequence[Path], sample: Sequence[RawRow]) -> float:
    """Estimate the rows of files without reading them: what the footers of tables say, else size by size of a row.

    sample: what sample_rows read of them. KitError and OSError as in reading; ImportError without pyarrow.
    """
    if is_whole(files, sample):
        return len(sample)
    first = [raw for raw in sample if raw.file == sample[0].file]
    rows, size = 0.0, 0.0
    for file in files:
        kind, packing = split_suffixes(file.name)
        if kind not in (".parquet", ".arrow"):
            size += unpacked_size(file, packing)
        elif os.path.getsize(file):
            with open_table(file) as source:
                rows += count_table_rows(source, kind)
    return rows + (size / bytes_of_row(first) if size else 0)


def bytes_of_row(rows: Sequence[RawRow]) -> float:
    """How many bytes a row takes in its file, on average of the first ones, `rows`."""
    first, last = rows[0], rows[-1]
    if first.offset is not None and last.offset is not None:
        return (last.offset - first.offset) / (len(rows) - 1) if len(rows) > 1 else len(str(first.row))
    kind, packing = split_suffixes(Path(first.file).name)
    if kind == ".json":  # the one list in an object, which no reader takes in parts
        return unpacked_size(Path(first.file), packing) / sum(1 for _ in read_rows([Path(first.file)]))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(raw.row.values() for raw in rows if raw.row)
    return len(text.getvalue().encode(errors="surrogateescape")) / len(rows)


def unpacked_size(file: Path, packing: str) -> float:
    """Bytes of a file when it is unpacked: by how much its first bytes grow, where there are more of them."""
    size = os.path.getsize(file)
    if not packing:
        return size
    with open(file, "rb") as source, unpack(packing, source) as stream:
        read = len(stream.read(UNPACKED))
        return read if read < UNPACKED else size * read / source.tell()


def open_rows(file: Path) -> Iterator[RawRow]:
    if not has_data_suffix(file.name):
        raise refuse_suffix(file)
    kind, _ = split_suffixes(file.name)
    if kind in (".parquet", ".arrow"):
        with open_table(file) as source:
            for number, (row, problem) in enumerate(read_table(source, kind), 1):
                yield RawRow(str(file), number, None, row, problem)
        return
    if kind == ".json" and is_json_lines(file):
        kind = ".jsonl"
    tsv = partial(read_csv, delimiter="\t")
    readers: dict[str, Any] = {".json": read_json_text, ".csv": read_csv, ".tsv": tsv, ".txt": read_text}
    with open_bytes(file) as stream:
        yield from readers.get(kind, read_json_lines)(file, stream, skip_byte_order_mark(file, stream))


def refuse_file(file: Path, problem: str, fix: str = "check the file") -> KitError:
    return KitError(f"{file} cannot be read: {problem}", "dataset.path", fix, rule="dataset-unreadable")


def open_bytes(file: Path) -> BinaryIO:
    """Open a file, unpacked as it is read."""
    packing = split_suffixes(file.name)[1]
    return unpack(packing, str(file)) if packing else open(file, "rb", buffering=CHUNK)


def unpack(packing: str, source: Any) -> BinaryIO:
    """Open a packed file, by its path or as it was opened, so that what is read of it is unpacked."""
    if packing in (".zst", ".lz4"):
        import pyarrow as pa

        packed = pa.CompressedInputStream(source, {".zst": "zstd", ".lz4": "lz4"}[packing])
        return io.BufferedReader(packed, CHUNK >> 4)  # what stands in it is lost where the file breaks off
    opens: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opens[packing](source, "rb")


def open_table(file: Path) -> BinaryIO:
    """Open a file with random access: one that is packed is unpacked into a file without a name."""
    stream = open_bytes(file)
    if not split_suffixes(file.name)[1]:
        return stream
    unpacked = tempfile.TemporaryFile()
    with stream:
        shutil.copyfileobj(stream, unpacked, CHUNK)
    unpacked.seek(0)
    return unpacked


def skip_byte_order_mark(file: Path, stream: Any) -> int:
    """Go behind the mark of UTF-8 and return its length; KitError for UTF-16 and UTF-32, with a mark or without."""
    head = stream.peek(4)[:4]
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (any(head) and b"\0" in head):
        fix = f"iconv -f UTF-16 -t UTF-8 {file.name} > utf8-{file.name}"
        raise refuse_file(file, "it is UTF-16 or UTF-32, not UTF-8", fix)
    return len(stream.read(3)) if head.startswith(codecs.BOM_UTF8) else 0


def read_lines(stream: BinaryIO, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """(number, byte offset, line) of each line; only a line feed ends one. Of a line over MAX_ROW just the beginning,
    longer than MAX_ROW, is returned."""
    number = 0
    while line := stream.readline(MAX_ROW + 1):
        number += 1
        yield number, offset, line
        offset += len(line)
        while len(line) > MAX_ROW and not line.endswith(b"\n") and (rest := stream.readline(CHUNK)):
            offset += len(rest)
            if rest.endswith(b"\n"):
                break


def read_json_lines(file: Path, stream: BinaryIO, start: int) -> Iterator[RawRow]:
    for number, offset, line in read_lines(stream, start):
        if not line.isspace():
            yield RawRow(str(file), number, offset, *parse_line(line))


def parse_line(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The row of a line of JSON, or why it is none."""
    if len(line) > MAX_ROW:
        return None, TOO_LONG
    cut = "" if line.endswith(b"\n") else " (the file may be cut off)"
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()  # the mark of a file that was joined to another
        return check_row(json.loads(text), text)
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start} of the line{cut}"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}{cut}"
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        return None, f"not JSON: {first_line(error).partition(';')[0]}{cut}"


def check_row(value: Any, text: str) -> tuple[dict[str, Any] | None, str | None]:
    """A value as a row, or why it is none: no object, or an escape in its text that no tokenizer takes."""
    if not isinstance(value, dict):
        return None, f"not an object: {text.strip():.40}"
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return None, f"half a character: {ascii(error.object[error.start])[1:-1]} without its other half"
    return value, None


def read_text(file: Path, stream: BinaryIO, start: int) -> Iterator[RawRow]:
    for number, offset, line in read_lines(stream, start):
        if line.strip():
            text = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
            problem = TOO_LONG if len(line) > MAX_ROW else check_text(text)
            yield RawRow(str(file), number, offset, None if problem else {"text": text}, problem)


def check_text(text: str) -> str | None:
    """What is wrong with the bytes of a text that was decoded with surrogateescape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 at byte {len(text[: error.start].encode())} of the row"
    return "a NUL byte" if "\0" in text else None


def read_csv(file: Path, stream: BinaryIO, start: int, delimiter: str = ",") -> Iterator[RawRow]:
    """Cells stay text as written; a row with more or fewer of them than the header is a problem."""
    csv.field_size_limit(MAX_ROW)
    lines = (decode_line(number, line) for number, _, line in read_lines(stream, start))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise refuse_file(file, f"its header is not CSV: {error}") from None
    check_header(file, header, delimiter)
    number = 0
    while True:
        try:
            cells, problem = next(reader), None
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"not CSV, line {reader.line_num}: {error}"
            if str(error) == "unexpected end of data":
                problem = "a quote that is opened and not closed until the end of the file"
        if not cells and not problem:
            continue
        number += 1
        if cells and len(cells) != len(header):
            problem = f"{len(cells)} cells, line {reader.line_num}; the header has {len(header)}"
        problem = problem or check_text("".join(cells))
        yield RawRow(str(file), number, None, None if problem else dict(zip(header, cells, strict=True)), problem)


def decode_line(number: int, line: bytes) -> str:
    if len(line) > MAX_ROW:  # whether a quote is open behind it cannot be known
        raise OSError(f"line {number} is {TOO_LONG}")
    return line.decode("utf-8", "surrogateescape")


def check_header(file: Path, header: list[str], delimiter: str) -> None:
    """KitError where the first row of a CSV cannot name columns."""
    other = next((c for c in ";\t|" if len(header) == 1 and c != delimiter and c in header[0]), None)
    if other:
        fix = "rename the file to .tsv" if other == "\t" else "save it comma-separated"
        raise refuse_file(file, f"its cells are separated by {other!r}, not {delimiter!r}", fix)
    if problem := check_text("".join(header)):
        raise refuse_file(file, f"its header is {problem}", f"iconv -f WINDOWS-1252 -t UTF-8 {file.name}")
    unnamed = next((place for place, name in enumerate(header, 1) if not name.strip()), None)
    twice = next((name for name in header if header.count(name) > 1), None)
    if unnamed or twice:
        problem = f"column {unnamed} of its header has no name" if unnamed else f"its header names {twice!r} twice"
        fix = "the first row names the columns, each once" + ("; pandas: index=False" if unnamed else "")
        raise refuse_file(file, problem, fix)


def is_json_lines(file: Path) -> bool:
    """Whether a .json file holds an object to a line: the first or the second line is one, and there are two."""
    with open_bytes(file) as stream:
        skip_byte_order_mark(file, stream)
        lines = filter(bytes.strip, iter(partial(stream.readline, CHUNK), b""))
        head = list(islice(lines, 2))
    return len(head) == 2 and head[0].lstrip()[:1] == b"{" and any(parse_line(line)[0] is not None for line in head)


def read_json_text(file: Path, stream: BinaryIO, start: int) -> Iterator[RawRow]:
    """A list of rows, an object that holds one, or objects one behind the other, each of them a row."""
    text = JsonText(stream, start, MAX_ROW)
    number = 0
    while first := text.peek():
        for offset, value, piece in text.take_list() if first == "[" else take_object(file, text):
            number += 1
            bad_bytes = check_text(piece)
            row, problem = (None, bad_bytes) if bad_bytes else check_row(value, piece)
            yield RawRow(str(file), number, offset, row, problem)
        if first == "[" and text.peek():
            raise OSError(f"something stands behind the list, at byte {text.offset}")


def take_object(file: Path, text: JsonText) -> Iterator[tuple[int | None, Any, str]]:
    """The elements of the one list of rows that an object holds, else the object itself."""
    offset = text.offset
    value, piece = text.take_value()
    if not isinstance(value, dict):
        raise OSError(f"not JSON at byte {offset} that holds rows: {piece:.40}")
    held = {k: v for k, v in value.items() if isinstance(v, list) and v and is_row(v[0])}
    if not held or (value.keys() - held.keys()) & OF_A_ROW:
        check_columns(file, value)
        yield offset, value, piece
    elif len(held) > 1:
        problem = f"it holds several lists of rows: {', '.join(held)}"
        raise refuse_file(file, problem, "write each into a file of its own")
    else:
        for row in next(iter(held.values())):
            yield None, row, json.dumps(row, ensure_ascii=False)


def is_row(value: Any) -> bool:
    """Whether an object in a list is a row, not a turn of a chat or a tool, which belong to a row."""
    return isinstance(value, dict) and not value.keys() & {"role", "from", "function", "speaker", "parameters"}


def check_columns(file: Path, row: dict[str, Any]) -> None:
    """KitError for an object that holds columns instead of rows, which other tools' to_json writes."""
    lists = [v for v in row.values() if isinstance(v, list) and not any(isinstance(x, dict) for x in v)]
    indexed = [v for v in row.values() if isinstance(v, dict) and v and all(k.isdecimal() for k in v)]
    if row and "input_ids" not in row and len(row) in (sum(map(bool, lists)), len(indexed)):
        problem = "it holds columns, not rows"
        raise refuse_file(file, problem, 'pandas.read_json(FILE).to_json("rows.jsonl", orient="records", lines=True)')
