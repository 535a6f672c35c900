"""Responses of a policy to a list of prompts, as tensors and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_maxmin.modules.language import TokenPolicy
from torchrl_maxmin.modules.sequences import pad_left

__all__ = ["encode_prompts", "sample_responses", "to_texts"]


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_length: int | None = None) -> TensorDict:
    """Prompts padded left: ``prompt_tokens`` and ``prompt_mask``, both [N, P]."""
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    tokens, mask = pad_left(
        [row if max_length is None else row[-max_length:] for row in rows], tokenizer.pad_token_id
    )
    return TensorDict({"prompt_tokens": tokens, "prompt_mask": mask}, [len(rows)])


@torch.no_grad()
def sample_responses(
    policy: TokenPolicy, prompts: TensorDict, num_samples: int = 1, batch_size: int = 512
) -> TensorDict:
    """Sample responses to every prompt.

    Args:
        policy: who answers.
        prompts: what :func:`encode_prompts` gives, batch size [N].
        num_samples: responses a prompt, n.
        batch_size: responses sampled at once.

    Returns:
        The prompts with ``action``, ``action_mask`` and ``sample_log_prob``, batch size [N * n];
        the responses of a prompt lie side by side.
    """
    device = next(policy.parameters()).device
    repeated = prompts[torch.arange(len(prompts)).repeat_interleave(num_samples)]
    parts = [policy(part.to(device)).cpu() for part in repeated.split(batch_size)]
    return torch.cat(parts)


def to_texts(tokenizer: Any, responses: TensorDict) -> tuple[list[str], list[str]]:
    """Prompts and completions of sampled responses as text, special tokens left out."""
    prompts = [
        row[mask].tolist()
        for row, mask in zip(responses["prompt_tokens"], responses["prompt_mask"], strict=True)
    ]
    actions = [
        row[mask].tolist() for row, mask in zip(responses["action"], responses["action_mask"], strict=True)
    ]
    decode = tokenizer.batch_decode
    return decode(prompts, skip_special_tokens=True), decode(actions, skip_special_tokens=True)
