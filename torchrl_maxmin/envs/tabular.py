"""A tabular decision process with a vector reward as a batched TorchRL environment."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_maxmin.envs.batched import BatchedEnv
from torchrl_maxmin.envs.exact import ROUNDING, VectorMDP

__all__ = ["TabularEnv"]


class TabularEnv(BatchedEnv):
    """Copies of a :class:`~torchrl_maxmin.envs.exact.VectorMDP`, all moved by one tensor step.

    An episode terminates where the process lets it; a process that goes on for ever is to be discounted with
    its ``gamma``, or truncated with :class:`~torchrl.envs.transforms.StepCounter`. What a policy can reach at
    best is known exactly, from :func:`~torchrl_maxmin.envs.exact.solve_max_min`.

    Args:
        mdp: transitions [S, A, S], rewards [S, A, K] and first states [S].
        num_envs: copies N.
        seed: of first states and transitions.
        device: where tensors live.

    Entries: ``observation`` [N, S], the state one-hot, zeros after the end; ``state`` [N, 1], its index, S
    after the end; ``action`` [N] int64; ``reward`` [N, K].

    Example:
        >>> from torchrl_maxmin.envs import TabularEnv
        >>> from torchrl_maxmin.envs.exact import VectorMDP
        >>> env = TabularEnv(VectorMDP.random(states=5, actions=3, groups=2), num_envs=7)
        >>> env.rollout(4)["next", "reward"].shape
        torch.Size([7, 4, 2])
    """

    def __init__(
        self, mdp: VectorMDP, num_envs: int = 1, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        states, actions, groups = mdp.reward.shape
        super().__init__(
            num_envs,
            observation_size=states,
            state_size=1,
            num_actions=actions,
            num_groups=groups,
            seed=seed,
            device=device,
        )
        self.mdp = mdp
        self._actions = actions
        self.register_buffer("_following", self._cumulative(mdp.moves.toarray()), persistent=False)
        self.register_buffer("_starting", self._cumulative(mdp.initial[None]), persistent=False)
        rewards = torch.as_tensor(mdp.reward, dtype=torch.float32, device=device).flatten(0, 1)
        self.register_buffer("_rewards", rewards, persistent=False)
        self.register_buffer("_looks", torch.eye(states + 1, states, device=device), persistent=False)

    def _cumulative(self, chances: object) -> Tensor:
        sums = torch.as_tensor(chances, dtype=torch.float64, device=self.device).cumsum(-1)
        return torch.where(sums >= 1 - ROUNDING, 1.0, sums)

    def _draw(self, cumulative: Tensor) -> Tensor:
        """Indices [N, 1] from cumulative chances [N, S]; S where the chances leave something."""
        point = self._uniform(self.num_envs, 1, dtype=torch.float64)
        return (cumulative <= point).sum(-1, keepdim=True)

    def _first(self) -> Tensor:
        return self._draw(self._starting)

    def _move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        row = state[:, 0] * self._actions + action
        following = self._draw(self._following[row])
        return following, self._rewards[row], following == len(self.mdp.initial), None

    def _look(self, state: Tensor) -> Tensor:
        return self._looks[state[:, 0]]

    def process(self) -> VectorMDP:
        """The exact process."""
        return self.mdp

    def observations(self) -> Tensor:
        """The observation of every state of :meth:`process` [S, S], in its order."""
        return self._looks[: len(self.mdp.initial)].clone()
