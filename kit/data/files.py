"""The files behind `dataset.path`, and their rows, one by one, as they were written: no value depends on another row.

No torch, no datasets; pyarrow only for what needs it: Parquet, Arrow, .zst and .lz4.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from kit.data.tables import read_table
from kit.errors import KitError, first_line
from kit.inspection import hub_dataset
from kit.inspection.hub_dataset import KEYWORDS, split_files, split_words
from kit.storage.json_files import read_json, read_json_or_empty

SUFFIXES = {  # of a file that holds rows, and the builder of `datasets` for it
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
PACKINGS = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # each may stand behind a suffix
NO_ROWS = re.compile(  # what lies beside data in a folder
    r"(readme|licen[cs]e|notice|changelog|citation|requirements|stats|metadata|package|schema)\.(txt|json)"
    r"|cache-.*\.arrow|__MACOSX|\..*", re.I)  # fmt: skip
MAX_ROW = 64 << 20  # bytes: a longer row is no text to train on
CHUNK = 1 << 20  # bytes read at once
BREAKS_OFF = "the file breaks off after row"  # begins the problem of a last row behind which more was lost
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises
BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
OF_A_ROW = {"messages", "conversations", "prompt", "completion", "text", "instruction", "output", "question", "answer"}
SPLIT_WORDS: set[str] = set().union(*KEYWORDS.values())


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in its file, or why it cannot be read."""

    file: str  # path as found
    number: int  # 1-based: line of JSON lines and text, record otherwise (a CSV's header is none)
    offset: int | None  # byte at which the row begins, unpacked; None for tables, CSV and lists within an object
    row: dict[str, Any] | None
    problem: str | None  # in words: "not JSON: Expecting ',' delimiter at column 17"


# -- which files


def find_data_files(path: str | list[str], split: str = "train", config: str | None = None) -> list[Path] | None:
    """The files of a split: of a file, a folder, a glob or a list of these, in a fixed order; None for a Hub id.

    KitError where there are none, where the split is not there (naming those that are), or where kinds are mixed.
    """
    if isinstance(path, list):
        found = {p: find_data_files(p, split, config) for p in path}
        if not found or None in found.values():
            hub = [p for p, files in found.items() if files is None]
            problem = f"{hub[0]} in a list of files is a Hub id" if hub else "the list of files is empty"
            raise refuse_path(problem, "name files and folders; several data sets are dataset.mix")
        return list(dict.fromkeys(file for files in found.values() for file in files or ()))
    splits = find_splits(path, config)
    if splits is None:
        return None
    if split not in splits:
        has = ", ".join(splits)
        problem, fix = f"{path} has no split {split}; it has {has}", f"one of {has}, or name the files themselves"
        raise KitError(problem, "dataset.split", fix, rule="dataset-split")
    kinds = sorted({split_suffixes(f.name)[0].replace("ndjson", "jsonl") for f in splits[split]})
    if len(kinds) > 1:
        raise refuse_path(f"{path} mixes file kinds: {', '.join(kinds)}", "name the files of one kind: FOLDER/*.jsonl")
    return splits[split]


def list_splits(path: str | list[str], config: str | None = None) -> list[str] | None:
    """The splits that a path on this machine offers, "train" alone where it says none; None for a Hub id."""
    found = [find_splits(p, config) for p in ([path] if isinstance(path, str) else path)]
    return None if None in found else list(dict.fromkeys(s for splits in found for s in splits or ()))


