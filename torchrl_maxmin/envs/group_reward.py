"""The group-reward transform: what every group gets from an environment's vector reward."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs.transforms import Transform

from torchrl_maxmin.core.errors import UserError

__all__ = ["GroupReward"]

TOTAL = "episode_group_reward"


class GroupReward(Transform):
    """Turn a vector reward into the rewards of K groups, and add them up over each episode.

    A step pays group k ``(sum_d matrix[k, d] * reward[d] - shift[k]) / scale[k]``. For the paper's objective,
    the minimum over groups of the mean return, ``reward`` holds all groups' rewards; for ``mean_of_mins``
    (``minimum=True``) it holds one column, 0 until an episode ends and there the least of the groups' returns
    of that episode. Append it after whatever ends episodes, such as
    :class:`~torchrl.envs.transforms.StepCounter`.

    Args:
        matrix: [K, D], every group as weights of the environment's D objectives; None: the objectives are the
            groups.
        scale: [K], every group's unit (calibration).
        shift: [K], taken off in every step.
        minimum: reward with the least return at an episode's end.

    Entries: ``group_reward`` [*B, K], of the step; ``episode_group_reward`` [*B, K], the running sum of the
    episode; ``reward`` [*B, K], or [*B, 1] with ``minimum``; ``episode_reward``, its running sum, which
    :class:`~torchrl_maxmin.collectors.GroupStatistics` reads.

    Raises:
        UserError: on shapes that do not fit, or a scale that is not positive.

    Example:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_maxmin.envs import FishwoodEnv, GroupReward
        >>> env = TransformedEnv(FishwoodEnv(8), GroupReward(matrix=[[1, 0], [0.5, 0.5], [0, 1]]))
        >>> env.rollout(200)["next", "episode_reward"].shape
        torch.Size([8, 200, 3])
    """

    def __init__(
        self,
        *,
        matrix: Any = None,
        scale: Any = None,
        shift: Any = None,
        minimum: bool = False,
    ) -> None:
        super().__init__(in_keys=["reward"], out_keys=["reward"])
        self.minimum = minimum
        for name, value, ndim in (("matrix", matrix, 2), ("scale", scale, 1), ("shift", shift, 1)):
            tensor = None if value is None else torch.as_tensor(value, dtype=torch.float32).clone()
            if tensor is not None and (tensor.ndim != ndim or not tensor.isfinite().all()):
                shape = "[K, D]" if ndim == 2 else "[K]"
                raise UserError(f"{name} must be finite numbers of shape {shape}, got {value}")
            self.register_buffer(f"_{name}", tensor)
        if scale is not None and not (self._scale > 0).all():
            raise UserError(f"scale must be positive for every group, got {scale}")

    def _groups(self, objectives: int) -> int:
        """K, for D objectives; or what does not fit."""
        if self._matrix is not None and self._matrix.shape[1] != objectives:
            raise UserError(
                f"matrix has {self._matrix.shape[1]} columns and the environment {objectives} objectives; "
                "give it a column for every objective"
            )
        groups = objectives if self._matrix is None else len(self._matrix)
        for name, value in (("scale", self._scale), ("shift", self._shift)):
            if value is not None and len(value) != groups:
                raise UserError(
                    f"{name} has {len(value)} numbers for {groups} groups; give one for every group"
                )
        return groups

    def _calibrated(self, reward: Tensor) -> Tensor:
        group = reward.float() if self._matrix is None else reward.float() @ self._matrix.T
        group = group if self._shift is None else group - self._shift
        return group if self._scale is None else group / self._scale

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        group = self._calibrated(next_tensordict.get("reward"))
        before = tensordict.get(TOTAL, None)
        total = group if before is None else before + group
        next_tensordict.set("group_reward", group)
        next_tensordict.set(TOTAL, total)
        if self.minimum:
            least = total.amin(-1, keepdim=True)
            reward = torch.where(next_tensordict.get("done"), least, torch.zeros_like(least))
        next_tensordict.set("reward", reward if self.minimum else group.clone())
        next_tensordict.set("episode_reward", (reward if self.minimum else total).clone())
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        fresh = None if tensordict is None else tensordict.get("_reset", None)
        for name, spec in self._specs().items():
            zero = spec.zero()
            if fresh is not None and (before := tensordict.get(name, None)) is not None:
                zero = torch.where(fresh.reshape(*spec.shape[:-1], 1), zero, before)
            tensordict_reset.set(name, zero)
        return tensordict_reset

    def _specs(self) -> dict[str, Unbounded]:
        """The entries that this writes beside the reward."""
        given = self.parent.full_reward_spec["reward"]
        groups = self._groups(given.shape[-1])
        widths = {"group_reward": groups, TOTAL: groups, "episode_reward": 1 if self.minimum else groups}
        return {
            name: Unbounded(shape=(*given.shape[:-1], width), device=given.device)
            for name, width in widths.items()
        }

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The reward of the groups, or their minimum."""
        given = reward_spec["reward"]
        width = 1 if self.minimum else self._groups(given.shape[-1])
        reward_spec["reward"] = Unbounded(shape=(*given.shape[:-1], width), device=given.device)
        return reward_spec

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """The group rewards and their sums are observed."""
        observation_spec.update(self._specs())
        return observation_spec

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """The running sum goes into the next step, through batched and parallel environments too."""
        state = input_spec["full_state_spec"]
        if state is None:
            state = Composite(shape=input_spec.shape, device=input_spec.device)
        state.update({TOTAL: self._specs()[TOTAL]})
        input_spec["full_state_spec"] = state
        return input_spec

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Not for stored data, whose episodes may be cut."""
        raise NotImplementedError(
            "GroupReward belongs in an environment: TransformedEnv(env, GroupReward(...))"
        )
