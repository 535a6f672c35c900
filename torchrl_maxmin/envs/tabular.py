"""A tabular decision process with a vector reward as a batched TorchRL environment."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from torchrl_maxmin.envs.exact import VectorMDP

__all__ = ["TabularEnv"]


class TabularEnv(EnvBase):
    """Copies of a :class:`~torchrl_maxmin.envs.exact.VectorMDP`, all moved by one tensor step.

    The process never terminates: discount it with the process's ``gamma``, or truncate it with
    :class:`~torchrl.envs.transforms.StepCounter`. What a policy can reach at best is known exactly, from
    :func:`~torchrl_maxmin.envs.exact.solve_max_min`.

    Args:
        mdp: transitions [S, A, S], rewards [S, A, K] and first states [S].
        num_envs: copies N.
        seed: of first states and transitions.
        device: where tensors live.

    Entries: ``observation`` [N, S], the state one-hot; ``action`` [N] int64; ``reward`` [N, K].

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
        super().__init__(device=torch.device(device), batch_size=[num_envs])
        self.mdp = mdp
        states, actions, groups = mdp.reward.shape
        self.transition = torch.as_tensor(mdp.transition, device=device)
        self.rewards = torch.as_tensor(mdp.reward, dtype=torch.float32, device=device)
        self.initial = torch.as_tensor(mdp.initial, device=device)
        size = (num_envs,)
        self.observation_spec = Composite(
            observation=OneHot(states, shape=(num_envs, states), dtype=torch.float32, device=device),
            shape=size,
            device=device,
        )
        self.action_spec = Categorical(actions, shape=size, dtype=torch.int64, device=device)
        self.reward_spec = Unbounded(shape=(num_envs, groups), device=device)
        flag = {"n": 1, "shape": (num_envs, 1), "dtype": torch.bool, "device": device}
        self.done_spec = Composite(done=Binary(**flag), terminated=Binary(**flag), shape=size, device=device)
        self._set_seed(seed)

    def _draw(self, chances: Tensor) -> Tensor:
        return torch.multinomial(chances, 1, generator=self._generator).squeeze(-1)

    def _observe(self, state: Tensor) -> TensorDict:
        flag = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        observation = torch.nn.functional.one_hot(state, len(self.initial)).float()
        entries = {"observation": observation, "done": flag, "terminated": flag.clone()}
        return TensorDict(entries, self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        fresh = self._draw(self.initial.expand(*self.batch_size, -1))
        if tensordict is not None:
            chosen, before = tensordict.get("_reset", None), tensordict.get("observation", None)
            if chosen is not None and before is not None:
                fresh = torch.where(chosen.reshape(self.batch_size), fresh, before.argmax(-1))
        return self._observe(fresh)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        state, action = tensordict["observation"].argmax(-1), tensordict["action"]
        result = self._observe(self._draw(self.transition[state, action]))
        result["reward"] = self.rewards[state, action]
        return result

    def _set_seed(self, seed: int | None) -> None:
        self._generator = torch.Generator(device=self.device)
        self._generator.manual_seed(0 if seed is None else seed)
