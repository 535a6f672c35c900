"""What every operator does under the transforms of PyTorch: an answer, or an error that names the remedy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from maxmin_kernels import (
    em_responsibilities,
    min_over_heads,
    plan_users,
    reward_heads_min,
    token_gae,
    token_log_probs,
    vector_gae,
)
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.real_device

OFFSETS = torch.tensor([0, 4, 4, 6])
TARGETS = torch.tensor([0, 1, 0, 1, 0, 1])
END = torch.zeros(6, 3, 1, dtype=torch.bool)
ROW_MASK = torch.tensor([True, True, False, True, True, True])


class Op(NamedTuple):
    """A call of floating inputs, and the shapes of these."""

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    gradient: bool = True


OPS = {
    "reward_heads_min": Op(
        lambda h, w, b, shift, **k: reward_heads_min(h, w, b, shift=shift, row_mask=ROW_MASK, **k),
        ((6, 3), (2, 3), (2,), (2,)),
    ),
    "reward_heads_min sums": Op(
        lambda h, w, s, **k: reward_heads_min(h, w, scale=s.exp(), return_sums=True, **k),
        ((6, 3), (2, 3), (2,)),
    ),
    "min_over_heads": Op(lambda r, **k: min_over_heads(r, return_sums=True, **k), ((6, 4),)),
    "em_responsibilities": Op(
        lambda c, r, p, **k: em_responsibilities(c, r, OFFSETS, p.log_softmax(0), return_mass=True, **k),
        ((6, 2), (6, 2), (2,)),
    ),
    "em_responsibilities margins": Op(
        lambda c, p, **k: em_responsibilities(
            c, None, OFFSETS, p.log_softmax(0), plan=plan_users(OFFSETS), **k
        ),
        ((6, 2), (2,)),
    ),
    "token_log_probs": Op(
        lambda h, w, b, **k: token_log_probs(
            h, w, TARGETS, entropy=True, bias=b, logit_scale=0.5, softcap=2.0, **k
        ),
        ((6, 3), (5, 3), (5,)),
    ),
    "token_log_probs plain": Op(lambda h, w, **k: token_log_probs(h, w, TARGETS, **k)[:1], ((6, 3), (5, 3))),
    "vector_gae": Op(
        lambda r, v, n, w, **k: vector_gae(r, v, n, END, END, gamma=0.9, lmbda=0.8, weights=w, **k),
        ((6, 3, 2), (6, 3, 2), (6, 3, 2), (2,)),
        gradient=False,
    ),
    "token_gae": Op(
        lambda r, v, **k: token_gae(r, v, END.squeeze(-1) == 0, gamma=0.9, lmbda=0.8, **k),
        ((6, 2), (6, 3, 2)),
        gradient=False,
    ),
}
EVERY = pytest.mark.parametrize("name", OPS)
DIFFERENTIABLE = pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.gradient])
REMEDY = 'pass backend="torch"'


def floats(name, backend="auto"):
    """Return the call's floating outputs, as a function of its inputs."""
    return lambda *inputs: tuple(
        out for out in OPS[name].call(*inputs, backend=backend) if out.is_floating_point()
    )


def make(name, requires_grad=False):
    return [torch.randn(s, dtype=torch.float64, requires_grad=requires_grad) for s in OPS[name].shapes]


def refuses(function, *inputs):
    with pytest.raises(NotImplementedError, match=REMEDY) as raised:
        function(*inputs)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- forward mode


@EVERY
def test_forward_mode_is_refused(name):
    inputs = tuple(make(name))
    for argument in range(len(inputs)):

        def call(x, argument=argument):
            return floats(name)(*inputs[:argument], x, *inputs[argument + 1 :])

        x = inputs[argument]
        refuses(torch.func.jvp, call, (x,), (x,))
        refuses(torch.func.jacfwd(call), x)
        for requires_grad in (False, True):
            with forward_ad.dual_level():
                leaf = x.clone().requires_grad_(requires_grad)
                refuses(call, forward_ad.make_dual(leaf, x))
                call(x)  # nothing with a tangent, nothing to refuse
        call(x)


