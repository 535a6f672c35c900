"""Log-probabilities of scaled, shifted and capped logits."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_oracles import COMPILER, LOW_BAR, PROPERTY, gradients, rms_error
from maxmin_kernels import token_log_probs
from torch._subclasses.fake_tensor import FakeTensorMode

INF = float("inf")
# Each of the three with and without: Granite's and Cohere's scale, Gemma 2's cap, the bias of Phi and GPT-J.
COMBINATIONS = list(itertools.product([1.0, 0.0625, -1.7], [None, 3.0], [False, True]))


def make(rows, width, vocabulary, dtype=torch.float32):
    hidden = torch.randn(rows, width).to(dtype)
    lm_head = (torch.randn(vocabulary, width) * 3 / width**0.5).to(dtype)
    return hidden, lm_head, torch.randn(vocabulary).to(dtype), torch.randint(0, vocabulary, (rows,))


def rounding(hidden, lm_head, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """Return what float32 may move a logit by: 16 roundings of the largest, and so p by that of itself."""
    largest = (hidden.double() @ lm_head.double().mT).abs().max() * abs(logit_scale)
    if bias is not None:
        largest = largest + bias.double().abs().max()
    if softcap is not None:
        largest = largest.clamp(max=softcap)
    return 16 * 2**-24 * (1.0 + largest.item() / temperature)


def oracle(hidden, lm_head, bias, targets, logit_scale=1.0, softcap=None, temperature=1.0):
    logits = torch.einsum("nh,vh->nv", hidden.double(), lm_head.double()) * logit_scale
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_p = torch.log_softmax(logits / temperature, -1)
    # A token of probability zero adds nothing to the entropy.
    finite = torch.where(log_p == -INF, 0.0, log_p)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * finite).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width", "vocabulary", "chunk"), [(23, 16, 203, 5), (7, 8, 2500, None)])
@pytest.mark.parametrize(("logit_scale", "softcap", "biased"), COMBINATIONS)
def test_values_and_gradients_equal_the_oracle(
    logit_scale, softcap, biased, rows, width, vocabulary, chunk, dtype
):
    *leaves, targets = make(rows, width, vocabulary, dtype)
    leaves = leaves if biased else leaves[:2]
    options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": 0.8}

    def call(hidden, lm_head, bias=None):
        return token_log_probs(hidden, lm_head, targets, bias=bias, entropy=True, chunk_size=chunk, **options)

    def expect(hidden, lm_head, bias=None):
        return oracle(hidden, lm_head, bias, targets, **options)

    outputs, grads = gradients(call, leaves)
    expected, expected_grads = gradients(expect, [x.double() for x in leaves])
    bar = rounding(*leaves, **options)
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), reference, rtol=0, atol=bar)
    for leaf, actual, reference in zip(leaves, grads, expected_grads, strict=True):
        assert actual.dtype == leaf.dtype
        assert rms_error(actual, reference) < LOW_BAR.get(dtype, bar)


@PROPERTY
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 12),
    vocabulary=st.integers(1, 300),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    logit_scale=st.floats(0.05, 2.0),
    softcap=st.one_of(st.none(), st.floats(0.5, 1e6)),
    strided=st.booleans(),
)
def test_any_shape_chunk_scale_and_cap(rows, width, vocabulary, chunk, logit_scale, softcap, strided):
    hidden, lm_head, bias, targets = make(rows, width, vocabulary)
    view = torch.stack([bias, bias + 1], -1)[:, 0] if strided else bias
    options = {"logit_scale": logit_scale, "softcap": softcap}
    outputs = token_log_probs(hidden, lm_head, targets, bias=view, entropy=True, chunk_size=chunk, **options)
    bar = rounding(hidden, lm_head, bias, **options) if rows else 0.0
    for actual, expected in zip(outputs, oracle(hidden, lm_head, bias, targets, **options), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bar)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0, 1e3])
def test_the_cap_keeps_its_digits_near_zero_and_where_it_saturates(magnitude):
    """One logit moves against a second: d log p = (1 - p) sech^2(x / c), to float32's digits."""
    softcap, factors = 8.0, torch.tensor([0.2, 0.25, 0.3, 1.0, 2.0, 5.0])
    hidden = (factors * magnitude).unsqueeze(-1).requires_grad_()
    lm_head, targets = torch.tensor([[1.0], [0.0]]), torch.zeros(6, dtype=torch.int64)
    log_probs, _ = token_log_probs(hidden, lm_head, targets, softcap=softcap)
    (grad,) = torch.autograd.grad(log_probs.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    expected, _ = oracle(wide, lm_head, None, targets, softcap=softcap)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-6)
    # x / c is rounded by 6e-8 of itself, which moves sech^2 by twice that, and 1 - p by 1e-7 of 1.
    other = torch.sigmoid(-softcap * torch.tanh(wide / softcap))
    slope = other / torch.cosh(wide / softcap).square()
    error = (grad.double() - slope).abs() / slope.clamp(min=1e-30)
    assert (error < 5e-7 * (2 + wide.abs() / softcap + 1 / other)).all()


