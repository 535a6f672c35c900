"""Users' choices between items as rows of pairs, and what EM asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from torchrl_maxmin.clustering.distinct import DistinctChoices, distinct_choices, ranges
from torchrl_maxmin.clustering.em import Expectation, UserRows, harden, posterior
from torchrl_maxmin.clustering.luce import log_choices, loser_probabilities, offsets_of, weighted_sums
from torchrl_maxmin.clustering.solvers import (
    ChoiceLosses,
    minimise,
    narrow_margins,
    narrow_slope_sum,
    rows_copied,
)
from torchrl_maxmin.preferences.dataset import PreferenceDataset

__all__ = ["PairChoices", "choice_offsets_of", "fit_device", "row_weights_of", "user_blocks"]

#: Rows that are worked on at a time: few blocks, as each costs a fixed time, and little memory.
BLOCK_ROWS = 65_536
#: Most that a float64 copy of the features may take.
MOST_WIDE_BYTES = 256 * 2**20


def row_weights_of(data: PreferenceDataset) -> Tensor | None:
    """Return how much each pair of a data set counts [P] fp32; None where every pair counts once."""
    return None if bool((data.weights == 1).all()) else data.weights.float()


def choice_offsets_of(data: PreferenceDataset) -> Tensor | None:
    """Return the rows of each choice of a data set, int64 [C + 1]; None where all are pairs."""
    offsets = data.choice_offsets
    return None if len(offsets) == len(data) + 1 else offsets


def fit_device(device: torch.device | str) -> torch.device:
    """Where linear mixtures are fitted, in float64: on the device, or the CPU where it has none (mps)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def user_blocks(user_offsets: Tensor, block_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows into blocks of whole users: (users, rows), each of about ``block_rows`` rows."""
    num_users, num_rows = len(user_offsets) - 1, int(user_offsets[-1])
    begins = torch.arange(0, num_rows, block_rows, device=user_offsets.device)
    cuts = torch.searchsorted(user_offsets, begins).tolist()
    for first, last in pairwise(sorted({0, *cuts, num_users})):
        yield slice(first, last), slice(int(user_offsets[first]), int(user_offsets[last]))


@dataclass(frozen=True)
class PairChoices(UserRows):
    """Pairs under linear Bradley-Terry rewards: P(chosen) = sigmoid(w . difference).

    Attributes:
        differences: features(chosen) - features(rejected) [P, D]; may be a memory-mapped file.
        user_offsets, row_weights: see :class:`UserRows`; a tie is the pair both ways, each counted one half.
        judgements: what each pair follows from [P]; pairs of one judgement are held out together.
        choice_offsets: int64 [C + 1], rows of a choice; None makes every pair one, see :mod:`~.luce`.
        distinct: the choices without repeats, of :meth:`find_distinct`.
    """

    differences: Tensor
    user_offsets: Tensor
    row_weights: Tensor | None = None
    judgements: Tensor | None = None
    choice_offsets: Tensor | None = None
    distinct: DistinctChoices | None = None

    @property
    def features(self) -> Tensor:
        """What heads are applied to [P, D]; fits come back in its dtype."""
        return self.differences

    @cached_property
    def wide(self) -> Tensor | None:
        """The features of the choices that fits work on in float64, kept: M-steps read them again and again.

        None where the copy would take more than :data:`MOST_WIDE_BYTES`.
        """
        narrow = self.differences if self.distinct is None else self.distinct.differences
        return None if 8 * narrow.numel() > MOST_WIDE_BYTES else narrow.double()

    @property
    def choice_judgements(self) -> Tensor | None:
        """What each choice follows from [C]."""
        if self.judgements is None or self.choice_offsets is None:
            return self.judgements
        return self.judgements[self.choice_offsets[:-1]]

    @property
    def mean_choice_weight(self) -> Tensor | float:
        """Mean of the choices' weights."""
        return 1.0 if self.choice_weights is None else self.choice_weights.mean()

    def to(self, device: torch.device | str) -> PairChoices:
        """The same choices on a device, for fits there; on the CPU where the device has no float64."""
        device = fit_device(device)
        if self.differences.device.type == device.type == "cpu":
            return self
        names = "differences", "user_offsets", "row_weights", "judgements", "choice_offsets"
        moved = {name: None if (x := getattr(self, name)) is None else x.to(device) for name in names}
        distinct = self.distinct
        if distinct is not None:
            distinct = DistinctChoices(*(None if x is None else x.to(device) for x in distinct))
        return replace(self, **moved, distinct=distinct)

    def find_distinct(self) -> PairChoices:
        """The same choices; where they repeat, fits work on each distinct one once."""
        return replace(self, distinct=distinct_choices(self.differences, self.choice_offsets))

    def take_users(self, users: Tensor) -> PairChoices:
        """These users' choices, in the order of ``users`` [U'], which may name a user twice."""
        counts = self.user_choice_offsets.diff()[users]
        return self.take_choices(ranges(self.user_choice_offsets[users], counts), offsets_of(counts))

    def keep_rows(self, kept: Tensor) -> PairChoices:
        """The rows where ``kept`` [P] holds, of whole choices; users may be left without any."""
        kept = kept.to(self.user_offsets.device)
        if self.choice_offsets is not None:
            kept = kept[self.choice_offsets[:-1]]
        return self.take_choices(kept.nonzero().flatten(), offsets_of(kept.long())[self.user_choice_offsets])

    def take_choices(self, choices: Tensor, user_choice_offsets: Tensor) -> PairChoices:
        """These choices [C'], of users to whom offsets [U' + 1] deal them."""
        rows, choice_offsets, user_offsets = choices, None, user_choice_offsets
        if self.choice_offsets is not None:
            sizes = self.choice_offsets.diff()[choices]
            rows, choice_offsets = ranges(self.choice_offsets[choices], sizes), offsets_of(sizes)
            user_offsets = choice_offsets[user_choice_offsets]
        row_weights = None if self.row_weights is None else self.row_weights[rows]
        judgements = None if self.judgements is None else self.judgements[rows]
        distinct = None
        if self.distinct is not None:
            distinct = self.distinct._replace(index=self.distinct.index[choices])
        taken = self.differences[rows]
        return PairChoices(taken, user_offsets, row_weights, judgements, choice_offsets, distinct)

    def expectation(
        self,
        weight: Tensor,
        log_prior: Tensor,
        assignment: str = "soft",
        *,
        gradient: bool = False,
        block_rows: int | None = None,
    ) -> Expectation:
        """One E-step in one pass over the rows, with the gradient of the M-step that follows it.

        Blocks hold whole users, so a block's responsibilities are final when its margins are at
        hand, and nothing of size P x K or P x D is alive beside the features. By Fisher's identity
        the gradient is that of the observed log-likelihood.

        Args:
            weight: heads [K, D]; its dtype is computed in.
            log_prior: log mixing weights [K].
            assignment: ``soft`` or ``hard``.
            gradient: whether the gradient is wanted.
            block_rows: rows of a block, about; None chooses.
        """
        responsibilities = weight.new_empty(len(self.user_offsets) - 1, len(weight))
        log_likelihood = weight.new_empty(len(responsibilities))
        slope_sum = torch.zeros_like(weight)
        if self.distinct is not None and not gradient:
            return self._expectation_by_distinct(weight, log_prior, assignment)
        if block_rows is None:
            copied = rows_copied(self.differences)
            block_rows = max(BLOCK_ROWS, copied) if weight.dtype == self.differences.dtype else copied
        wide = self.wide if weight.dtype == torch.float64 and self.distinct is None else None
        read = self.differences if wide is None else wide
        for users, rows in user_blocks(self.user_offsets, block_rows):
            x = read[rows].to(weight.dtype)
            block = self._block(users, rows, weight.dtype)
            row_weights, offsets = block.row_weights, block.user_offsets
            margins = narrow_margins(x, weight)
            responsibilities[users], log_likelihood[users], _ = block.expectation_of(
                margins, log_prior, assignment
            )
            if gradient:
                if block.choice_offsets is None:
                    slope = margins.neg_().sigmoid_()
                else:
                    log_choice = log_choices(margins, block.choice_offsets)
                    slope = loser_probabilities(margins, log_choice, block.choice_offsets)
                slope *= responsibilities[users].repeat_interleave(offsets.diff(), 0, output_size=len(x))
                if row_weights is not None:
                    slope *= row_weights.unsqueeze(-1)
                slope_sum += narrow_slope_sum(slope, x)
        return Expectation(responsibilities, log_likelihood, slope_sum if gradient else None)

    def _block(self, users: slice, rows: slice, dtype: torch.dtype) -> UserRows:
        """These users' rows without their features."""
        block = UserRows()
        block.user_offsets = self.user_offsets[users.start : users.stop + 1] - rows.start
        block.row_weights = None if self.row_weights is None else self.row_weights[rows].to(dtype)
        if self.choice_offsets is not None:
            ends = self.user_choice_offsets[users.start], self.user_choice_offsets[users.stop] + 1
            block.choice_offsets = self.choice_offsets[slice(*ends)] - rows.start
        return block

    def _expectation_by_distinct(self, weight: Tensor, log_prior: Tensor, assignment: str) -> Expectation:
        soft, log_likelihood, _ = posterior(self.user_log_likelihood(weight)[..., 0], log_prior)
        soft, log_likelihood = soft.to(weight.dtype), log_likelihood.to(weight.dtype)
        return Expectation(harden(soft) if assignment == "hard" else soft, log_likelihood)

    def user_log_likelihood(self, weight: Tensor, scales: Sequence[float] = (1.0,)) -> Tensor:
        """Log-likelihood [U, K, A] in float64 of every user's choices by heads [K, D] times scales [A]."""
        found = weight.new_empty(len(self.user_offsets) - 1, len(weight), len(scales), dtype=torch.float64)
        if self.distinct is not None:
            margins = (self.distinct.differences.to(weight.dtype) @ weight.T).double()
            for a, scale in enumerate(scales):
                log_choice = log_choices(scale * margins, self.distinct.choice_offsets)
                found[..., a] = self.sum_by_user(log_choice, self.distinct.index)
            return found
        for users, rows in user_blocks(self.user_offsets, rows_copied(self.differences)):
            block = self._block(users, rows, torch.float64)
            margins = (self.differences[rows].to(weight.dtype) @ weight.T).double()
            for a, scale in enumerate(scales):
                found[users, :, a] = block.log_likelihood_by_user(scale * margins)
        return found

    def user_slopes(self, head: Tensor) -> Tensor:
        """Slope [U, D] in float64 of every user's log-likelihood at a head [D]."""
        head = head.double()
        found = head.new_empty(len(self.user_offsets) - 1, len(head))
        for users, rows in user_blocks(self.user_offsets, rows_copied(self.differences)):
            block, x = self._block(users, rows, torch.float64), self.differences[rows].double()
            margins = x @ head.unsqueeze(1)
            log_choice = log_choices(margins, block.choice_offsets)
            slope = loser_probabilities(margins, log_choice, block.choice_offsets).squeeze(1)
            slope = slope if block.row_weights is None else slope * block.row_weights
            found[users] = weighted_sums(x, slope, block.user_offsets)
        return found

    def maximise(self, responsibilities: Tensor, start: Tensor, l2: float) -> Tensor:
        """The M-step, to convergence: float64 heads [K, D], from ``start`` [K, D]."""
        shares, penalty = responsibilities.double(), l2 * self.num_choices
        if (found := self.distinct) is None:
            weights, offsets = self.choice_weights, self.choice_offsets
            losses = ChoiceLosses(
                self.differences, self.choice_users, shares, penalty, weights, offsets, self.wide
            )
        else:
            shares = shares[self.choice_users]
            if self.choice_weights is not None:
                shares = shares * self.choice_weights.double().unsqueeze(-1)
            shares = found.sum_by_choice(shares)
            each = torch.arange(len(shares), device=shares.device)
            offsets = found.choice_offsets
            losses = ChoiceLosses(found.differences, each, shares, penalty, None, offsets, self.wide)
        return minimise(losses, start.double())
