"""Stop a run on numbers that are NaN or infinite, before they are saved, and keep what gave them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.core.distributed import is_main_process, rank
from torchrl_maxmin.core.json_text import plain

__all__ = [
    "NonFiniteError",
    "nonfinite_batch",
    "nonfinite_tensors",
    "require_finite_parameters",
    "save_batch",
]


class NonFiniteError(FloatingPointError):
    """A NaN or infinity where there is no folder to save the batch in.

    Attributes:
        batch: what gave it.
    """

    def __init__(self, what: str, batch: Any):
        super().__init__(what)
        self.batch = batch


def nonfinite_batch(batch: Any, folder: Path, what: str) -> FloatingPointError:
    """Save a batch for inspection; returns the error that names its file."""
    stem = folder / ("nonfinite_batch" if is_main_process() else f"nonfinite_batch-{rank()}")
    path = save_batch(batch, stem, what)
    return FloatingPointError(f"{what}; the batch that gave it is in {path}")


def save_batch(batch: Any, stem: Path, what: str) -> Path:
    """Write the tensors of a batch to ``stem.safetensors``, and the rest of it to ``stem.json``.

    Args:
        batch: a TensorDict, or a dict of tensors and of such dicts; the parts of a name are joined by dots.
        stem: the path without its ending.
        what: why it is kept; the json file says so.

    Returns:
        The path of the tensors.
    """
    from safetensors.torch import save_file

    tensors, others = {}, {}
    for name, value in _leaves(batch):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            others[name] = value
    path = stem.with_name(stem.name + ".safetensors")
    save_file(tensors, path)
    about = {"what": what, "tensors": path.name, "values": others}
    stem.with_name(stem.name + ".json").write_text(json.dumps(plain(about), indent=2, default=str) + "\n")
    return path


def _leaves(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    from tensordict import TensorDictBase

    if isinstance(batch, (TensorDictBase, Mapping)):
        for key, value in batch.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name or "batch", batch


def nonfinite_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity, each read once where it lies.

    Example:
        >>> nonfinite_tensors([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")]))])
        ['b']
    """
    names, ends = [], []
    for name, tensor in named:
        own = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach()
        # 8-bit floats are packed weights of a quantizer, for which there are no comparisons
        if own.is_floating_point() and own.itemsize > 1 and own.numel() and not own.is_meta:
            names.append(name)
            ends.append(torch.stack(torch.aminmax(own)))
    return [name for name, both in zip(names, ends, strict=True) if not bool(both.isfinite().all())]


def require_finite_parameters(named: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise :class:`FloatingPointError` where a parameter is NaN or infinite, so that none is saved.

    Example:
        >>> require_finite_parameters(torch.nn.Linear(2, 2).named_parameters(), "the policy")
    """
    if found := nonfinite_tensors(named):
        raise FloatingPointError(
            f"{len(found)} weights of {what} are NaN or infinite ({found[0]} first), so they are not saved; "
            "lower the learning rate"
        )
