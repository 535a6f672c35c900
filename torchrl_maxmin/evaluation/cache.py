"""What an evaluation keeps of its work as it is done, so that a later start need not do it again.

In the folder ``cache`` of the output: verdicts of endpoints, a line each, and the samples of every policy.
Each is found by a digest of all that decides it, so nothing is used that other settings would not give.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_maxmin.core.distributed import is_main_process, of_main_process, rank
from torchrl_maxmin.core.manifest import MANIFEST, VIEWS, file_digest
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run_folder import RUN
from torchrl_maxmin.core.serial import sync_folder
from torchrl_maxmin.models.loading import adapted_model

__all__ = ["FOLDER", "Samples", "Verdicts", "digest_of", "digest_of_model"]

FOLDER = "cache"


class Verdicts(MutableMapping[str, float]):
    """Verdicts by what identifies a question, each in a file as soon as it is had.

    Lines are only ever added. One that was not written to its end, or was damaged, does not count. Of
    processes that work as one each adds to a file of its own, and reads all.

    Args:
        folder: of the files; made with the first verdict.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Verdicts(Path(folder))["question"] = 0.5
        ...     dict(Verdicts(Path(folder)))
        {'question': 0.5}
    """

    def __init__(self, folder: Path):
        self.path = folder / (f"verdicts-{rank()}.jsonl" if rank() else "verdicts.jsonl")
        self._values: dict[str, float] = {}
        damaged = 0
        others = sorted(set(folder.glob("verdicts*.jsonl")) - {self.path})
        for path in (*others, self.path):  # what this process was told itself counts most
            for line in path.read_bytes().splitlines() if path.is_file() else []:
                try:
                    key, verdict, check = json.loads(line)
                    if check != _check(key, verdict):
                        raise ValueError
                    self._values[key] = verdict
                except (ValueError, TypeError):
                    damaged += 1
        if damaged:
            what = f"{damaged} line(s) of {folder} are damaged or unfinished: they are asked for again"
            console.print(what, markup=False, soft_wrap=True)

    def __getitem__(self, key: str) -> float:
        return self._values[key]

    def __setitem__(self, key: str, verdict: float) -> None:
        self._values[key] = verdict
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps([key, verdict, _check(key, verdict)]).encode() + b"\n"
        with self.path.open("ab+") as file:
            if size := file.tell():
                file.seek(size - 1)
                line = line if file.read() == b"\n" else b"\n" + line  # behind one that a kill cut
            file.write(line)

    def __delitem__(self, key: str) -> None:
        raise TypeError("a verdict is never taken back")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _check(key: str, verdict: float) -> int:
    return zlib.crc32(json.dumps([key, verdict]).encode())


class Samples:
    """Samples of policies, each in a safetensors file as soon as it is drawn.

    Args:
        folder: of the files; made with the first samples.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def of(self, digest: str, draw: Callable[[], TensorDict]) -> TensorDict:
        """Return samples as they were kept, or draw and keep them.

        A file that was damaged does not count. All processes that work as one call this.

        Args:
            digest: of all that decides them, see :func:`digest_of`.
            draw: gives a flat tensordict [N].
        """
        path = self.folder / f"samples-{digest[:16]}.safetensors"
        # one that is there for the main process alone is there for none
        found = of_main_process(lambda: _read(path, digest) if path.is_file() else None)
        if found is None:
            drawn = draw()
            found = {name: drawn[name].contiguous() for name in sorted(drawn.keys())}
            if is_main_process():
                _write(path, found, digest)
        return TensorDict(found, [len(next(iter(found.values())))])


def _read(path: Path, digest: str) -> dict[str, torch.Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            about = file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        tensors, about = {}, {}
    if about.get("digests") == f"{digest} {digest_of(tensors)}":
        return tensors
    line = f"{path} is damaged: the samples are drawn again"
    console.print(line, markup=False, soft_wrap=True)
    return None


def _write(path: Path, tensors: dict[str, torch.Tensor], digest: str) -> None:
    """Write a file whole or not at all."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        # one entry: several are written in any order, and equal runs are to write equal files
        file.write(save(tensors, {"digests": f"{digest} {digest_of(tensors)}"}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def digest_of(*parts: Any) -> str:
    """Compute the SHA-256 of settings and tensors.

    Args:
        parts: what json takes, tensors, and dicts of either.

    Example:
        >>> digest_of({"seed": 0}, torch.zeros(2)) == digest_of({"seed": 0}, torch.zeros(2, 1))
        False
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict) and any(isinstance(value, torch.Tensor) for value in part.values()):
            sha.update(digest_of(*(item for pair in sorted(part.items()) for item in pair)).encode())
        elif isinstance(part, torch.Tensor):
            sha.update(json.dumps([str(part.dtype), list(part.shape)]).encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"\0")
    return sha.hexdigest()


def digest_of_model(path: str) -> str:
    """Compute the SHA-256 of a model's files: those of its folder, and of the model that an adapter names.

    A name of the hub stands for itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return digest_of(path)
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    # what says when the run was, or shows it to people, and nothing of the model
    others = (RUN, MANIFEST, *VIEWS)
    found = {file.name: file_digest(file) for file in files if file.name not in others}
    base = adapted_model(path)
    return digest_of(found, digest_of_model(base) if base else "")
