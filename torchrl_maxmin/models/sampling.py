"""Responses of a policy to a list of prompts, as tensors and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sequences import in_batches, pad_left
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import TextEncoder

__all__ = ["encode_prompts", "rows_at_once", "sample_responses", "to_texts"]


def rows_at_once(policy: TokenPolicy) -> int:
    """Most rows that :func:`sample_responses` hands to a policy, which answers them in slices of its own."""
    return max(policy.generation_batch_size or 0, 512)


def encode_prompts(tokenizer: Any, prompts: Sequence[Text], max_length: int | None = None) -> TensorDict:
    """Tokenize prompts for a policy.

    Args:
        tokenizer: the policy's.
        prompts: N strings or conversations, see :class:`~torchrl_maxmin.preferences.texts.TextEncoder`.
        max_length: most tokens; longer prompts lose their start, but for BOS.

    Returns:
        ``prompt_tokens`` int64 and ``prompt_mask`` bool, both [N, P], padded left, and ``prompt_index``
        int64 [N], the place of each in ``prompts``.

    Raises:
        UserError: for an empty prompt where the tokenizer has no BOS.
    """
    rows = TextEncoder(tokenizer).prompts(prompts, max_length)
    tokens, mask = pad_left(rows, tokenizer.pad_token_id)
    index = torch.arange(len(rows))
    return TensorDict({"prompt_tokens": tokens, "prompt_mask": mask, "prompt_index": index}, [len(rows)])


@torch.no_grad()
def sample_responses(
    policy: TokenPolicy, prompts: TensorDict, num_samples: int = 1, batch_size: int | None = None
) -> TensorDict:
    """Sample responses to every prompt.

    Args:
        policy: who answers.
        prompts: what :func:`encode_prompts` gives, batch size [N].
        num_samples: responses a prompt, n.
        batch_size: most responses that the policy is asked for at once; by default :func:`rows_at_once`.

    Returns:
        The prompts with what the policy writes (``action``, ``action_mask``, ``sample_log_prob`` ...), batch
        size [N * n];
        the responses of a prompt lie side by side.
    """
    device = next(policy.parameters()).device
    repeated = prompts[torch.arange(len(prompts)).repeat_interleave(num_samples)]
    return in_batches(
        lambda part: policy(part.to(device)).cpu(), repeated, batch_size or rows_at_once(policy)
    )


def to_texts(
    tokenizer: Any, responses: TensorDict, prompts: Sequence[Text] | None = None
) -> tuple[list[Any], list[Any]]:
    """Read sampled responses as texts, special tokens left out.

    Args:
        tokenizer: the policy's.
        responses: as :class:`~torchrl_maxmin.models.language.TokenPolicy` writes them, [N].
        prompts: the texts that ``prompt_index`` counts; the prompts' tokens are read back when None.

    Returns:
        Prompts [N] and completions [N]: strings for strings, a message of the assistant for a conversation.
    """

    def read(tokens: str, mask: str) -> list[str]:
        rows = zip(responses[tokens], responses[mask], strict=True)
        return tokenizer.batch_decode([row[real].tolist() for row, real in rows], skip_special_tokens=True)

    completions = read("action", "action_mask")
    if prompts is None:
        return read("prompt_tokens", "prompt_mask"), completions
    answered = [prompts[place] for place in responses["prompt_index"].tolist()]
    encoder = TextEncoder(tokenizer)
    return answered, [encoder.completion(*texts) for texts in zip(answered, completions, strict=True)]
