"""One judgement of a user: responses to one prompt, their ranks, and the pairs that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.preferences.texts import Text

__all__ = ["Comparison", "Judgement", "LoadOptions", "best_of", "ranked", "tied"]


@dataclass(frozen=True)
class LoadOptions:
    """How judgements become pairs.

    Attributes:
        ties: ``"drop"`` leaves ties out; ``"halve"`` makes two pairs of each, one in either order, with
            weight 1/2.
        tie_margin: scores that differ by no more than this are a tie.
        max_pairs: most pairs from one user's scores of one prompt, and from all ratings of one rater; a
            seeded choice where there are more.
        identical: ``"error"`` refuses data that states chosen and rejected texts and has a pair in
            which they are equal; ``"drop"`` leaves such pairs out, as is always done where the pairs
            are built here.
        seed: of that choice.
        conversations: whether conversations become ``"transcript"`` strings or stay ``"messages"``.
    """

    ties: str = "drop"
    tie_margin: float = 0.0
    max_pairs: int = 64
    identical: str = "error"
    seed: int = 0
    conversations: str = "transcript"

    def __post_init__(self) -> None:
        choices = {
            "ties": ("drop", "halve"),
            "identical": ("error", "drop"),
            "conversations": ("transcript", "messages"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if not self.tie_margin >= 0:
            raise UserError(f"tie_margin must be at least 0, not {self.tie_margin}")
        if self.max_pairs < 1:
            raise UserError(f"max_pairs must be at least 1, not {self.max_pairs}")


class Comparison(NamedTuple):
    """Response ``better`` over response ``worse``, by their places; or neither, when it is a tie."""

    better: int
    worse: int
    tie: bool = False


class Judgement(NamedTuple):
    """What one user said about the responses to one prompt.

    Attributes:
        row: the row of the data where it stands (its first row, when it takes several).
        prompt: a string or a list of messages.
        responses: two or more responses, of the prompt's kind.
        ranks: rank of each response, the best 0; equal ranks are ties, or an order not asked for.
        comparisons: the pairs that train.
        ties_left_out: ties that are not among the comparisons.
        pairs_left_out: pairs beyond the cap that are not among the comparisons.
    """

    row: int
    prompt: Text
    responses: Sequence[Text]
    ranks: Sequence[int]
    comparisons: Sequence[Comparison]
    ties_left_out: int = 0
    pairs_left_out: int = 0


def tied() -> tuple[list[int], list[Comparison]]:
    """Ranks and comparisons of two responses that are equally good."""
    return [0, 0], [Comparison(0, 1, tie=True)]


def best_of(count: int, best: int) -> tuple[list[int], list[Comparison]]:
    """Ranks and comparisons of one response preferred to all others, whose order was not asked.

    Example:
        >>> best_of(3, best=1)[0]
        [1, 0, 1]
    """
    ranks = [int(i != best) for i in range(count)]
    return ranks, [Comparison(best, other) for other in range(count) if other != best]


def ranked(values: Sequence[float]) -> tuple[list[int], list[Comparison]]:
    """Ranks and all comparisons of responses with these values, where smaller is better.

    Example:
        >>> ranked([2.0, 1.0, 2.0])
        ([1, 0, 1], [Comparison(better=1, worse=0, tie=False), Comparison(better=0, worse=2, tie=True), \
Comparison(better=1, worse=2, tie=False)])
    """
    levels = {value: rank for rank, value in enumerate(sorted(set(values)))}
    ranks = [levels[value] for value in values]
    comparisons = [
        Comparison(i, j, tie=ranks[i] == ranks[j]) if ranks[i] <= ranks[j] else Comparison(j, i)
        for i, j in combinations(range(len(ranks)), 2)
    ]
    return ranks, comparisons
