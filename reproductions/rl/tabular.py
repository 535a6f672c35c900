"""200 random tabular processes: how far the game's averaged play is from its exact value."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from game import play_game

from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.envs import VectorMDP, solve_max_min

BAR = 1e-2


def play_random_processes(count: int = 200, iterations: int = 5000) -> dict[str, Any]:
    """Play ``count`` processes with 2 to 6 states, actions and groups, gamma .95.

    Returns:
        ``count``, ``within`` (gap at most 1% of the value), ``largest`` and ``smallest`` relative gap,
        ``farthest`` (largest distance of the least return from the linear programme's value, relative),
        ``programmes`` (largest distance of that value from its policy's own least return), ``seconds``.
    """
    rng, gaps, distances, programmes = np.random.default_rng(0), [], [], []
    start = time.perf_counter()
    with progress_bar("random processes", count) as advance:
        for seed in range(count):
            mdp = VectorMDP.random(*rng.integers(2, 7, size=3), seed=seed)
            played, exact = play_game(mdp, iterations), solve_max_min(mdp)
            gaps.append(played.gap / exact.value)
            distances.append((exact.value - played.utilities.min()) / exact.value)
            programmes.append(abs(mdp.returns(exact.policy).min() - exact.value))
            advance()
    return {
        "count": count,
        "iterations": iterations,
        "within": int(sum(gap <= BAR for gap in gaps)),
        "largest": max(gaps),
        "smallest": min(gaps),
        "farthest": max(distances),
        "programmes": max(programmes),
        "seconds": time.perf_counter() - start,
    }
