"""Results for other programs: CSV, Parquet, JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from ...errors import FerrotypeError
from .results import Result, as_rows, dumps

SUFFIXES = (".csv", ".parquet", ".json")


def encode(found: Sequence[Result], suffix: str) -> bytes:
    """The bytes of a file; ValueError for another kind, FerrotypeError where pyarrow is missing."""
    if suffix not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise ValueError(f"{suffix[:20]!r} is no kind of table: let the name end in {kinds}")
    if suffix == ".json":
        if len(found) != 1:
            raise ValueError(f"JSON is of one result, these are {len(found)}: name one")
        return dumps(found[0]).encode()
    columns = _columns([row for result in found for row in as_rows(result)])
    return _parquet(columns) if suffix == ".parquet" else _csv(columns)


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _csv(columns: dict[str, list[Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(map(_inert, column) for column in columns.values()), strict=True))
    return stream.getvalue().encode()


def _inert(value: Any) -> Any:
    """Text that a spreadsheet does not take for a formula: it may come from anywhere."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return value


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FerrotypeError(
            "Parquet needs pyarrow: pip install 'ferrotype[bench]', or name the file .csv"
        ) from None
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({n: _alike(c) for n, c in columns.items()}), sink)
    return sink.getvalue()


def _alike(column: list[Any]) -> list[Any]:
    """A column has one type: settings that are text here and numbers there are text."""
    kinds = {type(value) for value in column if value is not None}
    if len(kinds) > 1 and not kinds <= {int, float}:
        return [None if value is None else str(value) for value in column]
    return [float(v) if v is not None else v for v in column] if len(kinds) > 1 else column
