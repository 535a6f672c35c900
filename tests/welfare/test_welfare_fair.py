"""Nash, alpha-fairness, generalized Gini, regret: values and gradients by hand, limits, mistakes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.welfare import (
    WELFARES,
    AlphaFair,
    Egalitarian,
    GeneralizedGini,
    Nash,
    Regret,
    SoftMin,
    Utilitarian,
    make_welfare,
)

SHARES = [0.5, 0.3, 0.2]
positive = st.lists(st.floats(0.05, 10), min_size=3, max_size=3)
vectors = st.lists(st.floats(-50, 50), min_size=3, max_size=3)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@given(positive, st.floats(0, 4))
def test_alpha_fair_by_hand(utilities, alpha):
    u, p = np.array(utilities), np.array(SHARES)
    if abs(alpha - 1) < 1e-3:
        alpha = 1.0
    terms = np.log(u) if alpha == 1 else (u ** (1 - alpha) - 1) / (1 - alpha)
    welfare = AlphaFair(alpha, SHARES)
    assert welfare(f64(utilities)).item() == pytest.approx(p @ terms, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(welfare.weights(f64(utilities)).numpy(), p * u**-alpha, rtol=1e-9)


@given(positive)
def test_alpha_one_is_nash_and_the_limit_of_its_neighbours(utilities):
    values = f64(utilities)
    torch.testing.assert_close(AlphaFair(1.0)(values), Nash()(values))
    torch.testing.assert_close(AlphaFair(1.0 + 1e-9)(values), Nash()(values), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(AlphaFair(0.0)(values) + 1, Utilitarian()(values))


def test_a_large_alpha_climbs_for_the_worst_off():
    weights = AlphaFair(200.0).weights(f64([1.0, 0.8, 0.9]))
    torch.testing.assert_close(weights / weights.sum(), f64([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_a_disagreement_point_shifts_the_utilities():
    values = f64([-1.0, 0.5, 2.0])
    torch.testing.assert_close(Nash(disagreement=-2.0)(values), Nash()(values + 2))
    torch.testing.assert_close(Nash(disagreement=[-2.0, 0.0, 1.0])(values), Nash()(f64([1.0, 0.5, 1.0])))


@pytest.mark.parametrize("welfare", [Nash(), AlphaFair(2.0)])
def test_utilities_must_lie_above_it(welfare):
    with pytest.raises(ValueError, match="calibration win_rate"):
        welfare(torch.tensor([0.5, 0.0]))


@given(vectors)
def test_gini_by_hand_and_its_limits(utilities):
    values, ordered = f64(utilities), np.sort(utilities)
    assert GeneralizedGini(SHARES)(values).item() == pytest.approx(ordered @ SHARES, abs=1e-9)
    torch.testing.assert_close(GeneralizedGini([1 / 3] * 3)(values), values.mean())
    torch.testing.assert_close(GeneralizedGini([1.0, 0.0, 0.0])(values), Egalitarian()(values))


@given(
    st.lists(st.integers(-5, 5), min_size=3, max_size=3), st.lists(st.integers(-5, 5), min_size=3, max_size=3)
)
@settings(max_examples=200)
def test_a_small_ratio_compares_as_leximin_does(first, second):
    welfare = GeneralizedGini.leximin(3, ratio=1e-3)
    a, b = welfare(f64(first)).item(), welfare(f64(second)).item()
    lexicographic = (sorted(first) > sorted(second)) - (sorted(first) < sorted(second))
    assert (a > b + 1e-12) - (a < b - 1e-12) == lexicographic


def test_gini_coefficients_must_not_rise():
    with pytest.raises(ValueError, match="must not rise"):
        GeneralizedGini([0.2, 0.8])


@given(vectors, vectors)
def test_regret_is_the_welfare_of_the_differences(utilities, best):
    difference = f64(utilities) - f64(best)
    for welfare in (Egalitarian(), SoftMin(0.7), Utilitarian(SHARES)):
        regret = Regret(welfare, best)
        torch.testing.assert_close(regret(f64(utilities)), welfare(difference))
        torch.testing.assert_close(regret.weights(f64(utilities)), welfare.weights(difference))


@given(vectors)
@settings(max_examples=50)
def test_the_soft_minimum_goes_from_the_minimum_to_the_mean(utilities):
    values = f64(utilities)
    torch.testing.assert_close(SoftMin(1e-6, SHARES)(values), Egalitarian()(values), atol=1e-4, rtol=0)
    torch.testing.assert_close(SoftMin(1e9, SHARES)(values), Utilitarian(SHARES)(values), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "welfare",
    [Nash(SHARES), AlphaFair(2.5, SHARES), GeneralizedGini(SHARES), Regret(SoftMin(0.5), [1.0, 2.0, 3.0])],
)
def test_weights_are_the_gradient_also_in_a_batch(welfare):
    generator = torch.Generator().manual_seed(0)
    utilities = (torch.rand(6, 3, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(welfare(utilities).sum(), utilities)
    torch.testing.assert_close(gradient, welfare.weights(utilities))
    torch.testing.assert_close(torch.stack([welfare(row) for row in utilities]), welfare(utilities))


def test_names():
    settings_of = {
        "soft_min": {"temperature": 0.1},
        "kl_ball": {"radius": 0.1},
        "chi2_ball": {"radius": 0.1},
        "cvar": {"level": 0.5},
        "alpha_fair": {"alpha": 2.0},
        "generalized_gini": {"weights": [0.6, 0.4]},
        "regret": {"best": [1.0, 0.9], "welfare": "cvar", "level": 0.5},
    }
    for name in WELFARES:
        value = make_welfare(name, **settings_of.get(name, {}))(torch.tensor([0.5, 0.7]))
        assert value.isfinite()
    with pytest.raises(ValueError, match=r"Unknown welfare 'rawls'.*egalitarian"):
        make_welfare("rawls")
    assert make_welfare("regret", best=[1.0, 0.9])(torch.tensor([0.5, 0.7])).item() == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="an object was given"):
        make_welfare("regret", best=[1.0, 0.9], welfare=Nash(), alpha=2.0)


@given(positive, st.floats(0, 20))
def test_normalized_weights_are_the_gradient_over_its_sum(utilities, alpha):
    values = f64(utilities)
    lowest = [0.0, 0.01, 0.02]
    for welfare in (
        AlphaFair(alpha, SHARES),
        Regret(AlphaFair(alpha, SHARES), lowest),
        GeneralizedGini(SHARES),
    ):
        gradient = welfare.weights(values)
        torch.testing.assert_close(welfare.normalized_weights(values), gradient / gradient.sum())


def test_normalized_weights_survive_a_gradient_that_overflows():
    values = f64([1e-3, 2e-3, 1.0])
    assert AlphaFair(200.0).weights(values).isinf().any()
    torch.testing.assert_close(AlphaFair(200.0).normalized_weights(values), f64([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AlphaFair(-1.0), "alpha"),
        (lambda: AlphaFair(float("inf")), "Egalitarian is its limit"),
        (lambda: Nash([0.5, 0.6]), "sum to 1"),
        (lambda: Regret(Egalitarian(), [[1.0]]), "one finite number"),
        (lambda: Regret(Egalitarian(), [1.0, 2.0])(torch.ones(3)), "2 groups"),
    ],
)
def test_bad_settings_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()
