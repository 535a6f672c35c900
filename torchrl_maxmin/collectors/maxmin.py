"""TorchRL's collector with the max-min step: rollouts in, group weights out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict.utils import NestedKey
from torchrl.collectors import Collector

from torchrl_maxmin.welfare import Adversary, Welfare
from torchrl_maxmin.welfare.statistics import GroupStatistics

__all__ = ["MaxMinCollector"]


class MaxMinCollector(Collector):
    """A :class:`~torchrl.collectors.Collector` whose batches know which group is worst off.

    Every batch carries ``group_utilities`` and ``group_weights`` [*B, K]: the utilities of all
    groups under the current policy, and the weights of an adversary that moved on them (step
    3 of Algorithm 1 of MaxMin-RLHF, arXiv 2402.08925). ``MaxMinPPOLoss`` and ``VectorGAE``
    read the weights.

    Args:
        create_env_fn: an environment with reward [*B, K], or what makes one.
        policy: as for the parent.
        adversary: turns utilities into weights; its state is the caller's to save.
        reward_key: group rewards in a batch.
        prompt_welfare: weigh every prompt by itself, see
            :class:`~torchrl_maxmin.collectors.GroupStatistics`.
        mask_key: marks real steps, see :class:`~torchrl_maxmin.collectors.GroupStatistics`; the padding of
            ``split_trajs=True`` is left out by itself.
        postproc: applied before the statistics.
        **kwargs: as for the parent (``frames_per_batch``, ``total_frames``, ...).

    Example:
        >>> import torch
        >>> from torchrl.envs import RewardSum, TransformedEnv
        >>> from torchrl_maxmin.welfare import HardMin
        >>> env = make_vector_reward_env()  # doctest: +SKIP
        >>> collector = MaxMinCollector(  # doctest: +SKIP
        ...     TransformedEnv(env, RewardSum()), policy, adversary=HardMin(2),
        ...     frames_per_batch=256, total_frames=1024,
        ... )
        >>> next(iter(collector))["group_weights"].shape  # doctest: +SKIP
        torch.Size([256, 2])
    """

    def __init__(
        self,
        create_env_fn: Any,
        policy: Any = None,
        *,
        adversary: Adversary,
        reward_key: NestedKey = ("next", "reward"),
        prompt_welfare: Welfare | None = None,
        mask_key: NestedKey | None = "auto",
        postproc: Callable | None = None,
        **kwargs: Any,
    ):
        statistics = GroupStatistics(adversary, reward_key, prompt_welfare=prompt_welfare, mask_key=mask_key)
        both = statistics if postproc is None else lambda data: statistics(postproc(data))
        kwargs.setdefault("auto_register_policy_transforms", False)
        super().__init__(create_env_fn, policy, postproc=both, **kwargs)
        self.adversary = adversary
