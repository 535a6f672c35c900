import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from welfare_bandits import BANDITS, BETA, VALUE, WEIGHTS, mirror_ascent, objective

from torchrl_maxmin.welfare import (
    ADVERSARIES,
    AlphaFair,
    CVaR,
    EntropyRegularized,
    ExponentiatedGradient,
    FixedWeights,
    HardMin,
    KLBall,
    Nash,
    ProjectedGradient,
    Regret,
    SoftMin,
    WelfareAdversary,
    make_adversary,
)
from torchrl_maxmin.welfare.adversaries import project_to_simplex

MAKERS = {
    "hard_min": lambda k: HardMin(k),
    "exponentiated_gradient": lambda k: ExponentiatedGradient(k, step_size=0.3, scale=2.0),
    "entropy_regularized": lambda k: EntropyRegularized(k),
    "projected_gradient": lambda k: ProjectedGradient(k, step_size=0.3, scale=2.0),
    "welfare": lambda k: WelfareAdversary(k, KLBall(0.2)),
    "fixed": lambda k: FixedWeights(torch.full((k,), 1.0 / k)),
}
OPTIONS = {"step_decay": 0.1, "optimistic": True, "ema": 0.5}
each_adversary = pytest.mark.parametrize("name", MAKERS)


def test_hard_min_is_the_argmin_with_ties_to_the_first():
    adversary = HardMin(3)
    assert adversary.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert adversary.update(torch.tensor([0.4, 0.1, 0.1])).tolist() == [0.0, 1.0, 0.0]
    assert adversary.update(torch.tensor([-1.0, 0.1, 0.1])).tolist() == [1.0, 0.0, 0.0]


def test_exponentiated_gradient_by_hand():
    adversary = ExponentiatedGradient(2, step_size=0.5, scale=2.0)
    adversary.update(torch.tensor([1.0, 3.0]))
    weights = adversary.update(torch.tensor([1.0, 0.0]))
    # exponents add up: -(0.5 / 2) * (1 + 1) and -(0.5 / 2) * (3 + 0)
    expected = torch.tensor([-0.5, -0.75], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=0)


def test_exponentiated_gradient_comes_back_from_a_weight_below_the_smallest_float():
    adversary = ExponentiatedGradient(2, step_size=1.0)
    adversary.update(torch.tensor([0.0, 500.0]))
    assert adversary.weights[1] == 0.0
    adversary.update(torch.tensor([500.0, 0.0]))
    torch.testing.assert_close(adversary.weights, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("eta_tau", [0.1, 0.5, 1.0])
def test_entropy_regularized_fixed_point_is_the_softmin(eta_tau):
    utilities = torch.tensor([0.3, -0.1, 0.05])
    adversary = EntropyRegularized(3, tau=0.1, eta_tau=eta_tau, scale=2.0)
    for _ in range(300):
        weights = adversary.update(utilities)
    torch.testing.assert_close(weights, SoftMin(0.1 * 2.0).weights(utilities))
    torch.testing.assert_close(weights, (-utilities / 0.2).softmax(0))


def test_entropy_regularized_first_step_by_hand():
    adversary = EntropyRegularized(2, tau=0.25, eta_tau=0.5, scale=1.0)
    adversary.update(torch.tensor([0.0, 1.0]))
    weights = adversary.update(torch.tensor([0.0, 0.0]))
    # eta = 2: log-weights (0, -2), then halved
    torch.testing.assert_close(weights, torch.tensor([0.0, -1.0]).softmax(0))


def test_fixed_weights_do_not_move():
    adversary = FixedWeights([0.75, 0.25])
    assert adversary.update(torch.tensor([5.0, -5.0])).tolist() == [0.75, 0.25]


@each_adversary
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=8))
def test_weights_stay_on_the_simplex(name, rounds):
    adversary = MAKERS[name](3)
    for utilities in rounds:
        weights = adversary.update(torch.tensor(utilities))
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)


