"""Reward heads with padding: masked heads, masked rows, and the heads' sums."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernels_oracles import (
    INTERPRET,
    PROPERTY,
    gradients,
    heads_inputs,
    heads_oracle,
    largest_error,
    masked_heads_oracle,
)
from maxmin_kernels import min_over_heads, min_over_heads_naive, reward_heads_min

INF, NAN = float("inf"), float("nan")
BACKENDS = ["auto", "torch"]


def fused(temperature=1.0, **options):
    def call(hidden, weight, bias, shift, scale):
        return reward_heads_min(
            hidden, weight, bias, shift=shift, scale=scale, temperature=temperature, **options
        )

    return call


@PROPERTY
@given(
    st.lists(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -3.0]), min_size=3, max_size=3), min_size=1),
    st.sampled_from([None, [0], [1], [2], [0, 2], [1, 2], [0, 1, 2]]),
    st.sampled_from(BACKENDS),
)
def test_special_values_as_in_torch_min_over_the_real_heads(rows, real, backend):
    rewards, heads = torch.tensor(rows), torch.tensor([0, 1, 2] if real is None else real)
    head_mask = None if real is None else torch.zeros(3).bool().index_fill(0, heads, True)
    minimum, argmin, softmin = min_over_heads(rewards, head_mask=head_mask, backend=backend)
    expected = rewards[:, heads].min(-1)
    assert torch.equal(argmin, heads[expected.indices])
    torch.testing.assert_close(minimum, expected.values, equal_nan=True, rtol=0, atol=0)
    log_mean = torch.logsumexp(-rewards[:, heads].double(), -1) - torch.tensor(len(heads)).double().log()
    torch.testing.assert_close(softmin.double(), -log_mean, equal_nan=True, rtol=1e-6, atol=1e-6)


@PROPERTY
@given(
    rows=st.sampled_from([0, 1]) | st.integers(2, 40),
    heads=st.integers(1, 17) | st.just(70),
    data=st.data(),
    layout=st.sampled_from(["plain", "strided"]),
    backend=st.sampled_from(BACKENDS),
    padding=st.sampled_from([0.0, NAN, INF]),
)
def test_masks_and_sums_equal_the_oracle(rows, heads, data, layout, backend, padding):
    keep = {
        "row_mask": torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))).bool(),
        "head_mask": torch.rand(heads) < 0.5,
    }
    keep["head_mask"][data.draw(st.integers(0, heads - 1))] = True
    inputs = heads_inputs(rows, 6, heads)
    inputs[0][~keep["row_mask"]] = padding
    expected, expected_grads = gradients(lambda *x: masked_heads_oracle(*x, **keep, temperature=0.7), inputs)
    ordered = expected[0][keep["row_mask"]][:, keep["head_mask"]].sort(-1).values
    assume((ordered.diff(dim=-1)[:, :1] > 1e-4).all())  # float32 need not see which of two is the smaller
    if layout == "strided":
        keep = {name: torch.stack([mask, ~mask], -1)[..., 0] for name, mask in keep.items()}
        inputs = [torch.stack([x, x + 9], -1)[..., 0] for x in inputs]
    outputs, grads = gradients(fused(0.7, **keep, return_sums=True, backend=backend), inputs)
    for actual, reference in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.double(), reference.double(), rtol=1e-5, atol=3e-5)
    rewards = outputs[0].detach()
    rewards[~keep["row_mask"]] = padding
    options = keep | {"temperature": 0.7, "backend": backend}
    minimum, argmin, softmin, sums = min_over_heads(rewards, **options, return_sums=True)
    assert torch.equal(argmin, masked_heads_oracle(*inputs, **keep)[2])
    for actual, reference in zip((minimum, softmin, sums), outputs[1:], strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_an_unused_masked_head_holds_reaches_no_gradient(value):
    hidden, weight, bias, shift, scale = heads_inputs(20, 8, 3)
    head_mask = torch.tensor([True, False, True])
    real = [weight[head_mask], bias[head_mask], shift[head_mask], scale[head_mask]]
    _, expected = gradients(lambda *x: fused()(*x)[1:], [hidden, *real])
    weight[1, 2], bias[1], scale[1] = value, value, 0.0

    def lowest(*x):
        _, minimum, argmin, softmin, sums = fused(head_mask=head_mask, return_sums=True)(*x)
        assert not sums[1].isfinite()
        return minimum, argmin, softmin

    _, (d_hidden, *grads) = gradients(lowest, [hidden, weight, bias, shift, scale])
    torch.testing.assert_close(d_hidden, expected[0])
    for actual, reference in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(actual[head_mask], reference)
        assert (actual[1] == 0).all()


@pytest.mark.cpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_real_head_is_an_error_on_the_cpu(backend):
    none = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one head"):
        min_over_heads(torch.zeros(2, 3), head_mask=none, backend=backend)
    with pytest.raises(ValueError, match="at least one head"):
        reward_heads_min(torch.zeros(2, 4), torch.zeros(3, 4), head_mask=none, backend=backend)


def test_no_real_head_gives_infinity_where_nothing_is_checked(device):
    none = torch.zeros(3, dtype=torch.bool)
    rewards = torch.randn(2, 3, requires_grad=True)
    outputs = [min_over_heads_naive(rewards, head_mask=none)]
    (grad,) = torch.autograd.grad(outputs[0][0].sum() + outputs[0][2].sum(), rewards)
    grads = [grad]
    if INTERPRET or device.type == "cuda":
        from maxmin_kernels.heads.triton_kernels import min_backward, min_forward

        outputs.append(min_forward(rewards.detach(), 1.0, none, None, False))
        one = torch.ones(2)
        grads.append(min_backward(rewards.detach(), outputs[1][1], None, one, one, None, 1.0, none, None))
    for minimum, argmin, softmin, *_ in outputs:
        assert minimum.tolist() == softmin.tolist() == [INF, INF]
        assert argmin.tolist() == [0, 0]
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(("rows", "heads"), [(2200, 1), (1200, 5), (300, 70)], ids=str)
def test_head_sums_are_exact_to_float32_and_repeat_bit_for_bit(rows, heads):
    hidden, weight = torch.rand(rows, 8), torch.rand(heads, 8)
    rewards, *_, sums = reward_heads_min(hidden, weight, return_sums=True)
    assert largest_error(sums, heads_oracle(hidden, weight)[0].sum(0)) < 1e-6
    assert torch.equal(sums, reward_heads_min(hidden, weight, return_sums=True)[-1])
    batched = rewards.unflatten(0, (10, -1))
    *_, sums = min_over_heads(batched, return_sums=True)
    assert largest_error(sums, rewards.double().sum(0)) < 1e-6
    assert torch.equal(sums, min_over_heads(batched, return_sums=True)[-1])


def test_gradient_of_the_smallest_group_mean():
    hidden, weight, *_ = heads_inputs(30, 8, 4)
    leaf, row_mask = weight.clone().requires_grad_(), torch.arange(30) < 20
    *_, sums = reward_heads_min(hidden, leaf, row_mask=row_mask, return_sums=True)
    (sums / 20).min().backward()
    worst = (hidden[:20] @ weight.T).mean(0).argmin()
    expected = torch.zeros_like(weight)
    expected[worst] = hidden[:20].mean(0)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (0, None, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_with_masks_and_sums(dims, sums, backend):
    hidden, head_mask, row_mask = torch.randn(5, 6, 4), torch.rand(5, 3) < 0.5, torch.rand(5, 6) < 0.7
    head_mask[:, 1] = True
    weight = torch.randn(3, 4, requires_grad=True)
    arguments = [x if d == 0 else x[0] for x, d in zip((hidden, head_mask, row_mask), dims, strict=True)]

    def call(hidden, head_mask, row_mask):
        masks = {"head_mask": head_mask, "row_mask": row_mask, "return_sums": sums, "backend": backend}
        outputs = reward_heads_min(hidden, weight, **masks)
        return (*outputs, *min_over_heads(outputs[0], **masks))

    outputs = torch.vmap(call, in_dims=dims)(*arguments)
    single = [call(*(x[i] if d == 0 else x for x, d in zip(arguments, dims, strict=True))) for i in range(5)]
    expected = [torch.stack(column) for column in zip(*single, strict=True)]
    for actual, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, reference)
    (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs if o.requires_grad), weight)
    (reference,) = torch.autograd.grad(sum(e.sum() for e in expected if e.requires_grad), weight)
    torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5)
