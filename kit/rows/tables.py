"""Rows of Parquet and Arrow files as plain values: what pyarrow adds to a row, or makes of its values, is undone."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kit.errors import first_line
from kit.rows.turns import parse_json

BATCH = 500  # rows that are Python objects at once
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_table(source: Any, kind: str) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """(row, None) or (None, problem) of each row of `source`, an open file with random access.

    `kind` is .parquet or .arrow. OSError where the file is damaged; ImportError without pyarrow.
    """
    import pyarrow as pa

    try:
        with pa.PythonFile(source, mode="r") as file:
            schema, batches = open_parquet(file) if kind == ".parquet" else open_arrow(file, pa)
            if len(set(schema.names)) < len(schema.names):
                raise OSError("two of its columns have one name")
            described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            features = described.get("info", {}).get("features") or {}
            plain = {f.name: make_plain(f.type, features.get(f.name), pa.types) for f in schema}
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH):
                    yield from plain_rows(batch.slice(start, BATCH), plain)
    except (pa.ArrowException, ValueError, OverflowError, MemoryError) as error:  # sizes that a damage made up
        raise OSError(first_line(error)) from None


def count_table_rows(source: Any, kind: str) -> int:
    """Count the rows of a Parquet file by its footer, of an Arrow file by the heads of its batches; see read_table."""
    import pyarrow as pa

    try:
        file = pa.BufferReader(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ))  # a batch's values stay unread
        if kind == ".parquet":
            from pyarrow.parquet import read_metadata

            return read_metadata(file).num_rows
        return sum(batch.num_rows for batch in open_arrow(file, pa)[1])
    except (pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise OSError(first_line(error)) from None


def open_parquet(file: Any) -> tuple[Any, Iterator[Any]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)  # as a stream: not a whole row group at once
    return table.schema_arrow, table.iter_batches(BATCH)


def open_arrow(file: Any, pa: Any) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of Arrow's file format or its stream, which `datasets` writes."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        table = pa.ipc.open_file(file)
        return table.schema, (table.get_batch(i) for i in range(table.num_record_batches))
    stream = pa.ipc.open_stream(file)

    def read_stream() -> Iterator[Any]:
        yield from stream
        file.seek(file.size() - len(END_OF_STREAM))
        if file.read() != END_OF_STREAM:  # pyarrow takes a stream that was cut between two batches for whole
            raise OSError("the stream has no end mark")

    return stream.schema, read_stream()


def plain_rows(batch: Any, plain: dict[str, Any]) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """The rows of a record batch without their null columns, which are the keys that other rows have."""
    try:
        batch.validate(full=True)  # what is damaged could end the process
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # one text that is not UTF-8, one date that Python has not
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from plain_rows(batch.slice(i, 1), plain)
        else:
            yield None, f"not readable: {first_line(error)}"
        return
    for values in rows:
        row: dict[str, Any] = {}
        try:
            for name, value in values.items():
                if value is not None:
                    row[name] = plain[name](value) if plain[name] else value
        except (ValueError, RecursionError) as error:
            yield None, f"column {name} {first_line(error)}"
        else:
            yield row, None


def make_plain(kind: Any, feature: Any, types: Any) -> Callable[[Any], Any] | None:
    """The function that makes a plain value of one of an Arrow type; None where it is plain already.

    `feature`: what `datasets` noted of it. ValueError, behind the column's name, for a value that is no text.
    """
    feature = feature if isinstance(feature, dict) else {}
    if feature.get("_type") == "Json" or getattr(kind, "extension_name", "") == "arrow.json":
        return partial(parse_json, what="its text")
    kind = getattr(kind, "storage_type", kind)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_struct(kind):  # a field that is null is a key that the row did not have
        fields = {f.name: make_plain(f.type, feature.get(f.name), types) for f in kind}
        return lambda value: {k: f(v) if (f := fields[k]) else v for k, v in value.items() if v is not None}
    if types.is_map(kind):
        item = make_plain(kind.item_type, None, types) or (lambda value: value)
        return lambda pairs: {str(k): item(v) for k, v in pairs if v is not None}
    if hasattr(kind, "value_type"):
        element = make_plain(kind.value_type, feature.get("feature"), types)
        return element and (lambda values: [None if v is None else element(v) for v in values])
    if types.is_temporal(kind) or types.is_decimal(kind):
        return str
    return refuse_bytes if "binary" in str(kind) else None


def refuse_bytes(value: bytes) -> Any:
    raise ValueError("holds bytes")
