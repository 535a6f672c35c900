"""CSV and Parquet in, with the place of every mistake."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from torchrl_maxmin.core.errors import UserError, first_line

with suppress(ImportError):  # it comes with datasets, and load_table says where that is missing
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

__all__ = ["read_csv", "read_parquet"]

_BATCH_ROWS = 5_000
_CSV_BLOCK = 64 << 20  # a row of a csv file must fit into a block
_SEPARATORS = "\t;|,"


def read_csv(
    path: Path, reach: Callable[[int], None], mixed: dict[str, str], separator: str = ","
) -> Iterator[pa.Table]:
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


def read_parquet(path: Path, reach: Callable[[int], None], mixed: dict[str, str]) -> Iterator[pa.Table]:
    """Some thousand rows at a time, of which text is UTF-8."""
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
