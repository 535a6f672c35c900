"""Fishwood: two resources that a worker gathers in two places, moved hundreds at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs.batched import BatchedEnv
from torchrl_maxmin.envs.exact import VectorMDP

__all__ = ["FishwoodEnv"]

WOODS = 1  # where every episode starts; the other place, 0, is the water


class FishwoodEnv(BatchedEnv):
    """The dynamics of MO-Gymnasium's ``fishwood-v0``: one place has fish, the other has wood.

    Every step gathers, with a chance, one unit of what the current place has (index 0 fish, 1 wood), and the
    action says where to be next. The last of ``horizon`` steps is terminated and truncated both, as there.
    With the default chances and horizon max-min is 18 of each: 180 steps of fishing, 20 of wood. Origin:
    Roijers, Steckelmacher and Nowe, Multi-objective reinforcement learning for the expected utility of the
    return (2018).

    Args:
        num_envs: copies N.
        fish_chance: of a fish in a step at the water.
        wood_chance: of wood in a step in the woods.
        horizon: steps of an episode.
        seed: of what is gathered.
        device: where tensors live.

    Entries: ``observation`` [N, 2], the place one-hot (water, woods), without the time; ``state`` [N, 2], the
    place and the time; ``reward`` [N, 2].

    Raises:
        UserError: on chances outside [0, 1] or a horizon below 1.

    Example:
        >>> from torchrl_maxmin.envs import FishwoodEnv, solve_max_min
        >>> env = FishwoodEnv(256)
        >>> env.rollout(3)["next", "reward"].shape
        torch.Size([256, 3, 2])
        >>> round(solve_max_min(env.process()).value, 6)
        18.0
    """

    def __init__(
        self,
        num_envs: int,
        *,
        fish_chance: float = 0.1,
        wood_chance: float = 0.9,
        horizon: int = 200,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, chance in (("fish_chance", fish_chance), ("wood_chance", wood_chance)):
            if not 0 <= chance <= 1:
                raise UserError(f"{name} must be in [0, 1], got {chance}")
        if horizon < 1:
            raise UserError(f"horizon must be at least 1, got {horizon}")
        sizes = {"observation_size": 2, "state_size": 2, "num_actions": 2, "num_groups": 2}
        super().__init__(num_envs, **sizes, truncates=True, seed=seed, device=device)
        self.horizon = horizon
        self.register_buffer(
            "_chances", torch.tensor([fish_chance, wood_chance], device=device), persistent=False
        )
        self.register_buffer("_places", torch.eye(2, device=device), persistent=False)
        self.register_buffer("_start", torch.tensor([WOODS, 0], device=device), persistent=False)

    def _first(self) -> Tensor:
        return self._start.repeat(self.num_envs, 1)

    def _move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        place, time = state.unbind(-1)
        gathered = self._uniform(self.num_envs) < self._chances[place]
        reward = self._places[place] * gathered[:, None]
        following = torch.stack([action, time + 1], -1)
        last = following[:, 1:] == self.horizon
        return following, reward, last, last.clone()

    def _look(self, state: Tensor) -> Tensor:
        return self._places[state[:, 0]]

    def process(self) -> VectorMDP:
        """The exact process of ``2 * horizon`` states, ``2 * time + place``, without a discount."""
        transition = np.tile(np.eye(2), (2, 1, 1))
        reward = np.repeat(np.diag(self._chances.double().cpu().numpy())[:, None], 2, axis=1)
        return VectorMDP.with_horizon(transition, reward, np.eye(2)[WOODS], self.horizon)

    def observations(self) -> Tensor:
        """The observation of every state of :meth:`process` [2 * horizon, 2], in its order."""
        return self._places.repeat(self.horizon, 1)
