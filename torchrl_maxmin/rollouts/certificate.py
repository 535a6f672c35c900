"""Certify a language model's policy: samples of it and of the reference, scored by both."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_maxmin.core.distributed import over_ranks
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sampling import sample_responses
from torchrl_maxmin.models.sequences import in_batches
from torchrl_maxmin.welfare import Certificate, certify

__all__ = ["policy_certificate", "score_responses"]


@torch.no_grad()
def score_responses(policy: TokenPolicy, responses: TensorDict, batch_size: int = 512) -> Tensor:
    """Log-probabilities [N, R] of given responses, ``batch_size`` at once; on the CPU."""
    device = next(policy.parameters()).device

    def score(share: TensorDict) -> Tensor:
        return in_batches(lambda part: policy.log_prob(part.to(device)).cpu(), share, batch_size)

    return over_ranks(score, responses)


@torch.no_grad()
def policy_certificate(
    policy: TokenPolicy,
    reference: TokenPolicy,
    rewards: Callable[[TensorDict], Tensor],
    prompts: TensorDict,
    num_samples: int,
    beta: float,
    *,
    scoring_batch_size: int = 512,
    reward_bound: float | None = None,
    looks: int = 1,
) -> Certificate:
    """Certify how far a policy is from the max-min optimum of ``F_u = E[r_u] - beta KL``, from fresh samples.

    Args:
        policy: the policy.
        reference: the reference policy.
        rewards: gives the rewards [N, K] that the policy was trained on to responses of batch size [N].
        prompts: what :func:`~torchrl_maxmin.models.sampling.encode_prompts` gives, batch size [X].
        num_samples: responses a prompt, a multiple of 4; half are the policy's, half the reference's.
        beta: weight of the KL penalty, positive.
        scoring_batch_size: most responses whose log-probabilities are taken at once.
        reward_bound: the largest size that any response's reward can have; see ``certify``.
        looks: certificates that are looked at before one is acted on; see ``certify``.

    Returns:
        See :func:`~torchrl_maxmin.welfare.certify`; null, with the reason, where it cannot say.

    Raises:
        ValueError: for a policy that samples from a truncated distribution.
    """
    if policy.truncated or reference.truncated:
        raise ValueError("top_k and top_p leave out tokens that the certificate is about: sample without")
    half, shape = num_samples // 2, (len(prompts), num_samples)
    drawn = [sample_responses(who, prompts, half).reshape(len(prompts), half) for who in (policy, reference)]
    both = torch.cat(drawn, 1).reshape(-1)
    log_policy, log_reference = (
        score_responses(who, both, scoring_batch_size).double().sum(-1).reshape(shape)
        for who in (policy, reference)
    )
    group_rewards = rewards(both).cpu().double().reshape(*shape, -1)
    log_mixture = torch.logaddexp(log_policy, log_reference) - math.log(2)
    penalty = beta * (log_policy - log_reference)[:, :half, None]
    return certify(
        group_rewards,
        log_reference - log_mixture - math.log(num_samples),
        (group_rewards[:, :half] - penalty).mean(1),
        beta,
        reward_bound=reward_bound,
        looks=looks,
    )
