"""The game on tabular processes: its gap closes, and says how far the optimum is."""

import numpy as np
import pytest
from scripts import on_path

from torchrl_maxmin.envs.exact import VectorMDP, solve_max_min

on_path("rl")

from game import play_game  # noqa: E402


def random_processes(count):
    rng = np.random.default_rng(0)
    return [VectorMDP.random(*rng.integers(2, 7, size=3), seed=seed) for seed in range(count)]


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_the_average_iterate_closes_the_duality_gap(count):
    near = 0
    for mdp in random_processes(count):
        solution, value = play_game(mdp, 5000 if count == 200 else 1500), solve_max_min(mdp).value
        assert solution.gap >= -1e-8
        # the gap bounds the distance to the optimum, which no policy is above
        assert -1e-6 <= value - solution.utilities.min() <= solution.gap + 1e-6
        near += solution.gap <= 1e-2 * abs(value)
    assert near >= 0.99 * count


def test_it_stops_when_it_is_near_enough():
    mdp = random_processes(1)[0]
    solution = play_game(mdp, 5000, relative_gap=0.05, check_every=10)
    assert solution.iterations < 5000
    assert solution.gap <= 0.05 * solution.utilities.min()
    np.testing.assert_allclose(mdp.returns(solution.policy), solution.utilities)


def test_one_group_is_the_ordinary_optimum():
    mdp = VectorMDP.random(4, 3, 1, seed=5)
    solution = play_game(mdp, 3000)
    assert solution.weights.tolist() == [1.0]
    assert solution.utilities[0] == pytest.approx(solve_max_min(mdp).value, rel=1e-3)


def test_mistakes():
    endless = VectorMDP.random(2, 2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        play_game(endless, 0)
    ending = VectorMDP(np.full((1, 1, 1), 0.5), np.ones((1, 1, 2)), np.ones(1), gamma=1.0)
    with pytest.raises(ValueError, match="below 1"):
        play_game(ending)
