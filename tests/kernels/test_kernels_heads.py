"""Reward heads and the minimum over them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_oracles import COMPILER, LOW_BAR, PROPERTY, gradients, heads_oracle, min_oracle, rms_error
from maxmin_kernels import min_over_heads, reward_heads_min

INF, NAN = float("inf"), float("nan")


def make(rows, width, heads, dtype=torch.float32):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(heads, width) / width**0.5).to(dtype)
    vectors = torch.randn(heads).to(dtype), torch.randn(heads).to(dtype), (torch.rand(heads) + 0.5).to(dtype)
    return hidden, weight, *vectors


def fused(temperature=1.0):
    def call(hidden, weight, bias, shift, scale):
        return reward_heads_min(hidden, weight, bias, shift=shift, scale=scale, temperature=temperature)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "heads"),
    [(1, 1, 1), (33, 24, 2), (70, 96, 4), (65, 130, 5), (40, 64, 17), (20, 32, 70)],
    ids=lambda x: str(x),
)
def test_values_and_gradients_equal_the_oracle(rows, width, heads, dtype):
    inputs = make(rows, width, heads, dtype)
    outputs, grads = gradients(fused(0.7), inputs)
    expected, expected_grads = gradients(
        lambda *x: heads_oracle(*x, temperature=0.7), [x.double() for x in inputs]
    )
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        assert rms_error(actual, reference) < 2e-6
    for leaf, actual, reference in zip(inputs, grads, expected_grads, strict=True):
        assert actual.dtype == leaf.dtype
        assert rms_error(actual, reference) < LOW_BAR.get(dtype, 2e-6)


def test_argmin_equals_the_oracle():
    inputs = make(300, 16, 6)
    argmin = fused()(*inputs)[2]
    assert argmin.dtype == torch.int64
    assert torch.equal(argmin, heads_oracle(*inputs)[2])


@PROPERTY
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 40),
    heads=st.integers(1, 17),
    layout=st.sampled_from(["plain", "transposed", "strided", "offset"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_exact_on_small_integers_in_any_layout(rows, width, heads, layout, flags):
    # Integers have exact float32 sums, and many ties.
    hidden = torch.randint(-2, 3, (rows, width)).float()
    weight = torch.randint(-1, 2, (heads, width)).float()
    vectors = [torch.randint(-2, 3, (heads,)).float() if flag else None for flag in flags[:2]]
    scale = torch.full((heads,), 2.0) if flags[2] else None
    if layout == "transposed":
        hidden_view, weight_view = hidden.mT.contiguous().mT, weight.mT.contiguous().mT
    elif layout == "strided":
        hidden_view = torch.stack([hidden, hidden + 9], -1)[..., 0]
        weight_view = torch.cat([weight, weight + 9], 1)[:, :width]
    elif layout == "offset":
        hidden_view = torch.cat([hidden[:1] + 9, hidden])[min(1, rows) :]
        weight_view = torch.cat([weight[:1] + 9, weight])[1:]
    else:
        hidden_view, weight_view = hidden, weight
    rewards, minimum, argmin, _ = reward_heads_min(
        hidden_view, weight_view, vectors[0], shift=vectors[1], scale=scale
    )
    expected = heads_oracle(hidden, weight, *vectors, scale)
    assert torch.equal(rewards.double(), expected[0])
    assert torch.equal(minimum.double(), expected[1])
    assert torch.equal(argmin, expected[2])


@PROPERTY
@given(
    st.lists(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -3.0]), min_size=3, max_size=3), min_size=1)
)
def test_special_values_as_in_torch_min(rows):
    rewards = torch.tensor(rows)
    minimum, argmin, softmin = min_over_heads(rewards)
    expected = rewards.min(-1)
    assert torch.equal(argmin, expected.indices)
    torch.testing.assert_close(minimum, expected.values, equal_nan=True, rtol=0, atol=0)
    log_mean = torch.logsumexp(-rewards.double(), -1) - torch.tensor(3.0).double().log()
    torch.testing.assert_close(softmin.double(), -log_mean, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_nan_and_infinite_rewards_stay_in_their_row():
    hidden, weight = torch.randn(20, 8), torch.randn(3, 8)
    clean = reward_heads_min(hidden, weight)
    hidden[4, 2], hidden[9, 0] = NAN, INF
    dirty = reward_heads_min(hidden, weight)
    rest = [i for i in range(20) if i not in (4, 9)]
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[rest], after[rest])
    assert dirty[0][4].isnan().all()
    assert dirty[1][4].isnan()
    assert dirty[2][4] == 0


@pytest.mark.parametrize(
    "rewards", [[INF, INF, INF], [-INF, -INF, 0.0], [-INF, 0.0, INF], [1e30, -1e30, 0.0]]
)
def test_gradient_of_softmin_is_a_point_of_the_simplex(rewards):
    leaf = torch.tensor([rewards], requires_grad=True)
    (grad,) = torch.autograd.grad(min_over_heads(leaf)[2].sum(), leaf)
    lowest = torch.tensor(rewards) == min(rewards)
    torch.testing.assert_close(grad[0], lowest / lowest.sum())


@PROPERTY
@given(st.integers(1, 17), st.floats(0.01, 100.0), st.floats(-1e3, 1e3))
def test_softmin_lies_between_minimum_and_mean(heads, temperature, offset):
    rewards = torch.randn(9, heads) * 3 + offset
    minimum, _, softmin = min_over_heads(rewards, temperature=temperature)
    slack = 1e-5 * (1 + abs(offset) + temperature)
    assert (softmin >= minimum - slack).all()
    assert (softmin <= rewards.mean(-1) + slack).all()
    equal = torch.full((4, heads), offset)
    torch.testing.assert_close(min_over_heads(equal, temperature=temperature)[2], equal[:, 0])


@pytest.mark.parametrize("shape", [(3, 7, 4), (5,), (0, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_min_over_heads_keeps_the_batch_shape(shape, dtype):
    rewards = torch.randn(shape).to(dtype)
    outputs, (grad,) = gradients(min_over_heads, [rewards])
    expected, (expected_grad,) = gradients(min_oracle, [rewards.double()])
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.shape == shape[:-1]
        torch.testing.assert_close(actual.double(), reference, rtol=1e-6, atol=1e-6)
    assert grad.shape == shape
    assert rms_error(grad, expected_grad) <= LOW_BAR.get(dtype, 2e-6)


def test_gradcheck_in_float64():
    inputs = [x.double().requires_grad_() for x in make(5, 4, 3)]

    def call(*x):
        rewards, minimum, _, softmin = fused(0.5)(*x)
        return rewards, minimum, softmin

    assert torch.autograd.gradcheck(call, inputs)


def test_only_the_minimum_in_the_loss():
    hidden, weight, *_ = make(30, 8, 4)
    leaf = weight.clone().requires_grad_()
    _, minimum, argmin, _ = reward_heads_min(hidden, leaf)
    assert not argmin.requires_grad
    minimum.sum().backward()
    picked = torch.nn.functional.one_hot(argmin, 4).float()
    torch.testing.assert_close(leaf.grad, picked.T @ hidden)


def test_mixed_dtypes_are_widened():
    hidden, weight, *_ = make(30, 40, 3)
    low = hidden.bfloat16()
    rewards = reward_heads_min(low, weight)[0]
    assert rms_error(rewards, heads_oracle(low, weight)[0]) < 2e-6


@pytest.mark.parametrize("heads", [3, 70])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_does_not_reach_inside(heads, backend):
    hidden, weight, *_ = (x.requires_grad_() for x in make(30, 40, heads))
    expected = reward_heads_min(hidden, weight)
    reference = torch.autograd.grad(expected[1].sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = reward_heads_min(hidden, weight, backend=backend)
        # The plain path's backward is autograd's own, which follows autocast.
        grads = () if backend == "torch" else torch.autograd.grad(outputs[1].sum(), (hidden, weight))
    for actual, before in zip((*outputs, *grads), (*expected, *reference), strict=backend == "auto"):
        torch.testing.assert_close(actual, before, rtol=1e-5, atol=1e-5)


def test_backend_torch_is_the_same_function_and_differentiable_twice():
    inputs = [x.requires_grad_() for x in make(12, 10, 4)]
    hidden, weight, bias, shift, scale = inputs
    reference = reward_heads_min(hidden, weight, bias, shift=shift, scale=scale, backend="torch")
    for actual, expected in zip(fused()(*inputs), reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    (first,) = torch.autograd.grad(reference[3].sum(), weight, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), weight)[0].abs().sum() > 0


def test_vmap_over_stacked_heads_with_the_backward_outside():
    hidden, weights = torch.randn(9, 6), torch.randn(5, 3, 6, requires_grad=True)
    outputs = torch.vmap(lambda w: reward_heads_min(hidden, w), in_dims=0)(weights)
    expected = [reward_heads_min(hidden, w) for w in weights]
    for i, out in enumerate(outputs):
        torch.testing.assert_close(out, torch.stack([e[i] for e in expected]))
    (grad,) = torch.autograd.grad(outputs[3].sum(), weights)
    (reference,) = torch.autograd.grad(sum(e[3].sum() for e in expected), weights)
    torch.testing.assert_close(grad, reference)


def test_vmap_over_samples():
    hidden, weight = torch.randn(4, 6, 9), torch.randn(3, 6)
    outputs = torch.vmap(lambda h: reward_heads_min(h, weight), in_dims=2)(hidden)
    for i in range(9):
        for out, reference in zip(outputs, reward_heads_min(hidden[..., i], weight), strict=True):
            torch.testing.assert_close(out[i], reference)
    rewards = torch.randn(5, 4, 3)
    lowest = torch.vmap(lambda r: min_over_heads(r)[0])(rewards)
    assert torch.equal(lowest, rewards.amin(-1))


def test_batched_cotangents_equal_one_by_one():
    hidden, weight, *_ = make(4, 6, 3)
    weight.requires_grad_()
    _, minimum, _, softmin = reward_heads_min(hidden, weight)
    total = minimum + softmin
    rows = torch.autograd.grad(total, weight, torch.eye(4), is_grads_batched=True, retain_graph=True)[0]
    for n in range(4):
        torch.testing.assert_close(rows[n], torch.autograd.grad(total[n], weight, retain_graph=True)[0])


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_opcheck(rows):
    hidden, weight, bias, _, scale = (x.requires_grad_() for x in make(rows, 6, 3))
    torch.library.opcheck(torch.ops.maxmin.reward_heads_min.default, (hidden, weight, bias, None, scale, 0.5))
    rewards = torch.randn(rows, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.maxmin.min_over_heads.default, (rewards, 0.5))
    argmin, grad = torch.zeros(rows, dtype=torch.int64), torch.randn(rows)
    backward = torch.ops.maxmin.min_over_heads_backward.default
    torch.library.opcheck(backward, (rewards.detach(), argmin, None, grad, grad, 0.5))


@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def loss(hidden, weight, bias):
        _, minimum, _, softmin = reward_heads_min(hidden, weight, bias)
        again, _, _ = min_over_heads(hidden.unflatten(1, (2, -1)))
        return minimum.sum() + softmin.square().sum() + again.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=COMPILER)
    for rows in (5, 11):
        inputs = [x.requires_grad_() for x in make(rows, 6, 3)[:3]]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for actual, reference in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"weight": torch.zeros(3, 5)}, ValueError, "same H"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "K >= 1"),
        ({"bias": torch.zeros(2)}, ValueError, "bias"),
        ({"scale": torch.zeros(3, 1)}, ValueError, "scale"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "floating"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, "device|meta"),
        ({"backend": "triton"}, ValueError, "backend"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=message):
        reward_heads_min(**arguments)
    if "temperature" in change:
        with pytest.raises(error, match=message):
            min_over_heads(torch.zeros(3), **change)


def test_no_head_is_an_error():
    with pytest.raises(ValueError, match="K >= 1"):
        min_over_heads(torch.zeros(3, 0))
