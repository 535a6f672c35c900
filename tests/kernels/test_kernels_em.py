"""E-step of the mixture over users."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernels_oracles import COMPILER, INTERPRET, LOW_BAR, PROPERTY, em_oracle, gradients, rms_error
from maxmin_kernels import em_responsibilities, plan_users
from maxmin_kernels.em.plan import SEGMENT_PAIRS
from torch._subclasses.fake_tensor import FakeTensorMode

INF, NAN = float("inf"), float("nan")


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def make(counts, groups, dtype=torch.float32, scale=1.0):
    pairs = sum(counts)
    chosen = (torch.randn(pairs, groups) * scale).to(dtype)
    rejected = (torch.randn(pairs, groups) * scale).to(dtype)
    return chosen, rejected, offsets_of(counts), torch.randn(groups).log_softmax(0)


def likelihood_bar(expected, counts):
    # The sum over groups of a prior that was rounded to float32 is 1 only to 1e-7: a user has at least that.
    return 1.2e-7 * torch.tensor(counts).clamp(min=1) + 2e-6 * expected.abs()


def responsibility_bar(chosen, rejected, offsets, log_prior):
    """5e-6 where a user's margins are at most 50 in sum, else what the bar of the log joint lets through."""
    bars = []
    for first, last in itertools.pairwise(offsets.tolist()):
        margin = chosen[first:last].double() - rejected[first:last].double()
        joint = log_prior.double() - torch.logaddexp(-margin, torch.zeros_like(margin)).sum(0)
        # |d softmax| <= 1/4 of the difference of two logits, each of them off by at most this.
        implied = (1.2e-7 * (last - first) + 2e-6 * joint.abs().max()) / 2
        small = margin.abs().sum(0).max() <= 50 if last > first else True
        bars.append(5e-6 if small else max(5e-6, implied.item()))
    return torch.tensor(bars).unsqueeze(-1)


LONG = [0, 5, SEGMENT_PAIRS, SEGMENT_PAIRS + 1, 0, 2 * SEGMENT_PAIRS, 3, 3500, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("counts", "groups"),
    [([1], 1), ([3, 0, 7, 90, 1], 2), ([2] * 40, 4), (LONG, 3), ([300, 20], 17)],
    ids=["one", "ragged", "short", "split", "K17"],
)
def test_values_and_gradients_equal_the_oracle(counts, groups, dtype):
    chosen, rejected, offsets, log_prior = make(counts, groups, dtype)

    def call(c, r, p):
        return em_responsibilities(c, r, offsets, p)

    (resp, like), grads = gradients(call, [chosen, rejected, log_prior])
    inputs = [chosen.double(), rejected.double(), log_prior.double()]
    (exp_resp, exp_like), exp_grads = gradients(lambda c, r, p: em_oracle(c, r, offsets, p), inputs)
    assert resp.dtype == like.dtype == torch.float32
    assert ((like - exp_like).abs() <= likelihood_bar(exp_like, counts)).all()
    assert ((resp - exp_resp).abs() <= responsibility_bar(chosen, rejected, offsets, log_prior)).all()
    bar = LOW_BAR.get(dtype, 5e-5 if counts is LONG else 5e-6)
    for actual, reference in zip(grads, exp_grads, strict=True):
        assert rms_error(actual, reference) < bar


