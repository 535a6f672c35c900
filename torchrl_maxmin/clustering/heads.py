"""Heads on features as they are given: how features are scaled for a search, and heads in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array, vstack
from scipy.sparse.linalg import eigsh
from torch import Tensor

from torchrl_maxmin.clustering.linear import LinearMixture
from torchrl_maxmin.clustering.solvers import BLOCK_ROWS_COPIED
from torchrl_maxmin.core.errors import UserError

__all__ = ["FeatureMap", "Heads", "load_heads", "principal_axes"]

#: More features than these, a few of which make a row (items, one-hot), are worked on as a sparse matrix.
WIDE = 1024
_FEW = 8  # of a row, on average
_TOLERANCE = 1e-4  # of eigenvalues: those of items that are met at random lie close together

#: Principal components that wide features are read through: an exact M-step inverts a D x D matrix.
MOST_FEATURES = 128


@dataclass(frozen=True)
class FeatureMap:
    """From features as they are given to those that are searched: divided by deviations, by components.

    Attributes:
        scale: Deviations [D].
        axes: Components [D, C], where there are more than :data:`MOST_FEATURES`.
    """

    scale: Tensor
    axes: Tensor | None = None

    @classmethod
    def of(cls, differences: Tensor) -> FeatureMap:
        """Find the map for differences [P, D]."""
        rows = _as_sparse(differences) if differences.shape[1] > WIDE else None
        # A feature that hardly moves is divided by next to nothing: leave it small.
        deviation = differences.std(0) if rows is None else _deviation(rows).to(differences.dtype)
        scale = deviation.clamp_min(1e-6)
        if len(scale) <= MOST_FEATURES:
            return cls(scale)
        if rows is None:
            axes = principal_axes(differences, MOST_FEATURES, scale)
        else:
            axes = _sparse_axes(rows, scale, MOST_FEATURES)
        return cls(scale, axes.to(torch.promote_types(differences.dtype, torch.float32)))

    def __call__(self, differences: Tensor) -> Tensor:
        """Map differences [P, D] to those that are searched [P, C]."""
        if self.axes is None:
            return differences / self.scale
        parts = differences.split(BLOCK_ROWS_COPIED)  # features of thousands of items fill the memory once
        return torch.cat([(part / self.scale).to(self.axes.dtype) @ self.axes for part in parts])

    def heads(self, weight: Tensor) -> Tensor:
        """Return heads [K, C] on what is searched as heads [K, D] on standardised differences."""
        return weight if self.axes is None else weight @ self.axes.T


def principal_axes(differences: Tensor, count: int, scale: Tensor | float = 1.0) -> Tensor:
    """Axes [D, count] along which differences [P, D] are largest, about zero, the largest first; float64.

    Args:
        differences: [P, D].
        count: of the axes.
        scale: what the differences are divided by first [D].
    """
    moment = torch.zeros(2 * (differences.shape[1],), dtype=torch.float64)
    for part in differences.split(BLOCK_ROWS_COPIED):
        scaled = (part / scale).double()
        moment.addmm_(scaled.T, scaled)
    return torch.linalg.eigh(moment)[1][:, -count:].flip(1)


def _as_sparse(differences: Tensor) -> csr_array | None:
    """Rows [P, D] as a sparse matrix in float64; None where many features make one."""
    parts, size = [], 0
    for part in differences.split(BLOCK_ROWS_COPIED):
        parts.append(csr_array(part.float().numpy()).astype(np.float64))
        size += parts[-1].nnz
        if size > _FEW * sum(part.shape[0] for part in parts):
            return None
    return vstack(parts, format="csr")


def _deviation(rows: csr_array) -> Tensor:
    """Standard deviations [D] over sparse rows [P, D]."""
    count, mean = rows.shape[0], rows.sum(0) / rows.shape[0]
    squares = rows.multiply(rows).sum(0)
    return torch.from_numpy(np.sqrt(np.maximum(squares - count * mean**2, 0) / (count - 1)))


def _sparse_axes(rows: csr_array, scale: Tensor, count: int) -> Tensor:
    """Those of :func:`principal_axes` by Lanczos' method, nothing of size P x D or D x D in memory."""
    scaled = rows @ diags_array(1 / scale.double().numpy())
    start = np.full(rows.shape[1], rows.shape[1] ** -0.5)  # or ARPACK draws one
    axes = eigsh(scaled.T @ scaled, k=count, which="LA", v0=start, tol=_TOLERANCE)[1]
    return torch.from_numpy(axes[:, ::-1].copy())


@dataclass(frozen=True, eq=False)
class Heads:
    """Linear rewards of the groups, with what it takes to apply them to new features.

    Attributes:
        weight: [K, D] on differences divided by ``scale``.
        scale: [D].
        log_prior: Log mixing weights [K].
        feature_names: Names of the D features, where they have any.
        origin: What the features are: the model that gave them, or the file.

    Example:
        >>> import tempfile
        >>> heads = Heads(torch.eye(2), torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5]).log(), ["a", "b"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_heads(heads.save(Path(folder) / "heads.safetensors"))
        >>> again.weight.tolist(), again.feature_names
        ([[1.0, 0.0], [0.0, 1.0]], ['a', 'b'])
        >>> from torchrl_maxmin.clustering.assignment import assign_user
        >>> new = torch.tensor([[8.0, -4.0]])  # features(chosen) - features(rejected) of a new user
        >>> assign_user(again.mixture, again.standardised(new)).groups.tolist()
        [0]
    """

    weight: Tensor
    scale: Tensor
    log_prior: Tensor
    feature_names: Sequence[str] | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def mixture(self) -> LinearMixture:
        """The heads as a mixture, of no users yet."""
        return LinearMixture(
            self.weight, self.log_prior, self.weight.new_empty(0, len(self.weight)), math.nan
        )

    def standardised(self, differences: Tensor) -> Tensor:
        """Scale features(chosen) - features(rejected) [P, D] as the heads take them."""
        return differences / self.scale

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, the names as json in its metadata; returns the path."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).float().contiguous() for name in _TENSORS}
        names = None if self.feature_names is None else list(self.feature_names)
        save_file(
            tensors, path, {"feature_names": json.dumps(names), "origin": json.dumps(dict(self.origin))}
        )
        return Path(path)


_TENSORS = ("weight", "scale", "log_prior")


def load_heads(path: str | Path) -> Heads:
    """Read heads that :meth:`Heads.save` wrote.

    Args:
        path: The file, or the folder that holds ``heads.safetensors``.

    Raises:
        UserError: For a file that is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / "heads.safetensors" if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in _TENSORS}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read heads from {str(path)!r}: {error}; diagnose writes them") from error
    names, origin = (json.loads(metadata.get(key, "null")) for key in ("feature_names", "origin"))
    return Heads(**found, feature_names=names, origin=origin or {})
