"""Many copies of an environment with a vector reward, all moved by one tensor step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_maxmin.core.errors import UserError

__all__ = ["BatchedEnv"]


class BatchedEnv(EnvBase):
    """Base of environments that move hundreds of copies in one tensor step.

    The environment keeps no state between steps: what the dynamics need travels in the tensordict
    as ``state``, so that partial resets, rollouts from any step and copies are right by construction.
    A subclass writes :meth:`_first`, :meth:`_move` and :meth:`_look`.

    Args:
        num_envs: copies N.
        observation_size: D.
        state_size: S, integers that the dynamics need.
        num_actions: A.
        num_groups: K, columns of the reward.
        truncates: whether the environment writes ``truncated`` too.
        seed: of all that is random here; :meth:`set_seed` sets it anew.
        device: where tensors live.

    Entries: ``observation`` [N, D] float32; ``state`` [N, S] int64, not for a policy to read; ``action`` [N]
    int64; ``reward`` [N, K] float32; ``done``, ``terminated`` (and ``truncated``) [N, 1].

    Example:
        >>> import torch
        >>> from torchrl_maxmin.envs import BatchedEnv
        >>> class Countdown(BatchedEnv):
        ...     def __init__(self, num_envs):
        ...         super().__init__(num_envs, observation_size=1, state_size=1, num_actions=2, num_groups=2)
        ...     def _first(self):
        ...         return torch.full((self.num_envs, 1), 3)
        ...     def _move(self, state, action):
        ...         return state - 1, torch.nn.functional.one_hot(action, 2).float(), state == 1, None
        ...     def _look(self, state):
        ...         return state.float()
        >>> Countdown(5).rollout(10)["next", "reward"].shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        num_envs: int,
        *,
        observation_size: int,
        state_size: int,
        num_actions: int,
        num_groups: int,
        truncates: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        super().__init__(device=torch.device(device), batch_size=[num_envs])
        self.num_envs = num_envs
        size, here = (num_envs,), {"device": self.device}
        state = Unbounded(shape=(num_envs, state_size), dtype=torch.int64, **here)
        looks = Unbounded(shape=(num_envs, observation_size), **here)
        self.observation_spec = Composite(observation=looks, state=state, shape=size, **here)
        # a step reads the state from its input; SerialEnv and ParallelEnv pass on what is named here
        self.state_spec = Composite(state=state.clone(), shape=size, **here)
        self.action_spec = Categorical(num_actions, shape=size, dtype=torch.int64, **here)
        self.reward_spec = Unbounded(shape=(num_envs, num_groups), **here)
        self._ends = ("done", "terminated", "truncated")[: 3 if truncates else 2]
        flags = {name: Binary(n=1, shape=(num_envs, 1), dtype=torch.bool, **here) for name in self._ends}
        self.done_spec = Composite(**flags, shape=size, **here)
        self._set_seed(seed)

    @abstractmethod
    def _first(self) -> Tensor:
        """First states [N, S]."""

    @abstractmethod
    def _move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Next states [N, S], rewards [N, K], terminated [N, 1], truncated [N, 1] (None without)."""

    @abstractmethod
    def _look(self, state: Tensor) -> Tensor:
        """Observations [N, D] float32 of states [N, S]."""

    def _uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in [0, 1) from the environment's own generator."""
        return torch.rand(shape, generator=self._generator, dtype=dtype, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        # fresh for every copy: TorchRL keeps the entries of copies that were not to be reset
        state = self._first()
        entries = {"observation": self._look(state), "state": state}
        for name in self._ends:
            entries[name] = torch.zeros(self.num_envs, 1, dtype=torch.bool, device=self.device)
        return TensorDict(entries, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        before, moving = tensordict["state"], tensordict.get("_step", None)
        if moving is not None:  # a rollout until all copies are done: those that are wait where they are
            moving = moving.reshape(self.num_envs, 1)
            before = torch.where(moving, before, self._first())
        state, reward, terminated, truncated = self._move(before, tensordict["action"])
        done = terminated.clone() if truncated is None else terminated | truncated
        entries = {"observation": self._look(state), "state": state, "reward": reward}
        entries |= zip(self._ends, (done, terminated, truncated), strict=False)  # type: ignore[arg-type]
        if moving is not None:
            idle = {name: tensordict.get(name, None) for name in entries}
            for name, kept in idle.items():
                kept = torch.zeros_like(entries[name]) if kept is None or name == "reward" else kept
                entries[name] = torch.where(moving, entries[name], kept)
        return TensorDict(entries, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self._seed = 0 if seed is None else seed
        self._generator = torch.Generator(device=self.device).manual_seed(self._seed)

    def to(self, device: Any) -> BatchedEnv:
        """Move tables and specs; on another device the generator starts again from its seed."""
        before = self.device
        super().to(device)
        if self.device != before:
            self._set_seed(self._seed)
        return self