@pytest.mark.parametrize("margin", [0.0, 0.01, 7.0, -7.0, 20.0, -20.0, 1e4, -1e4])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1024, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["constant", "spread"])
def test_log_likelihood_and_responsibilities_keep_their_digits_at_any_margin(margin, count, spread):
    # A product of factors near 1 would lose what large margins add: 1 + exp(-20) is 1 in float32.
    chosen = margin + spread * torch.rand(count, 2)
    rejected = torch.zeros(count, 2)
    arguments = chosen, rejected, offsets_of([count]), torch.tensor([0.5, 0.5]).log()
    resp, like = em_responsibilities(*arguments)
    exp_resp, exp_like = em_oracle(*arguments)
    assert (like.double() - exp_like).abs() <= 1.2e-7 * count + 2e-6 * exp_like.abs()
    assert ((resp.double() - exp_resp).abs() <= responsibility_bar(*arguments)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_eager_pytorch(dtype):
    chosen, rejected, offsets, log_prior = make([40, 3, 200, 0, 57], 4, dtype)
    user = torch.repeat_interleave(torch.arange(5), offsets.diff())
    eager = torch.zeros(5, 4, dtype=dtype).index_add(0, user, F.logsigmoid(chosen - rejected))
    eager = torch.logsumexp(eager + log_prior.to(dtype), -1)
    expected = em_oracle(chosen, rejected, offsets, log_prior)[1]
    error = (em_responsibilities(chosen, rejected, offsets, log_prior)[1] - expected).abs().max()
    assert error <= 2 * (eager - expected).abs().max()


@PROPERTY
@given(
    counts=st.lists(st.integers(0, 70), min_size=0, max_size=12),
    groups=st.integers(1, 17),
    layout=st.sampled_from(["plain", "transposed", "padded"]),
    planned=st.booleans(),
)
def test_any_shape_and_layout(counts, groups, layout, planned):
    chosen, rejected, offsets, log_prior = make(counts, groups, scale=3.0)
    view_c, view_r = chosen, rejected
    if layout == "transposed":
        view_c = chosen.mT.contiguous().mT
    elif layout == "padded":
        view_c = torch.cat([chosen, chosen + 9], 1)[:, :groups]
        view_r = torch.cat([rejected - 9, rejected], 1)[:, groups:]
    plan = plan_users(offsets) if planned else None
    resp, like = em_responsibilities(view_c, view_r, offsets, log_prior, plan=plan)
    assert resp.shape == (len(counts), groups)
    assert like.shape == (len(counts),)
    if counts:
        expected = em_oracle(chosen, rejected, offsets, log_prior)
        assert ((resp - expected[0]).abs() <= responsibility_bar(chosen, rejected, offsets, log_prior)).all()
        assert ((like - expected[1]).abs() <= likelihood_bar(expected[1], counts)).all()
        torch.testing.assert_close(resp.sum(-1), torch.ones(len(counts)))


@PROPERTY
@given(st.lists(st.integers(0, 6 * SEGMENT_PAIRS), max_size=20))
def test_plan_covers_every_pair_once(counts):
    offsets = offsets_of(counts)
    plan = plan_users(offsets)
    seen = torch.full((sum(counts),), -1)
    slots = {}
    for s, (user, slot) in enumerate(
        zip(plan.segment_user.tolist(), plan.segment_slot.tolist(), strict=True)
    ):
        first, last = plan.segment_offsets[s : s + 2].tolist()
        if user < 0:
            continue
        assert last - first <= SEGMENT_PAIRS
        assert (seen[first:last] == -1).all()
        seen[first:last] = user
        if slot >= 0:
            slots.setdefault(user, []).append(slot)
    assert torch.equal(seen, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts).long()))
    # The rows that are added up for a split user are the rows that its segments wrote.
    ranges = {}
    for i, user in enumerate(plan.split_user.tolist()):
        if user >= 0:
            ranges[user] = list(range(*plan.split_offsets[i : i + 2].tolist()))
    assert ranges == slots
    assert set(ranges) == {u for u, n in enumerate(counts) if n > SEGMENT_PAIRS}
    assert (
        max((s for group in slots.values() for s in group), default=-1) < 2 * sum(counts) // SEGMENT_PAIRS + 1
    )


def test_a_user_of_more_segments_than_one_tile_of_the_last_sum():
    counts, groups = [3, 40 * SEGMENT_PAIRS + 7, 2], 17
    chosen, rejected, offsets, log_prior = make(counts, groups, scale=0.1)
    like = em_responsibilities(chosen, rejected, offsets, log_prior)[1]
    expected = em_oracle(chosen, rejected, offsets, log_prior)[1]
    assert ((like - expected).abs() <= 2e-6 * expected.abs() + 1e-7).all()


