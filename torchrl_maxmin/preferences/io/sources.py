"""Tables in: a file or folder, a ``datasets.Dataset`` or a hub name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.io.files import READERS, first_line, read_files
from torchrl_maxmin.preferences.io.table import DatasetTable, FileTable, Table, spill
from torchrl_maxmin.preferences.texts import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_prompts", "load_table", "mixed_columns", "open_table", "require_columns"]

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
