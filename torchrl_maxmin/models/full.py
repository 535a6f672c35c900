"""Policy, reference and critic of a language model, each a whole network of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_maxmin.models.language import TokenCritic, TokenPolicy, TokenScorer
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.models.sequences import backbone_of, in_batches

__all__ = ["FullCopies"]


class FullCopies(Networks):
    """Copies of a language model: the policy and, if any, the critic are trained, the reference is not.

    Another kind of model (adapters on one trunk, shards) offers the same methods.

    Args:
        reference: the policy to start from; frozen. The policy is a copy of it, and the critic of its trunk.
        tokenizer: theirs.
        num_columns: value heads of the critic, see :class:`~torchrl_maxmin.models.TokenCritic`; with 0 there
            is none, and no memory for it.
        entropy: whether :attr:`actor` also writes the entropy.
        scoring_batch_size: rows that the reference and the critic read at once in a rollout.
    """

    policy: TokenPolicy

    def __init__(
        self,
        reference: TokenPolicy,
        tokenizer: Any,
        num_columns: int,
        *,
        entropy: bool = False,
        scoring_batch_size: int = 512,
    ):
        device = next(reference.parameters()).device
        policy = copy.deepcopy(reference)  # not loaded again: a new pad token's row is random
        critic = None
        if num_columns:
            critic = TokenCritic(copy.deepcopy(backbone_of(reference.model)), num_columns).to(device)
        super().__init__(policy, critic, TokenScorer(policy, entropy))
        self.reference = reference.requires_grad_(False)
        self.tokenizer, self.scoring_batch_size = tokenizer, scoring_batch_size

    def generate(self, prompts: TensorDictBase) -> TensorDictBase:
        """Sample a response of the policy to every prompt."""
        return self.policy(prompts)

    @torch.no_grad()
    def log_prob(self, responses: TensorDictBase) -> Tensor:
        """Log-probabilities [B, R] of the tokens under the policy."""
        return in_batches(self.policy.log_prob, responses, self.scoring_batch_size)

    @torch.no_grad()
    def ref_log_prob(self, responses: TensorDictBase) -> Tensor:
        """Log-probabilities [B, R] of the tokens under the reference."""
        return in_batches(self.reference.log_prob, responses, self.scoring_batch_size)

    @torch.no_grad()
    def values(self, responses: TensorDictBase) -> Tensor:
        """Values [B, R, num_columns] of the tokens, where there is a critic."""
        assert self.critic is not None
        rows = responses.select(*self.critic.in_keys)
        return in_batches(self.critic, rows, self.scoring_batch_size)["state_value"]

    def save(self, folder: Path) -> None:
        """Write the policy and its tokenizer in the format of Hugging Face."""
        self.policy.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