@each_adversary
def test_one_group_has_weight_one_exactly(name):
    adversary = MAKERS[name](1)
    for utility in (3.0, -1e6, 0.1):
        assert adversary.update(torch.tensor([utility])).tolist() == [1.0]
    assert adversary.weights.tolist() == [1.0]


@each_adversary
def test_state_dict_round_trip_continues_bit_equal(name):
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randn(10, 3, generator=generator)
    straight, resumed = MAKERS[name](3), MAKERS[name](3)
    for utilities in rounds[:5]:
        straight.update(utilities)
    resumed.load_state_dict(straight.state_dict())
    assert torch.equal(resumed.weights, straight.weights)
    for utilities in rounds[5:]:
        assert torch.equal(straight.update(utilities), resumed.update(utilities))


@each_adversary
def test_the_returned_weights_are_a_copy(name):
    adversary = MAKERS[name](2)
    first = adversary.update(torch.tensor([0.0, 1.0]))
    kept = first.clone()
    adversary.update(torch.tensor([5.0, 0.0]))
    assert torch.equal(first, kept)


@each_adversary
@pytest.mark.parametrize(
    ("utilities", "match"),
    [
        ([float("nan"), 0.0], "NaN"),
        ([float("-inf"), 0.0], "infinite"),
        ([0.0, 0.0, 0.0], "Expected the utilities of 2 groups"),
        ([[0.0, 0.0]], "average over samples"),
    ],
    ids=["nan", "inf", "length", "batch"],
)
def test_bad_utilities_raise_and_leave_the_state(name, utilities, match):
    adversary = MAKERS[name](2)
    before = adversary.weights.clone()
    with pytest.raises(ValueError, match=match):
        adversary.update(torch.tensor(utilities))
    assert torch.equal(adversary.weights, before)


def test_factory():
    assert sorted(ADVERSARIES) == sorted(MAKERS)
    assert isinstance(make_adversary("entropy_regularized", 2, tau=0.1), EntropyRegularized)
    assert make_adversary("fixed", 2, weights=[0.9, 0.1]).weights.tolist() == pytest.approx([0.9, 0.1])
    assert make_adversary("fixed", 4).weights.tolist() == [0.25] * 4
    with pytest.raises(ValueError, match=r"Unknown adversary 'argmin'.*entropy_regularized.*hard_min"):
        make_adversary("argmin", 2)
    with pytest.raises(ValueError, match="2 fixed weights were given for 3 groups"):
        make_adversary("fixed", 3, weights=[0.5, 0.5])


def test_any_welfare_by_name_with_its_settings_and_the_options():
    adversary = make_adversary("welfare", 2, welfare="cvar", level=0.5, ema=0.9)
    assert isinstance(adversary.welfare, CVaR)
    assert (adversary.welfare.level, adversary.ema) == (0.5, 0.9)
    with pytest.raises(ValueError, match="an object was given"):
        make_adversary("welfare", 2, welfare=Nash(), level=0.5)
    with pytest.raises(ValueError, match="Unknown welfare"):
        make_adversary("welfare", 2, welfare="rawls")


def test_a_welfare_adversary_follows_a_gradient_that_overflows():
    weights = WelfareAdversary(2, AlphaFair(300.0)).update(torch.tensor([1e-3, 1e-2]))
    assert weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("welfare", [Nash(), Regret(AlphaFair(2.0), [1.0, 1.0])])
def test_optimism_would_leave_where_a_fair_welfare_is_defined(welfare):
    with pytest.raises(ValueError, match="optimistic extrapolates"):
        WelfareAdversary(2, welfare, optimistic=True)