@EVERY
def test_forward_mode_through_a_batch_is_refused(name):
    many = tuple(torch.stack([x, x]) for x in make(name))
    refuses(torch.func.jvp, torch.vmap(floats(name)), many, many)


@EVERY
def test_forward_mode_of_the_torch_backend_is_the_finite_difference(name):
    inputs, directions = tuple(make(name)), tuple(make(name))
    step = 1e-6
    function = floats(name, "torch")
    _, tangents = torch.func.jvp(function, inputs, directions)
    ahead, behind = (
        function(*(x + sign * step * d for x, d in zip(inputs, directions, strict=True))) for sign in (1, -1)
    )
    for index, (tangent, a, b) in enumerate(zip(tangents, ahead, behind, strict=True)):
        if name.startswith("em") and index != 1:
            assert (tangent == 0).all()  # responsibilities and masses are constants by design
        else:
            torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)


@DIFFERENTIABLE
def test_a_tangent_of_the_cotangent_is_refused(name):
    inputs = make(name, requires_grad=True)
    out = next(o for o in floats(name)(*inputs) if o.requires_grad)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        refuses(torch.autograd.grad, out, inputs, cotangent, None, False, True)


@EVERY
@pytest.mark.usefixtures("no_compile_cache")
def test_compiled_forward_mode_is_refused(name):
    inputs = tuple(make(name))

    def jvp(*inputs):
        return torch.func.jvp(floats(name), inputs, inputs)[1]

    refuses(torch.compile(jvp, backend="aot_eager"), *inputs)


# ---------------------------------------------------------------- second derivatives


@DIFFERENTIABLE
@pytest.mark.parametrize("power", [1, 2], ids=["constant cotangent", "cotangent with a graph"])
def test_second_derivatives_are_refused(name, power):
    inputs = make(name, requires_grad=True)
    for argument in range(len(inputs)):
        # One input alone with a gradient: no part of the rule may answer for the whole.
        leaves = [x.detach().requires_grad_(i == argument) for i, x in enumerate(inputs)]
        outputs = [o for o in floats(name)(*leaves) if o.requires_grad]
        # Not o**1: its gradient would have a graph.
        total = sum((o if power == 1 else o**power).sum() for o in outputs)
        (plain,) = torch.autograd.grad(total, leaves[argument], retain_graph=True)
        (grad,) = torch.autograd.grad(total, leaves[argument], create_graph=True)
        assert torch.equal(grad, plain)
        refuses(torch.autograd.grad, grad.square().sum(), leaves[argument])


@DIFFERENTIABLE
def test_mixed_second_derivatives_are_refused(name):
    inputs = make(name, requires_grad=True)
    total = sum(o.sum() for o in floats(name)(*inputs) if o.requires_grad)
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    for grad in grads:
        for leaf in inputs:
            with pytest.raises(NotImplementedError, match=REMEDY):
                torch.autograd.grad(grad.sum(), leaf, retain_graph=True)


@DIFFERENTIABLE
def test_hessians_are_refused(name):
    inputs = make(name)

    def total(x):
        return sum(o.square().sum() for o in floats(name)(x, *inputs[1:]))

    refuses(torch.autograd.functional.hessian, total, inputs[0])
    refuses(torch.func.hessian(total), inputs[0])
    refuses(torch.func.grad(total), inputs[0])
    refuses(torch.func.grad(lambda x: torch.vmap(total)(torch.stack([x, x])).sum()), inputs[0])


@DIFFERENTIABLE
def test_batched_cotangents_with_a_graph_equal_one_by_one(name):
    inputs = make(name, requires_grad=True)
    total = sum(o.sum() for o in floats(name)(*inputs) if o.requires_grad)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    many = torch.autograd.grad(total, inputs, scales, is_grads_batched=True, create_graph=True)
    plain = torch.autograd.grad(total, inputs, retain_graph=True)
    for grads, grad in zip(many, plain, strict=True):
        torch.testing.assert_close(grads, torch.stack([grad, -2 * grad]))


