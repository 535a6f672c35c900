"""``vector_gae`` and ``token_gae``: the operators (namespace ``maxmin``) and the public functions.

The estimates are targets, so the operators have no rule for autograd. Both return advantage, value target,
weighted advantage and moments; an output that was not asked for is empty, because their number is fixed.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._backend import Backend, accumulate_dtype, call, check_call, kernel_operator
from .._vmap import fold_rows_vmap
from .naive import discounted_sum_in_place, token_gae_naive, vector_gae_naive

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _pad_outputs(outputs: tuple[Tensor, ...], weighted: bool, moments: bool) -> Outputs:
    """Put an empty tensor where an output was not asked for."""
    advantage, target, *rest = outputs
    weights_out = rest.pop(0) if weighted else advantage.new_empty(0)
    return advantage, target, weights_out, rest.pop(0) if moments else advantage.new_empty(0)


def _fake_outputs(value: Tensor, dtype: torch.dtype, weighted: bool, moments: bool) -> Outputs:
    advantage = value.new_empty(value.shape, dtype=dtype)
    return (
        advantage,
        torch.empty_like(advantage),
        advantage.new_empty((*value.shape[:-1], 1) if weighted else 0),
        advantage.new_empty(3 if moments else 0),
    )


# ---------------------------------------------------------------- steps with their own end signals


@kernel_operator("vector_gae", "gae.gae_forward", floats=(0, 1, 2))
def _gae_op(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    gamma: float,
    lmbda: float,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimate from rewards and values ``[B, T, K]``, end signals ``[B, T, 1]`` and a mask ``[B, T]``."""
    signals = (reward, value, next_value, done, terminated)
    outputs = vector_gae_naive(*signals, gamma, lmbda, mask, weights, moments, discounted_sum_in_place)
    return _pad_outputs(outputs, weights is not None, moments)


@_gae_op.register_fake
def _gae_fake(*args: Any) -> Outputs:
    return _fake_outputs(args[0], accumulate_dtype(*args[:3]), args[6] is not None, args[-1])


_gae_op.register_vmap(partial(fold_rows_vmap, _gae_op, range(6)))


# ---------------------------------------------------------------- tokens of responses