def test_a_decaying_answer_goes_part_of_the_way():
    adversary = HardMin(2, step_decay=3.0)
    assert adversary.update(torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]
    # the second step is half of the first: 1 / sqrt(1 + 3)
    assert adversary.update(torch.tensor([1.0, 0.0])).tolist() == [0.5, 0.5]
    welfare = WelfareAdversary(2, Nash(), step_decay=3.0)
    welfare.update(torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(welfare.update(torch.tensor([0.25, 0.75])), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("name", BANDITS)
def test_a_decaying_hard_minimum_closes_what_its_constant_step_leaves(name):
    rewards = BANDITS[name]
    gaps = []
    for step_decay in (0.0, 1.0):
        adversary = HardMin(rewards.shape[1], step_decay=step_decay)
        values, _ = mirror_ascent(adversary, rewards, 0.1, 3000)
        gaps.append((VALUE[name] - values).mean().item())
    assert gaps[1] < 0.3 * gaps[0]


@each_adversary
def test_a_state_from_before_averages_still_loads(name):
    adversary = MAKERS[name](3)
    adversary.update(torch.tensor([0.3, 0.1, 0.2]))
    added = ("num_updates", "average_weights", "last_utilities", "smoothed_utilities")
    old = {key: value for key, value in adversary.state_dict().items() if key not in added}
    resumed = MAKERS[name](3)
    resumed.load_state_dict(old)
    assert torch.equal(resumed.weights, adversary.weights)
    weights = resumed.update(torch.tensor([0.2, 0.3, 0.1]))
    torch.testing.assert_close(resumed.average_weights, weights)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HardMin(0), "at least 1"),
        (lambda: ExponentiatedGradient(2, step_size=-1.0), "step_size"),
        (lambda: ExponentiatedGradient(2, step_size=1.0, scale=0.0), "scale"),
        (lambda: EntropyRegularized(2, tau=0.0), "tau"),
        (lambda: EntropyRegularized(2, eta_tau=1.5), "eta_tau"),
        (lambda: FixedWeights([0.5, 0.6]), "sum to 1"),
        (lambda: ProjectedGradient(2, step_size=-1.0), "step_size"),
        (lambda: ProjectedGradient(2, step_size=1.0, scale=0.0), "scale"),
        (lambda: HardMin(2, step_decay=-1.0), "step_decay"),
        (lambda: HardMin(2, ema=1.0), "ema"),
    ],
)
def test_bad_settings_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", BANDITS)
def test_entropy_regularized_is_within_its_bias_of_the_max_min(name):
    rewards = BANDITS[name]
    adversary = EntropyRegularized(rewards.shape[1], tau=0.05)
    values, _ = mirror_ascent(adversary, rewards, step_size=0.1, steps=2000)
    gap = VALUE[name] - values
    assert adversary.bias == pytest.approx(0.05 * math.log(rewards.shape[1]), rel=1e-6)
    assert gap.max().item() <= adversary.bias
    assert gap.min().item() >= -1e-4
    # It settles, where the hard minimum goes on alternating.
    assert (gap.max() - gap.min()).item() < 1e-6


@pytest.mark.parametrize("name", BANDITS)
def test_exponentiated_gradient_reaches_the_max_min(name):
    rewards = BANDITS[name]
    values, _ = mirror_ascent(ExponentiatedGradient(rewards.shape[1], 0.1), rewards, 0.5, 1000)
    assert (VALUE[name] - values).abs().max().item() < 1e-3


@pytest.mark.parametrize("name", BANDITS)
def test_hard_min_oscillates_with_an_amplitude_set_by_the_step(name):
    rewards = BANDITS[name]
    gaps = {}
    for step_size in (0.5, 0.1):
        values, weights = mirror_ascent(HardMin(rewards.shape[1]), rewards, step_size, 3000)
        gaps[step_size] = (VALUE[name] - values).mean().item()
        switches = (weights.argmax(-1).diff() != 0).sum().item()
        assert switches >= 90
    assert gaps[0.5] >= 0.005
    assert 3.0 < gaps[0.5] / gaps[0.1] < 8.0


