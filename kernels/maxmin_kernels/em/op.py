"""``em_responsibilities`` as a PyTorch operator (namespace ``maxmin``)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd import differentiable_once
from .._backend import Backend, accumulate_dtype, call, check_call, keeps, kernel_operator
from .._vmap import loop_vmap
from .cpu import em_backward_cpu, em_forward_cpu
from .naive import em_backward_naive, em_responsibilities_naive
from .plan import UserPlan, check_offsets_shape, check_user_offsets

#: Numbers that a CPU keeps for the gradient, 64 MB in float32; of more pairs they are computed again.
KEPT_ODDS = 2**24


@kernel_operator(
    "em_responsibilities",
    "em.em_forward",
    floats=(0, 1, 3),
    check=lambda chosen, _, user_offsets, *rest: check_user_offsets(user_offsets, chosen.shape[0]),
)
def _em_op(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    log_prior: Tensor,
    plan: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return responsibilities, log-likelihood, and the odds that a CPU keeps for the gradient, or [0, K]."""
    if not chosen.is_cuda:
        return em_forward_cpu(chosen, rejected, user_offsets, log_prior, keep)
    found = em_responsibilities_naive(chosen, rejected, user_offsets, log_prior)
    return *found, found[0].new_empty(0, chosen.shape[1])


@_em_op.register_fake
def _em_fake(chosen: Tensor, rejected: Tensor | None, user_offsets: Tensor, *args: Any) -> Any:
    log_prior, _, keep = args
    (pairs, groups), users = chosen.shape, user_offsets.shape[0] - 1
    shapes = ((users, groups), (users,), (pairs if keep else 0, groups))
    dtype = accumulate_dtype(chosen, rejected, log_prior)
    return tuple(chosen.new_empty(shape, dtype=dtype) for shape in shapes)


