"""From one vector a text to one reward a group."""

from __future__ import annotations

from typing import Any

import torch
from maxmin_kernels import reward_heads_min
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import import_transformers

__all__ = ["HEADS", "RewardHeads", "has_linear_score", "permute_rows_", "reset_row_"]

HEADS = ("linear", "mlp", "low_rank")


class RewardHeads(nn.Module):
    """Rewards of K groups, ``reward_k = w_k . f(h)``: whatever the groups share lies in f.

    ``linear``
        f is the identity.
    ``mlp``
        f is one hidden layer as wide as the trunk, with GELU.
    ``low_rank``
        f(h) = B h with B [rank, H]: groups differ by their weights on few common features, so
        that a small minority learns little more than its weights (SharedRep-RLHF, arXiv 2509.03672).

    Args:
        kind: one of the above.
        hidden_size: H.
        num_groups: K.
        rank: features of ``low_rank``; K when None.

    Raises:
        UserError: for an unknown kind, or a rank below 1 or without ``low_rank``.

    Example:
        >>> heads = RewardHeads("low_rank", hidden_size=16, num_groups=3, rank=2)
        >>> heads(torch.randn(5, 16)).shape
        torch.Size([5, 3])
    """

    def __init__(self, kind: str, hidden_size: int, num_groups: int, rank: int | None = None):
        super().__init__()
        if kind not in HEADS:
            raise UserError(f"head {kind!r} is none of {', '.join(HEADS)}")
        if rank is not None and (kind != "low_rank" or rank < 1):
            raise UserError("rank is a positive number of features of the head 'low_rank'")
        self.kind, self.rank = kind, rank
        self.features: nn.Module = nn.Identity()
        width = hidden_size
        if kind == "mlp":
            self.features = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU())
        elif kind == "low_rank":
            width = rank or num_groups
            self.features = nn.Linear(hidden_size, width, bias=False)
            nn.init.normal_(self.features.weight, std=(hidden_size + 1) ** -0.5)
        self.output = nn.Linear(width, num_groups, bias=False)
        nn.init.normal_(self.output.weight, std=(width + 1) ** -0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        """Rewards [N, K] in fp32 of vectors [N, H], or of [N, K, H] where every group has its own."""
        features = self.features(vectors.float())
        if features.dim() == 3:
            return (features * self.output.weight).sum(-1)
        return reward_heads_min(features, self.output.weight)[0]


@torch.no_grad()
def permute_rows_(output: nn.Linear, order: Tensor) -> None:
    """Put row ``order[k]`` of the last layer, which is a group's own, at k."""
    for parameter in (output.weight, output.bias):
        if parameter is not None:
            parameter.copy_(parameter[order.to(parameter.device)])


@torch.no_grad()
def reset_row_(output: nn.Linear, k: int, donor: int, noise_scale: float) -> None:
    """Give group k the donor's row of the last layer, and noise of ``noise_scale`` times its deviation."""
    weight = output.weight
    weight[k] = weight[donor] + noise_scale * weight[donor].std() * torch.randn_like(weight[donor])
    if output.bias is not None:
        output.bias[k] = output.bias[donor]


def has_linear_score(config: Any) -> bool:
    """Whether the sequence classifiers of a config's type end in one linear layer named ``score``.

    Decoders' do; RoFormer's, a decoder too, ends in a head of several layers.
    """
    transformers = import_transformers()
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return isinstance(getattr(model, "score", None), nn.Linear)
