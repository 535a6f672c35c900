import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.objectives import (
    masked_explained_variance,
    masked_mean,
    ratio_statistics,
    scalarise_advantage,
    whiten,
)


def test_scalarise_by_hand_with_and_without_a_kl_column():
    advantage = torch.tensor([[[1.0, 2.0, -0.5], [0.0, 4.0, 1.0]]])
    weights = torch.tensor([0.25, 0.75])
    assert scalarise_advantage(advantage[..., :2], weights).tolist() == [[[1.75], [3.0]]]
    assert scalarise_advantage(advantage, weights).tolist() == [[[1.25], [4.0]]]


def test_weights_align_with_the_first_dimensions():
    advantage = torch.ones(2, 3, 2)
    by_row = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    assert scalarise_advantage(advantage, by_row)[:, :, 0].tolist() == [[1.0] * 3, [2.5] * 3]
    by_step = by_row.unsqueeze(1).expand(2, 3, 2)
    assert torch.equal(scalarise_advantage(advantage, by_step), scalarise_advantage(advantage, by_row))


def test_one_group_passes_bit_equal():
    advantage = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scalarise_advantage(advantage, torch.ones(1)), advantage)


@pytest.mark.parametrize(
    ("advantage", "weights"),
    [((2, 4), (2,)), ((2, 1), (2,)), ((2, 3, 2), (3, 2)), ((2, 2), (2, 3, 2))],
    ids=str,
)
def test_shapes_that_do_not_fit_raise(advantage, weights):
    with pytest.raises(ValueError, match=r"last dimension must be|leading dimensions must be"):
        scalarise_advantage(torch.zeros(advantage), torch.zeros(weights))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_the_scalarised_advantage_is_that_of_the_scalarised_reward(groups, seed, kl_column):
    generator = torch.Generator().manual_seed(seed)
    advantage = torch.randn(3, groups + kl_column, generator=generator, dtype=torch.float64)
    weights = torch.randn(groups, generator=generator, dtype=torch.float64).softmax(0)
    expected = sum(weights[k] * advantage[:, k] for k in range(groups))
    if kl_column:
        expected = expected + advantage[:, -1]
    torch.testing.assert_close(scalarise_advantage(advantage, weights).squeeze(-1), expected)


def masked_example():
    generator = torch.Generator().manual_seed(0)
    values = 3 + 2 * torch.randn(6, 7, 2, generator=generator)
    mask = torch.rand(6, 7, generator=generator) > 0.4
    return values, mask


def test_whitening_uses_the_valid_steps_alone():
    values, mask = masked_example()
    first = values[..., :1]
    whitened = whiten(first.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    subset = first[mask].double()
    expected = (subset - subset.mean()) / (subset.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(whitened[mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert (whitened[~mask] == 0).all()
    torch.testing.assert_close(whiten(first[mask]), whitened[mask])


def test_whitening_with_dimensions_of_their_own():
    values, _ = masked_example()
    apart = torch.cat([whiten(values[..., :1]), whiten(values[..., 1:])], -1)
    torch.testing.assert_close(whiten(values, exclude_dims=(-1,)), apart)


def test_whitening_degenerate_inputs():
    assert whiten(torch.full((3, 1), 5.0)).tolist() == [[0.0]] * 3
    assert whiten(torch.ones(3, 1), torch.zeros(3, dtype=torch.bool)).tolist() == [[0.0]] * 3
    assert whiten(torch.ones(3, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_masked_mean_and_explained_variance_are_those_of_the_subset():
    values, mask = masked_example()
    prediction = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    garbage = ~mask.unsqueeze(-1)
    torch.testing.assert_close(masked_mean(values.masked_fill(garbage, torch.inf), mask), values[mask].mean())
    target, guess = values[mask].double(), prediction[mask].double()
    expected = 1 - (target - guess).var(0, correction=0) / target.var(0, correction=0)
    explained = masked_explained_variance(
        values.masked_fill(garbage, torch.nan), prediction.masked_fill(garbage, torch.nan), mask
    )
    assert explained.shape == (2,)
    torch.testing.assert_close(explained.double(), expected, atol=1e-5, rtol=1e-5)
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0


def test_nothing_is_explained_of_a_target_that_is_rounding():
    rounding = 1e-7 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    prediction = 3e-4 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    assert masked_explained_variance(rounding, prediction).tolist() == [0.0]
    assert masked_explained_variance(torch.ones(4, 1), torch.zeros(4, 1)).tolist() == [0.0]
    assert masked_explained_variance(1e3 * rounding, 1e3 * rounding).tolist() == [0.0]
    assert masked_explained_variance(1e4 * rounding, 1e4 * rounding).tolist() == [1.0]


def test_ratio_statistics_by_hand():
    log_ratio = torch.tensor([[1.0], [3.0], [99.0]]).log()
    statistics = ratio_statistics(log_ratio, torch.tensor([True, True, False]))
    assert statistics["ESS"].item() == pytest.approx(16 / (2 * 10))
    assert statistics["max_ratio"].item() == pytest.approx(3.0)
    assert statistics["mean_ratio"].item() == pytest.approx(2.0)
    assert ratio_statistics(torch.zeros(5, 1))["ESS"].item() == pytest.approx(1.0)
    # The squares of ratios this large overflow in float32.
    assert ratio_statistics(torch.full((5, 1), 80.0))["ESS"].item() == pytest.approx(1.0)