@pytest.mark.parametrize("name", BANDITS)
def test_the_average_policy_of_a_small_step_is_near_the_max_min(name):
    """The mean of the second half's policies against the hard minimum, step .1."""
    rewards = BANDITS[name]
    adversary, logits, seen = HardMin(rewards.shape[1]), torch.zeros(len(rewards)).double(), []
    for _ in range(3000):
        log_policy = logits.log_softmax(-1)
        policy = log_policy.exp()
        gradient = rewards @ adversary.update(policy @ rewards).double() - BETA * log_policy
        logits = logits + 0.1 * (gradient - policy @ gradient)
        seen.append(policy)
    average = torch.stack(seen[1500:]).mean(0)
    assert VALUE[name] - objective(average.log(), rewards).item() <= 0.005
    torch.testing.assert_close(
        adversary.average_weights.double(), torch.tensor(WEIGHTS[name]).double(), atol=0.05, rtol=0
    )


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_projection_onto_the_simplex(values):
    point = torch.tensor(values, dtype=torch.float64)
    found = project_to_simplex(point)
    assert (found >= 0).all()
    assert found.sum().item() == pytest.approx(1.0, abs=1e-9)
    # the nearest: the residual makes an obtuse angle with the way to every corner
    corners = torch.eye(len(values), dtype=torch.float64)
    assert ((corners - found) @ (point - found) <= 1e-8).all()


def test_a_welfare_adversary_has_the_direction_of_the_gradient():
    utilities = torch.tensor([0.8, 0.2, 0.5])
    weights = WelfareAdversary(3, Nash()).update(utilities)
    torch.testing.assert_close(weights, (1 / utilities) / (1 / utilities).sum())


def test_options_by_hand():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    optimistic = HardMin(2, optimistic=True)
    assert optimistic.update(first).tolist() == [0.0, 1.0]
    assert optimistic.update(second).tolist() == [1.0, 0.0]  # 2 * (0, 3) - (1, 0) = (-1, 6)
    smoothed = HardMin(2, ema=0.5)
    smoothed.update(first)
    smoothed.update(second)
    assert smoothed.smoothed_utilities.tolist() == [0.5, 1.5]
    decayed = ExponentiatedGradient(2, step_size=1.0, step_decay=3.0)
    decayed.update(first)
    before = decayed.log_weights.clone()
    decayed.update(first)  # the second step is half of the first: 1 / sqrt(1 + 3)
    log_ratio = (decayed.log_weights - before).diff().item()
    assert log_ratio == pytest.approx(0.5, abs=1e-6)
    assert HardMin(2, **OPTIONS).extra_repr() == "num_groups=2, step_decay=0.1, optimistic=True, ema=0.5"


@pytest.mark.parametrize("name", sorted(ADVERSARIES.keys() - {"fixed"}))  # which takes no options
def test_options_and_averages_survive_a_state_dict(name):
    settings_of = {
        "hard_min": {},
        "exponentiated_gradient": {"step_size": 0.3},
        "entropy_regularized": {},
        "projected_gradient": {"step_size": 0.3},
        "welfare": {"welfare": KLBall(0.2)},
    }
    straight, resumed = (make_adversary(name, 3, **settings_of[name], **OPTIONS) for _ in range(2))
    rounds = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    seen = [straight.update(utilities) for utilities in rounds[:4]]
    resumed.load_state_dict(straight.state_dict())
    for utilities in rounds[4:]:
        seen.append(straight.update(utilities))
        assert torch.equal(seen[-1], resumed.update(utilities))
    torch.testing.assert_close(straight.average_weights, torch.stack(seen).mean(0))


def test_optimism_settles_a_game_that_plain_descent_cycles_in():
    """Matching pennies between two gradient players; the solution is the middle."""

    def last(optimistic):
        rows = ExponentiatedGradient(2, 0.1, optimistic=optimistic)
        columns = ExponentiatedGradient(2, 0.1, optimistic=optimistic)
        columns.log_weights.copy_(torch.tensor([0.7, 0.3]).log())
        for _ in range(4000):
            x, y = rows.weights.clone(), columns.weights.clone()
            rows.update(torch.stack([y[0] - y[1], y[1] - y[0]]))
            columns.update(torch.stack([x[1] - x[0], x[0] - x[1]]))
        return (columns.weights - 0.5).abs().max().item()

    assert last(True) < 0.01
    assert last(False) > 0.2
