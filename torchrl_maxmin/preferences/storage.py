"""Arrow tables that may be larger than memory: written to a temporary file, mapped, read by rows."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from torchrl_maxmin.errors import UserError

__all__ = ["ArrowColumn", "spill"]

_READ_ROWS = 1_000  # rows turned into Python objects at a time


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
        pieces = [
            self._chunks[chunk].take(pa.array(part - self._starts[chunk]))
            for chunk, part in _runs(owner[order], rows[order])
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


def _runs(owner: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows by owner, where those of an owner stand side by side."""
    cuts = np.flatnonzero(np.diff(owner)) + 1
    for part_owner, part in zip(np.split(owner, cuts), np.split(rows, cuts), strict=True):
        if len(part):
            yield int(part_owner[0]), part
