"""Measure the groups' utilities in a batch, and let the adversary answer with weights."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import mean_over_ranks
from torchrl_maxmin.masks import expand_mask, validity_mask
from torchrl_maxmin.welfare.adversary import Adversary
from torchrl_maxmin.welfare.functions import Welfare

__all__ = ["GroupStatistics"]


class GroupStatistics(nn.Module):
    """Post-processing of a batch: what each group got, and how much each counts.

    Works as the ``postproc`` of any TorchRL collector and on any tensordict with a vector reward.
    :class:`~torchrl.collectors.MultiSyncCollector` calls it in the main process, on the batch of all workers,
    so that the adversary answers them together. Utilities are means over finished episodes of
    ``("next", "episode_reward")`` where the data have it (:class:`~torchrl_maxmin.envs.GroupReward`,
    TorchRL's ``RewardSum``), else means of the reward. Padding counts in neither, whatever it holds. Without
    a finished episode, or without a real step, the weights stay.

    Args:
        adversary: turns utilities [K] into weights [K].
        reward_key: group rewards [*B, K].
        prompt_welfare: weigh every prompt by itself instead: the gradient of this welfare at the mean
            rewards of the prompt's own responses, so that the policy climbs the mean over prompts of the
            welfare. The adversary then stays.
        prompt_key: which prompt a row answers [*B], int64.
        mask_key: entry [*B] or [*B, 1], True at real steps; ``"auto"`` for the masks that TorchRL writes,
            ``("collector", "mask")`` of ``split_trajs=True`` among them; None for no mask.

    Writes ``group_utilities`` and ``group_weights``, both [*B, K].

    Raises:
        KeyError: if a mask is named and the data do not hold it.
        ValueError: if the reward has another number of columns than the adversary has groups.

    Example:
        >>> from torchrl.collectors import MultiSyncCollector
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_maxmin.envs import GroupReward, make_env
        >>> from torchrl_maxmin.welfare import EntropyRegularized
        >>> make = lambda: TransformedEnv(make_env("fishwood-v0", 64), GroupReward())
        >>> collector = MultiSyncCollector(  # doctest: +SKIP
        ...     [make] * 2, policy, frames_per_batch=25600, total_frames=10**6, cat_results=0,
        ...     postproc=GroupStatistics(EntropyRegularized(2, scale=20.0)),
        ... )
        >>> for batch in collector:  # doctest: +SKIP
        ...     loss = loss_module(batch)  # reads batch["group_weights"]; then step, and send the policy
        ...     collector.update_policy_weights_()
    """

    def __init__(
        self,
        adversary: Adversary,
        reward_key: NestedKey = ("next", "reward"),
        *,
        prompt_welfare: Welfare | None = None,
        prompt_key: NestedKey = "prompt_index",
        mask_key: NestedKey | None = "auto",
    ):
        super().__init__()
        self.adversary = adversary
        self.reward_key, self.prompt_key = reward_key, prompt_key
        self.prompt_welfare, self.mask_key = prompt_welfare, mask_key

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the two entries; returns the same tensordict."""
        reward = tensordict.get(self.reward_key)
        episodes = tensordict.get(("next", "episode_reward"), None)
        mask = validity_mask(tensordict, self.mask_key)
        valid = torch.ones_like(reward[..., 0], dtype=torch.bool)
        if mask is not None:
            valid = expand_mask(mask, valid)
        rows = reward[valid]
        if episodes is not None:
            rows = episodes[tensordict["next", "done"].squeeze(-1) & valid]
        if rows.shape[-1] != self.adversary.num_groups:
            raise ValueError(
                f"the reward has {rows.shape[-1]} columns and the adversary {self.adversary.num_groups} "
                "groups; give both the same number"
            )
        utilities = mean_over_ranks(rows.sum(0), len(rows))
        shape = (*tensordict.batch_size, len(utilities))
        if self.prompt_welfare is not None:
            weights = self._by_prompt(reward, tensordict.get(self.prompt_key), valid)
        elif utilities.isnan().any() and not len(rows):
            weights = self.adversary.weights
        else:
            weights = self.adversary.update(utilities)
        tensordict["group_utilities"] = utilities.expand(shape).clone()
        tensordict["group_weights"] = weights.to(utilities).expand(shape).clone()
        return tensordict

    def _by_prompt(self, reward: Tensor, prompt: Tensor, valid: Tensor) -> Tensor:
        """Weights [*B, K]: the welfare's gradient at each prompt's mean rewards."""
        assert self.prompt_welfare is not None
        # Padding answers no prompt; the adversary's weights stand there.
        weights = self.adversary.weights.to(reward).expand_as(reward).clone()
        rows = reward[valid]
        _, which, counts = prompt.reshape(valid.shape)[valid].unique(return_inverse=True, return_counts=True)
        means = rows.new_zeros(len(counts), rows.shape[-1]).index_add_(0, which, rows) / counts[:, None]
        if len(counts):
            weights[valid] = self.prompt_welfare.normalized_weights(means)[which].to(weights)
        return weights
