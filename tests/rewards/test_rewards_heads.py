"""Reward heads against their formulas in double precision, and what EM does to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.rewards.base import HEADS, RewardHeads, permute_rows_, reset_row_


def make(kind, **options):
    torch.manual_seed(0)
    return RewardHeads(kind, hidden_size=12, num_groups=3, **options)


def wide(heads, vectors):
    """The same rewards in float64, from the weights alone."""
    w = {name: value.detach().double() for name, value in heads.state_dict().items()}
    h = vectors.detach().double()
    if heads.kind == "mlp":
        x = h @ w["features.0.weight"].T + w["features.0.bias"]
        h = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    elif heads.kind == "low_rank":
        h = h @ w["features.weight"].T
    if h.dim() == 2:
        return h @ w["output.weight"].T
    return torch.stack([h[:, k] @ w["output.weight"][k] for k in range(h.shape[1])], -1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 12)], ids=["shared vector", "a vector a group"])
def test_rewards_equal_their_formula(kind, shape):
    heads, vectors = make(kind), torch.randn(shape)
    rewards = heads(vectors)
    assert rewards.shape == (5, 3)
    torch.testing.assert_close(rewards.double(), wide(heads, vectors), atol=1e-5, rtol=1e-5)
    assert rewards.std(0).min() > 0.05


@pytest.mark.parametrize("kind", HEADS)
def test_equal_vectors_for_all_groups_are_a_shared_vector(kind):
    heads, vectors = make(kind), torch.randn(4, 12)
    torch.testing.assert_close(heads(vectors[:, None].expand(4, 3, 12)), heads(vectors), atol=1e-6, rtol=1e-5)


def test_low_rank_rewards_span_no_more_than_the_rank():
    vectors = torch.randn(50, 12)
    for rank in (1, 2):
        singular = torch.linalg.svdvals(make("low_rank", rank=rank)(vectors).detach())
        assert (singular / singular[0] > 1e-5).sum() == rank
    assert make("low_rank").output.weight.shape == (3, 3)  # by default as many features as groups


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_against_finite_differences(kind):
    heads, vectors = make(kind), torch.randn(6, 12)
    heads(vectors).sum().backward()
    for name, parameter in heads.named_parameters():
        step = torch.zeros_like(parameter)
        step.view(-1)[1] = 1e-3
        ends = []
        for sign in (1, -1):
            moved = make(kind)
            moved.load_state_dict(heads.state_dict())
            dict(moved.named_parameters())[name].data.add_(sign * step)
            ends.append(wide(moved, vectors).sum())
        slope = ((ends[0] - ends[1]) / 2e-3).item()
        assert parameter.grad.view(-1)[1].item() == pytest.approx(slope, rel=2e-3, abs=2e-3), name


@given(st.permutations(range(4)))
def test_permuted_rows_are_the_old_ones(order):
    layer = nn.Linear(5, 4)
    old = [layer.weight.detach().clone(), layer.bias.detach().clone()]
    permute_rows_(layer, torch.tensor(order))
    for new, was in zip((layer.weight, layer.bias), old, strict=True):
        assert torch.equal(new, was[order])


def test_reset_row_is_the_donor_with_noise_of_its_scale():
    layer = nn.Linear(4000, 3)
    old = layer.weight.detach().clone()
    reset_row_(layer, 2, donor=0, noise_scale=0.1)
    assert torch.equal(layer.weight[:2], old[:2])
    noise = layer.weight[2] - old[0]
    assert noise.std().item() == pytest.approx(0.1 * old[0].std().item(), rel=0.05)
    assert layer.bias[2] == layer.bias[0]


def test_reset_row_draws_one_normal_a_weight():
    layer = nn.Linear(8, 3, bias=False)
    old = layer.weight.detach().clone()
    torch.manual_seed(3)
    expected = old[1] + 0.1 * old[1].std() * torch.randn(8)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    reset_row_(layer, 0, donor=1, noise_scale=0.1)
    assert torch.equal(layer.weight[0], expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_mistakes():
    with pytest.raises(UserError, match="none of linear, mlp, low_rank"):
        make("deep")
    for options in ({"kind": "linear", "rank": 2}, {"kind": "low_rank", "rank": 0}):
        with pytest.raises(UserError, match="positive number of features"):
            make(**options)