def test_plan_and_repetition_give_equal_bits():
    arguments = make(LONG, 4)
    first = em_responsibilities(*arguments)
    for plan in (None, plan_users(arguments[2])):
        for a, b in zip(first, em_responsibilities(*arguments, plan=plan), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_margins_alone_are_the_same_function(dtype):
    chosen, _, offsets, log_prior = make(LONG, 3, dtype)
    zero = torch.zeros_like(chosen)
    outputs, (grad,) = gradients(lambda m: em_responsibilities(m, None, offsets, log_prior), [chosen])
    expected, (exp_grad,) = gradients(lambda m: em_responsibilities(m, zero, offsets, log_prior), [chosen])
    for actual, reference in zip((*outputs, grad), (*expected, exp_grad), strict=True):
        assert torch.equal(actual, reference)
    plain = em_responsibilities(chosen, None, offsets, log_prior, backend="torch")
    torch.testing.assert_close(plain[0], outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_mass_is_the_sum_of_responsibilities(backend):
    arguments = make([4, 0, 2000, 17], 3)
    resp, _, mass = em_responsibilities(*arguments, return_mass=True, backend=backend)
    error = (mass - em_oracle(*arguments)[0].sum(0)).abs()
    assert (error <= responsibility_bar(*arguments).sum(0)).all()
    # four users, each sum of theirs rounded once
    torch.testing.assert_close(mass.double(), resp.double().sum(0), rtol=4 * 1.2e-7, atol=0)
    torch.testing.assert_close(mass.sum(), torch.tensor(4.0))
    assert not mass.requires_grad
    arguments[0][1, 2] = NAN
    assert em_responsibilities(*arguments, return_mass=True, backend=backend)[2].isnan().all()


def test_user_without_pairs_gets_the_prior():
    log_prior = torch.tensor([0.2, 0.3, 0.5]).log()
    empty = torch.zeros(0, 3)
    for counts in ([0], [0, 0, 0]):
        resp, like = em_responsibilities(empty, empty, offsets_of(counts), log_prior)
        torch.testing.assert_close(resp, log_prior.exp().expand(len(counts), 3))
        # three shares, each rounded once, and their sum twice
        torch.testing.assert_close(like, torch.zeros(len(counts)), atol=5 * 1.2e-7, rtol=0)


@pytest.mark.parametrize("length", [3, 2500], ids=["short", "split"])
def test_impossible_user_gets_the_prior_and_minus_infinity(length):
    chosen, rejected, offsets, log_prior = make([4, length, 4], 2)
    clean = em_responsibilities(chosen, rejected, offsets, log_prior)
    chosen[5] = -INF
    leaf = chosen.clone().requires_grad_()
    resp, like = em_responsibilities(leaf, rejected, offsets, log_prior)
    torch.testing.assert_close(resp[1], log_prior.exp())
    assert like[1] == -INF
    assert torch.equal(resp[[0, 2]], clean[0][[0, 2]])
    assert torch.equal(like[[0, 2]], clean[1][[0, 2]])
    like[[0, 2]].sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("length", [3, 2500], ids=["short", "split"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_stays_with_its_user(length, value):
    chosen, rejected, offsets, log_prior = make([4, length, 4], 3)
    clean = em_responsibilities(chosen, rejected, offsets, log_prior)
    chosen[5, 1], rejected[5, 1] = value, value  # inf - inf is NaN too
    resp, like = em_responsibilities(chosen, rejected, offsets, log_prior)
    assert resp[1].isnan().all()
    assert like[1].isnan()
    assert torch.equal(resp[[0, 2]], clean[0][[0, 2]])
    assert torch.equal(like[[0, 2]], clean[1][[0, 2]])


def test_group_of_prior_zero_is_never_chosen():
    chosen, rejected, offsets, _ = make([4, 0, 2000], 3)
    log_prior = torch.tensor([0.4, 0.0, 0.6]).log().requires_grad_()
    resp, like = em_responsibilities(chosen, rejected, offsets, log_prior)
    assert (resp[:, 1] == 0).all()
    two = [0, 2]
    real = chosen[:, two], rejected[:, two], offsets, log_prior.detach()[two]
    expected = em_oracle(*real)
    assert ((resp[:, two] - expected[0]).abs() <= responsibility_bar(*real)).all()
    assert ((like - expected[1]).abs() <= likelihood_bar(expected[1], [4, 0, 2000])).all()
    (grad,) = torch.autograd.grad(like.sum(), log_prior)
    torch.testing.assert_close(grad, resp.sum(0))


def test_one_impossible_group_loses():
    chosen, rejected, offsets, log_prior = make([6], 3)
    chosen[2, 0] = -INF
    chosen[3, 1] = INF
    resp, like = em_responsibilities(chosen, rejected, offsets, log_prior)
    expected = em_oracle(chosen, rejected, offsets, log_prior)
    assert resp[0, 0] == 0
    torch.testing.assert_close(resp.double(), expected[0], atol=1e-6, rtol=1e-5)
    assert ((like - expected[1]).abs() <= likelihood_bar(expected[1], [6])).all()


@pytest.mark.skipif(
    INTERPRET, reason="ten million pairs; the interpreter adds the same partial sums in float64"
)
def test_sum_over_a_very_long_user_keeps_its_digits():
    count = 10_000_000
    chosen = torch.full((count, 1), 0.3)
    arguments = chosen, torch.zeros_like(chosen), offsets_of([count]), torch.zeros(1)
    expected = -count * torch.log1p(torch.exp(-chosen[0, 0].double()))
    assert abs(em_responsibilities(*arguments)[1].double() / expected - 1) < 5e-7


def test_gradcheck_in_float64():
    chosen, rejected, offsets, log_prior = make([2, 0, 3], 3)
    inputs = [x.double().requires_grad_() for x in (chosen, rejected, log_prior)]
    assert torch.autograd.gradcheck(lambda c, r, p: em_responsibilities(c, r, offsets, p)[1], inputs)


def test_responsibilities_are_not_differentiable():
    chosen, rejected, offsets, log_prior = make([2, 3], 2)
    resp, like = em_responsibilities(chosen.requires_grad_(), rejected, offsets, log_prior)
    assert not resp.requires_grad
    assert like.requires_grad


def test_backend_torch_is_the_same_function_and_differentiable_twice():
    chosen, rejected, offsets, log_prior = make([2, 30, 0], 3)
    leaf = chosen.requires_grad_()
    reference = em_responsibilities(leaf, rejected, offsets, log_prior, backend="torch")
    for actual, expected in zip(
        em_responsibilities(leaf, rejected, offsets, log_prior), reference, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    (first,) = torch.autograd.grad(reference[1].sum(), leaf, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), leaf)[0].abs().sum() > 0


def test_vmap_over_score_sets_with_the_backward_outside():
    chosen, rejected, offsets, log_prior = make([2, 5, 0], 3)
    many = torch.randn(4, *chosen.shape).requires_grad_()
    resp, like = torch.vmap(lambda c: em_responsibilities(c, rejected, offsets, log_prior))(many)
    (grad,) = torch.autograd.grad(like.sum(), many)
    for i in range(4):
        leaf = many[i].detach().requires_grad_()
        expected = em_responsibilities(leaf, rejected, offsets, log_prior)
        torch.testing.assert_close(resp[i], expected[0])
        torch.testing.assert_close(grad[i], torch.autograd.grad(expected[1].sum(), leaf)[0])


def test_batched_cotangents_equal_one_by_one():
    chosen, rejected, offsets, log_prior = make([2, 0, 4], 3)
    leaf = chosen.requires_grad_()
    like = em_responsibilities(leaf, rejected, offsets, log_prior)[1]
    rows = torch.autograd.grad(like, leaf, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    for u in range(3):
        torch.testing.assert_close(rows[u], torch.autograd.grad(like[u], leaf, retain_graph=True)[0])


@pytest.mark.real_device
@pytest.mark.parametrize("counts", [[0], [3, 0, 2], [2000, 1]], ids=str)
def test_opcheck(counts):
    chosen, rejected, offsets, log_prior = make(counts, 3)
    plan = list(plan_users(offsets))
    forward = torch.ops.maxmin.em_responsibilities.default
    for given_plan in ([], plan):
        leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        for keep in (False, not INTERPRET):
            arguments = (*leaves, offsets, log_prior.clone().requires_grad_(), given_plan, keep)
            torch.library.opcheck(forward, arguments)
    margins = chosen.clone().requires_grad_(), None
    torch.library.opcheck(forward, (*margins, offsets, log_prior.clone().requires_grad_(), plan, False))
    resp, grad, odds = torch.rand(len(counts), 3), torch.randn(len(counts)), torch.empty(0, 3)
    backward = torch.ops.maxmin.em_backward.default
    for segments in ((None, None), plan[:2]):
        torch.library.opcheck(backward, (chosen, rejected, offsets, resp, grad, odds, *segments))
    torch.library.opcheck(backward, (chosen, None, offsets, resp, grad, odds, *plan[:2]))


@pytest.mark.real_device
@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def loss(chosen, rejected, offsets, log_prior):
        resp, like = em_responsibilities(chosen, rejected, offsets, log_prior)
        return like.sum() + resp.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=COMPILER)
    for counts in ([3, 4], [6, 0, 1100]):
        chosen, rejected, offsets, log_prior = make(counts, 3)
        chosen.requires_grad_(), log_prior.requires_grad_()
        arguments, leaves = (chosen, rejected, offsets, log_prior), (chosen, log_prior)
        expected = torch.autograd.grad(loss(*arguments), leaves)
        actual = torch.autograd.grad(compiled(*arguments), leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.real_device
def test_export_keeps_one_operator():
    class EStep(torch.nn.Module):
        def forward(self, chosen, rejected, offsets, log_prior):
            return em_responsibilities(chosen, rejected, offsets, log_prior)

    arguments = make([3, 0, 5], 4)
    program = torch.export.export(EStep(), arguments)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [c for c in calls if "getitem" not in c] == ["maxmin.em_responsibilities.default"]
    for actual, expected in zip(program.module()(*arguments), em_responsibilities(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.real_device
@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors_have_the_shape_dtype_and_device_of_real_ones(fake_device):
    with FakeTensorMode():
        # Autograd asks for a real device.
        chosen = torch.empty(
            7, 3, dtype=torch.bfloat16, device=fake_device, requires_grad=fake_device == "cpu"
        )
        offsets = torch.empty(5, dtype=torch.int64, device=fake_device)
        resp, like = em_responsibilities(chosen, chosen, offsets, torch.empty(3, device=fake_device))
        assert resp.shape == (4, 3)
        assert like.shape == (4,)
        assert resp.dtype == like.dtype == torch.float32
        assert resp.device.type == fake_device
        if fake_device == "cpu":
            like.sum().backward()
            assert chosen.grad.shape == chosen.shape


@pytest.mark.cpu  # on a GPU an assertion on the device, after which its process is lost
@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([1, 3], ValueError, "start at 0"),
        ([0, 2], ValueError, "end at the number of pairs"),
        ([0, 4, 3], ValueError, "never fall"),
        ([], ValueError, r"U \+ 1"),
        ([0.0, 3.0], TypeError, "int64"),
    ],
    ids=str,
)
def test_impossible_offsets_are_named(offsets, error, message):
    scores = torch.zeros(3, 2)
    offsets = torch.tensor(offsets, dtype=None if offsets else torch.int64)
    with pytest.raises(error, match=message):
        em_responsibilities(scores, scores, offsets, torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rejected": torch.zeros(2, 2)}, ValueError, r"\[P, K\]"),
        ({"log_prior": torch.zeros(3)}, ValueError, "log_prior"),
        ({"chosen": torch.zeros(3, 2).long()}, TypeError, "floating"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
    ids=["shape", "prior", "dtype", "backend"],
)
def test_bad_input_is_named(change, error, message):
    scores = torch.zeros(3, 2)
    arguments = {
        "chosen": scores,
        "rejected": scores,
        "user_offsets": torch.tensor([0, 3]),
        "log_prior": torch.zeros(2),
    }
    with pytest.raises(error, match=message):
        em_responsibilities(**(arguments | change))


def test_plan_checks_the_offsets():
    with pytest.raises(ValueError, match="start at 0"):
        plan_users(torch.tensor([2, 3]))
    with pytest.raises(TypeError, match="int64"):
        plan_users(torch.tensor([0, 3], dtype=torch.int32))
