"""Group rewards of sampled responses, from a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_maxmin.core.distributed import of_every_process, over_ranks
from torchrl_maxmin.core.errors import RewardError
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sampling import sample_responses, to_texts
from torchrl_maxmin.models.sequences import Ends, has_ended, in_batches
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.rewards.base import RewardModel

_RESPONSE_KEYS: tuple[NestedKey, ...] = ("prompt_tokens", "prompt_mask", "action", "action_mask")


class NonFiniteRewards(RewardError):
    """A reward is NaN or infinite."""


class MixtureRewards:
    """Raw rewards [B, K] of responses by a mixture or an ensemble.

    A model with the policy's own tokenizer reads the tokens themselves. Any other reads the texts, and no end
    where a response was cut off. :attr:`shared_vocabulary` says which. With stop strings all read texts: the
    end of one is a token behind them that no policy wrote.

    Args:
        mixture: the reward model.
        tokenizer: the policy's.
        prompts: the texts that ``prompt_index`` counts; read back from their tokens when None.
        ends: what ends a response, see :attr:`~torchrl_maxmin.models.language.TokenPolicy.ends`; the
            tokenizer's EOS when None.
    """

    def __init__(
        self,
        mixture: RewardModel,
        tokenizer: Any,
        prompts: Sequence[Text] | None = None,
        ends: Ends | None = None,
    ):
        self.mixture, self.tokenizer, self.prompts = mixture, tokenizer, prompts
        self.ends: Ends = ends or (tokenizer.eos_token_id,)
        self.num_groups = mixture.num_groups
        self.shared_vocabulary = mixture.reads_tokens_of(tokenizer)

    @torch.no_grad()
    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score a tensordict of prompts and responses.

        Raises:
            NonFiniteRewards: for a reward that is NaN or infinite.
        """
        return _require_finite(self._read(responses))

    @torch.no_grad()
    def in_batches(self, responses: TensorDict, batch_size: int = 512) -> Tensor:
        """Score responses on the model's device, so many at once; returns rewards [N, K] on the CPU.

        Processes that work as one read a share each.

        Raises:
            NonFiniteRewards: for a reward that is NaN or infinite, in all processes.
        """
        device = next(self.mixture.parameters()).device

        def score(share: TensorDict) -> Tensor:
            return in_batches(lambda part: self._read(part.to(device)).cpu(), share, batch_size)

        return _require_finite(over_ranks(score, responses))

    def _read(self, responses: TensorDictBase) -> Tensor:
        by_tokens = self.shared_vocabulary and not callable(self.ends)
        return self._of_tokens(responses) if by_tokens else self._of_texts(responses)

    def _of_texts(self, responses: TensorDictBase) -> Tensor:
        known = None if responses.get("prompt_index", None) is None else self.prompts
        texts = to_texts(self.tokenizer, responses, known)
        ended = has_ended(responses, self.ends).flatten().tolist()
        return self.mixture.score(*texts, ended=ended).to(responses["action"].device)

    def _of_tokens(self, responses: TensorDictBase) -> Tensor:
        tokens = torch.cat([responses["prompt_tokens"], responses["action"]], -1)
        mask = torch.cat([responses["prompt_mask"], responses["action_mask"]], -1)
        longest = int(responses["action_mask"].sum(-1).max()) - responses["action"].shape[-1]
        return self.mixture(tokens[:, :longest], mask[:, :longest]) if longest else self.mixture(tokens, mask)


def _require_finite(rewards: Tensor) -> Tensor:
    if not bool(rewards.isfinite().all()):
        raise NonFiniteRewards("the reward model gives NaN or infinity for some response")
    return rewards


