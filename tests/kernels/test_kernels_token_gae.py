"""Generalised advantage estimation over the tokens of responses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_oracles import COMPILER, PROPERTY, rms_error
from maxmin_kernels import token_gae, vector_gae
from torch._subclasses.fake_tensor import FakeTensorMode

NAN = float("nan")
SETTINGS = {"gamma": 0.97, "lmbda": 0.9}


def make(batch, steps, groups, kl, dtype=torch.float32):
    """Inputs of random responses, garbage behind their ends."""
    lengths = torch.randint(1, steps + 1, (batch,))
    mask = torch.arange(steps) < lengths[:, None]
    value = torch.randn(batch, steps, groups + kl).to(dtype)
    options = {"group_weights": torch.rand(groups)}
    if kl:
        log_probs = [torch.where(mask, torch.randn(batch, steps), NAN).to(dtype) for _ in range(2)]
        options |= {"sample_log_prob": log_probs[0], "ref_log_prob": log_probs[1], "kl_coef": 0.3}
    return torch.randn(batch, groups).to(dtype), value, mask, options


def oracle(reward, value, mask, gamma, lmbda, group_weights, **kl):
    """Token by token from the definition, in float64."""
    batch, steps, columns = value.shape
    groups = reward.shape[1]
    advantage = torch.zeros(batch, steps, columns, dtype=torch.float64)
    for b in range(batch):
        length = int(mask[b].sum())
        following = torch.zeros(columns, dtype=torch.float64)
        for t in range(length - 1, -1, -1):
            paid = torch.zeros(columns, dtype=torch.float64)
            if t == length - 1:
                paid[:groups] = reward[b].double()
            if columns > groups:
                log_ratio = kl["sample_log_prob"][b, t].double() - kl["ref_log_prob"][b, t].double()
                paid[groups] = -kl["kl_coef"] * log_ratio
            after = value[b, t + 1].double() if t + 1 < length else torch.zeros(columns, dtype=torch.float64)
            following = paid + gamma * after - value[b, t].double() + gamma * lmbda * following
            advantage[b, t] = following
    weights = torch.cat([group_weights.double(), torch.ones(columns - groups, dtype=torch.float64)])
    weighted = (advantage * weights).sum(-1, keepdim=True)
    real = weighted[mask]
    moments = torch.stack([mask.sum().double(), real.mean(), real.var(correction=0)])
    return advantage, advantage + value.double(), weighted, moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kl", [False, True], ids=["rewards", "penalty"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 2), (2, 65, 5), (1, 70, 17)], ids=str)
def test_equals_the_definition(shape, kl, dtype):
    reward, value, mask, options = make(*shape, kl, dtype)
    outputs = token_gae(reward, value, mask, **SETTINGS, **options, return_moments=True)
    expected = oracle(reward, value, mask, **SETTINGS, **options)
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        assert rms_error(actual, reference) < 5e-6


@PROPERTY
@given(
    batch=st.integers(0, 4),
    steps=st.integers(1, 40),
    groups=st.integers(1, 17),
    kl=st.booleans(),
    backend=st.sampled_from(["auto", "torch"]),
    strided=st.booleans(),
)
def test_any_shape_and_layout(batch, steps, groups, kl, backend, strided):
    reward, value, mask, options = make(batch, steps, groups, kl)
    view = value.transpose(0, 1).contiguous().transpose(0, 1) if strided else value
    advantage, target, weighted = token_gae(reward, view, mask, **SETTINGS, **options, backend=backend)
    assert weighted.shape == (batch, steps, 1)
    if batch:
        expected = oracle(reward, value, mask, **SETTINGS, **options)
        for actual, reference in zip((advantage, target, weighted), expected, strict=False):
            torch.testing.assert_close(actual.double(), reference, rtol=1e-5, atol=1e-5)
    assert (advantage[~mask] == 0).all()
    assert torch.equal(target[~mask], value[~mask])


def test_values_behind_the_end_move_nothing():
    reward, value, mask, options = make(4, 20, 2, True)
    mask[:, 12:] = False
    clean = token_gae(reward, value, mask, **SETTINGS, **options, return_moments=True)
    value[~mask] = NAN
    dirty = token_gae(reward, value, mask, **SETTINGS, **options, return_moments=True)
    for before, after in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(before[mask], after[mask])
    assert torch.equal(clean[3], dirty[3])


def test_equals_vector_gae_on_the_steps_of_the_responses():
    reward, value, mask, options = make(5, 14, 3, True)
    penalty = -0.3 * (options["sample_log_prob"] - options["ref_log_prob"]).nan_to_num(0.0)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    paid = torch.cat([last[..., None] * reward[:, None], penalty[..., None]], -1)
    following = torch.nn.functional.pad(value[:, 1:], (0, 0, 0, 1))
    ends = last[..., None], last[..., None]
    expected = vector_gae(paid, value, following, *ends, **SETTINGS, mask=mask)
    for actual, reference in zip(
        token_gae(reward, value, mask, **SETTINGS, **options), expected, strict=False
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


def test_vmap_over_rewards():
    _, value, mask, options = make(3, 9, 2, True)
    many = torch.randn(4, 3, 2)
    for moments in (False, True):

        def call(r, moments=moments):
            return token_gae(r, value, mask, **SETTINGS, **options, return_moments=moments)

        outputs = torch.vmap(call)(many)
        for i in range(4):
            for out, reference in zip(outputs, call(many[i]), strict=True):
                torch.testing.assert_close(out[i], reference)


@pytest.mark.real_device
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("moments", [False, True])
def test_opcheck(kl, moments):
    reward, value, mask, options = make(3, 5, 2, kl)
    log_probs = [options.get(name) for name in ("sample_log_prob", "ref_log_prob")]
    log_probs = [None if x is None else x.nan_to_num(0.0) for x in log_probs]
    arguments = reward, value, mask, *log_probs, options["group_weights"], 0.9, 0.8, 0.1, moments
    torch.library.opcheck(torch.ops.maxmin.token_gae.default, arguments)


@pytest.mark.real_device
@pytest.mark.usefixtures("no_compile_cache")
def test_compile_in_one_dynamic_graph():
    def call(reward, value, mask, weights):
        advantage, target, weighted = token_gae(reward, value, mask, **SETTINGS, group_weights=weights)
        return advantage * 2 + target + weighted

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=COMPILER)
    for steps in (7, 12):
        reward, value, mask, options = make(3, steps, 2, False)
        inputs = reward, value, mask, options["group_weights"]
        torch.testing.assert_close(compiled(*inputs), call(*inputs))


@pytest.mark.real_device
def test_export_keeps_one_operator():
    class Estimate(torch.nn.Module):
        def forward(self, reward, value, mask):
            return token_gae(reward, value, mask, **SETTINGS)

    inputs = make(3, 9, 2, False)[:3]
    program = torch.export.export(Estimate(), inputs)
    # Under no_grad, which export keeps as a graph of its own.
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = [str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"]
    assert [c for c in calls if c.startswith("maxmin")] == ["maxmin.token_gae.default"]
    for actual, expected in zip(program.module()(*inputs), token_gae(*inputs, **SETTINGS), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.real_device
@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors_have_the_shape_dtype_and_device_of_real_ones(fake_device):
    with FakeTensorMode():
        reward = torch.empty(3, 2, dtype=torch.bfloat16, device=fake_device)
        value = torch.empty(3, 5, 2, dtype=torch.bfloat16, device=fake_device)
        mask = torch.empty(3, 5, dtype=torch.bool, device=fake_device)
        outputs = token_gae(reward, value, mask, **SETTINGS)
        assert [tuple(out.shape) for out in outputs] == [(3, 5, 2), (3, 5, 2)]
        assert all(out.dtype == torch.float32 and out.device.type == fake_device for out in outputs)


@pytest.mark.cpu  # on a GPU checking would wait for the device
@pytest.mark.parametrize(
    ("row", "message"), [([1, 0, 1], "right-padded"), ([0, 0, 0], "at least one")], ids=["hole", "empty"]
)
def test_an_impossible_mask_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        token_gae(torch.zeros(2, 2), torch.zeros(2, 3, 2), torch.tensor([row] * 2).bool(), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(2, 3, 3)}, "value"),
        ({"sample_log_prob": torch.zeros(2, 3)}, "both or none"),
        ({"kl_coef": 0.1}, "kl_coef"),
        ({"group_weights": torch.ones(3)}, "group_weights"),
        ({"return_moments": True}, "pass group_weights"),
    ],
    ids=lambda x: str(x)[:25],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "terminal_reward": torch.zeros(2, 2),
        "value": torch.zeros(2, 3, 2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        token_gae(**(arguments | change), **SETTINGS)
