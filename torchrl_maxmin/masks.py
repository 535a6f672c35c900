"""Which steps of a batch are real, and statistics over them; the others may hold anything, NaN too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS

__all__ = [
    "RowLengths",
    "expand_mask",
    "fill_masked",
    "mask_keys",
    "masked_explained_variance",
    "masked_mean",
    "ratio_statistics",
    "row_lengths",
    "to_device",
    "validity_mask",
    "whiten",
]

# Written by the value estimators: False where a step was displaced, and has neither advantage nor target.
SHIFTED_VALID = "shifted_valid"
# No tensor, but the :class:`RowLengths` of the rows.
ROW_LENGTHS = "row_lengths"


def mask_keys(key: NestedKey | None) -> tuple[NestedKey, ...]:
    """List the entries that ``key`` stands for.

    Args:
        key: ``"auto"`` for the masks that TorchRL writes by itself, ``("collector", "mask")`` of collectors
            and samplers and ``"shifted_valid"`` of value estimators; the name of another mask, which
            ``"shifted_valid"`` then joins; None for no mask.
    """
    if key is None:
        return ()
    return AUTO_LOSS_MASK_KEYS if key == "auto" else (key, SHIFTED_VALID)


def validity_mask(tensordict: TensorDictBase, key: NestedKey | None = "auto") -> Tensor | None:
    """Find the steps that count.

    Args:
        tensordict: the data, of batch size ``B``.
        key: as for :func:`mask_keys`.

    Returns:
        A boolean mask, True at steps that count under every mask in the data: ``[*B]``, or ``[*B, T]`` where
        the steps are no batch dimension; None if the data hold no mask.

    Raises:
        KeyError: if a mask is named and the data do not hold it.
    """
    result = None
    for name in mask_keys(key):
        mask = tensordict.get(name, None)
        if mask is None:
            if key != "auto" and name == key:
                raise KeyError(
                    f"The mask {name!r} is not in the data; padding would be counted. Put it there, name "
                    "another one, or None for no mask."
                )
            continue
        mask = mask.to(torch.bool)
        while mask.ndim > tensordict.batch_dims and mask.shape[-1] == 1:
            mask = mask.squeeze(-1)
        result = mask if result is None else result & mask
    return result


def expand_mask(mask: Tensor, values: Tensor) -> Tensor:
    """Expand a mask ``[*B]`` or ``[*B, 1]`` to ``values`` ``[*B, ...]``.

    Raises:
        ValueError: if the two do not fit.
    """
    shape = mask.shape
    while mask.ndim > values.ndim and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    mask = mask.reshape(*mask.shape, *(1,) * (values.ndim - mask.ndim)).to(torch.bool)
    try:
        return mask.expand_as(values)
    except RuntimeError as error:
        raise ValueError(
            f"A mask of shape {tuple(shape)} does not fit values of shape {tuple(values.shape)}: it needs "
            "one entry a step."
        ) from error


def fill_masked(tensordict: TensorDictBase, keys: Iterable[NestedKey], mask: Tensor | None) -> TensorDictBase:
    """Put 0 in the place of NaN and infinity at masked steps of what a network reads.

    A zero gradient times a NaN input is NaN in a weight's gradient, so selecting outputs is too late. Finite
    numbers stay: networks that look across steps may need them.

    Args:
        tensordict: the data.
        keys: the entries to look through; missing ones, integers and those without a step dimension are left.
        mask: from :func:`validity_mask`.

    Returns:
        A shallow copy; the data themselves where there is no mask.
    """
    if mask is None:
        return tensordict
    filled = tensordict.copy()
    for key in keys:
        values = tensordict.get(key, None)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            continue
        if values.shape[: mask.ndim] == mask.shape:
            filled.set(key, torch.where(expand_mask(mask, values) | values.isfinite(), values, 0.0))
    return filled


def masked_mean(values: Tensor, mask: Tensor | None = None, count: Tensor | None = None) -> Tensor:
    """The mean of ``values`` over the positions that ``mask`` selects; 0 if there are none.

    Args:
        values: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``, True where the values count; None for all.
        count: steps that count in the whole of which the values are a part: the parts' results then add up to
            the mean over the whole. None where they are the whole.

    Returns:
        A scalar.
    """
    if not values.numel():
        return values.sum()  # 0, with a path for the gradient
    if mask is not None:
        mask = expand_mask(mask, values)
        values = torch.where(mask, values, 0.0)
    if count is not None:
        return values.sum() / (count * values.shape[-1]).clamp_min(1)
    return values.mean() if mask is None else values.sum() / mask.sum().clamp_min(1)


def whiten(
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    exclude_dims: Sequence[int] = (),
    eps: float = 1e-8,
) -> Tensor:
    """Shift and scale to zero mean and unit variance over the valid positions.

    ``(A - mean) / sqrt(variance + eps)`` with the biased variance, both in float32 at least; 0 where all
    valid positions are equal, as one alone is. Whiten the scalarised advantage, not its columns: scaling
    each column by itself changes the objective.

    Args:
        advantage: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``, True where the advantage counts; None for all.
        exclude_dims: dimensions that keep statistics of their own.
        eps: added to the variance.

    Returns:
        The whitened advantage, of the same shape and dtype; 0 where the mask is False.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.objectives import whiten
        >>> mask = torch.tensor([True, True, False])
        >>> whiten(torch.tensor([[1.0], [3.0], [99.0]]), mask).tolist()
        [[-1.0], [1.0], [0.0]]
    """
    excluded = {dim % advantage.ndim for dim in exclude_dims}
    dims = [dim for dim in range(advantage.ndim) if dim not in excluded]
    if not dims or not advantage.numel():
        return advantage
    valid = torch.ones_like(advantage, dtype=torch.bool) if mask is None else expand_mask(mask, advantage)
    # Select, not multiply: padding may hold NaN.
    values = torch.where(valid, advantage.to(torch.promote_types(advantage.dtype, torch.float32)), 0.0)
    count = valid.sum(dims, keepdim=True).clamp_min(1)
    mean = values.sum(dims, keepdim=True) / count
    centred = torch.where(valid, values - mean, 0.0)
    variance = centred.square().sum(dims, keepdim=True) / count
    whitened = centred * (variance + eps).rsqrt()
    return torch.where(all_equal(values, valid, dims), 0.0, whitened).to(advantage.dtype)


def all_equal(values: Tensor, valid: Tensor, dims: list[int]) -> Tensor:
    """Tell whether the valid values along ``dims`` are one number: a mean's rounding is no spread."""
    highest = torch.where(valid, values, -torch.inf).amax(dims, keepdim=True)
    lowest = torch.where(valid, values, torch.inf).amin(dims, keepdim=True)
    return highest <= lowest  # NaN is equal to nothing