def find_splits(path: str, config: str | None) -> dict[str, list[Path]] | None:
    """Split to its files. A file that is named itself is its own split's, and "train" whatever its name says."""
    try:
        place = Path(path).expanduser()
        if place.is_file():
            if split_suffixes(place.name)[0] not in SUFFIXES:
                raise refuse_suffix(place)
            return {"train": [place]} | {s: [place] for s in KEYWORDS if split_files([place.name], "", None, s)}
        if place.is_dir():
            return find_splits_of_folder(place, config)
        if glob.has_magic(path):
            return find_splits_of_glob(str(place))
        parent, named = Path(path).parent, split_suffixes(path)[0] in SUFFIXES
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not named and not parent.exists():
            return None
    except (OSError, RuntimeError, ValueError) as error:  # no home, a name that is too long, a folder that is closed
        raise refuse_path(f"{path} cannot be looked at: {first_line(error)}", "check the path") from None
    here = f" (no Hub id either: the folder {parent} is here)" if path.count("/") == 1 and parent.is_dir() else ""
    raise refuse_path(f"there is no data file {path}{here}", "check the path; it is taken from where you stand")


def find_splits_of_folder(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """The splits that `datasets` finds: saved by save_to_disk, listed in README.md, or said by the files' names."""
    if (folder / "dataset_dict.json").is_file():
        return {s: find_saved_files(folder / s) for s in read_json(folder / "dataset_dict.json").get("splits", [])}
    if read_json_or_empty(folder / "state.json").get("_data_files"):
        return {"train": find_saved_files(folder)}
    card = hub_dataset.read_card(folder)
    listed = hub_dataset.choose_configuration(card, config)
    names = list_data_files(folder, everywhere=listed is not None)
    if not names:
        raise refuse_path(f"the folder {folder} holds no data file", f"put {' '.join(SUFFIXES)} in it")
    entries = listed["data_files"] if listed else []
    entries = entries if isinstance(entries, list) else [entries]
    splits = [e["split"] for e in entries if isinstance(e, dict) and "split" in e] or list(KEYWORDS)
    found = {s: [folder / n for n in split_files(names, card, config, s)] for s in dict.fromkeys(["train", *splits])}
    found = {s: files for s, files in found.items() if files}
    if not found:
        raise refuse_path(
            f"{folder / hub_dataset.CARD} lists files that are not there", "mend its configs, or name the files"
        )
    return found


def find_splits_of_glob(pattern: str) -> dict[str, list[Path]]:
    """The splits among a glob's files; a pattern that says a split's name itself has chosen: all is "train"."""
    parts = Path(pattern).parts
    base = Path(*parts[: next(i for i, p in enumerate(parts) if glob.has_magic(p))])
    matches = [Path(m) for m in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(m)]
    names = [n for n in (m.relative_to(base).as_posix() for m in matches) if is_data_file(n)]
    if not names:
        raise refuse_path(f"{pattern} matches no data file", "check the pattern; it is taken from where you stand")
    found = {s: [base / n for n in split_files(names, "", None, s)] for s in KEYWORDS}
    chosen = split_words(re.sub(r"[][*?!]", " ", pattern.removeprefix(str(base)))) & SPLIT_WORDS
    return {"train": [base / n for n in names]} if chosen else {s: files for s, files in found.items() if files}


def find_saved_files(folder: Path) -> list[Path]:
    """The files of a data set that `save_to_disk` wrote, in their order; KitError where one is missing."""
    listed = read_json(folder / "state.json").get("_data_files") or []
    files = [folder / str(f.get("filename")) for f in listed if isinstance(f, dict)]
    missing = next((f for f in files if not f.is_file()), None)
    if missing:
        raise refuse_path(f"{folder} is not whole: {missing.name} is missing", "save the data set again")
    return files


def list_data_files(folder: Path, everywhere: bool) -> list[str]:
    """The names of the data files below a folder, sorted. Nested folders are looked into `everywhere`, where there
    is none at the top, and where they are named after a split."""
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=raise_error, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        base = Path(place).relative_to(folder)
        found += [n for n in ((base / name).as_posix() for name in names) if is_data_file(n)]
        if place == str(folder) and found and not everywhere:
            folders[:] = [f for f in folders if split_words(f) & SPLIT_WORDS]
        folders[:] = [f for f in folders if not NO_ROWS.fullmatch(f)]
    return sorted(found)


def raise_error(error: OSError) -> None:
    raise error  # a folder that may not be read is no empty one


def is_data_file(name: str) -> bool:
    hidden = any(NO_ROWS.fullmatch(part) for part in Path(name).parts)
    return split_suffixes(name)[0] in SUFFIXES and not hidden and Path(name).name not in hub_dataset.NO_DATA


def split_suffixes(name: str) -> tuple[str, str]:
    """The suffix that says the kind, and that of the packing or "": (".jsonl", ".gz")."""
    path = Path(name.lower())
    return (Path(path.stem).suffix, path.suffix) if path.suffix in PACKINGS else (path.suffix, "")


def refuse_path(problem: str, fix: str) -> KitError:
    return KitError(problem, "dataset.path", fix, rule="dataset-files")


def refuse_suffix(file: Path) -> KitError:
    known = f"one of {' '.join(SUFFIXES)}, each also with {' '.join(PACKINGS)}"
    return refuse_path(f"{file} has a suffix that is not known", f"use {known}; unpack archives")


def refuse_file(file: Path, problem: str, fix: str = "check the file") -> KitError:
    return KitError(f"{file} cannot be read: {problem}", "dataset.path", fix, rule="dataset-unreadable")


# -- their rows


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


def sample_rows(files: Sequence[Path], count: int = 200, max_bytes: int = 1_000_000) -> list[RawRow]:
    """The first rows of the first file that has any, and the first row of up to 20 further ones: fast whatever the
    files' size. KitError where none has a row."""
    rows: list[RawRow] = []
    size = 0
    for file in files:
        for raw in islice(read_rows([file]), 1 if rows and rows[0].file != str(file) else count):
            rows.append(raw)
            size += len(str(raw.row))
            if max(size, raw.offset or 0) > max_bytes:
                break
        if len({raw.file for raw in rows}) > 20:
            break
    if not rows:
        name = str(files[0]) if len(files) == 1 else f"{files[0]} and the {len(files) - 1} files after it"
        problem, fix = f"{name}: no rows", "give a file with at least one row"
        raise KitError(problem, "dataset.path", fix, rule="dataset-rows")
    return rows


def open_rows(file: Path) -> Iterator[RawRow]:
    kind, _ = split_suffixes(file.name)
    if kind not in SUFFIXES:
        raise refuse_suffix(file)
    if kind in (".parquet", ".arrow"):
        with open_source(file) as source:
            for number, (row, problem) in enumerate(read_table(source, kind), 1):
                yield RawRow(str(file), number, None, row, problem)
        return
    if kind == ".json" and is_json_lines(file):
        kind = ".jsonl"
    tsv = partial(read_csv, delimiter="\t")
    readers: dict[str, Any] = {".json": read_json_text, ".csv": read_csv, ".tsv": tsv, ".txt": read_text}
    with open_bytes(file) as stream:
        yield from readers.get(kind, read_json_lines)(file, stream, skip_byte_order_mark(file, stream))


def open_bytes(file: Path) -> BinaryIO:
    """Open a file, unpacked as it is read."""
    packing = split_suffixes(file.name)[1]
    if packing in (".zst", ".lz4"):
        import pyarrow as pa

        packed = pa.CompressedInputStream(pa.OSFile(str(file)), {".zst": "zstd", ".lz4": "lz4"}[packing])
        return io.BufferedReader(packed, CHUNK >> 4)  # what stands in it is lost where the file breaks off
    opens: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opens.get(packing, partial(open, buffering=CHUNK))(file, "rb")


@contextmanager
def open_source(file: Path) -> Iterator[Any]:
    """What a table is read from, with random access: its path, or a file without a name into which it is unpacked."""
    if not split_suffixes(file.name)[1]:
        yield str(file)
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_bytes(file) as stream:
            shutil.copyfileobj(stream, unpacked, CHUNK)
        unpacked.seek(0)
        yield unpacked


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
    name = str(file)
    for number, offset, line in read_lines(stream, start):
        row, problem = None, None
        try:
            text = line.decode()
            row = json.loads(text) if len(line) <= MAX_ROW else None
        except (ValueError, RecursionError) as error:
            if not line.strip():
                continue
            row, problem = explain_line(line, error)
        if not isinstance(row, dict):
            problem = too_long() if len(line) > MAX_ROW else problem or f"not an object: {shorten(text)}"
            row = None
        elif b"\\ud" in line or b"\\uD" in line:
            row, problem = check_escapes(row)
        yield RawRow(name, number, offset, row, problem)


def explain_line(line: bytes, error: Exception) -> tuple[Any, str | None]:
    """Why a line is no row, or its value after all where only a byte order mark (of joined files) stands before it."""
    if line.startswith(codecs.BOM_UTF8):
        try:
            return json.loads(line.decode("utf-8-sig")), None
        except (ValueError, RecursionError) as other:
            error = other
    cut = "" if line.endswith(b"\n") else " (the file may be cut off)"
    if isinstance(error, UnicodeDecodeError):
        return None, f"not UTF-8 at byte {error.start} of the line{cut}"
    if isinstance(error, json.JSONDecodeError):
        return None, f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}{cut}"
    return None, f"not JSON: {first_line(error).partition(';')[0]}{cut}"


