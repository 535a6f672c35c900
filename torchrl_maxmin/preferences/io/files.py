"""Tables in: a file or folder, a ``datasets.Dataset`` or a hub name, with the place of every mistake."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torchrl_maxmin.core.errors import UserError, first_line
from torchrl_maxmin.core.progress import late_bar
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.io.csv_parquet import read_csv, read_parquet
from torchrl_maxmin.preferences.io.preflib import read_preflib
from torchrl_maxmin.preferences.io.table import DatasetTable, FileTable, Table, in_batches, spill
from torchrl_maxmin.preferences.texts import read_texts

with suppress(ImportError):  # it comes with datasets, and load_table says where that is missing
    import pyarrow as pa
if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "READERS",
    "load_prompts",
    "load_table",
    "mixed_columns",
    "open_table",
    "read_files",
    "require_columns",
]

Reach = Callable[[int], None]
NumberedRow = tuple[int, dict[str, Any]]

_BATCH_ROWS = 5_000
_BATCH_BYTES = 16 << 20  # of text; a batch ends at whichever comes first
_CHUNK = 4 << 20  # characters of a JSON list
_GAP = re.compile(r"[\s,]*")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")


def load_table(source: str | Path | Any, split: str = "train") -> Dataset:
    """Load rows from a file, a folder, a hub name or an object in memory.

    Rows of a file are mapped from a temporary copy that goes away with the process: nothing is
    written beside the file or kept in a cache. Hub data sets use the cache of ``datasets``
    (``HF_HOME``).

    Args:
        source: ``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or PrefLib's ``.soc`` or ``.soi``
            file, a folder of such files, a folder that ``save_to_disk`` wrote, a hub name, or a
            ``datasets.Dataset`` itself.
        split: which split of a ``DatasetDict``, of a hub data set, or of a folder whose files
            are named after their split.

    Raises:
        UserError: if there is nothing there, no such split, or a mistake in a file; the message
            names the line where there are lines.
    """
    with _reading(source):
        import datasets

        if files := _local_files(source, split):
            table = _read(files)
            # a fingerprint of our own: datasets would hash every byte of the table, in memory
            found = datasets.Dataset(table.table, fingerprint=uuid4().hex)
            found.mixed_columns = table.mixed_columns
            return found
        if not isinstance(source, str | Path):
            loaded = source
        elif _is_saved(Path(source)):
            loaded = datasets.load_from_disk(str(source))
        else:
            loaded = datasets.load_dataset(str(source), split=split)
        if isinstance(loaded, datasets.DatasetDict):
            return _pick_split(loaded, split)
        if isinstance(loaded, datasets.Dataset):
            return loaded
        raise UserError(
            f"cannot read data from a {type(source).__name__}; give a path, a hub name or a datasets.Dataset "
            "(Dataset.from_list, Dataset.from_pandas)"
        )


def open_table(source: str | Path | Any, split: str = "train") -> Table:
    """Open what :func:`load_table` takes; files without ``datasets``, whose import takes half a second."""
    with _reading(source):
        files = _local_files(source, split)
        if files:
            return _read(files)
    data = load_table(source, split)
    return DatasetTable(data, mixed_columns(data))


@contextmanager
def _reading(source: Any) -> Iterator[None]:
    """Turn what goes wrong into one sentence that says what could be read."""
    try:
        if find_spec("pyarrow") is None or find_spec("datasets") is None:
            raise UserError("reading data needs datasets: pip install 'torchrl-maxmin[llm]'")
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read data from {str(source)!r} ({type(error).__name__}: {first_line(error)}); "
            "give a json, jsonl, csv, tsv or parquet file, a saved dataset, or a hub name that can be reached"
        ) from error


def _is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _local_files(source: Any, split: str) -> list[Path]:
    """The files that a path names; none for what ``datasets`` has to load."""
    if not isinstance(source, str | Path) or _is_saved(path := Path(source)):
        return []
    if path.exists():
        return _data_files(path, split)
    if path.suffix in READERS:
        raise UserError(f"cannot read data from {str(path)!r}: there is no such file; check the path")
    return []


def _read(files: list[Path]) -> FileTable:
    mixed: dict[str, str] = {}
    table = spill(read_files(files, mixed))
    return FileTable(table.drop_columns([name for name in table.column_names if name in mixed]), mixed)


def mixed_columns(table: Dataset | Table) -> dict[str, str]:
    """Return the columns of a file that were left out as their rows disagree about the type, and where."""
    return getattr(table, "mixed_columns", {})


def _data_files(path: Path, split: str) -> list[Path]:
    """The file itself, or the files of a folder that belong to the split, by name."""
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(f"{path} is none of {', '.join(READERS)}; convert it to one of these")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
    found = sorted({file.suffix for file in files})
    if len(found) != 1:
        content = f"files of several kinds ({', '.join(found)})" if found else f"no {', '.join(READERS)} file"
        raise UserError(f"the folder {path} holds {content}; name one file, or keep one kind in the folder")
    of_split = {file: next((s for s in _SPLITS if file.stem.startswith(s)), None) for file in files}
    if not any(of_split.values()):
        return files
    mine = [file for file, name in of_split.items() if name == split]
    if not mine:
        there = ", ".join(sorted({name for name in of_split.values() if name}))
        raise UserError(f"no split {split!r} in the folder {path}; there are {there}")
    return mine


def _pick_split(splits: Any, split: str) -> Dataset:
    if split not in splits:
        raise UserError(f"no split {split!r} in the data; there are {', '.join(splits)}")
    return splits[split]


def require_columns(table: Dataset | Table, wanted: Sequence[str], what: str) -> None:
    """Raise :class:`UserError` naming the missing columns and those that are there."""
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        mixed = mixed_columns(table)
        lacks = f"{what} needs the column(s) {', '.join(missing)}; found {', '.join(table.column_names)}. "
        raise UserError(mixed.get(missing[0], f"{lacks}Rename your columns to match"))


def load_prompts(source: str | Path | Any, split: str, what: str) -> tuple[Dataset, list[Text]]:
    """Load a table with a column prompt.

    Args:
        source: what :func:`load_table` takes.
        split: which split of a data set that has several.
        what: the stage, for messages.

    Returns:
        The table, and its prompts: strings or conversations.

    Raises:
        UserError: for no rows, no such column, or a cell that is no text.
    """
    table = load_table(source, split)
    if len(table) == 0:
        raise UserError(f"{source} has no prompts")
    require_columns(table, ["prompt"], what)
    return table, read_texts(table, "prompt")


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


#: suffix -> reader
READERS: dict[str, Callable[[Path, Reach, dict[str, str]], Iterator[pa.Table]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, separator="\t"),
    ".parquet": read_parquet,
    ".soc": read_preflib,
    ".soi": read_preflib,
}
