"""Tables in: a local file, a folder, a ``datasets.Dataset`` or a hub name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_maxmin.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_table", "require_columns"]

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_table(source: str | Path | Any, split: str = "train") -> Dataset:
    """Load rows from a file, a saved dataset, a hub name or an object in memory.

    Args:
        source: ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, a folder that
            ``Dataset.save_to_disk`` wrote, a hub name, or a ``datasets.Dataset`` itself.
        split: which split of a ``DatasetDict`` or hub data set.

    Raises:
        UserError: if there is nothing there, or no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("reading data needs datasets: pip install 'torchrl-maxmin[llm]'") from error
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict):
        return _pick_split(source, split)
    path = Path(str(source))
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise UserError(f"{path} is none of {', '.join(_READERS)}; convert it to one of these")
            if path.suffix in (".json", ".jsonl"):
                return datasets.Dataset.from_list(_read_rows(path))
            return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            return _pick_split(loaded, split) if isinstance(loaded, datasets.DatasetDict) else loaded
        if path.suffix in _READERS:
            raise UserError(f"cannot read data from {str(path)!r}: there is no such file; check the path")
        return datasets.load_dataset(str(source), split=split)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot read data from {str(source)!r} ({type(error).__name__}: {reason}); "
            "give a json, jsonl, csv or parquet file, a saved dataset, or a hub name that can be reached"
        ) from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    import json

    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return json.loads(text)
    # not splitlines(): a text may hold other line separators, unescaped
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _pick_split(splits: Any, split: str) -> Dataset:
    if split not in splits:
        raise UserError(f"no split {split!r} in the data; there are {', '.join(splits)}")
    return splits[split]


def require_columns(table: Dataset, wanted: Sequence[str], what: str) -> None:
    """Raise :class:`UserError` naming the missing columns and those that are there."""
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise UserError(
            f"{what} needs the column(s) {', '.join(missing)}; found {', '.join(table.column_names)}. "
            "Rename your columns to match"
        )
