"""Files in: tables of JSON, CSV, Parquet and PrefLib, with the place of every mistake."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import late_bar
from torchrl_maxmin.preferences.io.preflib import read_preflib
from torchrl_maxmin.preferences.io.table import in_batches

with suppress(ImportError):  # it comes with datasets, and load_table says where that is missing
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

__all__ = ["READERS", "first_line", "read_files"]

Reach = Callable[[int], None]
NumberedRow = tuple[int, dict[str, Any]]

_BATCH_ROWS = 5_000
_BATCH_BYTES = 16 << 20  # of text; a batch ends at whichever comes first
_CHUNK = 4 << 20  # characters of a JSON list
_GAP = re.compile(r"[\s,]*")
_CSV_BLOCK = 64 << 20  # a row of a csv file must fit into a block
_SEPARATORS = "\t;|,"


def read_files(paths: Iterable[Path], mixed: dict[str, str] | None = None) -> Iterator[pa.Table]:
    """The rows of several files, a few thousand at a time; a bar shows after two seconds.

    Args:
        paths: files whose suffix is in :data:`READERS`.
        mixed: gets the name of every column whose rows disagree about its type, and where. Later tables
            lack such a column; what earlier ones have of it is of no use.

    Raises:
        UserError: naming the file, and the line where there are lines.
    """
    mixed = {} if mixed is None else mixed
    known = pa.schema([])
    for path in paths:
        with late_bar(f"reading {path.name}", path.stat().st_size) as reach:
            for table in READERS[path.suffix](path, reach, mixed):
                known = _unify(known, table.schema, str(path), mixed)
                kept = table.drop_columns([name for name in table.column_names if name in mixed])
                yield kept.replace_schema_metadata(None)


def _unify(known: pa.Schema, schema: pa.Schema, where: str, mixed: dict[str, str]) -> pa.Schema:
    """The types of columns so far and of these; one that does not go with the earlier ones is mixed."""
    for column in schema:
        try:
            known = pa.unify_schemas([known, pa.schema([column])], promote_options="permissive")
        except pa.ArrowException as error:
            mixed[column.name] = f"{where}: a column changes its type ({first_line(error)})"
    return known


# -- json ------------------------------------------------------------------------------------------


def _read_json(path: Path, reach: Reach, mixed: dict[str, str]) -> Iterator[pa.Table]:
    """One object a line, or one list of objects."""
    with path.open("rb") as file:
        is_list = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    known = pa.schema([])
    numbered = _list_items(path, reach) if is_list else _lines(path, reach)
    for rows in in_batches(_objects(path, numbered), _BATCH_ROWS, _BATCH_BYTES):
        table = _to_arrow(path, rows, known, mixed)
        known = _unify(known, table.schema, f"{path}, lines {rows[0][0]} to {rows[-1][0]}", mixed)
        yield table.drop_columns([name for name in table.column_names if name in mixed])


def _lines(path: Path, reach: Reach) -> Iterator[tuple[int, Any, int]]:
    """Line number, value and size of every line that is not blank."""
    with path.open("rb") as file:
        # a binary file ends its lines at \n alone: a text may hold other line separators, unescaped
        for number, line in enumerate(file, start=1):
            if number % _BATCH_ROWS == 0:
                reach(file.tell())
            if line.isspace():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, json.loads(text), len(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number} is not UTF-8 text ({error.reason})") from error
            except (ValueError, RecursionError) as error:
                reason = (
                    f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                )
                raise UserError(
                    f"{path}, line {number} is not JSON ({reason}); write one object a line, "
                    "or one list of objects"
                ) from error


def _list_items(path: Path, reach: Reach) -> Iterator[tuple[int, Any, int]]:
    """Line number, value and size of every item of one JSON list, without reading it whole."""
    decoder = json.JSONDecoder()
    buffer, position, line, at_end = "[", 1, 1, False
    try:
        with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            while (character := file.read(1)) != "[":
                line += character == "\n"
            while True:
                start = _GAP.match(buffer, position).end()  # type: ignore[union-attr]
                if buffer.startswith("]", start):
                    if (buffer[start + 1 :] + file.read()).strip():
                        raise UserError(f"{path}: there is more after the end of the list")
                    return
                try:
                    value, stop = decoder.raw_decode(buffer, start)
                except json.JSONDecodeError as error:
                    if at_end:
                        line += buffer.count("\n", position, error.pos)
                        raise UserError(
                            f"{path}, line {line} is not JSON ({error.msg}); the file must be one list of "
                            "objects, or one object a line"
                        ) from error
                    more = file.read(max(_CHUNK, len(buffer)))
                    buffer, position, at_end = buffer[position:] + more, 0, not more
                    reach(raw.tell())
                    continue
                yield line + buffer.count("\n", position, start), value, stop - start
                line += buffer.count("\n", position, stop)
                position = stop
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
    except RecursionError as error:
        raise UserError(f"{path}, line {line} is nested too deeply to be preference data") from error


def _objects(path: Path, numbered: Iterator[tuple[int, Any, int]]) -> Iterator[tuple[NumberedRow, int]]:
    """Line numbers and rows, and their sizes."""
    for number, value, length in numbered:
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number} holds {_kind(value)}, not an object with columns")
        yield (number, value), length


def _to_arrow(path: Path, rows: list[NumberedRow], known: pa.Schema, mixed: dict[str, str]) -> pa.Table:
    """A table of these rows without mixed columns; columns that they lack but earlier rows had are null."""
    names = dict.fromkeys([*known.names, *(name for _, row in rows for name in row)])
    columns = {}
    for name in names:
        if name in mixed:
            continue
        values = [row.get(name) for _, row in rows]
        try:
            column = pa.array(values)
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: column {name!r} holds half a character (a lone surrogate)") from error
        except (pa.ArrowException, OverflowError, TypeError) as error:
            reason = _mixture(name, rows) or _unlike_parts(name, rows)
            mixed[name] = f"{path}: {reason or f'column {name!r}: {first_line(error)}'}"
            continue
        if name in known.names and pa.types.is_null(column.type):
            column = pa.nulls(len(rows), known.field(name).type)
        columns[name] = column
    return pa.table(columns)


def _mixture(name: str, rows: list[NumberedRow]) -> str | None:
    """Name two lines that disagree about the type of a column."""
    first: dict[str, int] = {}
    for number, row in rows:
        if row.get(name) is not None:
            first.setdefault(_kind(row[name]), number)
    if len(first) < 2:
        return None
    types = " and ".join(f"{kind} (line {number})" for kind, number in list(first.items())[:2])
    return f"column {name!r} holds {types}; give it one type"


def _unlike_parts(name: str, rows: list[NumberedRow]) -> str | None:
    """The first line whose own list or object has no one type."""
    for number, row in rows:
        try:
            pa.array([row.get(name)])
        except (pa.ArrowException, OverflowError, TypeError):
            return f"line {number}: column {name!r} holds parts of different types; give them one type"
    return None


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return (kinds | {dict: "an object"}).get(type(value), "nothing")


# -- csv and parquet -------------------------------------------------------------------------------


def _read_csv(path: Path, reach: Reach, mixed: dict[str, str], separator: str = ",") -> Iterator[pa.Table]:
    """All columns as text: ids keep their zeros, and "NA" or "null" are words."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=separator), [])
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error
    if not names:
        return
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of the same name in its first line")
    other = [mark for mark in _SEPARATORS if mark in names[0]]
    if len(names) == 1 and other:
        cure = {"\t": "name it .tsv", ",": "name it .csv"}.get(other[0], "save it with commas, as .csv")
        raise UserError(f"{path} has its columns separated by {other[0]!r}; {cure}")
    with pa.OSFile(str(path)) as file:
        reader = pa.csv.open_csv(
            file,
            read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK),
            parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
        for batch in reader:
            reach(file.tell())
            yield pa.Table.from_batches([batch])


def _read_parquet(path: Path, reach: Reach, mixed: dict[str, str]) -> Iterator[pa.Table]:
    with pa.parquet.ParquetFile(path) as file:
        size, total, done = path.stat().st_size, max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(_BATCH_ROWS):
            done += len(batch)
            reach(size * done // total)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column.validate(full=True)  # the reader does not look whether text is UTF-8
                except pa.ArrowInvalid as error:
                    raise UserError(
                        f"{path} is damaged in column {name!r} ({first_line(error)}); write it again"
                    ) from error
            yield pa.Table.from_batches([batch])


def first_line(error: Exception) -> str:
    """The first line of what an error says, and not much of it."""
    return str(error).partition("\n")[0][:200]


#: suffix -> reader
READERS: dict[str, Callable[[Path, Reach, dict[str, str]], Iterator[pa.Table]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, separator="\t"),
    ".parquet": _read_parquet,
    ".soc": read_preflib,
    ".soi": read_preflib,
}
