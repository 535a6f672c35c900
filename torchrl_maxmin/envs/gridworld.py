"""A small grid with a goal for each of two groups, as pictured in Appendix G of MaxMin-RLHF."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs.batched import BatchedEnv
from torchrl_maxmin.envs.exact import VectorMDP

__all__ = ["GridworldEnv"]

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))  # up, right, down, left, stay


class GridworldEnv(BatchedEnv):
    """A walk from the top left; group 0 has its goal at the top right, group 1 at the bottom right.

    Every step that ends at a group's goal pays that group 1, and every move (not ``stay``) costs both groups
    ``move_cost``, also one into a wall, which goes nowhere. The episode terminates after ``horizon`` steps.
    The picture is that of arXiv 2402.08925, Appendix G, which gives no numbers: rewards and horizon are ours.

    Where every step at a goal pays, time at the two goals competes, and the max-min policy mixes: with the
    default, 0.375 of its episodes stay at the first goal for ever and the others go on to the second at once
    (4.375 for each group). With ``once`` a goal pays at its first visit alone, like goods that are delivered,
    and max-min visits both in every episode.

    Args:
        num_envs: copies N.
        size: cells of a side.
        horizon: steps of an episode.
        stay: whether a fifth action stays where it is.
        move_cost: of a move, for both groups.
        once: a goal pays only at the first visit in an episode.
        seed: unused by the dynamics, which have no chance in them.
        device: where tensors live.

    Entries: ``observation`` [N, size ** 2 + horizon], the position one-hot and the time one-hot (zeros at the
    end), and with ``once`` two columns more, 1 where a goal was visited: with a finite horizon and two goals
    to be served, a policy needs the time. ``state`` [N, 3], the cell (row by row), the time, and the goals
    visited (bit k for group k; 0 without ``once``). ``action`` [N], up, right, down, left (, stay).
    ``reward`` [N, 2].

    Raises:
        UserError: on a size below 2 or a horizon below 1.

    Example:
        >>> from torchrl_maxmin.envs import GridworldEnv, solve_max_min
        >>> env = GridworldEnv(8)
        >>> env.rollout(12)["observation"].shape
        torch.Size([8, 12, 28])
        >>> round(solve_max_min(env.process()).value, 6)
        4.375
    """

    def __init__(
        self,
        num_envs: int,
        *,
        size: int = 4,
        horizon: int = 12,
        stay: bool = False,
        move_cost: float = 0.0,
        once: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (("size", size, 2), ("horizon", horizon, 1)):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        cells, marks, actions = size * size, 2 if once else 0, 5 if stay else 4
        super().__init__(
            num_envs,
            observation_size=cells + horizon + marks,
            state_size=3,
            num_actions=actions,
            num_groups=2,
            seed=seed,
            device=device,
        )
        self.size, self.horizon, self.once, self._actions = size, horizon, once, actions
        rows, columns = np.divmod(np.arange(cells), size)
        steps = np.array(MOVES[:actions])
        there = (
            np.clip(rows[:, None] + steps[:, 0], 0, size - 1),
            np.clip(columns[:, None] + steps[:, 1], 0, size - 1),
        )
        pays = np.zeros((cells, 2))
        pays[size - 1, 0] = pays[cells - 1, 1] = 1.0
        costs = np.array([0.0 if move == (0, 0) else move_cost for move in MOVES[:actions]])
        tables = {
            "_following": there[0] * size + there[1],  # [cells, A]
            "_pays": pays.astype(np.float32),  # [cells, 2]
            "_costs": costs.astype(np.float32)[:, None],  # [A, 1]
            "_arrivals": (pays @ [1, 2]).astype(np.int64),  # [cells], the visited bits of a cell
            "_cells": np.eye(cells, dtype=np.float32),
            "_times": np.eye(horizon + 1, horizon, dtype=np.float32),
            "_visits": np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=np.float32)[:, :marks],
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.as_tensor(table, device=device), persistent=False)

    def _first(self) -> Tensor:
        return torch.zeros(self.num_envs, 3, dtype=torch.int64, device=self.device)

    def _move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        cell, time, visited = state.unbind(-1)
        cell, time = self._following[cell, action], time + 1
        reward = self._pays[cell] - self._costs[action]
        if self.once:
            reward = reward - self._pays[cell] * self._visits[visited]
            visited = visited | self._arrivals[cell]
        return torch.stack([cell, time, visited], -1), reward, (time == self.horizon)[:, None], None

    def _look(self, state: Tensor) -> Tensor:
        cell, time, visited = state.unbind(-1)
        parts = [self._cells[cell], self._times[time]]
        return torch.cat([*parts, self._visits[visited]] if self.once else parts, -1)

    def process(self) -> VectorMDP:
        """The exact process, without a discount; its states are those of :meth:`states`."""
        following, pays = self._following.cpu().numpy(), self._pays.double().cpu().numpy()
        costs, arrivals = self._costs.double().cpu().numpy(), self._arrivals.cpu().numpy()
        cells, marks = len(following), 4 if self.once else 1
        transition = np.zeros((cells * marks, self._actions, cells * marks))
        reward = np.zeros((cells * marks, self._actions, 2))
        for cell in range(cells):
            for visited in range(marks):
                for action in range(self._actions):
                    there, here = following[cell, action], cell * marks + visited
                    after = visited | arrivals[there] if self.once else 0
                    fresh = [1 - (visited >> k & 1) for k in range(2)]
                    transition[here, action, there * marks + after] = 1.0
                    reward[here, action] = pays[there] * fresh - costs[action]
        return VectorMDP.with_horizon(transition, reward, np.eye(cells * marks)[0], self.horizon)

    def states(self) -> Tensor:
        """Every state of :meth:`process` [S, 3], in its order: by time, then cell, then goals visited."""
        sizes = (self.horizon, len(self._cells), 4 if self.once else 1)
        time, cell, visited = torch.cartesian_prod(
            *(torch.arange(n, device=self.device) for n in sizes)
        ).unbind(-1)
        return torch.stack([cell, time, visited], -1)

    def observations(self) -> Tensor:
        """The observation of every state of :meth:`process` [S, D], in its order."""
        return self._look(self.states())
