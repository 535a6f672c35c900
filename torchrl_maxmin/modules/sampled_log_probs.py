"""Log-probabilities of what ``generate`` samples, from the scores that it samples with."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

__all__ = ["SampledLogProbs"]


class SampledLogProbs:
    """A logits processor that changes nothing and remembers how likely each sampled token was.

    A token is known one call after its scores: only one step's scores are held, never [B, R, V].

    Args:
        temperature: of the sampling; processors of the caller's see scores that are not divided yet.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self._temperature = temperature
        self._columns: list[Tensor] = []
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take the scores [B, V] of the next token, given all tokens [B, T] until now."""
        if self._scores is not None:
            self._take(input_ids[:, -1])
        self._scores = scores
        return scores

    def finish(self, last_token: Tensor) -> Tensor:
        """Return the log-probabilities [B, R] in fp32, given the last column of tokens [B]."""
        self._take(last_token)
        return torch.stack(self._columns, -1)

    def _take(self, token: Tensor) -> None:
        assert self._scores is not None
        scores = self._scores.float()
        if self._temperature != 1.0:
            scores = scores / self._temperature
        self._columns.append(-nn.functional.cross_entropy(scores, token, reduction="none"))


# generate() asks for it at every token, and working it out takes longer than the log-probability.
SampledLogProbs.__call__.__signature__ = inspect.signature(SampledLogProbs.__call__)  # type: ignore[attr-defined]
