"""``reward_heads_min`` and ``min_over_heads``: the public functions, which check their arguments."""

import math

import torch
from torch import Tensor

from .._backend import Backend, check_call
from .naive import min_over_heads_naive, reward_heads_min_naive
from .operators import check_head_mask, heads_op, min_op


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; use `minimum` for the limit 0.")


def _check_mask(name: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}; convert it with .bool().")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}.")
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the other tensors on {device}; move it there.")


def min_over_heads(
    rewards: Tensor,
    *,
    temperature: float = 1.0,
    head_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    return_sums: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Minimum, argmin and soft minimum over the last dimension of given rewards.

    :math:`\text{softmin} = -T \log \frac1K \sum_k e^{-r_k/T}`, so that equal heads give their value.
    Ties go to the lowest index; a NaN head is the minimum, as in :func:`torch.min`.

    Args:
        rewards: ``[..., K]`` with K >= 1; float32, bfloat16 or float16 (float64 takes the PyTorch path).
        temperature: T > 0.
        head_mask: ``[K]`` bool or None, True at real heads: the others, NaN or not, are never the minimum and
            no part of the soft minimum's mean. On CUDA, where checking would wait for the device, no real
            head gives minimum and softmin +inf, argmin 0.
        row_mask: ``[...]`` bool or None, True at real rows: the others return 0, whatever they hold, are no
            part of the sums and get no gradient.
        return_sums: Whether to return the sums over rows too.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable every way).

    Returns:
        ``(minimum [...], argmin [...] int64, softmin [...])`` in float32, differentiable except
        for ``argmin``. With ``return_sums`` also ``head_sums [K]``, differentiable: the rewards of every head
        (masked ones too) summed over the real rows, equal in every bit from call to call.

    Raises:
        TypeError: If the rewards are not floating point or a mask is not bool.
        ValueError: If there is no head, the temperature is not positive, shapes or devices do not fit, or
            (CPU) every head is masked.

    Example:
        >>> import torch
        >>> from maxmin_kernels import min_over_heads
        >>> minimum, argmin, softmin = min_over_heads(torch.tensor([[2.0, 1.0, 1.0]]))
        >>> minimum.item(), argmin.item()
        (1.0, 1)
    """
    check_call(backend, rewards=rewards)
    _check_temperature(temperature)
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards must be [..., K] with K >= 1, got shape {tuple(rewards.shape)}.")
    batch, heads = rewards.shape[:-1], rewards.shape[-1]
    _check_mask("head_mask", head_mask, rewards.shape[-1:], rewards.device)
    _check_mask("row_mask", row_mask, batch, rewards.device)
    if backend == "torch":
        check_head_mask(head_mask)
        return min_over_heads_naive(
            rewards, temperature, head_mask=head_mask, row_mask=row_mask, return_sums=return_sums
        )
    rows = math.prod(batch)
    row_mask = None if row_mask is None else row_mask.reshape(rows)
    *lowest, sums = min_op(rewards.reshape(rows, heads), temperature, head_mask, row_mask, return_sums)
    outputs = tuple(out.reshape(batch) for out in lowest)
    return (*outputs, sums) if return_sums else outputs


def reward_heads_min(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float = 1.0,
    head_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    return_sums: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Rewards of K linear heads on one hidden state, with their minimum and soft minimum.

    :math:`r = (h W^\top + b - \text{shift}) / \text{scale}` in float32: ``shift`` and ``scale`` put the heads
    on one convention before the minimum is taken (Bradley-Terry fixes a reward only up to an offset). The
    minimum over heads is the reward of MaxMin-RLHF (Chakraborty et al., ICML 2024, arXiv 2402.08925) per
    sample; ``(head_sums / N).min()`` is the smallest of the groups' means, the paper's objective.

    Args:
        hidden: ``[N, H]``; float32, bfloat16 or float16 (float64 takes the PyTorch path).
        weight: ``[K, H]``. If its dtype differs from that of ``hidden``, both are widened.
        bias: ``[K]`` or None.
        shift: ``[K]`` or None, subtracted.
        scale: ``[K]`` or None, divided by.
        temperature: T > 0 of ``softmin = -T log mean_k exp(-r_k / T)``.
        head_mask: ``[K]`` bool or None, True at real heads: the others, NaN or not, return their reward but
            are never the minimum and no part of the soft minimum's mean. If a masked head's reward gets no
            gradient, nothing it holds reaches another gradient (with ``backend="torch"`` its NaN does). On
            CUDA, where checking would wait for the device, no real head gives minimum and softmin +inf,
            argmin 0.
        row_mask: ``[N]`` bool or None, True at real rows: the others return 0, whatever they hold, are no
            part of the sums, and neither get nor pass a gradient. The gradient of ``weight`` then takes a
            copy of ``hidden``.
        return_sums: Whether to return the sums over rows too.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable every way).

    Returns:
        ``(rewards [N, K], minimum [N], argmin [N] int64, softmin [N])`` in float32; all but ``argmin`` are
        differentiable. Ties go to the lowest index; a NaN head is the minimum, as in :func:`torch.min`.
        With ``return_sums`` also ``head_sums [K]``, differentiable: the rewards of every head (masked ones
        too) summed over the real rows, equal in every bit from call to call.

    Raises:
        TypeError: If an input is not floating point or a mask is not bool.
        ValueError: If shapes or devices do not fit, the temperature is not positive, or (CPU) every head is
            masked.

    Example:
        >>> import torch
        >>> from maxmin_kernels import reward_heads_min
        >>> weight = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
        >>> rewards, minimum, argmin, softmin = reward_heads_min(torch.eye(2), weight)
        >>> minimum.tolist(), argmin.tolist()
        ([1.0, 3.0], [0, 1])
        >>> *_, head_sums = reward_heads_min(torch.eye(2), weight, return_sums=True)
        >>> (head_sums / 2).min().item()
        2.5
    """
    check_call(backend, hidden=hidden, weight=weight, bias=bias, shift=shift, scale=scale)
    _check_temperature(temperature)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be [N, H] and weight [K, H] with the same H and K >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    for name, vector in (("bias", bias), ("shift", shift), ("scale", scale)):
        if vector is not None and vector.shape != (weight.shape[0],):
            raise ValueError(f"{name} must be [K] = [{weight.shape[0]}], got {tuple(vector.shape)}.")
    _check_mask("head_mask", head_mask, weight.shape[:1], hidden.device)
    _check_mask("row_mask", row_mask, hidden.shape[:1], hidden.device)
    if backend == "torch":
        check_head_mask(head_mask)
        return reward_heads_min_naive(
            hidden,
            weight,
            bias,
            shift=shift,
            scale=scale,
            temperature=temperature,
            head_mask=head_mask,
            row_mask=row_mask,
            return_sums=return_sums,
        )
    outputs = heads_op(hidden, weight, bias, shift, scale, temperature, head_mask, row_mask, return_sums)
    return outputs if return_sums else outputs[:-1]