def too_long() -> str:
    return f"longer than {MAX_ROW >> 20} MB"


def shorten(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 40 else text[:40] + "..."


def check_escapes(row: Any) -> tuple[Any, str | None]:
    """The row, or the problem that an escape in it is half a character, which no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = ascii(error.object[error.start])[1:-1]
        return None, f"half a character: {escape} without its other half"
    return row, None


def read_text(file: Path, stream: BinaryIO, start: int) -> Iterator[RawRow]:
    for number, offset, line in read_lines(stream, start):
        if line.strip():
            text, problem = check_text(line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"))
            problem = too_long() if len(line) > MAX_ROW else problem
            yield RawRow(str(file), number, offset, None if problem else {"text": text}, problem)


def check_text(text: str) -> tuple[str, str | None]:
    """Text that was decoded with surrogateescape, and what is wrong with its bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text, f"not UTF-8 at byte {len(text[: error.start].encode())} of the row"
    return text, "a NUL byte" if "\0" in text else None


def read_csv(file: Path, stream: BinaryIO, start: int, delimiter: str = ",") -> Iterator[RawRow]:
    """Cells stay text as written; a row with more or fewer of them than the header is a problem."""
    csv.field_size_limit(MAX_ROW)
    lines = (decode_line(number, line) for number, _, line in read_lines(stream, start))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise refuse_file(file, f"its header is not CSV: {error}") from None
    if header:
        check_header(file, header, delimiter)
    number = 0
    while True:
        cells, problem = [], None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"not CSV, line {reader.line_num}: {error}"
            if str(error) == "unexpected end of data":
                problem = "a quote that is opened and not closed until the end of the file"
        if not cells and not problem:
            continue
        number += 1
        if not problem and len(cells) != len(header):
            problem = f"{len(cells)} cells, line {reader.line_num}; the header has {len(header)}"
        problem = problem or check_text("".join(cells))[1]
        yield RawRow(str(file), number, None, None if problem else dict(zip(header, cells, strict=True)), problem)


def decode_line(number: int, line: bytes) -> str:
    if len(line) > MAX_ROW:  # whether a quote is open behind it cannot be known
        raise OSError(f"line {number} is {too_long()}")
    return line.decode("utf-8", "surrogateescape")


def check_header(file: Path, header: list[str], delimiter: str) -> None:
    """KitError where the first row of a CSV cannot name columns."""
    other = next((c for c in ";\t|" if len(header) == 1 and c != delimiter and c in header[0]), None)
    fix = "the first row names the columns, each once"
    if other:
        fix = "rename the file to .tsv" if other == "\t" else "save it comma-separated"
        raise refuse_file(file, f"its cells are separated by {other!r}, not {delimiter!r}", fix)
    if problem := check_text("".join(header))[1]:
        raise refuse_file(file, f"its header is {problem}", f"iconv -f WINDOWS-1252 -t UTF-8 {file.name}")
    for place, name in enumerate(header, 1):
        if not name.strip():
            raise refuse_file(file, f"column {place} of its header has no name", f"{fix}; pandas: index=False")
        if header.index(name) != place - 1:
            raise refuse_file(file, f"its header names {name!r} twice", fix)


# -- JSON that is not lines


def is_json_lines(file: Path) -> bool:
    """Whether a .json file holds an object to a line: the first or the second line is one, and there are two."""
    with open_bytes(file) as stream:
        skip_byte_order_mark(file, stream)
        lines = (line for line in iter(partial(stream.readline, CHUNK), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    if not first.lstrip().startswith(b"{") or not first.endswith(b"\n"):  # longer than CHUNK: a row or a list anyway
        return False
    for line in (first, second) if second else ():
        try:
            if isinstance(json.loads(line), dict):
                return True
        except (ValueError, RecursionError):
            continue
    return False


class JsonText:
    """JSON read from front to back: `at` is the next character's place in `text`, `offset` its byte in the file."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self.stream, self.offset = stream, start
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.at, self.ended = "", 0, False

    def read_more(self) -> None:
        data = self.stream.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self.decode(data, self.ended), 0

    def move(self, end: int) -> str:
        piece = self.text[self.at : end]
        self.offset += len(piece.encode("utf-8", "surrogateescape"))
        self.at = end
        return piece

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            self.move(BLANKS.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def take(self, expected: str) -> bool:
        """Go behind the next character if it is the expected one."""
        found = self.peek() == expected
        self.move(self.at + found)
        return found

    def take_value(self) -> tuple[Any, str]:
        """The next value and its text; OSError saying where and why there is none."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    return value, self.move(end)
            except json.JSONDecodeError as error:
                more = error.pos > len(self.text) - 100 or error.msg.startswith("Unterminated string")
                if self.ended or not more:
                    self.move(error.pos)
                    reason = error.msg.removesuffix(" starting at")
                    raise OSError(f"not JSON at byte {self.offset}: {reason}") from None
            except (ValueError, RecursionError) as error:
                raise OSError(f"not JSON at byte {self.offset}: {first_line(error)}") from None
            if len(self.text) - self.at > MAX_ROW:
                raise OSError(f"the value at byte {self.offset} is {too_long()}, or not JSON")
            self.read_more()

    def take_list(self) -> Iterator[tuple[int, Any, str]]:
        """(byte offset, value, text) of each element of the list that begins here."""
        self.take("[")
        while self.peek() != "]":
            offset = self.offset
            yield offset, *self.take_value()
            if not self.take(","):
                break
        if not self.take("]"):
            raise OSError(f"not JSON at byte {self.offset}: ']' is missing")


def read_json_text(file: Path, stream: BinaryIO, start: int) -> Iterator[RawRow]:
    """A list of rows, an object that holds one, or objects one behind the other, each of them a row."""
    text = JsonText(stream, start)
    number = 0
    while first := text.peek():
        for offset, value, piece in text.take_list() if first == "[" else take_object(file, text):
            number += 1
            row, problem = check_value(value, piece)
            yield RawRow(str(file), number, offset, row, problem)
        if first == "[" and text.peek():
            raise OSError(f"something stands behind the list, at byte {text.offset}")


def check_value(value: Any, piece: str) -> tuple[Any, str | None]:
    if problem := check_text(piece)[1]:
        return None, problem
    if not isinstance(value, dict):
        return None, f"not an object: {shorten(piece)}"
    return check_escapes(value) if "\\ud" in piece or "\\uD" in piece else (value, None)


def take_object(file: Path, text: JsonText) -> Iterator[tuple[int | None, Any, str]]:
    """The elements of the one list of rows that an object holds, else the object itself."""
    offset = text.offset
    value, piece = text.take_value()
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
