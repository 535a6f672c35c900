"""The max-min objective for any TorchRL loss: K columns in the data become the weighted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.envs.transforms import Transform

from torchrl_maxmin.objectives.functional import scalarise_advantage
from torchrl_maxmin.welfare import Adversary
from torchrl_maxmin.welfare.statistics import GroupStatistics

__all__ = ["MaxMinAdvantage"]


class MaxMinAdvantage(Transform):
    """Weigh the K columns of an entry by the group weights, so that a scalar loss trains for max-min.

    :class:`~torchrl.objectives.A2CLoss`, :class:`~torchrl.objectives.ReinforceLoss` and
    :class:`~torchrl.objectives.llm.GRPOLoss` take an advantage of one column and average more of them
    in silence; :class:`~torchrl.objectives.llm.MCAdvantage` adds the columns of a reward up. The policy
    gradient is linear in either, so weighing the columns first makes their objective
    ``sum_k w_k F_k`` (MaxMin-RLHF, https://arxiv.org/abs/2402.08925).

    Call it on data, or append it to a replay buffer: it acts when data are written, and again when
    they are read if that has not been done. Before ``MCAdvantage`` weigh the reward: transforms act on
    written data in reverse order, so append ``MCAdvantage`` first. The columns are kept beside the
    entry, with ``_per_group`` added to its name; where they are, nothing is done.

    Args:
        adversary (Adversary, optional): moves on the utilities of every batch that has no weights of its
            own, as :class:`~torchrl_maxmin.collectors.GroupStatistics` does. Without it the data must
            hold the weights, as a :class:`~torchrl_maxmin.collectors.MaxMinCollector` writes them.
            Transforms that see one trajectory at a time need these: the worst group of a single
            trajectory is another objective.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): the entries ``[*B, K]``, or ``[*B, K + 1]`` with a KL
            column. Defaults to ``["advantage"]``.
        out_keys (sequence of NestedKey, optional): where the weighted ones ``[*B, 1]`` go. Defaults to
            ``in_keys``.
        weights_key (NestedKey): the group weights. Defaults to ``"group_weights"``.
        reward_key (NestedKey): the group rewards that the adversary looks at. Defaults to
            ``("next", "reward")``.
        mask_key (NestedKey, "auto" or None): the entry that marks the steps that the adversary looks at, see
            :class:`~torchrl_maxmin.collectors.GroupStatistics`. Defaults to ``"auto"``.

    Raises:
        KeyError: if there are neither weights nor an adversary.
        ValueError: if columns and weights do not fit.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_maxmin.objectives import MaxMinAdvantage
        >>> data = TensorDict(
        ...     {
        ...         "advantage": torch.tensor([[1.0, -1.0], [0.0, 4.0]]),
        ...         "group_weights": torch.tensor([[0.25, 0.75], [0.25, 0.75]]),
        ...     },
        ...     batch_size=[2],
        ... )
        >>> MaxMinAdvantage()(data)["advantage"].tolist()
        [[-0.5], [3.0]]
        >>> data["advantage_per_group"].shape
        torch.Size([2, 2])

        Before a Monte-Carlo advantage:

        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> from torchrl.objectives.llm import MCAdvantage
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(64))
        >>> buffer.append_transform(MCAdvantage(grpo_size=4, prompt_key="prompt_index"))
        >>> buffer.append_transform(MaxMinAdvantage(in_keys=[("next", "reward")]))
    """

    def __init__(
        self,
        adversary: Adversary | None = None,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        weights_key: NestedKey = "group_weights",
        reward_key: NestedKey = ("next", "reward"),
        mask_key: NestedKey | None = "auto",
    ) -> None:
        in_keys = ["advantage"] if in_keys is None else list(in_keys)
        out_keys = in_keys if out_keys is None else list(out_keys)
        if len(in_keys) != len(out_keys):
            raise ValueError(f"{len(in_keys)} in_keys for {len(out_keys)} out_keys; give as many of each")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.adversary = adversary
        self.weights_key = weights_key
        self.statistics = (
            None if adversary is None else GroupStatistics(adversary, reward_key, mask_key=mask_key)
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Weigh the entries of a batch; returns the same tensordict."""
        pending = [
            (key, out)
            for key, out in zip(self.in_keys, self.out_keys, strict=True)
            if tensordict.get(_columns_key(key), None) is None
        ]
        if not pending:
            return tensordict
        weights = tensordict.get(self.weights_key, None)
        if weights is None:
            if self.statistics is None:
                raise KeyError(
                    f"the data hold no {self.weights_key!r}: collect them with a MaxMinCollector, "
                    "or give MaxMinAdvantage an adversary"
                )
            self.statistics(tensordict)
            weights = tensordict["group_weights"]
            tensordict.set(self.weights_key, weights)
        for key, out in pending:
            columns = tensordict.get(key)
            if columns is None:
                raise KeyError(f"the data hold no {key!r} to weigh")
            tensordict.set(_columns_key(key), columns)
            tensordict.set(out, scalarise_advantage(columns, weights))
        return tensordict

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.forward(tensordict)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> Any:
        raise NotImplementedError(
            "MaxMinAdvantage weighs whole batches: call it on the collector's data or append it to a replay "
            "buffer. For fixed weights inside an environment there is torchrl.envs.LineariseRewards."
        )


def _columns_key(key: NestedKey) -> NestedKey:
    """``advantage`` -> ``advantage_per_group``; of a nested key, its last name."""
    if isinstance(key, str):
        return f"{key}_per_group"
    return (*key[:-1], f"{key[-1]}_per_group")