@DIFFERENTIABLE
def test_gradients_of_the_torch_backend_are_right_twice(name):
    inputs = make(name, requires_grad=True)

    def differentiable(*inputs):
        return tuple(o for o in floats(name, "torch")(*inputs) if o.requires_grad)

    assert torch.autograd.gradcheck(differentiable, inputs)
    assert torch.autograd.gradgradcheck(differentiable, inputs)


@DIFFERENTIABLE
def test_activation_checkpointing_with_a_graph(name):
    inputs = make(name, requires_grad=True)

    def total(*inputs):
        return sum(o.sum() for o in floats(name)(*inputs) if o.requires_grad)

    kept = checkpoint(total, *inputs, use_reentrant=False)
    grads = torch.autograd.grad(kept, inputs, create_graph=True)
    for grad, plain in zip(grads, torch.autograd.grad(total(*inputs), inputs), strict=True):
        assert torch.equal(grad, plain)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if not op.gradient])
def test_targets_have_no_gradient(name):
    inputs = make(name, requires_grad=True)
    assert not any(out.requires_grad for out in floats(name)(*inputs))
    grad = torch.func.grad(lambda x: sum(o.sum() for o in floats(name)(x, *inputs[1:])))(inputs[0])
    assert (grad == 0).all()


# ---------------------------------------------------------------- empty batches


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_vmap_over_an_empty_batch_is_empty(name, dtype):
    one = [x.to(dtype) for x in make(name)]
    expected = OPS[name].call(*one)
    for batched in range(len(one)):
        # One batched input, the inputs from this one on, all of them.
        for last in {batched + 1, len(one)}:
            dims = tuple(0 if batched <= i < last else None for i in range(len(one)))
            inputs = [x if d is None else x.new_zeros(0, *x.shape) for x, d in zip(one, dims, strict=True)]
            actual = torch.vmap(OPS[name].call, in_dims=dims)(*inputs)
            assert len(actual) == len(expected)
            for a, e in zip(actual, expected, strict=True):
                assert a.shape == (0, *e.shape)
                assert a.dtype == e.dtype


@EVERY
def test_vmap_over_an_empty_inner_dimension_and_nested(name):
    inputs = [x.new_zeros(*x.shape, 0) for x in make(name)]
    expected = OPS[name].call(*make(name))
    for a, e in zip(torch.vmap(OPS[name].call, in_dims=-1)(*inputs), expected, strict=True):
        assert a.shape == (0, *e.shape)
    for shape in ((2, 0), (0, 2)):
        nested = torch.vmap(torch.vmap(OPS[name].call))(*(x.new_zeros(*shape, *x.shape) for x in make(name)))
        for a, e in zip(nested, expected, strict=True):
            assert a.shape == (*shape, *e.shape)


@DIFFERENTIABLE
def test_gradients_of_an_empty_batch_are_empty(name):
    inputs = [x.new_zeros(0, *x.shape).requires_grad_() for x in make(name)]
    total = sum(o.sum() for o in torch.vmap(floats(name))(*inputs) if o.requires_grad)
    for leaf, grad in zip(inputs, torch.autograd.grad(total, inputs), strict=True):
        assert grad.shape == leaf.shape


@pytest.mark.usefixtures("no_compile_cache")
def test_an_unbatched_input_of_an_empty_batch_has_gradient_zero():
    weight = torch.randn(2, 3, requires_grad=True)
    minimum = torch.vmap(lambda h: reward_heads_min(h, weight)[1])(torch.zeros(0, 6, 3))
    assert (torch.autograd.grad(minimum.sum(), weight)[0] == 0).all()
    compiled = torch.compile(torch.vmap(lambda h: reward_heads_min(h, weight)[1]), backend="aot_eager")
    assert compiled(torch.zeros(0, 6, 3)).shape == (0, 6)