def masked_explained_variance(target: Tensor, prediction: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - Var[target - prediction] / Var[target]``, for every column.

    Args:
        target: ``[*B, C]``.
        prediction: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``; None for all.

    Returns:
        ``[C]``: 1 for a perfect critic, 0 for a constant, below 0 for a harmful one; 0 where the target's
        variance is below 1.2e-7 (float32's epsilon), as that of a KL that is nothing but rounding.
    """
    dims = list(range(target.ndim - 1))
    valid = torch.ones_like(target, dtype=torch.bool) if mask is None else expand_mask(mask, target)
    count = valid.sum(dims).clamp_min(1)
    variances = []
    for values in (target - prediction, target):
        values = torch.where(valid, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)
        centred = torch.where(valid, values - values.sum(dims) / count, 0.0)
        variances.append(centred.square().sum(dims) / count)
    unexplained, total = variances
    varies = total > torch.finfo(torch.float32).eps
    return torch.where(varies, 1.0 - unexplained / torch.where(varies, total, 1.0), 0.0)


def ratio_statistics(log_ratio: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Statistics of the importance ratios ``exp(log_ratio)``; 0 where no step is valid.

    Args:
        log_ratio: ``[*B, 1]``, ``log pi - log pi_behaviour`` of the actions.
        mask: boolean ``[*B]`` or ``[*B, 1]``; None for all.

    Returns:
        ``ESS``, the effective share of the valid steps ``(sum r)^2 / (n sum r^2)`` in (0, 1];
        ``max_ratio`` and ``mean_ratio``. Scalars.
    """
    valid = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else expand_mask(mask, log_ratio)
    if not log_ratio.numel():
        return dict.fromkeys(("ESS", "max_ratio", "mean_ratio"), log_ratio.sum())
    count = valid.sum().clamp_min(1)
    ratio = torch.where(valid, log_ratio.exp(), 0.0)
    # Relative to the largest, so that the squares do not overflow.
    tiny = torch.finfo(ratio.dtype).tiny
    # Of the ratios' own rank: torch.vmap over an empty batch cannot mix ranks.
    largest = ratio.amax(list(range(ratio.ndim)), keepdim=True)
    scaled = ratio / largest.clamp_min(tiny)
    return {
        "ESS": scaled.sum().square() / scaled.square().sum().clamp_min(tiny) / count,
        "max_ratio": largest.squeeze(),
        "mean_ratio": ratio.sum() / count,
    }


class RowLengths(NamedTuple):
    """How many real tokens each row of responses has, on the CPU: no update waits for the device to say it.

    Attributes:
        prompt: of the prompts int64 [B], padded left.
        response: of the responses int64 [B], padded right.

    Example:
        >>> lengths = RowLengths(torch.tensor([2, 3]), torch.tensor([1, 4]))
        >>> lengths.take(torch.tensor([1])).response.tolist()
        [4]
        >>> lengths.token_index(4).tolist()
        [0, 4, 5, 6, 7]
    """

    prompt: Tensor
    response: Tensor

    @classmethod
    def of(cls, rows: TensorDictBase) -> RowLengths:
        """Those of ``prompt_mask`` [B, P] and ``action_mask`` [B, R]: one wait for the device."""
        return cls(*torch.stack([rows["prompt_mask"].sum(-1), rows["action_mask"].sum(-1)]).cpu())

    @classmethod
    def full(cls, rows: TensorDictBase) -> RowLengths:
        """As many as the masks have columns: no wait, and shapes that are always the same."""
        shapes = (rows[key].shape for key in ("prompt_mask", "action_mask"))
        return cls(*(torch.full((num_rows,), width) for num_rows, width in shapes))

    def take(self, index: Tensor) -> RowLengths:
        """Those of some of the rows."""
        return RowLengths(self.prompt[index], self.response[index])

    def token_index(self, width: int) -> Tensor:
        """Places of the responses' tokens among ``width`` columns, rows one after the other."""
        real = torch.arange(width) < self.response.unsqueeze(-1)
        return real.flatten().nonzero().squeeze(-1)


def row_lengths(tensordict: TensorDictBase) -> RowLengths:
    """The lengths that came with the rows, or else those of their masks."""
    found = tensordict.get_non_tensor(ROW_LENGTHS, None)
    return RowLengths.of(tensordict) if found is None else found


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for what the device has still to do."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
