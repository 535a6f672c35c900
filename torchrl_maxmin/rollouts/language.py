"""Rollouts of a language model: responses sampled with ``generate`` of Hugging Face, and their group rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector

from torchrl_maxmin.envs import TokenEnv
from torchrl_maxmin.modules.language import TokenPolicy
from torchrl_maxmin.rollouts.rewards import CalibratedRewards

__all__ = ["LanguageRollouts"]


class LanguageRollouts:
    """Batches [B] of prompts, responses and rewards by the policy as it is at the time.

    Args:
        policy: samples the responses.
        rewards: scores them.
        prompts: what :func:`~torchrl_maxmin.modules.sampling.encode_prompts` gives.
        batch_size: responses a batch, B.
        num_batches: batches in all.
        num_generations: responses to every prompt.
        minimum: reward with the least of a response's group rewards.
        seed: of the order of prompts.
        start: batches that were drawn before.

    A batch holds what :class:`~torchrl_maxmin.envs.TokenEnv` and the policy write.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        rewards: CalibratedRewards,
        prompts: TensorDict,
        *,
        batch_size: int,
        num_batches: int,
        num_generations: int = 1,
        minimum: bool = False,
        seed: int = 0,
        start: int = 0,
    ):
        self.rewards, self.prompts = rewards, prompts
        self.env = TokenEnv(
            prompts,
            rewards,
            num_groups=rewards.source.num_groups,
            num_prompts=batch_size // num_generations,
            num_generations=num_generations,
            max_new_tokens=policy.max_new_tokens,
            eos_token_id=policy.eos_token_ids,
            vocab_size=policy.model.get_input_embeddings().num_embeddings,
            minimum=minimum,
            seed=seed,
            device=next(policy.parameters()).device,
        )
        self.env.batch_index = start  # the order of prompts follows from it
        self.collector = Collector(
            self.env,
            policy,
            frames_per_batch=batch_size,
            total_frames=batch_size * max(num_batches - start, 1),
            auto_register_policy_transforms=False,
        )

    def __iter__(self) -> Iterator[TensorDictBase]:
        for rollout in self.collector:
            yield rollout[:, 0] if rollout.ndim == 2 else rollout  # an episode is one step

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """The state to go on from after so many batches."""
        return self.rewards.state_dict()

    def close(self) -> None:
        """Free what the collector holds."""
        self.collector.shutdown(close_env=False)
