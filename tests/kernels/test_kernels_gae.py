"""Generalised advantage estimation with a vector reward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_oracles import COMPILER, INTERPRET, PROPERTY, gae_oracle, largest_error, rms_error
from maxmin_kernels import vector_gae
from maxmin_kernels.gae.naive import discounted_sum, discounted_sum_in_place
from torch._subclasses.fake_tensor import FakeTensorMode

NAN = float("nan")


def make(batch, steps, columns, dtype=torch.float32, ends=0.2):
    signals = [torch.randn(batch, steps, columns).to(dtype) for _ in range(3)]
    terminated = torch.rand(batch, steps, 1) < ends / 2
    done = terminated | (torch.rand(batch, steps, 1) < ends)
    return *signals, done, terminated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "steps", "columns"),
    [(1, 1, 1), (3, 16, 2), (2, 17, 5), (2, 65, 17), (1, 70, 40)],
    ids=lambda x: str(x),
)
def test_equals_the_defining_sum(batch, steps, columns, dtype):
    inputs = make(batch, steps, columns, dtype)
    outputs = vector_gae(*inputs, gamma=0.97, lmbda=0.9)
    for actual, expected in zip(outputs, gae_oracle(*inputs, 0.97, 0.9), strict=True):
        assert actual.dtype == torch.float32
        assert rms_error(actual, expected) < 2e-6


@pytest.mark.parametrize(("steps", "columns"), [(1500, 1), (1025, 4), (300, 5)])
def test_long_trajectories_equal_torchrl_column_by_column(steps, columns):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    reward, value, next_value, done, terminated = make(2, steps, columns, ends=0.002)
    outputs = vector_gae(reward, value, next_value, done, terminated, gamma=0.99, lmbda=0.95)
    for k in range(columns):
        column = [x[..., k : k + 1].double() for x in (value, next_value, reward)]
        expected = functional.generalized_advantage_estimate(
            0.99, 0.95, *column, done=done, terminated=terminated
        )
        for actual, reference in zip(outputs, expected, strict=True):
            assert rms_error(actual[..., k : k + 1], reference) < 2e-6


@pytest.mark.parametrize(("gamma", "lmbda"), [(0.99, 0.95), (0.999, 1.0), (1.0, 1.0)])
def test_float32_error_at_a_realistic_size(gamma, lmbda):
    # The interpreter scans an element at a time.
    batch, steps, columns = (1, 150, 2) if INTERPRET else (8, 1024, 4)
    inputs = make(batch, steps, columns, ends=0.002)
    wide = [x.double() for x in inputs[:3]]
    advantage = torch.zeros(batch, columns, dtype=torch.float64)
    expected = torch.zeros(batch, steps, columns, dtype=torch.float64)
    for t in range(steps - 1, -1, -1):
        reward, value, next_value = (x[:, t] for x in wide)
        delta = reward + gamma * next_value * ~inputs[4][:, t] - value
        advantage = delta + gamma * lmbda * advantage * ~inputs[3][:, t]
        expected[:, t] = advantage
    outputs = vector_gae(*inputs, gamma=gamma, lmbda=lmbda)
    for actual, reference in zip(outputs, (expected, expected + wide[1]), strict=True):
        assert largest_error(actual, reference) <= 2e-6


@pytest.mark.parametrize("gamma", [0.995, 1.0])
def test_with_lambda_one_the_sum_telescopes(gamma):
    # One trajectory whose next values are its own values: A_t is the discounted return minus the value.
    reward, value, *_ = make(2, 1200, 2)
    next_value = torch.cat([value[:, 1:], torch.full_like(value[:, :1], 3.0)], 1)
    no_end = torch.zeros(2, 1200, 1, dtype=torch.bool)
    advantage, target = vector_gae(reward, value, next_value, no_end, no_end, gamma=gamma, lmbda=1.0)
    following = torch.full((2, 2), 3.0, dtype=torch.float64)
    for t in range(1199, -1, -1):
        following = reward[:, t].double() + gamma * following
        assert (target[:, t] - following).abs().max() < 1e-4
        assert (advantage[:, t] - (following - value[:, t])).abs().max() < 1e-4


@PROPERTY
@given(
    batch=st.integers(0, 4),
    steps=st.integers(0, 40),
    columns=st.integers(1, 17),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    lmbda=st.sampled_from([0.0, 0.7, 1.0]),
    layout=st.sampled_from(["plain", "time-first", "columns-first", "expanded"]),
    masked=st.booleans(),
)
def test_any_shape_layout_and_mask(batch, steps, columns, gamma, lmbda, layout, masked):
    inputs = make(batch, steps, columns)
    mask = torch.rand(batch, steps) < 0.7 if masked else None
    views = list(inputs)
    if layout == "time-first":
        views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    elif layout == "columns-first":
        views = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in inputs]
    elif layout == "expanded":
        views[0] = torch.ones(1).expand(batch, steps, columns)
        inputs = (views[0].clone(), *inputs[1:])
    outputs = vector_gae(*views, gamma=gamma, lmbda=lmbda, mask=mask)
    for actual, expected in zip(outputs, gae_oracle(*inputs, gamma, lmbda, mask), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_right_padding_equals_the_short_trajectory_whatever_is_stored_there():
    reward, value, next_value, done, terminated = make(3, 20, 2)
    lengths = torch.tensor([20, 7, 0])
    mask = torch.arange(20) < lengths[:, None]
    reward[~mask], next_value[~mask] = NAN, NAN
    value[~mask] = 5.0
    advantage, target = vector_gae(
        reward, value, next_value, done, terminated, gamma=0.9, lmbda=0.8, mask=mask
    )
    assert (advantage[~mask] == 0).all()
    assert (target[~mask] == 5.0).all()
    short = [x[1:2, :7] for x in (reward, value, next_value, done, terminated)]
    for actual, expected in zip((advantage, target), vector_gae(*short, gamma=0.9, lmbda=0.8), strict=True):
        torch.testing.assert_close(actual[1:2, :7], expected)


def test_a_nan_behind_an_end_does_not_reach_the_steps_before_it():
    reward, value, next_value, *_ = make(1, 30, 3)
    done = torch.zeros(1, 30, 1, dtype=torch.bool)
    done[0, 11] = done[0, 29] = True
    clean, _ = vector_gae(reward, value, next_value, done, done, gamma=0.9, lmbda=0.8)
    next_value[0, 11] = NAN  # behind a terminal state there is no value
    reward[0, 20, 1] = NAN
    advantage, _ = vector_gae(reward, value, next_value, done, done, gamma=0.9, lmbda=0.8)
    assert torch.equal(advantage[0, :12], clean[0, :12])
    assert torch.equal(advantage[0, 21:], clean[0, 21:])
    assert torch.equal(advantage[0, :, [0, 2]], clean[0, :, [0, 2]])
    assert advantage[0, 12:21, 1].isnan().all()


def test_numbers_as_flags_and_more_batch_dimensions():
    inputs = make(6, 9, 2)
    expected = vector_gae(*inputs, gamma=0.9, lmbda=0.8)
    signals = [x.unflatten(0, (2, 3)) for x in (*inputs[:3], inputs[3].float(), inputs[4].long())]
    outputs = vector_gae(*signals, gamma=torch.tensor(0.9), lmbda=0.8)
    for actual, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, reference.unflatten(0, (2, 3)))


def test_estimates_are_targets_and_the_torch_backend_agrees():
    inputs = make(2, 12, 3)
    inputs[1].requires_grad_()
    outputs = vector_gae(*inputs, gamma=0.9, lmbda=0.8)
    reference = vector_gae(*inputs, gamma=0.9, lmbda=0.8, backend="torch")
    for actual, expected in zip(outputs, reference, strict=True):
        assert not actual.requires_grad
        assert not expected.requires_grad
        torch.testing.assert_close(actual, expected)
    wide = vector_gae(*(x.double() for x in inputs[:3]), *inputs[3:], gamma=0.9, lmbda=0.8)
    assert wide[0].dtype == torch.float64


@pytest.mark.cpu
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(4, 30, 3), (2, 1, 2), (3, 0, 2), (0, 5, 2)], ids=str)
def test_both_recursions_give_equal_bits(shape, decay):
    delta, carries = torch.randn(shape), torch.rand(*shape[:2], 1) < 0.8
    assert torch.equal(discounted_sum(delta, carries, decay), discounted_sum_in_place(delta, carries, decay))


@pytest.mark.parametrize("batched", ["reward", "done"])
def test_vmap_of_the_torch_backend(batched):
    reward, value, next_value, done, terminated = make(2, 9, 3)
    many = torch.randn(4, 2, 9, 3) if batched == "reward" else torch.rand(4, 2, 9, 1) < 0.3

    def call(x):
        signals = (x, value, next_value, done) if batched == "reward" else (reward, value, next_value, x)
        return vector_gae(*signals, terminated, gamma=0.9, lmbda=0.8, backend="torch")[0]

    torch.testing.assert_close(torch.vmap(call)(many), torch.stack([call(x) for x in many]))


def test_vmap_with_a_shared_value():
    _, value, next_value, done, terminated = make(2, 9, 3)
    many = torch.randn(5, 2, 9, 3)
    outputs = torch.vmap(lambda r: vector_gae(r, value, next_value, done, terminated, gamma=0.9, lmbda=0.8))(
        many
    )
    for i in range(5):
        expected = vector_gae(many[i], value, next_value, done, terminated, gamma=0.9, lmbda=0.8)
        for out, reference in zip(outputs, expected, strict=True):
            torch.testing.assert_close(out[i], reference)


@pytest.mark.real_device
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (0, 4, 2)], ids=str)
def test_opcheck(shape):
    inputs = make(*shape)
    op = torch.ops.maxmin.vector_gae.default
    for mask in (None, torch.rand(shape[:2]) < 0.5):
        for weights, moments in (
            (None, False),
            (torch.rand(shape[-1]), False),
            (torch.rand(shape[-1]), True),
        ):
            torch.library.opcheck(op, (*inputs, mask, weights, 0.9, 0.8, moments))


def moments_oracle(weighted, mask):
    valid = weighted.double()[..., 0] if mask is None else weighted.double()[..., 0][mask]
    if not len(valid):
        return torch.zeros(3, dtype=torch.float64)
    return torch.stack([torch.tensor(float(valid.numel())).double(), valid.mean(), valid.var(correction=0)])


@settings(PROPERTY, max_examples=3 if INTERPRET else 40)
@given(
    batch=st.integers(1, 5),
    steps=st.integers(1, 40),
    columns=st.integers(1, 17),
    masked=st.booleans(),
    backend=st.sampled_from(["auto", "torch"]),
)
def test_weighted_sum_and_its_moments(batch, steps, columns, masked, backend):
    inputs, weights = make(batch, steps, columns), torch.rand(columns)
    mask = torch.rand(batch, steps) < 0.6 if masked else None
    settings = {"gamma": 0.9, "lmbda": 0.8, "mask": mask, "backend": backend}
    advantage, target, weighted, moments = vector_gae(
        *inputs, **settings, weights=weights, return_moments=True
    )
    plain = vector_gae(*inputs, **settings)
    assert torch.equal(advantage, plain[0])
    assert torch.equal(target, plain[1])
    expected = (gae_oracle(*inputs, 0.9, 0.8, mask)[0] * weights.double()).sum(-1, keepdim=True)
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.double(), moments_oracle(expected, mask), rtol=1e-5, atol=1e-5)
    assert len(vector_gae(*inputs, **settings, weights=weights)) == 3


def test_moments_are_accurate_where_the_mean_is_large_and_equal_in_every_bit():
    # Every step an end of its own, so that the advantage is the reward.
    rows, steps = (3, 40) if INTERPRET else (64, 700)
    reward = 1e4 + torch.randn(rows, steps, 1)
    zero, end = torch.zeros_like(reward), torch.ones(rows, steps, 1, dtype=torch.bool)
    runs = [
        vector_gae(reward, zero, zero, end, end, gamma=0.9, lmbda=0.9, return_moments=True)[2]
        for _ in range(3)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    torch.testing.assert_close(runs[0].double(), moments_oracle(reward, None), rtol=1e-5, atol=0)


def test_no_valid_step_has_no_moments():
    inputs = make(2, 5, 1)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    *_, moments = vector_gae(*inputs, gamma=0.9, lmbda=0.8, mask=nothing, return_moments=True)
    assert moments.tolist() == [0.0, 0.0, 0.0]


def test_vmap_with_weights_and_moments():
    inputs = make(2, 9, 3)
    many = torch.randn(4, 2, 9, 3)
    for extras in ({}, {"return_moments": True}):
        settings = {"gamma": 0.9, "lmbda": 0.8, "weights": torch.rand(3)} | extras

        def call(reward, settings=settings):
            return vector_gae(reward, *inputs[1:], **settings)

        outputs = torch.vmap(call)(many)
        for i in range(4):
            for out, reference in zip(outputs, call(many[i]), strict=True):
                torch.testing.assert_close(out[i], reference)


@pytest.mark.real_device
def test_export_keeps_one_operator():
    class Estimate(torch.nn.Module):
        def forward(self, *signals):
            return vector_gae(*signals, gamma=0.9, lmbda=0.8)

    inputs = make(3, 9, 2)
    program = torch.export.export(Estimate(), inputs)
    # Under no_grad, which export keeps as a graph of its own.
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = [str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"]
    assert [c for c in calls if c.startswith("maxmin")] == ["maxmin.vector_gae.default"]
    for actual, expected in zip(
        program.module()(*inputs), vector_gae(*inputs, gamma=0.9, lmbda=0.8), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.real_device
@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors_have_the_shape_dtype_and_device_of_real_ones(fake_device):
    with FakeTensorMode():
        signals = [torch.empty(3, 5, 2, dtype=torch.bfloat16, device=fake_device) for _ in range(3)]
        end = torch.empty(3, 5, 1, dtype=torch.bool, device=fake_device)
        weights = torch.empty(2, device=fake_device)
        outputs = vector_gae(*signals, end, end, gamma=0.9, lmbda=0.8, weights=weights, return_moments=True)
        assert [tuple(out.shape) for out in outputs] == [(3, 5, 2), (3, 5, 2), (3, 5, 1), (3,)]
        assert all(out.dtype == torch.float32 and out.device.type == fake_device for out in outputs)


@pytest.mark.real_device
@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def call(*inputs):
        advantage, target = vector_gae(*inputs, gamma=0.9, lmbda=0.8)
        return advantage * 2 + target

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=COMPILER)
    for steps in (7, 12):
        inputs = make(3, steps, 2)
        torch.testing.assert_close(compiled(*inputs), call(*inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": torch.zeros(2, 4, 1)}, ValueError, r"\[..., T, K\]"),
        ({"done": torch.zeros(2, 4, 3)}, ValueError, "done"),
        ({"terminated": torch.zeros(2, 4)}, ValueError, "terminated"),
        ({"mask": torch.ones(2, 4, 1)}, ValueError, "mask"),
        ({"reward": torch.zeros(2, 4, 3).long()}, TypeError, "floating"),
        ({"backend": "numpy"}, ValueError, "backend"),
        ({"weights": torch.ones(2)}, ValueError, "weights"),
        ({"return_moments": True}, ValueError, "pass weights"),
    ],
    ids=lambda x: str(x)[:15],
)
def test_bad_input_is_named(change, error, message):
    zeros, ends = torch.zeros(2, 4, 3), torch.zeros(2, 4, 1)
    arguments = {"reward": zeros, "value": zeros, "next_value": zeros, "done": ends, "terminated": ends}
    with pytest.raises(error, match=message):
        vector_gae(**(arguments | change), gamma=0.9, lmbda=0.8)
