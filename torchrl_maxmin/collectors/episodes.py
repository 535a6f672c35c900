"""Measure what a policy gives each group in an environment: sampled, and exactly where that can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, StepCounter, TransformedEnv
from torchrl.envs.transforms import Compose, Transform
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import late_bar
from torchrl_maxmin.envs.exact import VectorMDP, solve_max_min
from torchrl_maxmin.stats.clustered import interval_over_users
from torchrl_maxmin.stats.interval import Interval, worst_of

__all__ = ["episode_returns", "episode_summary", "exact_summary", "policy_table"]


@torch.no_grad()
def episode_returns(
    env: EnvBase, policy: TensorDictModuleBase, num_episodes: int, *, max_steps: int | None = None
) -> Tensor:
    """Sample the returns of whole episodes under the stochastic policy.

    Every copy of the environment gives its first ``ceil(num_episodes / N)`` episodes: those that end
    first would be the short ones. A bar shows how many have ended once that takes two seconds.

    Args:
        env: batch size [N], writing ``("next", "episode_group_reward")`` [N, K], as
            :class:`~torchrl_maxmin.envs.GroupReward` does.
        policy: reads ``observation``, writes ``action``.
        num_episodes: at least so many.
        max_steps: of an episode, on average; a copy that needs more is an error.

    Returns:
        [E, K], float64.

    Raises:
        UserError: if a copy needs more than ``max_steps`` an episode, as one does that never ends.
    """
    (copies,) = env.batch_size
    quota = -(-num_episodes // copies)
    counts, rows, steps = torch.zeros(copies, dtype=torch.int64), [], 0
    total = quota * copies
    with set_exploration_type(ExplorationType.RANDOM), late_bar("playing episodes", total) as reach:
        state = env.reset()
        while bool((counts < quota).any()):
            step, state = env.step_and_maybe_reset(policy(state))
            ended = step["next", "done"].reshape(copies).cpu() & (counts < quota)
            if bool(ended.any()):
                rows.append(step["next", "episode_group_reward"].cpu()[ended].double())
                counts += ended
            reach(int(counts.sum()))
            steps += 1
            if max_steps is not None and steps >= max_steps * quota and bool((counts < quota).any()):
                raise UserError(
                    f"an episode did not end in {max_steps} steps; cut episodes by --max_episode_steps, or "
                    "take more steps a rollout by --frames_per_batch"
                )
    return torch.cat(rows)


def episode_summary(returns: Tensor, confidence: float = 0.95) -> dict[str, Any]:
    """Estimate every group's mean return, the worst group's, and the mean of the episodes' minima.

    Args:
        returns: [E, K].
        confidence: of the intervals, each by itself.

    Returns:
        ``episodes``; ``utilities`` {group: {mean, low, high, method}}; ``worst_group``, the least mean, which
        is biased low; ``worst_group_interval``, which allows for that; ``mean_of_mins``
        {mean, low, high, method}.

    Raises:
        ValueError: for fewer than two episodes, which give no interval.

    Example:
        >>> episode_summary(torch.tensor([[1.0, 4.0], [3.0, 4.0]]))["utilities"]["0"]["mean"]
        2.0
    """
    if len(returns) < 2:
        raise ValueError(f"an interval needs at least two episodes, got {len(returns)}")

    def interval(values: Tensor) -> Interval:
        settings: dict[str, Any] = {"scale": "identity", "num_resamples": 0, "warn": False}
        return interval_over_users(values.numpy(), unit="episodes", confidence=confidence, **settings)

    groups = interval(returns)
    worst = worst_of(groups)[1].to_dict()
    return {
        "episodes": len(returns),
        "utilities": {str(k): groups.to_dict(k) for k in range(returns.shape[-1])},
        "worst_group": worst["mean"],
        "worst_group_interval": [worst["low"], worst["high"]],
        "mean_of_mins": interval(returns.amin(-1)).to_dict(),
    }


@torch.no_grad()
def policy_table(env: EnvBase, policy: TensorDictModuleBase) -> np.ndarray:
    """Tabulate the chance of every action in every state of the environment's process [S, A].

    Args:
        env: with ``observations()`` [S, D], as the tabular environments have.
        policy: a :class:`~torchrl.modules.ProbabilisticActor` over categorical actions.
    """
    observations = env.observations()
    distribution = policy.get_dist(TensorDict({"observation": observations}, [len(observations)]))
    return distribution.probs.double().cpu().numpy()


def exact_summary(env: EnvBase, policy: TensorDictModuleBase, objective: str) -> dict[str, Any]:
    """Compute exact utilities, and how far from the max-min optimum they are, where the process is known.

    Args:
        env: the environment; its ``process()`` and ``observations()`` are used where it has them, and
            where the process ends all episodes that end.
        policy: the policy.
        objective: what the policy was trained for; the certificate speaks of ``min_of_means`` alone.

    Returns:
        ``exact`` {utilities, worst_group, max_min} or None, and ``certificate`` {value, low, high, reason}.
    """
    process = env.process() if hasattr(env, "process") else None
    if (reason := _why_unknown(env, process)) or process is None:
        return {"exact": None, "certificate": _certificate(None, reason)}
    utilities = process.returns(policy_table(env, policy))
    worst, best = float(utilities.min()), solve_max_min(process).value
    gap: float | None = best - worst
    if objective != "min_of_means":
        gap, reason = None, f"trained for {objective}, which has another optimum"
    exact = {"utilities": utilities.tolist(), "worst_group": worst, "max_min": best}
    return {"exact": exact, "certificate": _certificate(gap, reason)}


def _why_unknown(env: EnvBase, process: VectorMDP | None) -> str | None:
    """Say why the process does not give an episode's mean return; None where it does."""
    if process is None:
        return "the environment's process is not known: there is nothing to compare with"
    if process.gamma < 1:
        return f"the process discounts by {process.gamma:g}, and the returns of episodes are not discounted"
    cutting = [one for one in _transforms(env) if isinstance(one, StepCounter) and one.max_steps is not None]
    return "episodes are cut after a number of steps, and the process goes on" if cutting else None


def _transforms(env: EnvBase) -> Iterator[Transform]:
    while isinstance(env, TransformedEnv):
        yield from env.transform if isinstance(env.transform, Compose) else [env.transform]
        env = env.base_env


def _certificate(gap: float | None, reason: str | None) -> dict[str, Any]:
    return {"value": gap, "low": gap, "high": gap, "reason": reason}
