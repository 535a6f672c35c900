"""Columns of tables: found by name, read by rows."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.io.table import Table

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
    import pyarrow.compute as pc


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


# -- columns by name -------------------------------------------------------------------------------


def column_paths(table: Table) -> list[str]:
    """Names of all columns, and of the fields inside a column of objects as ``column.field``."""
    schema = table.schema
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


def read_column(table: Table, path: str) -> pa.ChunkedArray:
    """One column, or one field of a column, as it lies in memory or on disk."""
    name = outer_column(table, path)
    column = table.column(name)
    return column if name == path else pc.struct_field(column, path.removeprefix(f"{name}."))


def labels_of(table: Table, path: str, what: str) -> tuple[np.ndarray, list[str]]:
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
    table: Table, roles: Roles, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """The columns of the roles, row by row, read a thousand rows at a time."""
    names = list(dict.fromkeys(outer_column(table, path) for path in roles.columns()))
    total = len(table) if rows is None else len(rows)
    for start in range(0, total, _READ_ROWS):
        read = slice(start, start + _READ_ROWS)
        batch = table.read(names, read if rows is None else rows[read])
        for values in zip(*batch, strict=True):
            yield dict(zip(names, values, strict=True))


def outer_column(table: Table, path: str) -> str:
    """The column in which a path of :func:`column_paths` lies."""
    return path if path in table.column_names else path.partition(".")[0]