@kernel_operator("em_backward", "em.em_backward", floats=(0, 1, 3))
def _em_backward_op(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    responsibilities: Tensor,
    grad: Tensor,
    odds: Tensor,
    segment_offsets: Tensor | None,
    segment_user: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if chosen.is_cuda:
        return em_backward_naive(chosen, rejected, user_offsets, responsibilities, grad)
    return em_backward_cpu(chosen, rejected, user_offsets, responsibilities, grad, odds)


@_em_backward_op.register_fake
def _em_backward_fake(chosen: Tensor, rejected: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    d_rejected = chosen.new_empty(0) if rejected is None else rejected.new_empty(rejected.shape)
    return chosen.new_empty(chosen.shape), d_rejected


def _em_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    chosen, rejected, user_offsets, log_prior, plan, _ = inputs
    responsibilities, _, odds = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(responsibilities, odds)
    # The prior is no term of the gradient, but a cause: the responsibilities depend on it.
    ctx.save_for_backward(chosen, rejected, user_offsets, log_prior, responsibilities, odds, *plan[:2])


@differentiable_once
def _em_autograd(ctx: Any, saved: Any, _: Any, grad: Tensor, __: Any) -> Any:
    chosen, rejected, user_offsets, log_prior, responsibilities, odds, *segments = saved
    need = ctx.needs_input_grad
    d_chosen = d_rejected = d_prior = None
    if need[0] or need[1]:
        d_chosen, d_rejected = _em_backward_op(
            chosen, rejected, user_offsets, responsibilities, grad, odds, *(segments or (None, None))
        )
    if need[3]:
        d_prior = (responsibilities * grad.unsqueeze(-1)).sum(0).to(log_prior.dtype)
    return d_chosen, d_rejected if need[1] else None, None, d_prior, [None] * len(need[4]), None


_em_op.register_autograd(_em_autograd, setup_context=_em_setup)
_em_op.register_vmap(partial(loop_vmap, _em_op))
_em_backward_op.register_vmap(partial(loop_vmap, _em_backward_op))


def em_responsibilities(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    log_prior: Tensor,
    *,
    plan: UserPlan | None = None,
    return_mass: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""E-step of a Bradley-Terry mixture over users: who belongs to which group.

    .. math::
        \ell_u = \log \sum_k \exp\Big(\log \pi_k + \sum_{p \in u} \log \sigma(c_{pk} - r_{pk})\Big)

    and the responsibilities are the softmax of the same terms (Chakraborty et al., ICML 2024,
    arXiv 2402.08925, Algorithm 2, in its soft form; the hard form is their argmax). The gradient of the
    log-likelihood is the M-step's at the same responsibilities (Fisher's identity):
    :math:`\partial \ell_u / \partial c_{pk} = \rho_{uk}\, \sigma(r_{pk} - c_{pk})`.

    A user without pairs gets the prior. A user whose every group has likelihood zero gets the prior and
    log-likelihood -inf. A NaN stays with its user. A prior weight of zero (log -inf) is allowed. No atomics:
    equal inputs give bit-equal outputs. A CPU keeps the odds ``exp(r - c)`` for the gradient, up to 64 MB.

    Args:
        chosen: ``[P, K]`` rewards of the chosen responses, rows sorted by user; float32, bfloat16 or float16
            (float64 takes the PyTorch path). K a power of two loads widest.
        rejected: ``[P, K]`` rewards of the rejected responses, or None if ``chosen`` already holds the
            margins ``c - r``, which halves what is read.
        user_offsets: ``[U + 1]`` int64: the pairs of user u are rows ``user_offsets[u]:user_offsets[u + 1]``.
        log_prior: ``[K]`` log mixing weights.
        plan: :func:`plan_users` of the same offsets; built on every call if None. On CUDA the plan also
            spares the check of the offsets, which is otherwise a device-side assertion.
        return_mass: Whether to return the groups' masses too, from which EM takes the next mixing weights.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable every way).

    Returns:
        ``(responsibilities [U, K], log_likelihood [U])`` in float32. Only the log-likelihood is
        differentiable, with respect to chosen, rejected and log_prior. With ``return_mass`` a third output
        ``mass [K]``, the responsibilities summed over users in float64.

    Raises:
        TypeError: If a reward is not floating point or the offsets are not int64.
        ValueError: If shapes or devices do not fit, or (CPU) the offsets are impossible.

    Example:
        >>> import torch
        >>> from maxmin_kernels import em_responsibilities
        >>> chosen, rejected = torch.tensor([[4.0, -4.0], [4.0, -4.0], [-4.0, 4.0]]), torch.zeros(3, 2)
        >>> log_prior = torch.tensor([0.5, 0.5]).log()
        >>> responsibilities, _ = em_responsibilities(chosen, rejected, torch.tensor([0, 2, 3]), log_prior)
        >>> responsibilities.argmax(-1).tolist()
        [0, 1]
    """
    check_call(backend, chosen=chosen, rejected=rejected, log_prior=log_prior)
    if chosen.ndim != 2 or chosen.shape[1] == 0 or (rejected is not None and chosen.shape != rejected.shape):
        raise ValueError(
            "chosen and rejected must both be [P, K] with K >= 1, "
            f"got {tuple(chosen.shape)} and {None if rejected is None else tuple(rejected.shape)}."
        )
    if log_prior.shape != (chosen.shape[1],):
        raise ValueError(f"log_prior must be [K] = [{chosen.shape[1]}], got {tuple(log_prior.shape)}.")
    check_offsets_shape(user_offsets)
    if user_offsets.device != chosen.device:
        raise ValueError(
            f"user_offsets is on {user_offsets.device}, chosen on {chosen.device}; move it there."
        )
    if backend == "torch":
        if not torch.compiler.is_compiling():
            check_user_offsets(user_offsets, chosen.shape[0])
        outputs = em_responsibilities_naive(chosen, rejected, user_offsets, log_prior)
    else:
        keep = chosen.numel() <= KEPT_ODDS and keeps(chosen, rejected)
        tensors = [] if plan is None else list(plan)
        outputs = call(_em_op, chosen, rejected, user_offsets, log_prior, tensors, keep)[:2]
    if not return_mass:
        return outputs
    # A sum over [U, K], not over the scores: a library reduction is as good as a kernel of our own.
    return *outputs, outputs[0].sum(0, dtype=torch.float64).to(outputs[0].dtype)