def _check_padding(*args: Any) -> None:
    mask = args[2]
    if not (mask[:, :1].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError(
            "mask must be right-padded: each row True at its first tokens, at least one, then False."
        )


@kernel_operator("token_gae", "gae.token_gae_forward", floats=(0, 1, 3, 4), check=_check_padding)
def _token_gae_op(
    terminal_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    sample_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    group_weights: Tensor | None,
    gamma: float,
    lmbda: float,
    kl_coef: float,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimate from rewards ``[B, K]``, values ``[B, T, C]``, a mask and log-probabilities ``[B, T]``."""
    outputs = token_gae_naive(
        terminal_reward, value, mask, gamma, lmbda, sample_log_prob, ref_log_prob, kl_coef, group_weights,
        moments, discounted_sum_in_place,
    )  # fmt: skip
    return _pad_outputs(outputs, group_weights is not None, moments)


@_token_gae_op.register_fake
def _token_gae_fake(*args: Any) -> Outputs:
    dtype = accumulate_dtype(*args[:2], *args[3:5])
    return _fake_outputs(args[1], dtype, args[5] is not None, args[-1])


_token_gae_op.register_vmap(partial(fold_rows_vmap, _token_gae_op, range(5)))


# ---------------------------------------------------------------- the public functions


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {like.device}; move it there.")


def _check_moments(return_moments: bool, weights_name: str, weights: Tensor | None, columns: int) -> None:
    if return_moments and weights is None and columns != 1:
        raise ValueError(
            f"return_moments describes one advantage a step, not {columns} columns: pass {weights_name}."
        )


def _wanted(outputs: tuple[Tensor, ...], weights: Tensor | None, moments: bool) -> tuple[Tensor, ...]:
    """Leave out the operators' empty outputs."""
    *estimates, weighted, all_moments = outputs
    return (*estimates, *(() if weights is None else (weighted,)), *((all_moments,) if moments else ()))


def _as_bool(flags: Tensor) -> Tensor:
    return flags if flags.dtype == torch.bool else flags.bool()


def vector_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    gamma: float,
    lmbda: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    return_moments: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Generalised advantage estimation of K rewards at once (Schulman et al., arXiv 1506.02438).

    With TorchRL's meaning of the end signals, for every column k:

    .. math::
        \delta_t &= r_t + \gamma (1 - \text{terminated}_t) V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma \lambda (1 - \text{done}_t) A_{t+1}

    The last step carries nothing in; ``value_target = A + V``. Columns share the end signals, so the result
    equals K scalar estimates. What stands behind an end (a NaN, say) does not reach the steps before it.

    Args:
        reward: ``[..., T, K]`` with K >= 1, typically ``[B, T, K]``; float32, bfloat16 or float16 (float64
            takes the PyTorch path).
        value: ``[..., T, K]``, V(s_t).
        next_value: ``[..., T, K]``, V(s_{t+1}) of the step's own successor, before any reset.
        done: ``[..., T, 1]`` bool (or 0/1): the trajectory ends here, terminated or truncated.
        terminated: ``[..., T, 1]`` bool (or 0/1): the end is real, so nothing is bootstrapped.
        gamma: Discount.
        lmbda: Trace decay.
        mask: ``[..., T]`` bool or None, True at valid steps. A masked step has advantage 0, value target
            ``value``, and carries nothing to the step before it, whatever is stored there.
        weights: ``[K]`` or None, of the columns' weighted sum; any floating dtype.
        return_moments: Whether to return what whitening the weighted advantage (or with K = 1 the advantage)
            takes; needs ``weights`` unless K = 1.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, through which forward mode goes).

    Returns:
        ``(advantage [..., T, K], value_target [..., T, K])`` in float32. With ``weights`` also ``weighted
        [..., T, 1]``, the sum over k of w_k A_k. With ``return_moments`` last ``moments [3]``: count, mean
        and biased variance over the valid steps, equal in every bit from call to call and accurate where the
        mean is large against the deviation; all 0 if no step is valid. All are targets: no gradient.

    Raises:
        TypeError: If reward, values or weights are not floating point.
        ValueError: If shapes or devices do not fit, or the moments lack weights.

    Example:
        >>> import torch
        >>> from maxmin_kernels import vector_gae
        >>> zero, end = torch.zeros(1, 2, 2), torch.tensor([[[False], [True]]])
        >>> advantage, _ = vector_gae(torch.ones(1, 2, 2), zero, zero, end, end, gamma=0.5, lmbda=1.0)
        >>> advantage[0, :, 0].tolist()
        [1.5, 1.0]
        >>> signals = torch.ones(1, 2, 2), zero, zero, end, end
        >>> weights = torch.tensor([0.5, 0.5])
        >>> *_, weighted, moments = vector_gae(
        ...     *signals, gamma=0.5, lmbda=1.0, weights=weights, return_moments=True
        ... )
        >>> weighted.flatten().tolist(), moments.tolist()
        ([1.5, 1.0], [2.0, 1.25, 0.0625])
    """
    with torch.no_grad():  # as below: no gradient is asked for
        check_call(backend, reward=reward, value=value, next_value=next_value, weights=weights)
    shape = reward.shape
    if reward.ndim < 2 or shape[-1] == 0 or value.shape != shape or next_value.shape != shape:
        raise ValueError(
            "reward, value and next_value must all be [..., T, K] with K >= 1, "
            f"got {tuple(shape)}, {tuple(value.shape)} and {tuple(next_value.shape)}."
        )
    *batch, steps, columns = shape
    _check_shape("done", done, (*batch, steps, 1), reward)
    _check_shape("terminated", terminated, (*batch, steps, 1), reward)
    _check_shape("mask", mask, (*batch, steps), reward)
    _check_shape("weights", weights, (columns,), reward)
    _check_moments(return_moments, "weights", weights, columns)
    done, terminated = _as_bool(done), _as_bool(terminated)
    mask = None if mask is None else _as_bool(mask)
    if len(batch) != 1:
        rows = math.prod(batch)
        reward, value, next_value = (x.reshape(rows, steps, columns) for x in (reward, value, next_value))
        done, terminated = done.reshape(rows, steps, 1), terminated.reshape(rows, steps, 1)
        mask = None if mask is None else mask.reshape(rows, steps)
    gamma, lmbda = float(gamma), float(lmbda)
    signals = (reward, value, next_value, done, terminated)
    with torch.no_grad():
        if backend == "torch":
            outputs = vector_gae_naive(*signals, gamma, lmbda, mask, weights, return_moments)
        else:
            outputs = _wanted(
                call(_gae_op, *signals, mask, weights, gamma, lmbda, return_moments), weights, return_moments
            )
    if len(batch) != 1:
        outputs = tuple(out.reshape(*batch, *out.shape[1:]) if out.ndim == 3 else out for out in outputs)
    return outputs


def token_gae(
    terminal_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lmbda: float,
    sample_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    group_weights: Tensor | None = None,
    return_moments: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Generalised advantage estimation over the tokens of responses that are scored as a whole.

    A response is one trajectory of its valid tokens. Its K rewards, one a group, are paid at the last of
    them, which terminates; the value that follows a token is that of the next token. So the result is that of
    :func:`vector_gae` on these steps; on CUDA their rewards, next values and end signals are never stored.

    With the log-probabilities there are C = K + 1 columns: every valid token pays
    :math:`-\beta (\log \pi - \log \pi_\text{ref})` in the last, once and outside the minimum over groups.

    Args:
        terminal_reward: ``[B, K]`` with K >= 1; float32, bfloat16 or float16 (float64 takes the PyTorch
            path).
        value: ``[B, T, C]``, V(s_t), with C = K, or K + 1 if log-probabilities are given.
        mask: ``[B, T]`` bool (or 0/1), right-padded: True at a response's tokens, at least one, then False.
            Whatever the other tensors hold at masked tokens moves nothing. On CUDA, where checking would wait
            for the device, a response without a token gives zeros.
        gamma: Discount.
        lmbda: Trace decay.
        sample_log_prob: ``[B, T]`` or None, log-probabilities of the tokens under the sampling policy.
        ref_log_prob: ``[B, T]`` or None, under the reference policy; both or none.
        kl_coef: beta.
        group_weights: ``[K]`` or None, of the weighted sum over groups, to which the penalty's column is
            added with weight 1; any floating dtype.
        return_moments: Whether to return what whitening the weighted advantage (or with C = 1 the advantage)
            takes; needs ``group_weights`` unless C = 1.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, through which forward mode goes).

    Returns:
        ``(advantage [B, T, C], value_target [B, T, C])`` in float32; at masked tokens 0 and ``value``. With
        ``group_weights`` also ``weighted [B, T, 1]``, with ``return_moments`` last ``moments [3]``: count,
        mean and biased variance over the valid tokens, as :func:`vector_gae` returns them. No gradient.

    Raises:
        TypeError: If an input other than the mask is not floating point.
        ValueError: If shapes or devices do not fit, only one log-probability or ``kl_coef`` without any is
            given, the moments lack weights, or (CPU) the mask is not right-padded.

    Example:
        >>> import torch
        >>> from maxmin_kernels import token_gae
        >>> mask = torch.tensor([[True, True, False]])
        >>> advantage, _ = token_gae(torch.tensor([[4.0]]), torch.zeros(1, 3, 1), mask, gamma=1.0, lmbda=0.5)
        >>> advantage.flatten().tolist()
        [2.0, 4.0, 0.0]
    """
    with torch.no_grad():  # as below: no gradient is asked for
        check_call(
            backend,
            value=value,
            terminal_reward=terminal_reward,
            sample_log_prob=sample_log_prob,
            ref_log_prob=ref_log_prob,
            group_weights=group_weights,
        )
    if (sample_log_prob is None) != (ref_log_prob is None):
        raise ValueError("sample_log_prob and ref_log_prob make the penalty together: pass both or none.")
    gamma, lmbda, kl_coef = float(gamma), float(lmbda), float(kl_coef)
    if sample_log_prob is None and kl_coef != 0.0:
        raise ValueError(f"kl_coef is {kl_coef}, but the penalty takes sample_log_prob and ref_log_prob.")
    if terminal_reward.ndim != 2 or terminal_reward.shape[1] == 0 or value.ndim != 3:
        raise ValueError(
            "terminal_reward must be [B, K] with K >= 1 and value [B, T, C], "
            f"got {tuple(terminal_reward.shape)} and {tuple(value.shape)}."
        )
    (batch, groups), steps = terminal_reward.shape, value.shape[1]
    columns = groups if sample_log_prob is None else groups + 1
    _check_shape("value", value, (batch, steps, columns), value)
    for name, tensor in (
        ("mask", mask),
        ("sample_log_prob", sample_log_prob),
        ("ref_log_prob", ref_log_prob),
    ):
        _check_shape(name, tensor, (batch, steps), value)
    _check_shape("group_weights", group_weights, (groups,), value)
    _check_moments(return_moments, "group_weights", group_weights, columns)
    log_probs = (sample_log_prob, ref_log_prob)
    with torch.no_grad():
        mask = _as_bool(mask)
        if backend == "torch":
            return token_gae_naive(
                terminal_reward, value, mask, gamma, lmbda, *log_probs, kl_coef, group_weights, return_moments
            )
        outputs = call(
            _token_gae_op,
            terminal_reward,
            value,
            mask,
            *log_probs,
            group_weights,
            gamma,
            lmbda,
            kl_coef,
            return_moments,
        )
    return _wanted(outputs, group_weights, return_moments)
