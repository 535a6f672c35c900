"""Group rewards of sampled responses, from a reward mixture or from functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.importing import import_named
from torchrl_maxmin.modules.language import TokenPolicy
from torchrl_maxmin.modules.sampling import sample_responses, to_texts
from torchrl_maxmin.preferences.world import World
from torchrl_maxmin.rewards.base import RewardModel

__all__ = [
    "FunctionRewards",
    "MixtureRewards",
    "ask",
    "count_columns",
    "load_functions",
    "reference_rewards",
    "require_finite_rewards",
]

RewardFunction = Callable[..., Any]  # f(prompts, completions) -> floats [N] or [N, k]
_WANTED = "it must give one number, or one a group, for every response"


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
    """Rewards [B, K] by plain functions ``f(prompts, completions) -> floats``, each asked once to begin with.

    Args:
        functions: each gives one column [N], or several [N, k].
        tokenizer: the policy's.
        prompts: two of the data's, for that question: a function may know no others.

    Raises:
        UserError: for a function that fails, or gives anything else.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], tokenizer: Any, prompts: Sequence[str] = ("a", "b")
    ):
        self.functions, self.tokenizer = list(functions), tokenizer
        self.num_groups = sum(count_columns(f, "reward function", prompts) for f in self.functions)

    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses."""
        texts = to_texts(self.tokenizer, responses)
        columns = np.concatenate([ask(f, *texts, "reward function") for f in self.functions], -1)
        return torch.from_numpy(columns).to(responses["action"].device, torch.float32)


def ask(
    function: RewardFunction, prompts: Sequence[str], completions: Sequence[str], role: str
) -> np.ndarray:
    """What a function says of N responses: floats [N, k].

    Raises:
        UserError: where that is anything else.
    """
    said = function(prompts, completions)
    role = _named(function, role)
    try:
        values = np.asarray(said.detach().cpu() if isinstance(said, Tensor) else said, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"the {role} gives no numbers ({error}); {_WANTED}") from error
    if values.ndim not in (1, 2) or len(values) != len(prompts):
        shape = list(values.shape)
        raise UserError(f"the {role} gives numbers of shape {shape} for {len(prompts)} responses; {_WANTED}")
    return values.reshape(len(prompts), -1)


def count_columns(function: RewardFunction, role: str, prompts: Sequence[str]) -> int:
    """How many groups a function speaks for: asked about two responses, before thousands are sampled.

    Raises:
        UserError: where it fails, or its answer is not one that :func:`ask` takes.
    """
    try:
        values = ask(function, [prompts[0], prompts[-1]], ["c", "d e"], role)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the {_named(function, role)} fails on f(prompts, completions) with {type(error).__name__}: "
            f"{error}; {_WANTED}"
        ) from error
    require_finite_rewards(values, _named(function, role))
    return values.shape[1]


def require_finite_rewards(values: np.ndarray, role: str) -> None:
    """Raise :class:`UserError` where a number is NaN or infinite."""
    if not np.isfinite(values).all():
        raise UserError(f"the {role} gives NaN or infinity for some response; {_WANTED}")


def _named(function: RewardFunction, role: str) -> str:
    return f"{role} {getattr(function, '__name__', type(function).__name__)}"


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
    """Raw rewards [X, n, K] on the CPU of n samples of the reference policy for each of X prompts.

    Raises:
        UserError: where one is NaN or infinite.
    """
    device = next(reference.parameters()).device
    samples = sample_responses(reference, prompts, num_samples)
    raw = torch.cat([rewards(part.to(device)).cpu() for part in samples.split(512)])
    require_finite_rewards(raw.numpy(), "reward")
    return raw.reshape(len(prompts), num_samples, -1)
