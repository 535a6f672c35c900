"""Log-probabilities and entropies from hidden states."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernels_oracles import COMPILER, LOW_BAR, PROPERTY, gradients, log_probs_oracle, rms_error
from maxmin_kernels import token_log_probs
from maxmin_kernels._backend import keeps
from maxmin_kernels.log_probs.chunked import kept_rows
from torch._subclasses.fake_tensor import FakeTensorMode

INF = float("inf")


def make(rows, width, vocabulary, dtype=torch.float32):
    hidden = torch.randn(rows, width).to(dtype)
    lm_head = (torch.randn(vocabulary, width) * 3 / width**0.5).to(dtype)
    return hidden, lm_head, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk"),
    [(1, 1, 1, None), (24, 16, 203, None), (23, 16, 203, 5), (7, 8, 2500, 3)],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_the_oracle(rows, width, vocabulary, chunk, temperature, dtype):
    hidden, lm_head, targets = make(rows, width, vocabulary, dtype)

    def call(h, w):
        return token_log_probs(h, w, targets, temperature=temperature, entropy=True, chunk_size=chunk)

    outputs, grads = gradients(call, [hidden, lm_head])
    inputs = [hidden.double(), lm_head.double()]
    expected, expected_grads = gradients(lambda h, w: log_probs_oracle(h, w, targets, temperature), inputs)
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), reference, rtol=2e-6, atol=1e-5)
    for leaf, actual, reference in zip((hidden, lm_head), grads, expected_grads, strict=True):
        assert actual.dtype == leaf.dtype
        if vocabulary == 1:  # a certain token has no gradient
            assert (actual == 0).all()
        else:
            assert rms_error(actual, reference) < LOW_BAR.get(dtype, 5e-6)


@PROPERTY
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 12),
    vocabulary=st.integers(1, 300),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    entropy=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape_chunk_and_layout(rows, width, vocabulary, chunk, entropy, transposed):
    hidden, lm_head, targets = make(rows, width, vocabulary)
    view = hidden.mT.contiguous().mT if transposed else hidden
    strided = torch.stack([targets, targets + 1], -1)[:, 0]
    log_probs, entropies = token_log_probs(view, lm_head, strided, entropy=entropy, chunk_size=chunk)
    if rows == 0:
        assert log_probs.shape == (0,)
        return
    expected = log_probs_oracle(hidden, lm_head, targets)
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=2e-6, atol=1e-5)
    assert (entropies is not None) == entropy
    if entropies is not None:
        torch.testing.assert_close(entropies.double(), expected[1], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["log_probs", "entropy"])
def test_gradient_through_one_output_alone(which):
    hidden, lm_head, targets = make(11, 6, 50)
    leaves = [hidden.requires_grad_(), lm_head.requires_grad_()]
    out = token_log_probs(hidden, lm_head, targets, entropy=True, chunk_size=4)[which]
    expected = log_probs_oracle(hidden, lm_head, targets)[which]
    weights = torch.randn(11)
    actual_grads = torch.autograd.grad((out * weights).sum(), leaves)
    for actual, reference in zip(
        actual_grads, torch.autograd.grad((expected * weights).sum(), leaves), strict=True
    ):
        assert rms_error(actual, reference) < 5e-6


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "lm_head"])
def test_a_frozen_matrix_gets_no_gradient(frozen):
    hidden, lm_head, targets = make(9, 5, 40)
    both = [hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()]
    token_log_probs(*both, targets)[0].sum().backward()
    one = [x.clone().requires_grad_(i != frozen) for i, x in enumerate((hidden, lm_head))]
    token_log_probs(*one, targets)[0].sum().backward()
    assert one[frozen].grad is None
    torch.testing.assert_close(one[1 - frozen].grad, both[1 - frozen].grad)


def test_gradcheck_in_float64():
    hidden, lm_head, targets = make(4, 3, 7)
    inputs = [hidden.double().requires_grad_(), lm_head.double().requires_grad_()]

    def call(h, w):
        return token_log_probs(h, w, targets, temperature=0.7, entropy=True, chunk_size=3)

    assert torch.autograd.gradcheck(call, inputs)


def test_large_logits_do_not_overflow():
    hidden, lm_head, targets = make(6, 4, 30)
    log_probs, entropy = token_log_probs(hidden * 1e4, lm_head, targets, entropy=True)
    expected = log_probs_oracle(hidden * 1e4, lm_head, targets)
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-2)


def test_a_forbidden_token_has_probability_zero_and_no_gradient():
    hidden, lm_head, targets = make(5, 4, 9)
    hidden[:, 0], lm_head[:, 0] = 1.0, 0.0
    allowed = torch.arange(9) != 3
    lm_head[3, 0] = -INF
    targets[:] = 4
    leaf = hidden.clone().requires_grad_()
    log_probs, entropy = token_log_probs(leaf, lm_head, targets, entropy=True)
    expected = log_probs_oracle(hidden, lm_head[allowed], targets - 1)
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=2e-6, atol=1e-5)
    weight = lm_head.clone().requires_grad_()
    sum(x.sum() for x in token_log_probs(hidden, weight, targets, entropy=True)).backward()
    assert (weight.grad[3] == 0).all()
    assert weight.grad.isfinite().all()


def test_a_nan_stays_in_its_row():
    hidden, lm_head, targets = make(6, 4, 30)
    clean = token_log_probs(hidden, lm_head, targets, entropy=True)
    hidden[2, 1] = float("nan")
    leaf = hidden.clone().requires_grad_()
    dirty = token_log_probs(leaf, lm_head, targets, entropy=True)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in dirty), leaf)
    rest = torch.arange(6) != 2
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after[rest], before[rest])
        assert after[2].isnan()
    assert grad[2].isnan().all()
    assert grad[rest].isfinite().all()


def test_backend_torch_is_the_same_function_and_differentiable_twice():
    hidden, lm_head, targets = make(5, 4, 9)
    hidden.requires_grad_()
    reference = token_log_probs(hidden, lm_head, targets, entropy=True, backend="torch")
    for actual, expected in zip(
        token_log_probs(hidden, lm_head, targets, entropy=True), reference, strict=True
    ):
        torch.testing.assert_close(actual, expected)
    assert token_log_probs(hidden, lm_head, targets, backend="torch")[1] is None
    (first,) = torch.autograd.grad(reference[0].sum(), hidden, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), hidden)[0].abs().sum() > 0


@pytest.mark.real_device
def test_autocast_sets_the_dtype_of_the_product(device):
    hidden, lm_head, targets = make(6, 4, 9)
    with torch.autocast(device.type, torch.bfloat16):
        log_probs, _ = token_log_probs(hidden.requires_grad_(), lm_head, targets)
    expected = token_log_probs(hidden.bfloat16(), lm_head.bfloat16(), targets)[0]
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs, expected)
    log_probs.sum().backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("entropy", [False, True])
def test_vmap_with_the_backward_outside(entropy):
    _, lm_head, targets = make(5, 4, 9)
    many = torch.randn(3, 5, 4, requires_grad=True)

    def call(h, w):
        return token_log_probs(h, w, targets, entropy=entropy)[0]

    out = torch.vmap(call, in_dims=(0, None))(many, lm_head)
    torch.testing.assert_close(out, torch.stack([call(h, lm_head) for h in many]))
    (grad,) = torch.autograd.grad(out.sum(), many)
    (expected,) = torch.autograd.grad(sum(call(h, lm_head).sum() for h in many), many)
    torch.testing.assert_close(grad, expected)
    stacked = torch.randn(3, 9, 4)
    out = torch.vmap(call)(many, stacked)
    torch.testing.assert_close(out, torch.stack([call(h, w) for h, w in zip(many, stacked, strict=True)]))


def test_batched_cotangents_equal_one_by_one():
    hidden, lm_head, targets = make(4, 6, 9)
    hidden.requires_grad_()
    total = sum(token_log_probs(hidden, lm_head, targets, entropy=True))
    rows = torch.autograd.grad(total, hidden, torch.eye(4), is_grads_batched=True, retain_graph=True)[0]
    for n in range(4):
        torch.testing.assert_close(rows[n], torch.autograd.grad(total[n], hidden, retain_graph=True)[0])


@pytest.mark.real_device
@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(rows, entropy):
    hidden, lm_head, targets = make(rows, 4, 9)
    forward = torch.ops.maxmin.token_log_probs.default
    leaves = hidden.requires_grad_(), lm_head.requires_grad_()
    keep = not entropy and keeps(*leaves)
    torch.library.opcheck(forward, (*leaves, targets, 0.7, entropy, 4, None, 1.0, None, keep))
    kept = torch.rand(kept_rows(rows, 9, "cpu", 4) if keep else 0, 9)
    vectors = torch.rand(rows if entropy else 0), torch.rand(rows) + 9, kept, torch.randn(rows), None
    backward = torch.ops.maxmin.token_log_probs_backward.default
    plain = hidden.detach(), lm_head.detach(), targets
    torch.library.opcheck(backward, (*plain, *vectors, 0.7, 4, True, entropy, None, 1.0, None, False))


@pytest.mark.real_device
@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def loss(hidden, lm_head, targets):
        log_probs, entropy = token_log_probs(hidden, lm_head, targets, temperature=0.7, entropy=True)
        return log_probs.exp().sum() + entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=COMPILER)
    for rows in (5, 9):
        hidden, lm_head, targets = make(rows, 4, 11)
        leaves = hidden.requires_grad_(), lm_head.requires_grad_()
        expected = torch.autograd.grad(loss(*leaves, targets), leaves)
        actual = torch.autograd.grad(compiled(*leaves, targets), leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.real_device
def test_export_keeps_one_operator():
    class Score(torch.nn.Module):
        def forward(self, hidden, lm_head, targets):
            return token_log_probs(hidden, lm_head, targets, entropy=True)

    arguments = make(6, 4, 11)
    program = torch.export.export(Score(), arguments)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [c for c in calls if "getitem" not in c] == ["maxmin.token_log_probs.default"]
    for actual, expected in zip(
        program.module()(*arguments), token_log_probs(*arguments, entropy=True), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.real_device
@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors_have_the_shape_dtype_and_device_of_real_ones(fake_device):
    with FakeTensorMode():
        # Autograd asks for a real device.
        grad = fake_device == "cpu"
        hidden = torch.empty(7, 4, dtype=torch.bfloat16, device=fake_device, requires_grad=grad)
        lm_head = torch.empty(9, 4, dtype=torch.bfloat16, device=fake_device, requires_grad=grad)
        targets = torch.empty(7, dtype=torch.int64, device=fake_device)
        log_probs, entropy = token_log_probs(hidden, lm_head, targets, entropy=True)
        assert log_probs.shape == entropy.shape == (7,)
        assert log_probs.dtype == entropy.dtype == torch.float32
        assert log_probs.device.type == entropy.device.type == fake_device
        if grad:
            log_probs.sum().backward()
            assert hidden.grad.dtype == lm_head.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_eager_pytorch(dtype):
    hidden, lm_head, targets = make(40, 32, 203, dtype)
    expected = log_probs_oracle(hidden, lm_head, targets)[0]
    eager = F.log_softmax(hidden @ lm_head.mT, -1).gather(-1, targets[:, None])[:, 0]
    error = (token_log_probs(hidden, lm_head, targets)[0] - expected).abs().max()
    assert error <= 2 * (eager - expected).abs().max()


@pytest.mark.cpu  # on a GPU the result is NaN
@pytest.mark.parametrize(("targets", "message"), [([0, 9], r"\[0, 5\)"), ([0, -100], "padded")], ids=str)
def test_a_target_outside_the_vocabulary_is_named(targets, message):
    with pytest.raises(IndexError, match=message):
        token_log_probs(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor(targets))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.tensor([0, 1]).int()}, TypeError, "int64"),
        ({"targets": torch.tensor([0])}, ValueError, "targets"),
        ({"lm_head": torch.zeros(5, 4)}, ValueError, "same H"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"backend": "liger"}, ValueError, "backend"),
    ],
    ids=lambda x: str(x)[:25],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden": torch.zeros(2, 3), "lm_head": torch.zeros(5, 3), "targets": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        token_log_probs(**(arguments | change))
