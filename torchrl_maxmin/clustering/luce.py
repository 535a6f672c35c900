"""Luce's choices: one item preferred to each of a set of others, as rows of pairs.

A pair is a choice between two items (Bradley-Terry). The best of n is one choice, of n - 1 rows with the same
chosen item. A ranking of n items is n - 1 choices, of the best among those that are left (Plackett-Luce), of
n - 1, ..., 1 rows. Rows of a choice are not independent: as so many pairs they carry groups that are not
there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "at_rows",
    "log_choices",
    "loser_probabilities",
    "offsets_of",
    "redraw",
    "segment_logsumexp",
    "sum_by_segment",
    "weighted_sums",
]


def offsets_of(counts: Tensor) -> Tensor:
    """Where each of segments of these sizes [S] begins, and the last ends: [S + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


#: Columns from which a bag sums rows in less time than ``segment_reduce``; a tenth of it where they are many.
_WIDE = 32


def sum_by_segment(
    values: Tensor, offsets: Tensor, rows: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sums [S, K] of the rows of ``values`` [N, K] between offsets [S + 1]; 0 where there are none.

    Args:
        values: [N, K] or [N].
        offsets: int64, where each segment begins, and the last ends.
        rows: which row of ``values`` stands at each place; None takes them in order.
        weights: how much each place counts.
    """
    if values.ndim == 2 and values.shape[1] >= _WIDE:
        return weighted_sums(values, weights, offsets, rows)
    taken = values if rows is None else values[rows]
    taken = taken if weights is None else taken * weights.unsqueeze(-1)
    return torch.segment_reduce(taken, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def weighted_sums(
    values: Tensor, weights: Tensor | None, offsets: Tensor, rows: Tensor | None = None
) -> Tensor:
    """As :func:`sum_by_segment`, each row times its weight [N]; no product is in memory."""
    if rows is None:
        rows = torch.arange(len(values), device=values.device)
    weights = None if weights is None else weights.to(values.dtype).contiguous()
    return nn.functional.embedding_bag(rows, values, offsets[:-1], mode="sum", per_sample_weights=weights)


def segment_logsumexp(values: Tensor, offsets: Tensor) -> Tensor:
    """log sum exp [S, K] of the rows of ``values`` [M, K] between offsets [S + 1], none empty."""
    largest = torch.segment_reduce(values.detach(), "max", offsets=offsets, axis=0, unsafe=True)
    shifted = values - at_rows(largest, offsets, len(values))
    return largest + sum_by_segment(shifted.exp(), offsets).log()


def log_choices(margins: Tensor, choice_offsets: Tensor | None = None) -> Tensor:
    """Log-probability of every choice: -log(1 + sum exp(-margin)) over its rows [C, K].

    Args:
        margins: reward of the chosen item less that of another one [P, K], rows of a choice side by side.
        choice_offsets: int64 [C + 1]; None makes every row a choice of its own.

    Example:
        >>> scores = torch.tensor([2.0, 1.0, 0.0])  # the first of three is chosen
        >>> margins = (scores[0] - scores[1:]).unsqueeze(1)
        >>> log_choices(margins, torch.tensor([0, 2])).exp().item() - scores.softmax(0)[0].item()
        0.0
    """
    if choice_offsets is None:
        return nn.functional.logsigmoid(margins)
    return nn.functional.logsigmoid(-segment_logsumexp(-margins, choice_offsets))


def loser_probabilities(margins: Tensor, log_choice: Tensor, choice_offsets: Tensor | None = None) -> Tensor:
    """Probability [P, K] that the other item of each row had been chosen; the slope of ``log_choice``.

    Args:
        margins: [P, K].
        log_choice: of :func:`log_choices` [C, K].
        choice_offsets: as there.
    """
    if choice_offsets is None:
        return torch.sigmoid(-margins)
    return (at_rows(log_choice, choice_offsets, len(margins)) - margins).exp()


def at_rows(values: Tensor, choice_offsets: Tensor | None, num_rows: int) -> Tensor:
    """Figures of choices [C, ...] at their rows [P, ...]."""
    if choice_offsets is None:
        return values
    return values.repeat_interleave(choice_offsets.diff(), 0, output_size=num_rows)


def redraw(margins: Tensor, choice_offsets: Tensor | None, values: Tensor, uniform: Tensor) -> Tensor:
    """Let choices be made anew among the same items, and turn the rows to the items that win then.

    Args:
        margins: by the reward that chooses [P].
        choice_offsets: int64 [C + 1]; None makes every row a choice of its own.
        values: of every row, chosen less other [P, ...]: features, or margins of other rewards.
        uniform: a number in [0, 1) for every choice [C].

    Returns:
        ``values`` of the same shape: where another item wins, that item less each of the others.

    Example:
        >>> items = torch.tensor([2.0, 1.0, 0.0])  # the first was chosen
        >>> rows, offsets = items[0] - items[1:], torch.tensor([0, 2])
        >>> redraw(rows, offsets, rows, torch.tensor([0.0])).tolist()  # and is again
        [1.0, 2.0]
        >>> redraw(rows, offsets, rows, torch.tensor([0.999])).tolist()  # the last wins
        [-1.0, -2.0]
    """
    count, columns = len(values), values.reshape(len(values), -1)
    margins = margins.double().unsqueeze(1)
    log_choice = log_choices(margins, choice_offsets)
    stays = log_choice.exp().squeeze(1)
    if choice_offsets is None:
        return torch.where((uniform < stays).unsqueeze(1), columns, -columns).view_as(values)
    loses = loser_probabilities(margins, log_choice, choice_offsets).squeeze(1)
    running = offsets_of(loses)
    low = running[:-1] - at_rows(running[choice_offsets[:-1]], choice_offsets, count)
    drawn = at_rows(uniform - stays, choice_offsets, count)
    wins = ((low <= drawn) & (drawn < low + loses)).unsqueeze(1)
    winner = sum_by_segment(wins * columns, choice_offsets)
    return (torch.where(wins, 0, columns) - at_rows(winner, choice_offsets, count)).view_as(values)
