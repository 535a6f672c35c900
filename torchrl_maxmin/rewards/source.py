"""Group rewards of sampled responses, from a reward mixture or from functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.importing import import_named
from torchrl_maxmin.modules.language import TokenPolicy
from torchrl_maxmin.modules.sampling import sample_responses, to_texts
from torchrl_maxmin.preferences.world import World
from torchrl_maxmin.rewards.base import RewardModel

__all__ = ["FunctionRewards", "MixtureRewards", "load_functions", "reference_rewards"]

RewardFunction = Callable[..., Any]  # f(prompts, completions) -> floats [N] or [N, k]


class MixtureRewards:
    """Raw rewards [B, K] of responses by a mixture or an ensemble.

    Args:
        mixture: the reward model.
        tokenizer: the policy's; where the model reads other tokens, responses travel as text.
    """

    def __init__(self, mixture: RewardModel, tokenizer: Any):
        self.mixture, self.tokenizer = mixture, tokenizer
        self.num_groups = mixture.num_groups
        self.shared_vocabulary = mixture.reads_tokens_of(tokenizer)

    @torch.no_grad()
    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses."""
        if not self.shared_vocabulary:
            return self.mixture.score(*to_texts(self.tokenizer, responses)).to(responses["action"].device)
        tokens = torch.cat([responses["prompt_tokens"], responses["action"]], -1)
        mask = torch.cat([responses["prompt_mask"], responses["action_mask"]], -1)
        longest = int(responses["action_mask"].sum(-1).max()) - responses["action"].shape[-1]
        return self.mixture(tokens[:, :longest], mask[:, :longest]) if longest else self.mixture(tokens, mask)


class FunctionRewards:
    """Rewards [B, K] by plain functions ``f(prompts, completions) -> floats``.

    Args:
        functions: each gives one column [N], or several [N, k].
        tokenizer: the policy's.
    """

    def __init__(self, functions: Sequence[RewardFunction], tokenizer: Any):
        self.functions, self.tokenizer = list(functions), tokenizer
        self.num_groups = self._columns(["a"], ["b"]).shape[-1]

    def _columns(self, prompts: list[str], completions: list[str]) -> Tensor:
        columns = [torch.as_tensor(f(prompts, completions), dtype=torch.float32) for f in self.functions]
        return torch.cat([c.reshape(len(prompts), -1) for c in columns], -1)

    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses."""
        return self._columns(*to_texts(self.tokenizer, responses)).to(responses["action"].device)


def load_functions(specs: Sequence[str]) -> list[RewardFunction]:
    """Functions by name: ``module:function``, or the path of a world's json.

    Raises:
        UserError: for a name that leads nowhere.
    """
    functions: list[RewardFunction] = []
    for spec in specs:
        if spec.endswith(".json"):
            if not Path(spec).is_file():
                raise UserError(f"no world file {spec!r}")
            functions.append(World.load(spec))
            continue
        try:
            functions.append(import_named(spec))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"no reward function {spec!r}: write module:function, importable from here"
            ) from error
    return functions


def reference_rewards(
    reference: TokenPolicy,
    prompts: TensorDict,
    rewards: MixtureRewards | FunctionRewards,
    num_samples: int,
) -> Tensor:
    """Raw rewards [X, n, K] on the CPU of n samples of the reference policy for each of X prompts."""
    device = next(reference.parameters()).device
    samples = sample_responses(reference, prompts, num_samples)
    raw = torch.cat([rewards(part.to(device)).cpu() for part in samples.split(512)])
    return raw.reshape(len(prompts), num_samples, -1)
