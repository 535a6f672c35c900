"""Worst cases over shares against scipy, in the primal, over a thousand random problems."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from torchrl_maxmin.welfare import Chi2Ball, CVaR, Egalitarian, KLBall, SoftMin, Utilitarian

PROBLEMS = 1000


def problems(seed):
    """Utilities, shares and a number between 0 and 1, over 2 to 6 groups."""
    rng = np.random.default_rng(seed)
    for _ in range(PROBLEMS):
        size = rng.integers(2, 7)
        shares = rng.dirichlet(np.ones(size)) * 0.95 + 0.05 / size
        yield rng.normal(size=size) * 10 ** rng.uniform(-1, 1), shares, rng.random()


def compare(welfare, utilities, value, weights):
    values = torch.from_numpy(utilities)
    scale = max(1.0, np.abs(utilities).max())
    assert welfare(values).item() == pytest.approx(value, abs=1e-6 * scale)
    np.testing.assert_allclose(welfare.weights(values).numpy(), weights, atol=1e-5)


def primal(utilities, shares, constraint=None, penalty=None):
    """Minimise ``w . u`` plus a penalty over the simplex, under a constraint."""
    unit = np.ptp(utilities)
    scaled = (utilities - utilities.min()) / unit

    def objective(w):
        return w @ scaled + (0.0 if penalty is None else penalty(w)[0] / unit)

    def gradient(w):
        return scaled + (0.0 if penalty is None else penalty(w)[1] / unit)

    constraints = [{"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}]
    if constraint is not None:
        inequality = {"type": "ineq", "fun": lambda w: -constraint(w)[0], "jac": lambda w: -constraint(w)[1]}
        constraints.append(inequality)
    best = None
    for start in (shares, 0.5 * shares + 0.5 * np.eye(len(shares))[utilities.argmin()]):
        found = minimize(
            objective,
            start,
            jac=gradient,
            bounds=[(1e-15, 1.0)] * len(shares),
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-16, "maxiter": 1000},
        )
        infeasible = constraint is not None and constraint(found.x)[0] > 1e-7
        if not infeasible and (best is None or found.fun < best.fun):
            best = found
    return best.x @ utilities, best.x


def divergence(shares):
    """KL(w || p) and its gradient."""
    return lambda w: ((w * np.log(w / shares)).sum(), np.log(w / shares) + 1)


def test_chi_square_ball():
    for utilities, shares, draw in problems(0):
        radius = draw * (1 / shares[utilities.argmin()] - 1) * 0.98

        def constraint(w, shares=shares, radius=radius):
            return ((w - shares) ** 2 / shares).sum() - radius, 2 * (w - shares) / shares

        compare(Chi2Ball(radius, shares), utilities, *primal(utilities, shares, constraint))


def test_kl_ball():
    """Its dual, ``max_T -T log sum_k p_k exp(-u_k / T) - T radius``, and the weights of the T found."""
    for utilities, shares, draw in problems(1):
        radius = draw * -np.log(shares[utilities.argmin()]) * 0.98 + 1e-9
        unit = np.ptp(utilities)
        above = (utilities - utilities.min()) / unit

        def dual(log_t, above=above, shares=shares, radius=radius):
            return np.exp(log_t) * (logsumexp(-above / np.exp(log_t), b=shares) + radius)

        def excess(log_t, above=above, shares=shares, radius=radius):
            log_weights = log_softmax(np.log(shares) - above / np.exp(log_t))
            return (np.exp(log_weights) * (log_weights - np.log(shares))).sum() - radius

        found = minimize_scalar(dual, bounds=(-12, 12), method="bounded", options={"xatol": 1e-12})
        log_t = brentq(excess, -60, 60, xtol=1e-13)
        weights = softmax(np.log(shares) - above / np.exp(log_t))
        compare(KLBall(radius, shares), utilities, utilities.min() - unit * found.fun, weights)


def test_conditional_value_at_risk():
    for utilities, shares, draw in problems(2):
        level = 0.02 + 0.98 * draw
        found = linprog(
            utilities,
            A_eq=np.ones((1, len(shares))),
            b_eq=[1.0],
            bounds=[(0, share / level) for share in shares],
        )
        compare(CVaR(level, shares), utilities, found.fun, found.x)


def test_the_soft_minimum_is_the_kl_penalised_worst_case():
    for utilities, shares, draw in problems(3):
        temperature = np.ptp(utilities) * (0.1 + draw)

        def penalty(w, shares=shares, temperature=temperature):
            value, gradient = divergence(shares)(w)
            return temperature * value, temperature * gradient

        _, weights = primal(utilities, shares, penalty=penalty)
        value = weights @ utilities + penalty(weights)[0]
        compare(SoftMin(temperature, shares), utilities, value, weights)


# -- limits, ties, gradients -------------------------------------------------------------------------------

vectors = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)
BALLS = [KLBall, Chi2Ball]


@pytest.mark.parametrize("ball", BALLS)
@given(vectors)
@settings(max_examples=50, deadline=None)
def test_radius_zero_is_the_mean_and_a_huge_one_the_minimum(ball, utilities):
    shares, values = [0.5, 0.3, 0.2], torch.tensor(utilities, dtype=torch.float64)
    torch.testing.assert_close(ball(0.0, shares)(values), Utilitarian(shares)(values))
    torch.testing.assert_close(ball(1e6, shares)(values), Egalitarian()(values))


@given(vectors)
@settings(max_examples=50, deadline=None)
def test_levels_of_the_value_at_risk(utilities):
    shares, values = [0.5, 0.3, 0.2], torch.tensor(utilities, dtype=torch.float64)
    torch.testing.assert_close(CVaR(1.0, shares)(values), Utilitarian(shares)(values))
    torch.testing.assert_close(CVaR(1e-6, shares)(values), Egalitarian()(values))


@pytest.mark.parametrize(
    "make", [lambda s: KLBall(0.3, s), lambda s: Chi2Ball(0.3, s), lambda s: CVaR(0.3, s)]
)
@given(vectors, st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_worst_cases_are_no_higher_than_any_weights_of_the_set_and_on_the_simplex(make, utilities, seed):
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    values, welfare = torch.tensor(utilities, dtype=torch.float64), make(shares)
    weights = welfare.weights(values)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-9)
    other = np.random.default_rng(seed).dirichlet(np.ones(3), size=50)
    log_ratio = np.log(other / shares.numpy())
    inside = {
        "KLBall": (other * log_ratio).sum(1) <= 0.3,
        "Chi2Ball": ((other - shares.numpy()) ** 2 / shares.numpy()).sum(1) <= 0.3,
        "CVaR": (other <= shares.numpy() / 0.3).all(1),
    }[type(welfare).__name__]
    if inside.any():
        assert welfare(values).item() <= (other[inside] @ values.numpy()).min() + 1e-7


def test_equal_groups_share_the_value_at_risk_by_size():
    weights = CVaR(0.4, [0.2, 0.3, 0.5]).weights(torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.6, 0.0]))
    weights = CVaR(0.6, [0.4, 0.2, 0.2, 0.2]).weights(torch.tensor([0.0, 1.0, 1.0, 2.0]))
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 6, 1 / 6, 0.0]))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("make", [KLBall, Chi2Ball, CVaR])
def test_ties_and_absent_groups_change_nothing(make, seed):
    """Splitting a group into equal ones, or adding one of share zero, is the same problem."""
    rng = np.random.default_rng(seed)
    shares, utilities = rng.dirichlet(np.ones(3)), rng.normal(size=3)
    parameter = float(rng.uniform(0.05, 0.9))
    welfare = make(parameter, torch.from_numpy(shares))
    split = torch.tensor([shares[0] * 0.3, shares[0] * 0.7, shares[1], shares[2], 0.0])
    finer = make(parameter, split)
    values = torch.from_numpy(utilities)
    more = torch.cat([values[:1], values, torch.tensor([-9.0], dtype=torch.float64)])
    assert finer(more).item() == pytest.approx(welfare(values).item(), abs=1e-9)
    weights, coarse = finer.weights(more), welfare.weights(values)
    torch.testing.assert_close(weights[2:4], coarse[1:], atol=1e-7, rtol=0)
    torch.testing.assert_close(weights[:2], coarse[0] * torch.tensor([0.3, 0.7]).double(), atol=1e-7, rtol=0)
    assert weights[4] == 0


@pytest.mark.parametrize("radius", [1e-14, 1e-8, 1e-3])
def test_a_small_radius_costs_its_root_times_the_deviation(radius):
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    values = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mean = (shares * values).sum()
    deviation = (shares * (values - mean).square()).sum().sqrt()
    # To first order KL is half of the chi-square divergence.
    for ball, factor in ((Chi2Ball, 1.0), (KLBall, 2.0)):
        loss = mean - ball(radius, shares)(values)
        expected = (factor * radius) ** 0.5 * deviation
        assert loss.item() == pytest.approx(expected.item(), rel=max(1e-6, 2 * radius**0.5), abs=1e-9)


@pytest.mark.parametrize("ball", BALLS)
def test_a_group_of_share_zero_stays_out(ball):
    welfare = ball(5.0, [0.5, 0.5, 0.0])
    assert welfare.weights(torch.tensor([1.0, 0.0, -9.0]))[2] == 0
    assert welfare(torch.tensor([1.0, 0.0, -9.0])).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_equal_utilities_and_ties_at_the_bottom(ball):
    shares = [0.5, 0.3, 0.2]
    torch.testing.assert_close(ball(0.7, shares).weights(torch.ones(3)), torch.tensor(shares))
    tied = ball(1e6, shares).weights(torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(tied, torch.tensor([0.625, 0.375, 0.0]))


@pytest.mark.parametrize("welfare", [KLBall(0.2), Chi2Ball(0.2), CVaR(0.6)])
def test_the_gradient_is_the_weights_also_in_a_batch(welfare):
    generator = torch.Generator().manual_seed(0)
    utilities = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(welfare(utilities).sum(), utilities)
    torch.testing.assert_close(gradient, welfare.weights(utilities))
    rows = torch.stack([welfare(row) for row in utilities])
    torch.testing.assert_close(rows, welfare(utilities))
    for k in range(4):
        step = torch.zeros_like(utilities)
        step[:, k] = 1e-6
        numeric = (welfare(utilities + step) - welfare(utilities - step)) / 2e-6
        torch.testing.assert_close(numeric, gradient[:, k], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KLBall(-1.0), "radius"),
        (lambda: Chi2Ball(float("nan")), "radius"),
        (lambda: CVaR(0.0), "level"),
        (lambda: CVaR(1.5), "level"),
        (lambda: KLBall(0.1, [0.5, 0.6]), "sum to 1"),
    ],
)
def test_bad_settings_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()
