"""Fruit tree: a walk from the root of a full binary tree to one of its leaves, hundreds at a time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs.batched import BatchedEnv
from torchrl_maxmin.envs.exact import VectorMDP
from torchrl_maxmin.envs.optional import require_mo_gymnasium

__all__ = ["FruitTreeEnv"]


class FruitTreeEnv(BatchedEnv):
    """The dynamics of MO-Gymnasium's ``fruit-tree-v0``: every leaf holds a fruit of K nutrients.

    An action goes to the left (0) or the right (1) child; reaching a leaf pays its fruit and ends the
    episode. Mixtures of leaves do better for the worst nutrient than any leaf: max-min is 3.7982, 3.7987 and
    3.9301 at depth 5, 6 and 7. Origin: Yang, Sun and Narasimhan, arXiv 1908.08342.

    Args:
        num_envs: copies N.
        depth: steps of an episode; 5, 6 or 7 with the fruits of MO-Gymnasium.
        fruits: [2 ** depth, K], the leaves from left to right; None reads MO-Gymnasium's own table.
        seed: unused by the dynamics, which have no chance in them.
        device: where tensors live.

    Entries: ``observation`` [N, 2 ** depth - 1], the inner node one-hot, row by row, zeros at a leaf;
    ``state`` [N, 1], the node; ``reward`` [N, K].

    Raises:
        UserError: without MO-Gymnasium where its table is needed, or on a table that does not fit the depth.

    Example:
        >>> from torchrl_maxmin.envs import FruitTreeEnv
        >>> env = FruitTreeEnv(4, depth=1, fruits=[[1.0, 0.0], [0.0, 1.0]])
        >>> env.process().returns([[0.25, 0.75]]).tolist()
        [0.25, 0.75]
    """

    def __init__(
        self,
        num_envs: int,
        *,
        depth: int = 6,
        fruits: ArrayLike | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        table = _shipped_fruits(depth) if fruits is None else np.asarray(fruits, dtype=np.float64)
        if depth < 1 or table.ndim != 2 or len(table) != 2**depth:
            raise UserError(
                f"a tree of depth {depth} (at least 1) needs fruits of shape [2 ** depth, K]; got "
                f"{list(table.shape)}"
            )
        inner, groups = 2**depth - 1, table.shape[1]
        sizes = {"observation_size": inner, "state_size": 1, "num_actions": 2, "num_groups": groups}
        super().__init__(num_envs, **sizes, seed=seed, device=device)
        self.depth, self.fruits, self._inner = depth, table, inner
        paid = torch.as_tensor(
            np.vstack([np.zeros((inner, groups)), table]), dtype=torch.float32, device=device
        )
        self.register_buffer("_paid", paid, persistent=False)
        self.register_buffer("_looks", torch.eye(2 * inner + 1, inner, device=device), persistent=False)

    def _first(self) -> Tensor:
        return torch.zeros(self.num_envs, 1, dtype=torch.int64, device=self.device)

    def _move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        following = 2 * state + 1 + action[:, None]
        return following, self._paid[following[:, 0]], following >= self._inner, None

    def _look(self, state: Tensor) -> Tensor:
        return self._looks[state[:, 0]]

    def process(self) -> VectorMDP:
        """The exact process of the ``2 ** depth - 1`` inner nodes, row by row, without a discount."""
        nodes = self._inner
        transition, reward = np.zeros((nodes, 2, nodes)), np.zeros((nodes, 2, self.fruits.shape[1]))
        for node in range(nodes):
            for action in range(2):
                child = 2 * node + 1 + action
                if child < nodes:
                    transition[node, action, child] = 1.0
                else:
                    reward[node, action] = self.fruits[child - nodes]
        return VectorMDP(transition, reward, np.eye(nodes)[0], gamma=1.0)

    def observations(self) -> Tensor:
        """The observation of every state of :meth:`process` [S, S], in its order."""
        return self._looks[: self._inner].clone()


def _shipped_fruits(depth: int) -> np.ndarray:
    home = "mo_gymnasium.envs.fruit_tree.fruit_tree"
    tables = require_mo_gymnasium("a fruit tree without a table of your own as fruits", home).FRUITS
    if str(depth) not in tables:
        raise UserError(
            f"MO-Gymnasium has fruits for depth {', '.join(sorted(tables))}, not {depth}; give a table "
            "of your own as fruits [2 ** depth, K]"
        )
    return np.asarray(tables[str(depth)], dtype=np.float64)
