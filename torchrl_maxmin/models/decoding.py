"""What shapes generation: the tokens that it samples from, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.models.loading import import_transformers
from torchrl_maxmin.models.sequences import is_end

__all__ = ["LARGE_VOCABULARY", "NUMBERS", "GivenNumbers", "StopStrings", "truncating_warpers"]

#: where a policy finds the numbers that the tokens of responses are drawn by, uniform in [0, 1), [B, R]
NUMBERS = "drawn_by"
#: tokens from which one number a token is drawn: ``multinomial`` draws as many as there are tokens, which is
#: a quarter of a decoding step at 49,152 on a CPU
LARGE_VOCABULARY = 2**13
#: tokens whose probabilities are first summed up, and then looked at one by one in a single sum
_BLOCK = 256


def truncating_warpers(top_k: int, top_p: float) -> list[Any]:
    """What leaves the likeliest tokens alone in scores [B, V], in the order of ``generate``.

    Args:
        top_k: so many tokens; 0 leaves all.
        top_p: as many as hold so much probability together; 1 leaves all.
    """
    transformers = import_transformers()
    warpers: list[Any] = [transformers.TopKLogitsWarper(top_k)] if top_k else []
    return warpers + ([transformers.TopPLogitsWarper(top_p)] if top_p < 1 else [])


class GivenNumbers:
    """A logits processor that leaves one token, where the cumulated probabilities reach a given number.

    A row's tokens then depend on its own numbers and scores, whichever rows are sampled beside it.

    Args:
        numbers: uniform in [0, 1), [B, R], one a column of the responses.
        width: of the prompts.
        temperature: of the sampling.
    """

    def __init__(self, numbers: Tensor, width: int, temperature: float = 1.0):
        self.numbers, self.width, self.temperature = numbers.double(), width, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take the scores [B, V] of the next token, given all tokens [B, T]."""
        number = self.numbers[:, input_ids.shape[-1] - self.width, None]
        wide = scores.float()
        chances = (wide if self.temperature == 1.0 else wide / self.temperature).softmax(-1)
        size = chances.shape[-1]
        whole = size - size % _BLOCK
        blocks = chances[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
        blocks = torch.cat([blocks, chances[:, whole:].sum(-1, keepdim=True)], -1).double()
        block, rest = _reached(blocks, number * blocks.sum(-1, keepdim=True))
        tokens = block * _BLOCK + torch.arange(_BLOCK, device=scores.device)
        within = chances.gather(-1, tokens.clamp(max=size - 1)).double().where(tokens < size, 0.0)
        place, _ = _reached(within, rest)
        # of NaN, too, some token is drawn: the loss finds it and saves the batch
        token = tokens.gather(-1, place).clamp(max=size - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def _reached(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The place [B, 1] at which sums over weights [B, N] pass a target, and what is left of it there.

    Nothing of weight 0 is a place, however the sums are rounded.
    """
    sums = weights.cumsum(-1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.searchsorted(sums, target, right=True).minimum(last)
    return place, (target - sums.gather(-1, place) + weights.gather(-1, place)).clamp(min=0.0)


class StopStrings:
    """Says where responses end: at an end token, or at the token with which their text completes a string.

    The text is the tokenizer's, special tokens included. A string that begins in the prompt is none.

    Args:
        strings: end a response; none of them empty.
        tokenizer: the policy's.
        eos_token_ids: tokens that end a response by themselves.

    Example:
        >>> from torchrl_maxmin.world import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> ends = StopStrings(["was great"], tokenizer, [tokenizer.eos_token_id])
        >>> ends(torch.tensor([tokenizer("it was great .").input_ids[-4:]])).tolist()
        [[False, False, True, True]]
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, eos_token_ids: Sequence[int]):
        self.strings, self.tokenizer = tuple(strings), tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        # a token is a byte or more; one more, for decoders that strip what a text begins with
        self.window = 1 + max(len(string.encode()) for string in strings)

    def completed(self, tokens: Tensor) -> Tensor:
        """Whether the last tokens of responses [B, T] complete a string, or one shortly before: bool [B]."""
        texts = self.tokenizer.batch_decode(tokens[:, -self.window :].tolist())
        found = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(found, device=tokens.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Mark tokens [B, R] of responses that end one: bool, and anything behind the first of a row."""
        stops = [self.completed(tokens[:, : column + 1]) for column in range(tokens.shape[-1])]
        return torch.stack(stops, -1) | is_end(tokens, self.eos_token_ids)