@pytest.mark.parametrize("which", [0, 1], ids=["log_probs", "entropy"])
@pytest.mark.parametrize("leaf", [0, 1, 2], ids=["hidden", "lm_head", "bias"])
def test_one_output_and_one_leaf(which, leaf):
    *leaves, targets = make(11, 6, 50)
    options = {"logit_scale": 0.5, "softcap": 2.0}
    leaves[leaf].requires_grad_()
    hidden, lm_head, bias = leaves
    out = token_log_probs(hidden, lm_head, targets, bias=bias, entropy=True, chunk_size=4, **options)[which]
    expected = oracle(*leaves, targets, **options)[which]
    weights = torch.randn(11)
    (actual,) = torch.autograd.grad((out * weights).sum(), leaves[leaf])
    (reference,) = torch.autograd.grad((expected * weights).sum(), leaves[leaf])
    assert rms_error(actual, reference) < 5e-6


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("logit_scale", "softcap", "biased"), COMBINATIONS)
def test_gradcheck_in_float64(logit_scale, softcap, biased, backend):
    *leaves, targets = make(4, 3, 7, torch.float64)

    def call(hidden, lm_head, bias=None):
        options = {"logit_scale": logit_scale, "softcap": softcap, "temperature": 0.7, "bias": bias}
        return token_log_probs(
            hidden, lm_head, targets, entropy=True, chunk_size=3, backend=backend, **options
        )

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves[: 3 if biased else 2]])


def test_a_float64_bias_widens_the_result():
    hidden, lm_head, bias, targets = make(5, 4, 9)
    wide = bias.double().requires_grad_()
    for backend in ("auto", "torch"):
        log_probs, _ = token_log_probs(hidden, lm_head, targets, bias=wide, backend=backend)
        assert log_probs.dtype == torch.float64
        torch.testing.assert_close(log_probs, oracle(hidden, lm_head, wide, targets)[0])
        assert torch.autograd.grad(log_probs.sum(), wide)[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_bias_of_another_dtype_keeps_it(dtype):
    hidden, lm_head, bias, targets = make(5, 4, 9, torch.bfloat16)
    bias = bias.to(dtype).requires_grad_()
    log_probs, _ = token_log_probs(hidden, lm_head, targets, bias=bias)
    expected, _ = oracle(hidden, lm_head, bias, targets)
    torch.testing.assert_close(log_probs.double(), expected, rtol=2e-6, atol=1e-5)
    (actual,) = torch.autograd.grad(log_probs.sum(), bias)
    assert actual.dtype == dtype
    assert rms_error(actual, torch.autograd.grad(expected.sum(), bias)[0]) < LOW_BAR.get(dtype, 5e-6)


def test_the_bias_gradient_is_summed_in_float32():
    """Every row adds a half: in bfloat16 the sum would stop growing at 128."""
    rows, vocabulary = 300, 2
    bias = torch.zeros(vocabulary, dtype=torch.bfloat16, requires_grad=True)
    zero = torch.zeros(rows, 1, dtype=torch.bfloat16), torch.zeros(vocabulary, 1, dtype=torch.bfloat16)
    log_probs, _ = token_log_probs(*zero, torch.zeros(rows, dtype=torch.int64), bias=bias, chunk_size=1)
    log_probs.sum().backward()
    assert bias.grad.tolist() == [150.0, -150.0]


def test_the_defaults_are_the_plain_call_to_the_bit():
    hidden, lm_head, bias, targets = make(23, 16, 203)
    leaves = [hidden.requires_grad_(), lm_head.requires_grad_()]

    def call(**options):
        outputs = token_log_probs(
            hidden, lm_head, targets, temperature=0.7, entropy=True, chunk_size=5, **options
        )
        return *outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), leaves)

    plain = call()
    for options in (
        {"logit_scale": 1.0, "softcap": None, "bias": None},
        {"bias": torch.zeros_like(bias)},
    ):
        assert all(torch.equal(a, b) for a, b in zip(call(**options), plain, strict=True))


def test_a_forbidden_token_has_probability_zero_and_no_gradient():
    hidden, lm_head, bias, targets = make(5, 4, 9)
    allowed = torch.arange(9) != 3
    targets[:] = 4
    bias[3] = -INF
    leaves = [x.requires_grad_() for x in (hidden, lm_head, bias)]
    outputs = token_log_probs(hidden, lm_head, targets, bias=bias, entropy=True, logit_scale=0.5)
    expected = oracle(hidden, lm_head[allowed], bias[allowed], targets - 1, logit_scale=0.5)
    for actual, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=2e-6, atol=1e-5)
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][3] == 0).all()
    assert grads[2][3] == 0


def test_an_infinite_logit_is_at_the_cap_and_does_not_move():
    hidden, lm_head, bias, targets = make(5, 4, 9)
    bias[3], bias[5] = -INF, INF
    leaves = [x.requires_grad_() for x in (hidden, lm_head, bias)]
    outputs = token_log_probs(*leaves[:2], targets, bias=bias, entropy=True, softcap=2.0)
    for actual, reference in zip(outputs, oracle(*leaves, targets, softcap=2.0), strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=2e-6, atol=1e-5)
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2][[3, 5]] == 0).all()


