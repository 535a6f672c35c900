"""States of a run as safetensors and JSON: what is read back is numbers and text, and runs no code."""

from __future__ import annotations

import importlib
import json
import math
import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Elsewhere", "load_state", "save_state", "sync_folder"]

TENSORS, STRUCTURE = "state.safetensors", "state.json"
_PACKAGE = f"{__name__.partition('.')[0]}."
_MARK = "$"  # first character of the keys that stand for something that JSON lacks


@dataclass(frozen=True)
class Elsewhere:
    """Stands in a state for a tensor that is written by other means.

    Attributes:
        name: of the tensor there.
    """

    name: str


def save_state(folder: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples and records of tensors, arrays, numbers, text and None into a folder.

    Keys of a dict are text or whole numbers; records are dataclasses of this package. Tensors that share
    their memory are written once. Both files are on the disk when this returns.

    Args:
        folder: is there; gets ``state.safetensors`` and ``state.json``.
        state: what :func:`load_state` gives again, on the CPU.

    Raises:
        TypeError: for a value of another type, with where it stands.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_state(folder, {"step": 3, "betas": (0.9, 0.95), "moments": {0: torch.ones(2)}})
        >>> load_state(folder)
        {'step': 3, 'betas': (0.9, 0.95), 'moments': {0: tensor([1., 1.])}}
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(state, "", tensors, {})
    save_file(tensors, folder / TENSORS)
    (folder / STRUCTURE).write_text(json.dumps(structure, allow_nan=False) + "\n")
    for name in (TENSORS, STRUCTURE):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def load_state(folder: Path) -> Any:
    """Read what :func:`save_state` wrote."""
    from safetensors.torch import load_file

    return _decode(json.loads((folder / STRUCTURE).read_text()), load_file(folder / TENSORS))


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk, not their content alone."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor], known: dict[Any, str]) -> Any:
    """JSON for a value; tensors go to ``tensors``, under the names of where they stand."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else {f"{_MARK}float": str(number)}
    if isinstance(value, Elsewhere):
        return {f"{_MARK}elsewhere": value.name}
    if is_dataclass(value) and type(value).__module__.startswith(_PACKAGE):
        content = {part.name: getattr(value, part.name) for part in fields(value)}
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {f"{_MARK}record": [name, _encode(content, where, tensors, known)]}
    if isinstance(value, torch.Tensor):
        return {f"{_MARK}tensor": _name_tensor(value, where, tensors, known)}
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(np.ascontiguousarray(value))
        return {f"{_MARK}array": where}
    if isinstance(value, tuple):
        return {f"{_MARK}tuple": _encode(list(value), where, tensors, known)}
    if isinstance(value, list):
        return [_encode(part, f"{where}.{i}", tensors, known) for i, part in enumerate(value)]
    if isinstance(value, dict):
        parts = {key: _encode(part, f"{where}.{key}", tensors, known) for key, part in value.items()}
        if all(isinstance(key, str) and not key.startswith(_MARK) for key in parts):
            return parts
        if all(isinstance(key, str | int) for key in parts):
            return {f"{_MARK}dict": [[key, part] for key, part in parts.items()]}
    raise TypeError(f"a state may not hold {type(value).__name__} (at {where or 'its top'})")


def _name_tensor(
    tensor: torch.Tensor, where: str, tensors: dict[str, torch.Tensor], known: dict[Any, str]
) -> str:
    plain = tensor.detach()
    memory = (
        plain.untyped_storage().data_ptr(),
        plain.storage_offset(),
        plain.shape,
        plain.stride(),
        plain.dtype,
    )
    if plain.numel() and memory in known:
        return known[memory]
    known[memory] = where
    # safetensors takes no two tensors of one memory, and none with gaps
    tensors[where] = plain.cpu().clone(memory_format=torch.contiguous_format)
    return where


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, content),) = value.items()
        if key == f"{_MARK}tensor":
            return tensors[content]
        if key == f"{_MARK}array":
            return tensors[content].numpy()
        if key == f"{_MARK}elsewhere":
            return Elsewhere(content)
        if key == f"{_MARK}record":
            return _record(content[0], _decode(content[1], tensors))
        if key == f"{_MARK}float":
            return float(content)
        if key == f"{_MARK}tuple":
            return tuple(_decode(part, tensors) for part in content)
        if key == f"{_MARK}dict":
            return {name: _decode(part, tensors) for name, part in content}
    return {key: _decode(part, tensors) for key, part in value.items()}


def _record(name: str, content: dict[str, Any]) -> Any:
    """A dataclass of this package; a file names no other code."""
    module, _, qualname = name.partition(":")
    record = getattr(importlib.import_module(module), qualname) if module.startswith(_PACKAGE) else None
    if not (isinstance(record, type) and is_dataclass(record)):
        raise ValueError(f"{name} is no record of {_PACKAGE.rstrip('.')}")
    return record(**content)
