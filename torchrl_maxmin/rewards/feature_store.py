"""Features of texts on disk, by model and text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console, late_bar
from torchrl_maxmin.models.loading import adapted_model, import_transformers, load_config

__all__ = ["FeatureStore", "cache_folder", "cache_limit", "prune", "row_key", "store_facts"]

#: Bytes of all kept features, where the environment's TORCHRL_MAXMIN_CACHE_BYTES says nothing.
MOST_BYTES = 20 << 30
_LEFTOVER_SECONDS = 86_400  # an unfinished file of a process that is long gone

#: counts up when features of one key would come out otherwise, or lie otherwise in the files
FORMAT = 1
_READ_ROWS = 4096
_WRITTEN_BYTES = 1 << 26  # at a time: what a run that is stopped has read in vain
_HASHED_BYTES = 1 << 24
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_CONFIGS = ("config.json", "adapter_config.json")


def cache_folder(setting: bool | str) -> Path | None:
    """Find the folder that features are kept in.

    Args:
        setting: ``true``, ``false`` or a folder. ``true`` is that of the environment's
            ``TORCHRL_MAXMIN_CACHE``, and else ``~/.cache/torchrl_maxmin/features``.

    Returns:
        The folder, made and writable; None for ``false``, and where there is no home to write to.

    Raises:
        UserError: if a folder that was named cannot be written to, or the limit of bytes is no number.
    """
    if str(setting).lower() == "false":
        return None
    cache_limit()
    own = str(setting) if str(setting).lower() != "true" else os.environ.get("TORCHRL_MAXMIN_CACHE")
    try:
        folder = Path(own or "~/.cache/torchrl_maxmin/features").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:
        if own:
            raise UserError(
                f"features cannot be kept in {own!r}: {error}; give --feature_cache another folder, or false"
            ) from error
        return None


def cache_limit() -> int:
    """Bytes that kept features may take together, from ``TORCHRL_MAXMIN_CACHE_BYTES``.

    Raises:
        UserError: if it is no whole number of bytes.
    """
    setting = os.environ.get("TORCHRL_MAXMIN_CACHE_BYTES", "").strip()
    if not setting:
        return MOST_BYTES
    if not setting.isdecimal():
        raise UserError(f"TORCHRL_MAXMIN_CACHE_BYTES is a whole number of bytes, not {setting!r}; unset it")
    return int(setting)


def prune(folder: Path, most: int) -> int:
    """Remove the files of kept features that were used the longest ago, until the others take ``most`` bytes.

    Any number of processes may prune at once, and read: what is read is copied, and what is missing is made
    again.

    Args:
        folder: of all stores.
        most: bytes that may stay.

    Returns:
        Bytes that were removed.
    """
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # another process was first
            facts = path.stat()
            age = time.time() - facts.st_mtime
            if path.suffix == ".partial" and age > _LEFTOVER_SECONDS:
                path.unlink()
            elif path.suffix == ".safetensors":
                found.append((facts.st_mtime_ns, str(path), facts.st_size))
    total, removed = sum(size for *_, size in found), 0
    for _, name, size in sorted(found):
        if total - removed <= most:
            break
        with contextlib.suppress(OSError):
            os.unlink(name)
            removed += size
    return removed


def row_key(row: Sequence[int]) -> bytes:
    """The SHA-256 of a row of tokens."""
    return hashlib.sha256(np.asarray(row, "<i4").tobytes()).digest()


def store_facts(name_or_path: str, **more: Any) -> dict[str, Any] | None:
    """Everything that decides the features of a row of tokens.

    Args:
        name_or_path: the model: its files are hashed, or its commit at the hub stands for them.
        **more: how it is read, and where.

    Returns:
        The facts; None where nothing tells two versions of a model apart.
    """
    digest = _model_digest(name_or_path)
    if digest is None:
        return None
    versions = {"torch": torch.__version__, "transformers": import_transformers().__version__}
    return {"format": FORMAT, "model": digest, **versions, **more}


def _model_digest(name_or_path: str) -> str | None:
    folder = Path(name_or_path)
    if not folder.is_dir():
        commit = getattr(load_config(name_or_path), "_commit_hash", None)
        return commit and f"{name_or_path}@{commit}"
    files = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS or p.name in _CONFIGS)
    digest, done = hashlib.sha256(), 0
    with late_bar("hashing the model, MB", sum(p.stat().st_size for p in files) >> 20) as reach:
        for path in files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while part := file.read(_HASHED_BYTES):
                    digest.update(part)
                    done += len(part)
                    reach(done >> 20)
    base = adapted_model(name_or_path)
    below = None if base is None else _model_digest(base)
    if base is not None and below is None:
        return None
    return digest.hexdigest() if below is None else f"{digest.hexdigest()} on {below}"


class FeatureStore:
    """Features of token rows in files of one folder; a file is written whole, and never changed.

    Any number of processes may read and write at once: a file appears under its name when it is complete and
    on the disk. Each row lies there with a checksum of its key and its numbers; a file that is cut off, or
    of which a row does not fit its checksum, is removed, and its rows are as if they had never been there.

    Args:
        folder: of all stores.
        facts: of :func:`store_facts`; each set of facts has a folder of its own in it.

    Example:
        >>> import tempfile
        >>> store = FeatureStore(Path(tempfile.mkdtemp()), {"model": "a"})
        >>> store.add([row_key([1, 2])], torch.tensor([[0.5, 1.5]]))
        >>> [(places, rows.tolist()) for places, rows in store.held([row_key([3]), row_key([1, 2])])]
        [([1], [[0.5, 1.5]])]
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.facts = json.dumps(facts, sort_keys=True)
        self.folder = folder / hashlib.sha256(self.facts.encode()).hexdigest()[:32]

    def held(self, keys: Sequence[bytes]) -> Iterator[tuple[list[int], Tensor]]:
        """Read what is there, by blocks: places in ``keys``, which all differ, and their features [n, D]."""
        wanted = {key: place for place, key in enumerate(keys)}
        for path in sorted(self.folder.glob("*.safetensors")):
            if wanted:
                yield from self._of_file(path, wanted)

    def _of_file(self, path: Path, wanted: dict[bytes, int]) -> Iterator[tuple[list[int], Tensor]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:  # maps the file: what is not asked for is not read
                stored, checksums, features = (
                    file.get_tensor(name) for name in ("keys", "checksums", "features")
                )
        except FileNotFoundError:  # another process found it damaged
            return
        except (SafetensorError, OSError):
            self._drop(path)
            return
        alike = len(stored) == len(checksums) == len(features)
        if not alike or stored.shape[1:] != (32,) or features.ndim != 2:
            self._drop(path)
            return
        whole = stored.numpy().tobytes()
        found = [whole[start : start + 32] for start in range(0, len(whole), 32)]
        rows = [row for row, key in enumerate(found) if key in wanted]
        for start in range(0, len(rows), _READ_ROWS):
            part = rows[start : start + _READ_ROWS]
            values = features[part]
            if _checksums([found[row] for row in part], values) != checksums[part].tolist():
                self._drop(path)
                return
            if start == 0:
                with contextlib.suppress(OSError):  # used now: pruned later than others
                    os.utime(path)
            yield [wanted.pop(found[row]) for row in part], values

    def _drop(self, path: Path) -> None:
        console.print(f"! {path} is damaged: its features are made again")
        with contextlib.suppress(OSError):
            path.unlink()

    def kept(
        self, keys: Sequence[bytes], blocks: Iterable[tuple[list[int], Tensor]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Pass on what is read, places in ``keys`` and features, and write it, some blocks to a file."""
        unwritten: list[tuple[list[int], Tensor]] = []

        def write() -> None:
            if unwritten:
                places = [place for part, _ in unwritten for place in part]
                self.add([keys[place] for place in places], torch.cat([values for _, values in unwritten]))
                unwritten.clear()

        for places, values in blocks:
            yield places, values
            unwritten.append((places, values))
            if sum(values.nbytes for _, values in unwritten) >= _WRITTEN_BYTES:
                write()
        write()
        if removed := prune(self.folder.parent, cache_limit()):
            console.print(
                f"{removed / 1e6:,.0f} MB of kept features are removed, those used longest ago: more than "
                "TORCHRL_MAXMIN_CACHE_BYTES were there"
            )

    def add(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Write features [n, D] of rows; where the disk is full or broken, say so, and go on without."""
        from safetensors.torch import save

        content = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32),
            "checksums": torch.tensor(_checksums(keys, features)),
            "features": features.contiguous(),
        }
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        partial = self.folder / f"{name}.{os.getpid()}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(save(content, {"facts": self.facts}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / f"{name}.safetensors")
        except OSError as error:
            console.print(f"! features are not kept in {self.folder}: {error}")
            with contextlib.suppress(OSError):
                partial.unlink()


def _checksums(keys: Sequence[bytes], features: Tensor) -> list[int]:
    kind = zlib.crc32(
        f"{features.dtype} {features.shape[1]}".encode()
    )  # the same bytes may be read otherwise
    rows = features.contiguous().view(torch.uint8).numpy()
    return [zlib.crc32(row, zlib.crc32(key, kind)) for key, row in zip(keys, rows, strict=True)]
