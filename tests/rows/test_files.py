"""Finding and reading raw rows: every kind of file, packed and not; what is wrong with a file or a row is said."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import subprocess
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from kit.errors import KitError
from kit.inspection.data_files import find_data_files, list_splits
from kit.rows import files
from kit.rows.files import read_rows, sample_rows

CHATS = [
    {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "a\u2028b\r\nc", "weight": 0}]},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "日本"}], "id": 7},
]
TEXTS = [{"text": "NA", "n": "007"}, {"text": 'one, "two"\nthree\tfour', "n": ""}]


def json_lines(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows: list, mark: str) -> bytes:
    quote = ['"' + v.replace('"', '""') + '"' for row in rows for v in row.values()]
    width = len(rows[0])
    lines = [mark.join(quote[i : i + width]) for i in range(0, len(quote), width)]
    return "\r\n".join([mark.join(rows[0]), *lines, ""]).encode()


def table_bytes(rows: list, kind: str) -> bytes:
    names = dict.fromkeys(name for row in rows for name in row)
    table, sink = pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows]), pa.BufferOutputStream()
    if kind == "parquet":
        parquet.write_table(table, sink)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


KINDS = {  # name: (what the file holds, its rows)
    "rows.jsonl": (json_lines(CHATS), CHATS),
    "rows.ndjson": (json_lines(CHATS), CHATS),
    "list.json": (json.dumps(CHATS, indent=2).encode(), CHATS),
    "object.json": (json.dumps(CHATS[0], indent=2).encode(), CHATS[:1]),
    "short.json": (json.dumps(CHATS[0]).encode(), CHATS[:1]),
    "inside.json": (json.dumps({"version": 1, "data": CHATS, "x": [1]}).encode(), CHATS),
    "lines.json": (json_lines(CHATS), CHATS),
    "joined.json": (b"\n".join(json.dumps(c, indent=1).encode() for c in CHATS), CHATS),
    "tokens.json": (b'{"input_ids": [1, 2], "labels": [1, 2]}', [{"input_ids": [1, 2], "labels": [1, 2]}]),
    "rows.csv": (delimited(TEXTS, ","), TEXTS),
    "rows.tsv": (delimited(TEXTS, "\t"), TEXTS),
    "rows.parquet": (table_bytes(CHATS, "parquet"), CHATS),
    "rows.arrow": (table_bytes(CHATS, "file"), CHATS),
    "stream.arrow": (table_bytes(CHATS, "stream"), CHATS),
    "rows.txt": (
        "one\n \n  two\u2028 \r\nthree".encode(),
        [{"text": "one"}, {"text": "  two\u2028 "}, {"text": "three"}],
    ),
}
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".lz4": lambda data: pack_lz4(data),
}


def pack_lz4(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path: Path) -> list:
    return list(read_rows([path]))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_packed_and_not(name: str, packing: str, tmp_path: Path):
    data, rows = KINDS[name]
    path = write(tmp_path / (name + packing), PACK[packing](data))
    assert find_data_files(str(path)) == find_data_files(str(tmp_path)) == [path]
    found = read(path)
    assert [r.row for r in found] == rows and not any(r.problem for r in found)
    assert {r.file for r in found} == {str(path)}
    for raw in found:  # what stands at the offset begins the row
        if raw.offset is not None and not name.endswith(".txt"):
            assert json.JSONDecoder().raw_decode(data[raw.offset :].decode())[0] == raw.row
    assert [r.row for r in sample_rows([path])] == rows


@pytest.mark.parametrize("name", [n for n in KINDS if not n.endswith((".parquet", ".arrow"))])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path):
    data, rows = KINDS[name]
    found = read(write(tmp_path / name, codecs.BOM_UTF8 + data))
    assert [r.row for r in found] == rows
    first = data.index(b"{", 1 if name == "inside.json" else 0) if name.endswith("json") else 0
    assert found[0].offset in (3 + first, None)


@pytest.mark.parametrize("place", ["first", "middle", "after 10 MB"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.zst"])
def test_an_odd_row_arrives_as_written_wherever_it_stands(name: str, place: str, tmp_path: Path):
    plain = {"messages": [{"role": "user", "content": "x" * 2500}, {"role": "assistant", "content": "yes"}]}
    odd = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": None}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "int"}}}}],
        "n": 1.0, "big": 2**70,
    }  # fmt: skip
    at = {"first": 0, "middle": 2_000, "after 10 MB": 4_050}[place]
    rows = [odd if i == at else plain for i in range(4_100)]
    data = json_lines(rows) if name != "rows.json" else json.dumps(rows, ensure_ascii=False).encode()
    assert len(data) > 10_000_000
    path = write(tmp_path / name, PACK[Path(name).suffix](data) if name.endswith(".zst") else data)
    found = read(path)
    assert len(found) == len(rows) and repr(found[at].row) == repr(odd) and found[at].number == at + 1
    assert found[0 if at else 1].row == plain and found[-1].row == plain
    assert data[found[at].offset :].startswith(json.dumps(odd).encode())


LONG = "x" * (64 << 20)
ROWS = {  # name: (what the file holds, {row's number: what its problem says}, the rows that are there)
    "not utf8.jsonl": (
        b'{"a": 1}\n{"a": "\xe9"}\n{"a": 2}\n',
        {2: "not UTF-8 at byte 7 of the line"}, [{"a": 1}, {"a": 2}]),
    "cut off.jsonl": (b'{"a": 1}\n{"a": "tw', {2: r"not JSON: .*column 7 \(the file may be cut off\)"}, [{"a": 1}]),
    "torn.jsonl": (
        b'{"a": 1}\n{"a": \n}\n{"a": 2}\n',
        {2: "not JSON: Expecting value at column 8", 3: "not JSON"}, [{"a": 1}, {"a": 2}]),
    "no object.jsonl": (
        b'[1]\n"x"\nnull\n\n{"a": 1}\r\n3\n',
        {1: r"not an object: \[1\]", 2: "not an", 3: "null", 6: "3"}, [{"a": 1}]),
    "deep.jsonl": (b'{"a":' * 100_000 + b'\n{"a": 1}\n', {1: "not JSON: maximum recursion"}, [{"a": 1}]),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b'}\n{"a": 1}\n', {1: "not JSON: Exceeds the limit"}, [{"a": 1}]),
    "surrogate.jsonl": (
        b'{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n',
        {1: r"half a character: \\ud83d"}, [{"a": "😀"}]),
    "nul.jsonl": (b'\0\0\0\0\0\n{"a": 1}\n', {1: "not JSON"}, [{"a": 1}]),
    "marks.jsonl": (b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', {}, [{"a": 1}, {"a": 2}]),
    "separators.jsonl": ('{"a": "x\u2028y\x85z"}\r\n\r\n \n{"a": 2}'.encode(), {}, [{"a": "x\u2028y\x85z"}, {"a": 2}]),
    "long.jsonl": (f'{{"a": "{LONG}"}}\n{{"a": 1}}\n', {1: "longer than 64 MB"}, [{"a": 1}]),
    "long end.jsonl": (f'{{"a": 1}}\n{{"a": "{LONG}', {2: "longer than 64 MB"}, [{"a": 1}]),
    "not utf8.json": (b'[{"a": "\xe9"}, {"a": 2}]', {1: "not UTF-8 at byte 7"}, [{"a": 2}]),
    "no object.json": (b'[{"a": 1}, 2, {"a": "\\udc00"}]', {2: "not an object: 2", 3: "half a character"}, [{"a": 1}]),
    "cut off.json": (b'[{"a": 1}, {"a":', {2: "breaks off after row 1: not JSON at byte 16"}, [{"a": 1}]),
    "no comma.json": (b'[{"a": 1} {"a": 2}]', {2: "breaks off after row 1: not JSON at byte 10"}, [{"a": 1}]),
    "behind.json": (b'[{"a": 1}]\n[{"a": 2}]', {2: "breaks off after row 1: something stands behind"}, [{"a": 1}]),
    "torn lines.json": (b'{"a": 1\n{"a": 2}\n{"a": 3}\n', {1: "not JSON"}, [{"a": 2}, {"a": 3}]),
    "empty list.json": (b"[]", {}, []),
    "blank.jsonl": (b"\n \n", {}, []),
    "empty.csv": (b"a,b\n", {}, []),
    "blank.csv": (b"\n\na,b\n\n1,2\n\n", {}, [{"a": "1", "b": "2"}]),
    "ragged.csv": (
        b"a,b\n1\n1,2,3\n1,2\n",
        {1: "1 cells, line 2; the header has 2", 2: "3 cells, line 3"}, [{"a": "1", "b": "2"}]),
    "not utf8.csv": (b"a,b\n1,\xe9\n1,2\n", {1: "not UTF-8 at byte 1"}, [{"a": "1", "b": "2"}]),
    "nul.csv": (b"a,b\n1,x\0\n1,2\n", {1: "a NUL byte"}, [{"a": "1", "b": "2"}]),
    "open quote.csv": (b'a,b\n1,2\n1,"2\n3,4\n', {2: "a quote that is opened and not closed"}, [{"a": "1", "b": "2"}]),
    "quote.csv": (b'a,b\n1,"x"y\n1,2\n', {1: "not CSV, line 2"}, [{"a": "1", "b": "2"}]),
    "long.csv": (
        f"a,b\n1,2\n1,{LONG}\n1,2\n",
        {2: "breaks off after row 1: line 3 is longer than 64 MB"}, [{"a": "1", "b": "2"}]),
    "not utf8.txt": (
        b"one\n\xe9\nt\0o\nthree",
        {2: "not UTF-8 at byte 0", 3: "a NUL byte"}, [{"text": "one"}, {"text": "three"}]),
    "long.txt": (f"{LONG}x\none\n", {1: "longer than 64 MB"}, [{"text": "one"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_is_wrong_with_a_row_is_its_problem(name: str, tmp_path: Path):
    data, problems, rows = ROWS[name]
    found = read(write(tmp_path / name, data))
    said = {r.number: r.problem for r in found if r.problem}
    assert said.keys() == problems.keys()
    for number, words in problems.items():
        assert re.search(words, said[number]) and len(said[number]) < 150, said[number]
    assert [r.row for r in found if not r.problem] == rows
    assert all((r.row is None) == (r.problem is not None) for r in found)


FILES = {  # name: (what the file holds, what is said, the fix)
    "utf16.jsonl": ('{"a": 1}\n'.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
    "utf16le.jsonl": ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16", "iconv"),
    "utf32.csv": ("a,b\n1,2\n".encode("utf-32"), "UTF-16 or UTF-32", "iconv"),
    "columns.json": (b'{"text": ["a", "b"], "n": [1, 2]}', "columns, not rows", "orient=\"records\""),
    "pandas.json": (b'{"text": {"0": "a", "1": "b"}}', "columns, not rows", "pandas.read_json"),
    "two lists.json": (b'{"a": [{"x": 1}], "b": [{"x": 2}]}', "several lists of rows: a, b", "file of its own"),
    "inside cut off.json": (b'{"data": [{"a": 1}, {"a": 2}', "not JSON at byte 28", ""),
    "number.json": (b"12 {", "not JSON at byte 0", ""),
    "word.json": (b"hello", "not JSON at byte 0", ""),
    "semicolons.csv": (b"a;b\n1;2\n", "separated by ';', not ','", "comma-separated"),
    "tabs.csv": (b"a\tb\n1\t2\n", "separated by '\\t', not ','", ".tsv"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "names 'a' twice", "each once"),
    "index.csv": (b",text\n0,x\n", "column 1 of its header has no name", "index=False"),
    "latin.csv": (b"caf\xe9,b\n1,2\n", "header is not UTF-8", "iconv"),
    "text.gz.jsonl.gz": (b'{"a": 1}\n', "Not a gzipped file", ""),
    "text.jsonl.xz": (b'{"a": 1}\n', "Input format not supported", ""),
    "text.jsonl.zst": (b'{"a": 1}\n', "ZSTD", ""),
    "cut.parquet": (table_bytes(CHATS, "parquet")[:-9], "Parquet", ""),
    "text.parquet": (b"hello, this is no table", "Parquet", ""),
    "cut.arrow": (table_bytes(CHATS, "file")[:-9], "Arrow", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_rows_is_refused_with_the_fix(name: str, tmp_path: Path):
    data, words, fix = FILES[name]
    with pytest.raises(KitError) as refused:
        read(write(tmp_path / name, data))
    (problem,) = refused.value.problems
    assert words in problem.problem and fix in problem.fix and name in problem.problem
    assert (problem.where, problem.rule) == ("dataset.path", "dataset-unreadable")


@pytest.mark.parametrize("packing", [p for p in PACK if p])
def test_a_packed_file_that_is_cut_off_never_ends_in_silence(packing: str, tmp_path: Path):
    import random

    draw = random.Random(0)
    rows = [{"n": draw.getrandbits(256)} for _ in range(15_000)]
    data = PACK[packing](json_lines(rows))
    found = read(write(tmp_path / f"cut.jsonl{packing}", data[: len(data) - 20]))
    assert [r.row for r in found[:-1]] == rows[: len(found) - 1]
    assert found[-1].problem.startswith(f"{files.BREAKS_OFF} {len(found) - 1}: ")
    broken = bytearray(data)
    broken[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    path = write(tmp_path / f"broken.jsonl{packing}", bytes(broken))
    try:
        assert any(r.problem for r in read(path))
    except KitError as error:  # damage before the first row
        assert error.problems[0].rule == "dataset-unreadable"


def test_a_table_that_breaks_in_the_middle_never_ends_in_silence(tmp_path: Path):
    rows = [{"text": f"{i:050d}"} for i in range(5000)]
    table = pa.Table.from_pylist(rows)
    whole = tmp_path / "rows.parquet"
    parquet.write_table(table, whole, row_group_size=1000, compression="zstd", use_dictionary=False)
    data = bytearray(whole.read_bytes())
    middle = parquet.ParquetFile(whole).metadata.row_group(3).column(0).data_page_offset
    data[middle : middle + 200] = bytes(200)
    found = read(write(tmp_path / "broken.parquet", bytes(data)))
    assert [r.row for r in found[:-1]] == rows[:3000] and "breaks off after row 3000: " in found[-1].problem
    stream = tmp_path / "stream.arrow"
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=1000):
            writer.write_batch(batch)
            end = writer.stats.num_record_batches
    data = stream.read_bytes()
    assert end == 5
    found = read(write(tmp_path / "cut.arrow", data[:-8]))
    assert len(found) == 5001 and found[-1].problem == f"{files.BREAKS_OFF} 5000: the stream has no end mark"
    found = read(write(tmp_path / "half.arrow", data[: len(data) // 2]))
    assert len(found) == 2001 and "breaks off after row 2000" in found[-1].problem


def test_what_a_table_filled_in_is_taken_out_and_what_is_no_text_becomes_one(tmp_path: Path):
    import datetime
    import decimal

    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "call": {"q": 1, "r": None}}],
         "when": datetime.datetime(2024, 2, 3, 4, 5), "price": decimal.Decimal("1.50"),
         "tags": ["a", None], "image": None},
        {"messages": [{"role": "user", "content": "x", "name": "n"}], "image": b"\x89PNG", "n": float("inf")},
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    table = table.append_column("map", pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())))
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path)
    one, two = read(path)
    assert one.row == {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "call": {"q": 1}}],
        "when": "2024-02-03 04:05:00", "price": "1.50", "tags": ["a", None], "map": {"k": 1},
    }  # fmt: skip
    assert (two.row, two.problem, two.number) == (None, "column image holds bytes", 2)


def test_text_in_a_table_that_is_not_utf8_is_one_rows_problem(tmp_path: Path):
    array = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    parquet.write_table(pa.table({"text": array}), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert [r.row for r in found] == [{"text": "a"}, None, {"text": "b"}]
    assert "Invalid UTF8 sequence" in found[1].problem


def test_what_save_to_disk_writes(tmp_path: Path):
    from datasets import Dataset, DatasetDict, Features, Json, List, Value

    rows = [{"text": "a", "tools": [{"x": 1, "y": None}], "turns": [{"role": "user", "args": {"q": [1]}}]},
            {"text": "b", "tools": "words", "turns": [{"role": "user"}]}]  # fmt: skip
    turns = List({"role": Value("string"), "args": Json()})
    features = Features({"text": Value("string"), "tools": Json(), "turns": turns})
    made = Dataset.from_list(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    DatasetDict({"train": made, "held": made.select([0])}).save_to_disk(str(tmp_path / "all"))
    made.to_parquet(str(tmp_path / "rows.parquet"))
    write(tmp_path / "one" / "cache-123.arrow", b"x")
    one = find_data_files(str(tmp_path / "one"))
    assert [f.name for f in one] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [r.row for r in read_rows(one)] == rows == [r.row for r in read(tmp_path / "rows.parquet")]
    assert list_splits(str(tmp_path / "all")) == ["train", "held"]
    assert [r.row for r in read_rows(find_data_files(str(tmp_path / "all"), "held"))] == rows[:1]
    with pytest.raises(KitError, match="no split test; it has train, held"):
        find_data_files(str(tmp_path / "all"), "test")
    one[1].unlink()
    with pytest.raises(KitError, match="not whole: data-00001-of-00002.arrow is missing"):
        find_data_files(str(tmp_path / "one"))


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: a/*.jsonl
  - split: held
    path: [b/1.jsonl]
---
"""
LAYOUTS = {  # files, and those of each split
    "rows.jsonl ._rows.jsonl .x.jsonl __MACOSX/rows.jsonl config.json README.txt": {"train": "rows.jsonl"},
    "b.jsonl a.jsonl.gz c.ndjson stats.json": {"train": "a.jsonl.gz b.jsonl c.ndjson"},
    "train.jsonl test.jsonl valid-1.jsonl":
        {"train": "train.jsonl", "validation": "valid-1.jsonl", "test": "test.jsonl"},
    "train/2.jsonl train/1.jsonl dev/1.jsonl": {"train": "train/1.jsonl train/2.jsonl", "validation": "dev/1.jsonl"},
    "train/test_cases.jsonl test/1.jsonl": {"train": "train/test_cases.jsonl", "test": "test/1.jsonl"},
    "train.jsonl notes/old.jsonl test/1.jsonl": {"train": "train.jsonl", "test": "test/1.jsonl"},
    "rows.jsonl more/rows.jsonl": {"train": "rows.jsonl"},
    "x/rows.jsonl y/z/rows.jsonl .git/rows.jsonl": {"train": "x/rows.jsonl y/z/rows.jsonl"},
    "train.jsonl test.csv": {"train": "train.jsonl", "test": "test.csv"},
    "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet x/infos.py":
        {"train": "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet",
         "test": "data/test-00000-of-00001.parquet"},
    "README.md a/1.jsonl a/2.jsonl b/1.jsonl b/2.jsonl": {"train": "a/1.jsonl a/2.jsonl", "held": "b/1.jsonl"},
    "eval/1.jsonl": {"test": "eval/1.jsonl"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_splits_that_its_names_say(layout: str, tmp_path: Path):
    for name in layout.split():
        write(tmp_path / name, CARD if name == "README.md" else "")
    splits = {s: [tmp_path / n for n in names.split()] for s, names in LAYOUTS[layout].items()}
    assert list_splits(str(tmp_path)) == list(splits)
    for split, expected in splits.items():
        assert find_data_files(str(tmp_path), split) == expected
    for lacking in {"train", "test", "validation"} - splits.keys():
        with pytest.raises(KitError, match=f"has no split {lacking}; it has {', '.join(splits)}"):
            find_data_files(str(tmp_path), lacking)


def test_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for (
        name
    ) in "d/a.jsonl d/b.jsonl d/c/d.jsonl d/._a.jsonl d/x.py e/train.jsonl e/test-1.jsonl f/rows[1].csv".split():
        write(tmp_path / name, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    d, e = Path("d"), Path("e")
    assert find_data_files("d/*.jsonl") == find_data_files("d/*") == [d / "a.jsonl", d / "b.jsonl"]
    assert find_data_files("d/**/*.jsonl") == [d / "a.jsonl", d / "b.jsonl", d / "c" / "d.jsonl"]
    assert find_data_files("~/d/[ab].jsonl") == [tmp_path / "d" / "a.jsonl", tmp_path / "d" / "b.jsonl"]
    assert find_data_files("e/*.jsonl") == [e / "train.jsonl"]  # never the test rows
    assert find_data_files("e/*.jsonl", "test") == find_data_files("e/test*.jsonl") == [e / "test-1.jsonl"]
    assert find_data_files("e/test-1.jsonl") == find_data_files("e/test-1.jsonl", "test") == [e / "test-1.jsonl"]
    assert find_data_files("f/rows[1].csv") == [Path("f/rows[1].csv")]
    mixed = [d / "b.jsonl", e / "train.jsonl", d / "a.jsonl", Path("f/rows[1].csv")]
    assert find_data_files(["d/b.jsonl", "e", "d/*.jsonl", "f"]) == mixed
    for link in ("d/c/up", "g/link"):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / "d")
    assert [f.as_posix() for f in find_data_files("g")] == ["g/link/a.jsonl", "g/link/b.jsonl", "g/link/c/d.jsonl"]


NOWHERE = {  # path: what is said, the fix
    "nothere.jsonl": ("there is no data file nothere.jsonl", "where you stand"),
    "here/chats": ("there is no data file here/chats (no Hub id either: the folder here is here)", "check the path"),
    "here/x/y": ("there is no data file", "check the path"),
    "org/rows.jsonl.gz": ("there is no data file", ""),
    "./org/name": ("there is no data file", ""),
    "squad": ("there is no data file", ""),
    "here/*.csv": ("matches no data file", "check the pattern"),
    "empty": ("the folder empty holds no data file", "put .json"),
    "here/rows.xlsx": ("a suffix that is not known", ".parquet"),
    "here": ("here mixes file kinds: .csv, .jsonl", "name the files of one kind"),
    "~nobody-there/x": ("cannot be looked at", ""),
    "x" * 5000: ("cannot be looked at", ""),
    "a\0b": ("", ""),
}


@pytest.mark.parametrize("path", NOWHERE, ids=lambda p: p[:20])
def test_a_path_that_leads_nowhere_is_no_hub_id(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("here/rows.xlsx", "here/a.csv.gz", "here/a.jsonl", "empty/x.py"):
        write(tmp_path / name, "")
    monkeypatch.chdir(tmp_path)
    if path == "here/*.csv":
        assert find_data_files("owner/name") is None and list_splits("owner/name") is None
        with pytest.raises(KitError, match="owner/name in a list of files is a Hub id"):
            find_data_files(["here/a.jsonl", "owner/name"])
        with pytest.raises(KitError, match="is empty"):
            find_data_files([])
    with pytest.raises(KitError) as refused:
        find_data_files(path)
    (problem,) = refused.value.problems
    assert NOWHERE[path][0] in problem.problem and NOWHERE[path][1] in problem.fix
    assert (problem.where, problem.rule) == ("dataset.path", "dataset-files")


def test_a_sample_sees_each_file_and_is_fast(tmp_path: Path):
    big = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 1000}) + "\n"
    with open(big, "w") as f:
        for _ in range(200):
            f.write(line * 1000)
    more = [write(tmp_path / f"b{i:02}.jsonl", f'{{"prompt": {i}}}\n{{"prompt": 0}}\n') for i in range(30)]
    empty = [write(tmp_path / "0.jsonl", ""), write(tmp_path / "1.jsonl", "\n")]
    started = time.perf_counter()
    rows = sample_rows([*empty, big, *more])
    assert time.perf_counter() - started < 0.5
    assert [r.row for r in rows[:200]] == [json.loads(line)] * 200
    assert [r.row for r in rows[200:]] == [{"prompt": i} for i in range(20)]
    assert len(sample_rows([big], max_bytes=10_000)) < 12
    with pytest.raises(KitError, match="1.jsonl: no rows") as refused:
        sample_rows(empty[1:])
    assert refused.value.problems[0].rule == "dataset-rows"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
def test_memory_stays_bounded(name: str, tmp_path: Path):
    row = json.dumps({"text": "x" * 2000})
    text = {".json": "[" + ",\n".join([row] * 8_000) + "]", ".csv": "text\n" + ("x" * 2000 + "\n") * 8_000}
    data = text.get(Path(name).suffix, (row + "\n") * 8_000).encode()
    path = write(tmp_path / name, PACK[Path(name).suffix](data) if name.endswith(".gz") else data)
    del text, data
    tracemalloc.start()
    try:
        assert sum(1 for r in read_rows([path]) if r.row == {"text": "x" * 2000}) == 8_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # of 16 MB
    finally:
        tracemalloc.stop()


def test_nothing_heavy_is_imported(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", '{"text": "x"}\n')
    code = f"""
import sys
from kit.rows.files import *
from kit.inspection.data_files import find_data_files
assert len(sample_rows(find_data_files({str(path)!r}))) == 1
heavy = {{"torch", "transformers", "trl", "datasets", "pyarrow", "numpy"}} & set(sys.modules)
assert not heavy, heavy
sys.modules["pyarrow"] = None
try:
    list(read_rows([Path({str(write(tmp_path / "rows.parquet", b"x"))!r})]))
except KitError as error:
    assert error.problems[0].fix == "pip install pyarrow"
else:
    raise SystemExit("read without pyarrow")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_given_one_by_one(tmp_path: Path):
    """The rows before a damage are there before it is met."""
    path = write(tmp_path / "rows.json", b"[" + b'{"a": 1},\n' * 300_000 + b"x")
    assert [r.row for r in islice(read_rows([path]), 2)] == [{"a": 1}, {"a": 1}]


def problems_of(here: Path, **dataset) -> tuple[str | None, list[tuple[str, str, str]]]:
    from kit.config.inputs import inspect_data
    from kit.schema.run_plan import Dataset

    found, problems = inspect_data(Dataset.model_validate(dataset), here=True)
    return found.kind, [(p.where, p.rule, p.problem.replace(f"{here}/", "")) for p in problems]


def test_the_check_looks_at_the_first_rows_of_every_set(tmp_path: Path):
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.csv"
    write(chats, json_lines([{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]))
    write(texts, "text\nx\n")
    torn = write(tmp_path / "torn.jsonl", '{"text": "x"}\n{"text": \n{"text": "y"}\n')
    nowhere = str(tmp_path / "nowhere.jsonl")
    assert problems_of(tmp_path, path=str(chats)) == ("messages", [])
    assert problems_of(tmp_path, path=[str(texts), str(tmp_path / "te*.csv")]) == ("text", [])
    assert problems_of(tmp_path, mix=[{"path": str(chats)}, {"path": str(chats)}]) == ("messages", [])
    assert problems_of(tmp_path, mix=[{"path": str(chats)}, {"path": str(texts)}]) == (None, [])
    assert problems_of(tmp_path, mix=[{"path": str(chats)}, {"path": nowhere}, {"path": str(texts), "split": "x"}])[
        1
    ] == [
        ("dataset.mix.1.path", "dataset-files", "there is no data file nowhere.jsonl"),
        ("dataset.mix.2.split", "dataset-split", "texts.csv has no split x; it has train"),
    ]
    assert problems_of(tmp_path, path=str(texts), eval_split="test")[1] == [
        ("dataset.eval_split", "dataset-split", "texts.csv has no split test; it has train")
    ]
    assert problems_of(tmp_path, path=str(texts), eval_path=nowhere)[1][0][0] == "dataset.eval_path"
    (bad,) = problems_of(tmp_path, path=str(torn))[1]
    assert bad[:2] == ("dataset.path", "bad-rows") and bad[2].startswith("torn.jsonl row 2: not JSON")
    assert problems_of(tmp_path, path=str(torn), on_bad_row="drop") == ("text", [])
    assert problems_of(tmp_path)[1][0][:2] == ("dataset.path", "dataset-files")
    assert "both given" in problems_of(tmp_path, path=str(texts), mix=[{"path": str(texts)}])[1][0][2]
