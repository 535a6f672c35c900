"""Generalised advantage estimation for a vector reward: K columns, one set of done flags."""

from __future__ import annotations

from maxmin_kernels import vector_gae
from torch import Tensor
from torchrl.objectives.value import GAE
from torchrl.objectives.value.functional import generalized_advantage_estimate

from torchrl_maxmin.objectives.vector_estimator import Signals, VectorEstimator


class VectorGAE(VectorEstimator, GAE):
    """GAE with a K-column reward, K-column values and one ``done`` for all columns.

    Equal to K scalar :class:`~torchrl.objectives.value.GAE`, one a column, in one pass. If the data
    hold group weights, the advantage is scalarised afterwards: group weights change every iteration,
    the groups' values do not, so the critic stays valid where a critic of the weighted reward would not.

    Entries: ``("next", "reward")`` ``[*B, T, K]``, ``state_value`` and ``("next", "state_value")``
    ``[*B, T, K]`` (written by the value network, if there is one), ``("next", "done")`` and
    ``("next", "terminated")`` ``[*B, T, 1]``. Written: ``advantage`` and ``value_target``
    ``[*B, T, K]``. With ``group_weights`` ``[*B, T, K]`` (or ``[*B, K]`` in a tensordict of batch size
    ``B``) in the data, ``advantage`` is their weighted sum ``[*B, T, 1]`` and the columns are kept under
    ``advantage_per_group``. A reward with one column more than there are weights has a KL penalty in its
    last, which enters the sum with weight 1.

    Args:
        gamma: the discount.
        lmbda: the trace decay.
        value_network: a module that writes ``state_value`` ``[*B, T, K]``; None to read the values from
            the data.
        average_gae: standardise the advantage: the scalarised one if there are group weights, else every
            column by itself (over valid steps); where they are all equal, it is 0. Defaults to ``False``.
        mask_key: entry ``[*B, T]`` (or ``[*B, T, 1]``), True at real steps; ``"auto"`` for the masks that
            TorchRL writes, ``("collector", "mask")`` among them; None for no mask. Padded steps get advantage
            and value target 0 and pass nothing on, whatever they hold, NaN too. Defaults to ``"auto"``.
        **kwargs: passed to :class:`~torchrl.objectives.value.GAE`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_maxmin.objectives import VectorGAE
        >>> data = TensorDict(
        ...     {
        ...         "state_value": torch.zeros(4, 5, 3),
        ...         "group_weights": torch.full((4, 5, 3), 1 / 3),
        ...         "next": {
        ...             "state_value": torch.zeros(4, 5, 3),
        ...             "reward": torch.randn(4, 5, 3),
        ...             "done": torch.zeros(4, 5, 1, dtype=torch.bool),
        ...             "terminated": torch.zeros(4, 5, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     batch_size=[4, 5],
        ... )
        >>> data = VectorGAE(gamma=0.99, lmbda=0.95, value_network=None)(data)
        >>> data["advantage"].shape, data["advantage_per_group"].shape
        (torch.Size([4, 5, 1]), torch.Size([4, 5, 3]))

    Reference: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage
    Estimation, eq. 16, https://arxiv.org/abs/1506.02438.
    """

    @property
    def _standardises(self) -> bool:
        return self.average_gae

    def _estimate(self, signals: Signals) -> tuple[Tensor, Tensor]:
        data, reward, value, terminated = signals.data, signals.reward, signals.value, signals.terminated
        gamma, lmbda = self.gamma.to(reward.device), self.lmbda.to(reward.device)
        steps = data.get(self.tensor_keys.steps_to_next_obs, None)
        if steps is not None:
            gamma = gamma ** steps.reshape(*reward.shape[:-1], 1).expand_as(reward)
        if self.auto_reset_env:
            truncated = self._broadcast_optional(data.get(("next", "truncated")), value)
            reward = reward + gamma * value * truncated
            terminated = terminated | truncated
        signals = signals._replace(reward=reward, terminated=terminated)
        return self._recursion(signals, gamma, lmbda)

    def _recursion(self, signals: Signals, gamma: Tensor, lmbda: Tensor) -> tuple[Tensor, Tensor]:
        _, reward, value, next_value, done, terminated, mask, time_dim = signals
        if self.differentiable or gamma.numel() > 1 or lmbda.numel() > 1:
            # TorchRL's own loop has a gradient and takes a discount of its own for every step.
            return generalized_advantage_estimate(
                gamma, lmbda, value, next_value, reward, done, terminated=terminated, time_dim=time_dim
            )

        def time_last(x: Tensor) -> Tensor:
            return x.movedim(time_dim, -2)

        advantage, value_target = vector_gae(
            time_last(reward),
            time_last(value),
            time_last(next_value),
            time_last(done[..., :1]),
            time_last(terminated[..., :1]),
            gamma=float(gamma),
            lmbda=float(lmbda),
            mask=None if mask is None else time_last(mask).squeeze(-1),
        )
        return advantage.movedim(-2, time_dim), value_target.movedim(-2, time_dim)
