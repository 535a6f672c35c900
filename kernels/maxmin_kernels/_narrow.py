"""Products of many rows with few columns in float32 on a CPU: BLAS is far from the memory's speed there.

oneDNN has faster ones, behind the operator that ``torch.compile`` writes for a linear layer. On two cores of
an AMD EPYC, [200000, 768] by 8 columns takes .76 of BLAS's time, by 64 columns .45, and the transposed
product .45; at two to four columns BLAS is the one at the memory's speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_OF_BLAS = range(2, 5)  # columns
_SMALLEST = 2**17  # numbers of a matrix; below, what the call itself takes shows


def by_onednn(rows: Tensor) -> bool:
    """Return whether oneDNN is there and takes products with these rows [P, D]."""
    return (
        rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.numel() >= _SMALLEST
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def narrow_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``rows @ weight.T + bias`` [P, K] without a gradient."""
    if len(weight) in _OF_BLAS or not by_onednn(rows):
        return F.linear(rows, weight, bias)
    return _product(rows, weight, bias)


def narrow_sum(slope: Tensor, rows: Tensor) -> Tensor:
    """Return ``slope.T @ rows`` [K, D] without a gradient, of two matrices that oneDNN takes."""
    columns = torch.stack(slope.unbind(1))  # a transposed copy takes four times as long
    return _product(columns, rows.T, None)


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``left @ right.T + bias``."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
