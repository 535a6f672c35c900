"""Columns of tables that may be larger than memory: mapped from a file, found by name, read by rows."""

from __future__ import annotations

import errno
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from torchrl_maxmin.core.errors import UserError

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
    import pyarrow.compute as pc
if TYPE_CHECKING:
    from datasets import Dataset


Row = TypeVar("Row")

_READ_ROWS = 1_000  # turned into Python objects at a time

USER_ALIASES = (
    "user_id",
    "worker",
    "annotator_id",
    "annotator",
    "rater_id",
    "judge",
    "uid",
    "respondent_id",
    "user",
    "userId",
    "worker_id",
    "labeler",
    "labeller",
    "participant",
)
GROUP_ALIASES = ("group_id", "group", "data_subset")
PROMPT_ALIASES = (
    "prompt",
    "query",
    "question",
    "instruction",
    "user_prompt",
    "user_input",
    "context",
    "info.post",
    "info.prompt",
)
#: the ``user_column`` that makes every row a user of its own
EACH_ROW = "none"
#: the ``prompt_column`` of data without prompts
NO_PROMPT = "none"


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


# -- columns by name -------------------------------------------------------------------------------


def column_paths(table: Dataset) -> list[str]:
    """Names of all columns, and of the fields inside a column of objects as ``column.field``."""
    schema: pa.Schema = table.features.arrow_schema
    nested = [f"{f.name}.{part.name}" for f in schema if pa.types.is_struct(f.type) for part in f.type]
    return [*schema.names, *nested]


def first_of(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """The first alias that is there."""
    return next((alias for alias in aliases if alias in names), None)


def find_user_column(paths: Sequence[str]) -> str:
    """The one column with a known name for users; inside other columns only when there is none.

    Raises:
        UserError: for none or several; the message lists them.
    """
    found = [alias for alias in USER_ALIASES if alias in paths] or [
        path for path in paths if path.rpartition(".")[2] in USER_ALIASES
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"several columns could be the user: {', '.join(found)}; say which with --user_column"
        )
    group = first_of(paths, GROUP_ALIASES)
    as_users = f", let every {group} be one user with --user_column {group}" if group else ""
    raise UserError(
        f"no user column among {', '.join(paths)}; name it with --user_column "
        f"(known names: {', '.join(USER_ALIASES)}){as_users}, or let every row be a user of its own with "
        f"--user_column {EACH_ROW}"
    )


def numbered_columns(paths: Sequence[str], stems: Sequence[str]) -> tuple[str, ...]:
    """The columns of the first stem that comes as ``stem_a, stem_b ..``, ``stem_0 ..`` or ``stem_1 ..``."""
    for stem in stems:
        for marks in (string.ascii_lowercase, string.digits, string.digits[1:]):
            columns = tuple(takewhile(paths.__contains__, (f"{stem}_{mark}" for mark in marks)))
            if len(columns) > 1:
                return columns
    return ()


def shown(value: Any) -> str:
    """A value as messages show it: one line, and not much of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def cell(row: dict[str, Any], path: str) -> Any:
    """The value of a row at a path of :func:`column_paths`; None where the outer object is missing."""
    if path in row:
        return row[path]
    name, _, part = path.partition(".")
    return None if row[name] is None else row[name].get(part)


def read_column(table: Dataset, path: str) -> pa.ChunkedArray:
    """One column, or one field of a column, as it lies in memory or on disk."""
    name = outer_column(table, path)
    column = table.select_columns([name]).with_format("arrow")[:].column(0)
    return column if name == path else pc.struct_field(column, path.removeprefix(f"{name}."))


def labels_of(table: Dataset, path: str, what: str) -> tuple[np.ndarray, list[str]]:
    """Codes and names of a column of ids, both in order of first appearance.

    Args:
        table: the data, N rows.
        path: its column.
        what: what an id stands for, in messages.

    Returns:
        codes int64 [N], and the names that they stand for.

    Raises:
        UserError: for a column that holds no ids, or a row without one.
    """
    column = read_column(table, path)
    try:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        names = pc.cast(column, pa.large_string())
    except pa.ArrowException as error:
        raise UserError(
            f"column {path!r} holds {column.type}, not {what} ids; name another column"
        ) from error
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(names), ""), True)
    first = pc.index(empty, True).as_py()
    if first >= 0:
        raise UserError(f"row {first}: no {what} id in column {path!r}; drop the row or give it an id")
    encoded = pc.dictionary_encode(names).combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


@dataclass(frozen=True)
class Roles:
    """Columns that a layout reads.

    Attributes:
        prompt: columns of the prompt; the first that holds something counts. Empty where it is implicit.
        responses: one column a response, or one that lists them.
        verdict: columns that say which response is better, or how good one is.
        key: the column that tells prompts apart where their text does not have to.
        promptless: whether texts that are no transcripts stand for themselves, to an empty prompt.
    """

    prompt: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    verdict: tuple[str, ...] = ()
    key: str | None = None
    promptless: bool = False

    def columns(self) -> dict[str, str]:
        """Role of every column."""
        roles = {"prompt": self.prompt, "response": self.responses, "verdict": self.verdict}
        by_path = {path: role for role, paths in roles.items() for path in paths}
        return by_path if self.key is None else {**by_path, self.key: "same prompt"}


def rows_of(
    table: Dataset, roles: Roles, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """The columns of the roles, row by row, read a thousand rows at a time."""
    names = list(dict.fromkeys(outer_column(table, path) for path in roles.columns()))
    part = table.with_format(None).select_columns(names)
    total = len(table) if rows is None else len(rows)
    for start in range(0, total, _READ_ROWS):
        read = slice(start, start + _READ_ROWS)
        batch = part[read] if rows is None else part[list(rows[read])]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def outer_column(table: Dataset, path: str) -> str:
    """The column in which a path of :func:`column_paths` lies."""
    return path if path in table.column_names else path.partition(".")[0]
