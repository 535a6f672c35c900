"""Reward heads and the minimum over them."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_oracles import (
    COMPILER,
    INTERPRET,
    LOW_BAR,
    PROPERTY,
    gradients,
    heads_inputs,
    heads_oracle,
    largest_error,
    masked_heads_oracle,
    min_oracle,
    rms_error,
)
from maxmin_kernels import min_over_heads, reward_heads_min
from torch._subclasses.fake_tensor import FakeTensorMode

INF, NAN = float("inf"), float("nan")
BACKENDS = ["auto", "torch"]


def fused(temperature=1.0, **options):
    def call(hidden, weight, bias, shift, scale):
        return reward_heads_min(
            hidden, weight, bias, shift=shift, scale=scale, temperature=temperature, **options
        )

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "heads"),
    [(1, 1, 1), (33, 24, 2), (70, 96, 4), (65, 130, 5), (40, 64, 17), (20, 32, 70)],
    ids=lambda x: str(x),
)
def test_values_and_gradients_equal_the_oracle(rows, width, heads, dtype):
    inputs = heads_inputs(rows, width, heads, dtype)
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


def test_float32_error_at_a_realistic_size():
    inputs = heads_inputs(*((96, 512, 8) if INTERPRET else (512, 4096, 8)))
    outputs, grads = gradients(fused(0.7, return_sums=True), inputs)
    keep = {"head_mask": torch.ones(8).bool(), "row_mask": torch.ones(len(inputs[0])).bool()}
    expected, expected_grads = gradients(
        lambda *x: masked_heads_oracle(*x, **keep, temperature=0.7), [x.double() for x in inputs]
    )
    for actual, reference in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        # 4096 terms in the order of a GPU's lanes: 2.2e-6 measured
        assert largest_error(actual, reference) < 4e-6


def test_bfloat16_error_is_at_most_twice_that_of_eager_bfloat16():
    def eager(hidden, weight):
        rewards = torch.nn.functional.linear(hidden, weight).float()
        return rewards, rewards.min(-1).values

    inputs = heads_inputs(128, 256, 8, torch.bfloat16)[:2]
    exact, exact_grads = gradients(lambda *x: heads_oracle(*x)[:2], [x.double() for x in inputs])
    base, base_grads = gradients(eager, inputs)
    ours, our_grads = gradients(lambda *x: reward_heads_min(*x)[:2], inputs)
    for reference, theirs, actual in zip(
        (*exact, *exact_grads), (*base, *base_grads), (*ours, *our_grads), strict=True
    ):
        assert rms_error(actual, reference) <= 2 * rms_error(theirs, reference)


def test_argmin_equals_the_oracle():
    inputs = heads_inputs(300, 16, 6)
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend, masked):
    inputs = [x.double().requires_grad_() for x in heads_inputs(5, 4, 3)]
    masks = {"head_mask": torch.tensor([True, False, True]), "row_mask": torch.arange(5) != 2}
    options = {"return_sums": True, "backend": backend} | (masks if masked else {})

    def call(*x):
        rewards, minimum, _, softmin, sums = fused(0.5, **options)(*x)
        return rewards, minimum, softmin, sums

    assert torch.autograd.gradcheck(call, inputs)
    if backend == "torch":
        assert torch.autograd.gradgradcheck(call, inputs)


def test_only_the_minimum_in_the_loss():
    hidden, weight, *_ = heads_inputs(30, 8, 4)
    leaf = weight.clone().requires_grad_()
    _, minimum, argmin, _ = reward_heads_min(hidden, leaf)
    assert not argmin.requires_grad
    minimum.sum().backward()
    picked = torch.nn.functional.one_hot(argmin, 4).float()
    torch.testing.assert_close(leaf.grad, picked.T @ hidden)


def test_mixed_dtypes_are_widened():
    hidden, weight, *_ = heads_inputs(30, 40, 3)
    low = hidden.bfloat16()
    rewards = reward_heads_min(low, weight)[0]
    assert rms_error(rewards, heads_oracle(low, weight)[0]) < 2e-6


@pytest.mark.real_device
@pytest.mark.parametrize("heads", [3, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(device, heads, backend):
    hidden, weight, *_ = (x.requires_grad_() for x in heads_inputs(30, 40, heads))
    expected = reward_heads_min(hidden, weight)
    reference = torch.autograd.grad(expected[1].sum(), (hidden, weight))
    with torch.autocast(device.type, torch.bfloat16):
        outputs = reward_heads_min(hidden, weight, backend=backend)
        # The plain path's backward is autograd's own, which follows autocast.
        grads = () if backend == "torch" else torch.autograd.grad(outputs[1].sum(), (hidden, weight))
    for actual, before in zip((*outputs, *grads), (*expected, *reference), strict=backend == "auto"):
        torch.testing.assert_close(actual, before, rtol=1e-5, atol=1e-5)


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
    hidden, weight, *_ = heads_inputs(4, 6, 3)
    weight.requires_grad_()
    masks = {"head_mask": torch.tensor([True, False, True]), "row_mask": torch.arange(4) != 1}
    _, minimum, _, softmin, sums = reward_heads_min(hidden, weight, **masks, return_sums=True)
    total = minimum + softmin + sums.sum()
    rows = torch.autograd.grad(total, weight, torch.eye(4), is_grads_batched=True, retain_graph=True)[0]
    for n in range(4):
        torch.testing.assert_close(rows[n], torch.autograd.grad(total[n], weight, retain_graph=True)[0])


@pytest.mark.real_device
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_opcheck(rows, extras):
    hidden, weight, bias, _, scale = (x.requires_grad_() for x in heads_inputs(rows, 6, 3))
    masks = (torch.tensor([True, False, True]), torch.arange(rows) % 3 > 0) if extras else (None, None)
    heads = torch.ops.maxmin.reward_heads_min.default
    torch.library.opcheck(heads, (hidden, weight, bias, None, scale, 0.5, *masks, extras))
    rewards = torch.randn(rows, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.maxmin.min_over_heads.default, (rewards, 0.5, *masks, extras))
    argmin, grad = torch.zeros(rows, dtype=torch.int64), torch.randn(rows)
    grads = (torch.randn(rows, 3), grad, grad, torch.randn(3)) if extras else (None, grad, grad, None)
    backward = torch.ops.maxmin.min_over_heads_backward.default
    torch.library.opcheck(backward, (rewards.detach(), argmin, *grads, 0.5, *masks))


@pytest.mark.real_device
@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def loss(hidden, weight, bias, head_mask, row_mask):
        _, minimum, _, softmin = reward_heads_min(hidden, weight, bias)
        # No unflatten: under a default device, which is a mode, Dynamo cannot trace it.
        again, _, _ = min_over_heads(hidden.reshape(hidden.shape[0], 2, -1))
        masks = {"head_mask": head_mask, "row_mask": row_mask, "return_sums": True}
        rewards, masked, _, _, sums = reward_heads_min(hidden, weight, **masks)
        *_, third, sums_again = min_over_heads(rewards, **masks)
        return (
            minimum.sum()
            + softmin.square().sum()
            + again.sum()
            + (masked * third).sum()
            + (sums * sums_again).sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=COMPILER)
    for rows in (5, 11):
        inputs = [x.requires_grad_() for x in heads_inputs(rows, 6, 3)[:3]]
        masks = torch.tensor([True, False, True]), torch.arange(rows) % 3 > 0
        expected = torch.autograd.grad(loss(*inputs, *masks), inputs)
        actual_grads = torch.autograd.grad(compiled(*inputs, *masks), inputs)
        for actual, reference in zip(actual_grads, expected, strict=True):
            torch.testing.assert_close(actual, reference)


@pytest.mark.real_device
@pytest.mark.parametrize("masked", [False, True])
def test_export_keeps_one_operator_each(masked):
    class Heads(torch.nn.Module):
        def forward(self, hidden, weight, head_mask, row_mask):
            masks = {"head_mask": head_mask, "row_mask": row_mask, "return_sums": masked}
            outputs = reward_heads_min(hidden, weight, **masks)
            return (*outputs, *min_over_heads(outputs[0], **masks))

    masks = (torch.tensor([True, False, True]), torch.arange(6) % 3 > 0) if masked else (None, None)
    arguments = (torch.randn(6, 4), torch.randn(3, 4), *masks)
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(
        Heads(), arguments, dynamic_shapes=(rows, None, None, rows if masked else None)
    )
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    names = [c for c in calls if "maxmin" in c]
    assert names == ["maxmin.reward_heads_min.default", "maxmin.min_over_heads.default"]
    for actual, expected in zip(program.module()(*arguments), Heads()(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.real_device
@pytest.mark.parametrize("fake_device", ["cpu", "cuda", "meta"])
def test_fake_and_meta_tensors_have_the_shape_dtype_and_device_of_real_ones(fake_device):
    with contextlib.nullcontext() if fake_device == "meta" else FakeTensorMode():
        # Autograd asks for a real CUDA device.
        options = {"dtype": torch.bfloat16, "device": fake_device, "requires_grad": fake_device != "cuda"}
        hidden, weight = torch.empty(7, 4, **options), torch.empty(3, 4, **options)
        masks = {
            "head_mask": torch.empty(3, dtype=torch.bool, device=fake_device),
            "row_mask": torch.empty(7, dtype=torch.bool, device=fake_device),
        }
        rewards, *lowest, sums = reward_heads_min(hidden, weight, **masks, return_sums=True)
        *again, sums_again = min_over_heads(rewards, **masks, return_sums=True)
        assert rewards.shape == (7, 3)
        assert sums.shape == sums_again.shape == (3,)
        for minimum, argmin, softmin in (lowest, again):
            assert minimum.shape == argmin.shape == softmin.shape == (7,)
            assert argmin.dtype == torch.int64
            assert minimum.dtype == softmin.dtype == rewards.dtype == sums.dtype == torch.float32
        assert all(out.device.type == fake_device for out in (rewards, *lowest, sums, *again, sums_again))
        if fake_device != "cuda":
            (lowest[0].sum() + again[2].sum() + sums_again.sum()).backward()
            for leaf in (hidden, weight):
                assert leaf.grad.shape == leaf.shape
                assert leaf.grad.dtype == torch.bfloat16
                assert leaf.grad.device.type == fake_device


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"weight": torch.zeros(3, 5)}, ValueError, "same H"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "K >= 1"),
        ({"bias": torch.zeros(2)}, ValueError, "bias"),
        ({"scale": torch.zeros(3, 1)}, ValueError, "scale"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "floating"),
        pytest.param(
            {"weight": torch.zeros(3, 4, device="meta")},
            ValueError,
            "device|meta",
            marks=pytest.mark.real_device,
        ),
        ({"backend": "triton"}, ValueError, "backend"),
        ({"head_mask": torch.ones(3)}, TypeError, "head_mask must be bool"),
        ({"head_mask": torch.ones(2).bool()}, ValueError, "head_mask must be"),
        ({"row_mask": torch.ones(2, 1).bool()}, ValueError, "row_mask must be"),
        pytest.param(
            {"row_mask": torch.ones(2, device="meta").bool()},
            ValueError,
            "row_mask is on meta",
            marks=pytest.mark.real_device,
        ),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=message):
        reward_heads_min(**arguments)
    if change.keys() & {"temperature", "head_mask", "row_mask"}:
        with pytest.raises(error, match=message):
            min_over_heads(torch.zeros(2, 3), **change)


def test_no_head_is_an_error():
    with pytest.raises(ValueError, match="K >= 1"):
        min_over_heads(torch.zeros(3, 0))
