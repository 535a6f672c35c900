"""Which steps of a batch are real: one resolution for losses, estimators and statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS

__all__ = ["expand_mask", "fill_masked", "mask_keys", "validity_mask"]

# Written by the value estimators: False where a step was displaced, and has neither advantage nor target.
SHIFTED_VALID = "shifted_valid"


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
