"""Checksums of a folder's files: damage is found, and named, before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from torchrl_maxmin.core.errors import UserError

__all__ = [
    "CARD",
    "MANIFEST",
    "VIEWS",
    "DamagedError",
    "file_digest",
    "require_digest",
    "require_whole",
    "write_manifest",
]

MANIFEST = "manifest.json"
#: A model's card on the Hugging Face hub.
CARD = "README.md"
#: Files for people, which are written again from what a run found, and decide nothing.
VIEWS = ("report.md", "report.html", CARD)


class DamagedError(UserError):
    """A file is not what was written."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write SHA-256 and size of files of a folder, but for :data:`VIEWS`, into its ``manifest.json``.

    It is written whole or not at all.
    """
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(files)
        if path.relative_to(folder).as_posix() not in VIEWS
    }
    partial = folder / f".{MANIFEST}.partial"
    with partial.open("w") as file:
        file.write(json.dumps({"files": listed}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)


def require_whole(folder: str | Path) -> None:
    """Read all files of a folder's manifest once; a folder without one is taken as it is.

    Raises:
        DamagedError: naming the first file that is missing or other than it was written.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        listed = {
            str(name): str(facts["sha256"]) for name, facts in json.loads(path.read_text())["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged: it lists no files; {_REMEDY}") from error
    for name, digest in listed.items():
        if name in VIEWS:  # of an earlier version, which listed them
            continue
        require_digest(folder / name, digest)


def require_digest(path: Path, digest: str) -> None:
    """Raise :class:`DamagedError` where a file is missing or its SHA-256 another one."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing, which was written; {_REMEDY}")
    if file_digest(path) != digest:
        raise DamagedError(f"{path} is damaged: not what was written (SHA-256); {_REMEDY}")


_REMEDY = "take a copy of the folder that is whole, or make it again"
