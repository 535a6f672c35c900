"""A reward model as a TensorDict module: responses in, group rewards out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from torchrl_maxmin.rewards.base import RewardModel
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.reader import Text
from torchrl_maxmin.rewards.source import MixtureRewards

__all__ = ["RewardModule"]

_RESPONSE_KEYS: tuple[NestedKey, ...] = ("prompt_tokens", "prompt_mask", "action", "action_mask")


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
        eos_token_ids: tokens that end a response, such as ``policy.eos_token_ids``; the tokenizer's EOS when
            None.

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
        eos_token_ids: Sequence[int] | None = None,
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
            assert isinstance(self.model, RewardMixture)
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
