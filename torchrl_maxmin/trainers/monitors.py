"""Monitors of a policy run: what is logged beside the metrics of PPO, and never ends a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase

from torchrl_maxmin.core.distributed import of_every_process, over_ranks
from torchrl_maxmin.core.errors import LostRankError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.text_escape import terminal
from torchrl_maxmin.rewards.functions import FunctionRewards, FunctionTimeout

__all__ = ["HarmlessMonitor", "Metrics", "Monitor", "monitors_of_rewards"]

Metrics = dict[str, float]
Monitor = Callable[[int, TensorDictBase, Metrics], Metrics]


class HarmlessMonitor:
    """A monitor whose failures end no run: they are said once, and its metrics are left out.

    One that took too long is not called again.

    Args:
        monitor: gives metrics of an iteration.

    Example:
        >>> HarmlessMonitor(lambda iteration, batch, metrics: {"squared": iteration**2})(3, None, {})
        {'squared': 9}
    """

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self._told = self._over = False

    def __call__(self, iteration: int, batch: TensorDictBase, metrics: Metrics) -> Metrics:
        """Return its metrics that are finite."""
        if self._over:
            return {}
        try:
            found = self.monitor(iteration, batch, metrics)
            finite = {name: value for name, value in found.items() if math.isfinite(value)}
        except LostRankError:
            raise
        except FunctionTimeout as error:
            self._over = True
            return self._warn(iteration, f"{terminal(error, 300)}; it is not called again")
        except Exception as error:
            return self._warn(iteration, terminal(error, 300) or type(error).__name__)
        if len(finite) < len(found):
            self._warn(iteration, f"{', '.join(found.keys() - finite.keys())} is NaN or infinite")
        return finite

    def _warn(self, iteration: int, what: str) -> Metrics:
        if not self._told:
            line = f"warning: a monitor fails at iteration {iteration}, and its metrics are left out: {what}"
            console.print(line, markup=False, soft_wrap=True)
        self._told = True
        return {}


def monitors_of_rewards(functions: Sequence[FunctionRewards]) -> list[Monitor]:
    """Log the means of rewards that are never trained on, as ``monitor/{k}/mean``: a monitor a function."""
    monitors: list[Monitor] = []
    first = 0
    for rewards in functions:
        monitors.append(_means(rewards, first))
        first += rewards.num_groups
    return monitors


def _means(rewards: FunctionRewards, first: int) -> Monitor:
    def score(part: TensorDictBase) -> torch.Tensor:
        return of_every_process(rewards, part)

    def monitor(iteration: int, batch: TensorDictBase, metrics: Metrics) -> Metrics:
        means = over_ranks(score, batch.cpu()).nanmean(0).tolist()
        # a group that no response of the batch has a reward for has no mean
        return {f"monitor/{first + k}/mean": mean for k, mean in enumerate(means) if not math.isnan(mean)}

    return monitor
