"""What generation samples from, and where it ends: log-probabilities, truncation, stop strings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_maxmin.models.loading import import_transformers
from torchrl_maxmin.models.sequences import is_end

__all__ = ["SampledLogProbs", "StopStrings", "TruncatedLogProbs", "whole_log_prob"]


@dataclass
class SampledLogProbs:
    """A logits processor that changes nothing and remembers how likely each sampled token was.

    A token is known one call after its scores: only one step's scores are held, never [B, R, V].

    Attributes:
        temperature: of the sampling; processors of the caller's see scores that are not divided yet.
        columns: the log-probabilities [B] in fp32 of every column but the last, which a last call adds.
        scores: those of the last call.
    """

    temperature: float = 1.0
    columns: list[Tensor] = field(default_factory=list)
    scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor | None:
        """Take the scores [B, V] of the next token, None after the last, given all tokens [B, T]."""
        if self.scores is not None:
            last = self.scores.float()
            if self.temperature != 1.0:
                last = last / self.temperature
            self.columns.append(-nn.functional.cross_entropy(last, input_ids[:, -1], reduction="none"))
        self.scores = scores
        return scores


class TruncatedLogProbs(SampledLogProbs):
    """A logits processor that leaves the likeliest tokens alone, and remembers what share they have.

    The order is that of ``generate``: temperature, top-k, top-p. What comes out is sampled as it is.

    Args:
        temperature: divides the scores.
        top_k: tokens that are left; 0 leaves all.
        top_p: probability that those left hold together at least; 1 leaves all.

    Attributes:
        log_mass: log [B] in fp32 of the probability that the tokens left hold, for every column.
        columns: the log-probabilities among the tokens left.
    """

    def __init__(self, temperature: float, top_k: int, top_p: float):
        super().__init__()
        transformers = import_transformers()
        self.divisor = temperature
        self.warpers: list[Any] = [transformers.TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
        self.log_mass: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor | None:
        """Truncate the scores [B, V] of the next token; see the parent."""
        if scores is not None:
            whole = scores = scores.float() / self.divisor
            for warper in self.warpers:
                scores = warper(input_ids, scores)
            self.log_mass.append(scores.logsumexp(-1) - whole.logsumexp(-1))
        return super().__call__(input_ids, scores)


for _kind in (SampledLogProbs, TruncatedLogProbs):
    # generate() asks for it at every token, and working it out takes longer than the log-probability
    _kind.__call__.__signature__ = inspect.signature(_kind.__call__)  # type: ignore[attr-defined]


def whole_log_prob(responses: TensorDictBase) -> Tensor:
    """Log-probabilities [B, R] of sampled tokens under the whole distribution, before it was truncated.

    Args:
        responses: with ``sample_log_prob`` [B, R] and, where top-k or top-p shaped it, ``kept_log_mass``.
    """
    log_mass = responses.get("kept_log_mass", None)
    return responses["sample_log_prob"] if log_mass is None else responses["sample_log_prob"] + log_mass


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