class RewardModule(TensorDictModuleBase):
    """Writes the rewards of K groups for tokens that a policy wrote.

    TorchRL's ``HFRewardModelWrapper`` takes models with one reward; this one keeps all K as the
    last dimension, and reads the same keys if told to.

    Args:
        model: mixture or ensemble.
        tokenizer: the policy's; where it is not the model's own, prompt and response travel as text.
        in_keys: prompt tokens, prompt mask, response tokens and response mask, as
            :class:`~torchrl_maxmin.models.language.TokenPolicy` writes them; or two keys, tokens
            and mask of whole texts in the model's own vocabulary, such as TorchRL's
            ``("tokens", "full")`` and ``("masks", "all_attention_mask")``.
        out_key: where rewards [*B, K] go.
        calibrated: apply the model's calibration.
        prompts: the texts that the tensordict's ``prompt_index`` counts, strings or conversations; a model
            with another tokenizer then reads them, in place of what their tokens read back as.
        eos_token_ids: tokens that end a response, or what marks its ends, such as ``policy.ends``; the
            tokenizer's EOS when None.

    Raises:
        ValueError: for another number of keys, and for whole texts in another vocabulary.

    Example:
        >>> rewards = RewardModule(mixture, tokenizer)  # doctest: +SKIP
        >>> rewards(policy(prompts))["next", "reward"].shape  # doctest: +SKIP
        torch.Size([64, 2])
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: Any,
        *,
        in_keys: Sequence[NestedKey] = _RESPONSE_KEYS,
        out_key: NestedKey = ("next", "reward"),
        calibrated: bool = True,
        prompts: Sequence[Text] | None = None,
        eos_token_ids: Ends | None = None,
    ):
        super().__init__()
        if len(in_keys) not in (2, 4):
            raise ValueError(f"in_keys are tokens and mask, of prompt and response or of both, not {in_keys}")
        self.source = MixtureRewards(model, tokenizer, prompts, eos_token_ids)
        if len(in_keys) == 2 and not self.source.shared_vocabulary:
            raise ValueError(
                "whole texts can be read in the model's own vocabulary alone; give keys of prompt and answer"
            )
        self.in_keys, self.out_keys = list(in_keys), [out_key]
        self.model, self.calibrated = model, calibrated

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write rewards [*B, K]."""
        values = [tensordict.get(key, as_padded_tensor=True) for key in self.in_keys]
        batch = values[0].shape[:-1]
        flat = [value.reshape(-1, value.shape[-1]) for value in values]
        if len(flat) == 2:
            rewards = self.model(flat[0], flat[1].bool())
        else:
            rows = TensorDict(dict(zip(_RESPONSE_KEYS, flat, strict=True)), [len(flat[0])])
            if (index := tensordict.get("prompt_index", None)) is not None:
                rows["prompt_index"] = index.reshape(-1)
            rewards = self.source(rows)
        if self.calibrated:
            rewards = self.model.calibration.apply(rewards)
        tensordict.set(self.out_keys[0], rewards.reshape(*batch, -1))
        return tensordict


def fill_absent(rewards: Tensor, neutral: Tensor) -> Tensor:
    """Replace NaN in rewards [B, K], no reward, by its group's mean over the other responses.

    Where no response has a reward, all get the group's ``neutral`` reward [K], the reference's mean: equal
    rewards prefer no response, and the adversary sees a group as well off as under the reference.
    """
    means = rewards.nanmean(0)
    means = torch.where(means.isnan(), neutral.to(means), means)
    return torch.where(rewards.isnan(), means, rewards)


def reference_rewards(
    reference: TokenPolicy,
    prompts: TensorDict,
    rewards: Callable[[TensorDictBase], Tensor],
    num_samples: int,
    scoring_batch_size: int = 512,
) -> Tensor:
    """Raw rewards [X, n, K] on the CPU of n samples of the reference policy for each of X prompts.

    NaN stands where a function gave None.

    Raises:
        RewardError: where a reward cannot be had, or is NaN or infinite.
    """
    device = next(reference.parameters()).device
    samples = sample_responses(reference, prompts, num_samples)

    def score(some: TensorDictBase) -> Tensor:
        return of_every_process(
            lambda: in_batches(lambda part: rewards(part.to(device)).cpu(), some, scoring_batch_size)
        )

    raw = over_ranks(score, samples)
    return raw.reshape(len(prompts), num_samples, -1)
