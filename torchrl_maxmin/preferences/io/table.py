"""Tables that may be larger than memory: rows of files, mapped, or those of a ``datasets.Dataset``."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from torchrl_maxmin.core.errors import UserError

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ArrowColumn", "DatasetTable", "FileTable", "Table", "in_batches", "spill"]

Row = TypeVar("Row")

_READ_ROWS = 1_000  # turned into Python objects at a time


def spill(tables: Iterable[pa.Table]) -> pa.Table:
    """Write tables one after the other to a temporary file and map them as one table.

    The file is deleted as soon as it is mapped: its space returns when the last reference to the
    table goes, however the process ends. Where the schema changes a new file starts; columns
    are then reconciled (null with anything, int with float, structs field by field).

    Args:
        tables: consumed one at a time.

    Raises:
        UserError: if the temporary folder is full.
        pyarrow.ArrowTypeError: if a column changes to a type that does not go with the earlier one.

    Example:
        >>> spill(pa.table({"a": [i]}) for i in range(3)).to_pydict()
        {'a': [0, 1, 2]}
    """
    parts = []
    try:
        for schema, run in groupby(tables, key=lambda table: table.schema):
            with tempfile.NamedTemporaryFile(prefix="torchrl-maxmin-", suffix=".arrow") as file:
                with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                    for table in run:
                        writer.write_table(table)
                parts.append(pa.ipc.open_file(pa.memory_map(file.name)).read_all())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"no space for a temporary copy of the data in {tempfile.gettempdir()}; "
            "set TMPDIR to a folder on a larger disk"
        ) from error
    return pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})


def in_batches(sized: Iterable[tuple[Row, int]], most_rows: int, most_size: int) -> Iterator[list[Row]]:
    """Cut rows that come with their sizes into lists, each ending at whichever limit comes first."""
    batch: list[Row] = []
    total = 0
    for row, size in sized:
        batch.append(row)
        total += size
        if len(batch) == most_rows or total > most_size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class ArrowColumn(Sequence[Any]):
    """Rows of a column of a mapped table, turned into Python objects only when they are read.

    A sequence that compares and adds up like a list, and of which a slice is a list.

    Args:
        column: the whole column.
        rows: int64 [P], the rows of it that this sequence shows, in order.
        decode: applied to every row as it is read; None leaves it.

    Example:
        >>> column = ArrowColumn(pa.chunked_array([["a", "b"], ["c"]]), np.array([2, 0]))
        >>> column[0], column[:2], column == ["c", "a"]
        ('c', ['c', 'a'], True)
    """

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray, decode: Callable[[Any], Any] | None = None):
        self._chunks = column.chunks
        self._type = column.type
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self._rows = rows
        self._decode = decode

    def __len__(self) -> int:
        return len(self._rows)

    def _gather(self, rows: np.ndarray) -> pa.Array:
        """These rows of the column as one Arrow array, taken chunk by chunk."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        cuts = np.searchsorted(owner[order], chunks := np.unique(owner))[1:]
        pieces = [
            self._chunks[chunk].take(pa.array(part - self._starts[chunk]))
            for chunk, part in zip(chunks.tolist(), np.split(rows[order], cuts), strict=False)
        ]
        gathered = pa.concat_arrays(pieces) if pieces else pa.array([], self._type)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return gathered.take(pa.array(back))

    def batches(self, size: int = _READ_ROWS) -> Iterator[pa.Array]:
        """All rows, as Arrow arrays of ``size`` rows."""
        return (self._gather(self._rows[start : start + size]) for start in range(0, len(self), size))

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches():
            yield from self._objects(batch)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._objects(self._gather(self._rows[index]))
        row = int(self._rows[index])
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._chunks[chunk][row - int(self._starts[chunk])].as_py()
        return value if self._decode is None else self._decode(value)

    def _objects(self, batch: pa.Array) -> list[Any]:
        values = batch.to_pylist()
        return values if self._decode is None else [self._decode(value) for value in values]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __add__(self, other: Sequence[Any]) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: Sequence[Any]) -> list[Any]:
        return [*other, *self]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        head = ", ".join(repr(self[i]) for i in range(min(3, len(self))))
        return f"ArrowColumn([{head}{', ...' if len(self) > 3 else ''}], {len(self)} rows)"


class Table(Protocol):
    """Columns by name, whole or by rows."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""

    @property
    def mixed_columns(self) -> dict[str, str]:
        """Columns that were left out as their rows disagree about the type, and where."""

    def __len__(self) -> int:
        """Number of rows."""

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it lies in memory or on disk."""

    def read(self, names: list[str], rows: slice | Sequence[int] | np.ndarray) -> list[list[Any]]:
        """These rows of these columns as Python objects, a list a column."""


@dataclass(frozen=True)
class FileTable:
    """Rows of files, without ``datasets``, whose import takes half a second.

    Args:
        table: their rows, mapped from disk.
        mixed_columns: see :class:`Table`.

    Example:
        >>> FileTable(pa.table({"a": [1, 2], "b": ["x", "y"]})).read(["b", "a"], [1])
        [['y'], [2]]
    """

    table: pa.Table
    mixed_columns: dict[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.table.schema

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return self.table.column_names

    def __len__(self) -> int:
        """Number of rows."""
        return self.table.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it lies on disk."""
        return self.table.column(name)

    def read(self, names: list[str], rows: slice | Sequence[int] | np.ndarray) -> list[list[Any]]:
        """These rows of these columns as Python objects, a list a column."""
        part = self.table.select(names)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return [column.to_pylist() for column in part.slice(start, stop - start).columns]
        return [ArrowColumn(column, np.asarray(rows))[:] for column in part.columns]


class DatasetTable:
    """Rows of a ``datasets.Dataset``, whose features may have more to them than their columns.

    Args:
        data: the data set, whatever its format.
        mixed_columns: see :class:`Table`.
    """

    def __init__(self, data: Dataset, mixed_columns: dict[str, str] | None = None):
        self.data = data.with_format(None)
        self.mixed_columns = mixed_columns or {}

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.data.features.arrow_schema

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return self.data.column_names

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.data)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it lies in memory or on disk."""
        return self.data.select_columns([name]).with_format("arrow")[:].column(0)

    def read(self, names: list[str], rows: slice | Sequence[int] | np.ndarray) -> list[list[Any]]:
        """These rows of these columns as Python objects, a list a column."""
        batch = self.data.select_columns(names)[rows if isinstance(rows, slice) else list(rows)]
        return [batch[name] for name in names]