def test_backend_torch_is_the_same_function():
    hidden, lm_head, bias, targets = make(5, 4, 9)
    options = {"logit_scale": 0.3, "softcap": 2.0, "bias": bias, "entropy": True, "temperature": 0.6}
    for actual, expected in zip(
        token_log_probs(hidden, lm_head, targets, **options),
        token_log_probs(hidden, lm_head, targets, backend="torch", **options),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("batched", ["hidden", "bias", "both"])
def test_vmap_with_the_backward_outside(batched, entropy):
    hidden, lm_head, bias, targets = make(5, 4, 9)
    if batched != "bias":
        hidden = torch.randn(3, 5, 4)
    if batched != "hidden":
        bias = torch.randn(3, 9)
    leaves = hidden.requires_grad_(), bias.requires_grad_()

    def call(h, b):
        outputs = token_log_probs(h, lm_head, targets, entropy=entropy, bias=b, logit_scale=0.5, softcap=2.0)
        return torch.stack([x for x in outputs if x is not None])

    dims = 0 if hidden.ndim == 3 else None, 0 if bias.ndim == 2 else None
    out = torch.vmap(call, in_dims=dims)(*leaves)
    pairs = ([x if d is None else x[i] for x, d in zip(leaves, dims, strict=True)] for i in range(3))
    one_by_one = torch.stack([call(*pair) for pair in pairs])
    torch.testing.assert_close(out, one_by_one)
    for actual, expected in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(one_by_one.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize(
    ("logit_scale", "softcap", "biased"), [(0.5, None, False), (1.0, 3.0, False), (0.5, 3.0, True)]
)
def test_opcheck(logit_scale, softcap, biased, rows):
    hidden, lm_head, bias, targets = make(rows, 4, 9)
    bias = bias.requires_grad_() if biased else None
    forward = torch.ops.maxmin.token_log_probs.default
    leaves = hidden.requires_grad_(), lm_head.requires_grad_()
    torch.library.opcheck(forward, (*leaves, targets, 0.7, True, 4, bias, logit_scale, softcap, False))
    vectors = torch.rand(rows), torch.rand(rows) + 9, torch.rand(0, 9), torch.randn(rows), torch.randn(rows)
    backward = torch.ops.maxmin.token_log_probs_backward.default
    plain = hidden.detach(), lm_head.detach(), targets, *vectors, 0.7, 4, True, True
    detached = bias.detach() if biased else None
    torch.library.opcheck(backward, (*plain, detached, logit_scale, softcap, biased))


@pytest.mark.real_device
@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def loss(hidden, lm_head, bias, targets):
        log_probs, entropy = token_log_probs(
            hidden, lm_head, targets, entropy=True, bias=bias, logit_scale=0.5, softcap=30.0
        )
        return log_probs.exp().sum() + entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=COMPILER)
    for rows in (5, 9):
        *leaves, targets = make(rows, 4, 11)
        leaves = [x.requires_grad_() for x in leaves]
        expected = torch.autograd.grad(loss(*leaves, targets), leaves)
        actual = torch.autograd.grad(compiled(*leaves, targets), leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_fake_tensors_have_the_dtypes_of_real_ones():
    with FakeTensorMode():
        hidden, lm_head = (torch.empty(n, 4, dtype=torch.bfloat16, requires_grad=True) for n in (7, 9))
        bias = torch.empty(9, dtype=torch.float16, requires_grad=True)
        targets = torch.empty(7, dtype=torch.int64)
        log_probs, _ = token_log_probs(hidden, lm_head, targets, bias=bias, softcap=30.0)
        log_probs.sum().backward()
        assert log_probs.dtype == torch.float32
        assert bias.grad.dtype == torch.float16
        assert bias.grad.shape == (9,)


@pytest.mark.real_device
def test_autocast_leaves_the_bias_in_its_dtype():
    hidden, lm_head, bias, targets = make(5, 4, 9)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        log_probs, _ = token_log_probs(hidden, lm_head, targets, bias=bias, softcap=2.0)
    expected, _ = oracle(hidden.bfloat16(), lm_head.bfloat16(), bias, targets, softcap=2.0)
    torch.testing.assert_close(log_probs.double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"softcap": -30.0}, "softcap must be positive"),
        ({"softcap": float("nan")}, "softcap must be positive"),
        ({"softcap": INF}, "softcap must be positive"),
        ({"logit_scale": 0.0}, "logit_scale must be finite"),
        ({"logit_scale": INF}, "logit_scale must be finite"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite"),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\] = \[5\]"),
        ({"bias": torch.zeros(1, 5)}, r"bias must be \[V\] = \[5\]"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias must be floating point"),
        pytest.param(
            {"bias": torch.zeros(5, device="meta")}, "bias is on meta", marks=pytest.mark.real_device
        ),
    ],
    ids=lambda x: str(x)[:25],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_input_is_named(change, message, backend):
    arguments = {"hidden": torch.zeros(2, 3), "lm_head": torch.zeros(5, 3), "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        token_log_probs(**(arguments | change), backend=backend)
