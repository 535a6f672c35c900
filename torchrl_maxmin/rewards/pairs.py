"""Preference pairs as a model reads them: tokens, frozen features, and the M-step that fine-tunes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices, choice_offsets_of, row_weights_of
from torchrl_maxmin.clustering.distinct import ranges
from torchrl_maxmin.clustering.em import UserRows, log_likelihood_by_user
from torchrl_maxmin.clustering.judged import merged_choices
from torchrl_maxmin.clustering.luce import offsets_of
from torchrl_maxmin.clustering.shares import SharedChoices
from torchrl_maxmin.core.distributed import gather_rows, share_of_rows, sum_over_ranks
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.models.sequences import pad_right
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import text_key
from torchrl_maxmin.rewards.features import feature_rows, gathered_differences
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE, load_reader

_ENCODED_AT_ONCE = 4096
_BLOCK_ROWS = 8192  # of features that are worked on at a time

Encoder = Callable[[Sequence[Text], Sequence[Text]], list[list[int]]]


class TokenRows(Sequence[list[int]]):
    """Token rows of any length in one flat array: four bytes a token, whatever the number of rows."""

    def __init__(self, parts: list[np.ndarray], lengths: list[int]):
        self._tokens = np.concatenate([*parts, np.zeros(0, np.int32)])
        self._ends = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[self._ends[index] : self._ends[index + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [N] of every row."""
        return np.diff(self._ends)

    def distinct(self, places: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Find rows that are alike, by their tokens.

        Args:
            places: of rows [n].

        Returns:
            Places of the first of each kind, and of which kind each of the n is, int64 [n].
        """
        kinds: dict[bytes, int] = {}
        first: list[int] = []
        which = np.empty(len(places), np.int64)
        for i, place in enumerate(places):
            row = self._tokens[self._ends[place] : self._ends[place + 1]].tobytes()
            which[i] = kind = kinds.setdefault(row, len(kinds))
            if kind == len(first):
                first.append(int(place))
        return first, which


class PairTokens(UserRows):
    """Both sides of every pair as token rows: row i is pair i's chosen text, row P + i its rejected one.

    Args:
        data: the pairs.
        encode: prompts and completions in, token rows out.
        pad_id: what pads a batch.
    """

    def __init__(self, data: PreferenceDataset, encode: Encoder, pad_id: int):
        self.user_offsets, self.row_weights = data.user_offsets, row_weights_of(data)
        self.choice_offsets = choice_offsets_of(data)
        self.num_pairs = len(data)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        with progress_bar("tokenizing pairs", 2 * self.num_pairs) as advance:
            for side in (data.chosen, data.rejected):
                for start in range(0, self.num_pairs, _ENCODED_AT_ONCE):
                    part = slice(start, start + _ENCODED_AT_ONCE)
                    rows = encode(data.prompts[part], side[part])
                    lengths.extend(map(len, rows))
                    parts.append(np.fromiter((token for row in rows for token in row), np.int32))
                    advance(len(rows))
        self.rows = TokenRows(parts, lengths)
        self.pad_id = pad_id

    def __len__(self) -> int:
        return self.num_pairs

    @property
    def num_units(self) -> int:
        """Choices C: what batches are made of."""
        return self.num_pairs if self.choice_offsets is None else len(self.choice_offsets) - 1

    @cached_property
    def most_rows(self) -> int:
        """Rows of the largest choice."""
        return 1 if self.choice_offsets is None else int(self.choice_offsets.diff().max())

    def rows_of(self, choices: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """Pairs of these choices, and where each begins among them [C' + 1]; None where each is one."""
        if self.choice_offsets is None:
            return list(choices), None
        index = torch.as_tensor(choices)
        sizes = self.choice_offsets.diff()[index]
        return ranges(self.choice_offsets[index], sizes).tolist(), offsets_of(sizes)

    def batch_of(self, choices: Sequence[int]) -> dict[str, Tensor]:
        """The texts of these choices as tokens: chosen and rejected ones [P', T], and their masks."""
        rows, _ = self.rows_of(choices)
        places = [*rows, *(self.num_pairs + i for i in rows)]
        tokens, mask = pad_right([self.rows[i] for i in places], self.pad_id)
        batch = {"choices": torch.tensor(choices)}
        for name, value in (("tokens", tokens), ("mask", mask)):
            batch[f"chosen_{name}"], batch[f"rejected_{name}"] = value.chunk(2)
        return batch

    def scores(self, model: RewardMixture, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected texts, both [len(pairs), K], in one pass."""
        device = model.log_prior.device
        places = [*pairs, *(self.num_pairs + i for i in pairs)]
        which = None
        if self.choice_offsets is not None:  # the chosen text of a choice stands in all its rows
            places, kinds = self.rows.distinct(np.asarray(places))
            which = torch.from_numpy(kinds).to(device)
        tokens, mask = pad_right([self.rows[i] for i in places], self.pad_id)
        rewards = model(tokens.to(device), mask.to(device))
        chosen, rejected = (rewards if which is None else rewards[which]).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def margins(self, model: RewardMixture, batch_size: int = SCORED_AT_ONCE) -> Tensor:
        """Margins [P, K] of all pairs on the CPU, by batches of like length, ``batch_size`` texts at once."""
        return gather_rows(self.own_margins(model, batch_size), self.num_pairs)

    @torch.no_grad()
    def own_margins(self, model: RewardMixture, batch_size: int = SCORED_AT_ONCE) -> Tensor:
        """Those of this process's share of the pairs (:mod:`~torchrl_maxmin.core.distributed`), [n, K]."""
        share = share_of_rows(self.num_pairs)[0].numpy()
        longest = self.rows.lengths.reshape(2, -1).max(0)[share]
        order = np.argsort(longest, kind="stable").tolist()
        margins = torch.empty(len(share), model.num_groups)
        size = max(1, batch_size // 2)
        for start in range(0, len(share), size):
            part = order[start : start + size]
            chosen, rejected = self.scores(model, share[part].tolist())
            margins[part] = (chosen - rejected).cpu()
        return margins

    def own_log_likelihood(self, margins: Tensor) -> Tensor:
        """Log-likelihood [U, K] of the pairs of every user that are in this process's share, in float64.

        Args:
            margins: of :meth:`own_margins`.
        """
        own = own_rows(self.num_pairs)
        weights = None if self.row_weights is None else self.row_weights[own]
        margins = margins[: own.stop - own.start]
        return log_likelihood_by_user(margins, own_offsets(self.user_offsets, own), weights)


def each_once(encode: Encoder) -> Encoder:
    """Make an encoder that is called with every prompt and completion once, however often they are given."""

    def encoded(prompts: Sequence[Text], completions: Sequence[Text]) -> list[list[int]]:
        keys = [(text_key(p), text_key(c)) for p, c in zip(prompts, completions, strict=True)]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        rows = encode([prompts[i] for i in first.values()], [completions[i] for i in first.values()])
        row_of = dict(zip(first, rows, strict=True))
        return [row_of[key] for key in keys]

    return encoded


def own_rows(num_rows: int) -> slice:
    """Which rows are this process's, each with one process; none where there are fewer than processes."""
    index, real = share_of_rows(num_rows)
    return slice(int(index[0]), int(index[0]) + int(real.sum()))


def own_offsets(user_offsets: Tensor, own: slice) -> Tensor:
    """Where the rows of every user begin [U + 1] among those of a slice."""
    return user_offsets.clamp(own.start, own.stop) - own.start


# -- frozen features -------------------------------------------------------------------------------


def feature_differences(
    data: PreferenceDataset,
    model: str,
    max_length: int | None,
    device: torch.device | str,
    batch_size: int = SCORED_AT_ONCE,
    **options: Any,
) -> Tensor:
    """Features of chosen minus rejected texts [P, D] on a frozen trunk, each of unit deviation.

    Args:
        data: the pairs.
        model: Hugging Face model.
        max_length: longest text in tokens.
        device: where the model reads.
        batch_size: texts at once, at most.
        **options: ``cache`` and ``dtype`` of :func:`~torchrl_maxmin.rewards.features.feature_rows`, and how
            texts are read.
    """
    everyone = range(len(data))
    differences = raw_differences(data, everyone, model, max_length, device, batch_size, deal=True, **options)
    return standardised(differences, deviation(differences))


def raw_differences(
    data: PreferenceDataset,
    share: Sequence[int],
    model: str,
    max_length: int | None,
    device: torch.device | str,
    batch_size: int = SCORED_AT_ONCE,
    *,
    cache: Path | None = None,
    dtype: torch.dtype = torch.float32,
    deal: bool = False,
    **reading_options: Any,
) -> Tensor:
    """Features of chosen minus rejected texts [n, D] of some pairs, as the trunk gives them."""
    with torch.random.fork_rng(devices=[]):
        reader = load_reader(model, **reading_options)
    pairs = PairTokens(data, each_once(lambda p, c: reader.encode(p, c, max_length)), reader.pad_id)
    places = np.fromiter(share, np.int64, len(share))
    first, which = pairs.rows.distinct(np.concatenate([places, len(pairs) + places]))
    how: dict[str, Any] = {"reader": reader, "cache": cache, "dtype": dtype, "deal": deal}
    texts = [pairs.rows[row] for row in first]
    features = feature_rows(texts, model, device, batch_size, **how, **reading_options)
    return gathered_differences(features, *torch.from_numpy(which).chunk(2))


def feature_choices(data: PreferenceDataset, *args: Any, **kwargs: Any) -> PairChoices:
    """Choices between the pairs of :func:`feature_differences`, those that repeat another left out."""
    return _merged(data, feature_differences(data, *args, **kwargs))


def raw_feature_choices(data: PreferenceDataset, *args: Any, **kwargs: Any) -> PairChoices:
    """Those of :func:`feature_choices` with features as the trunk gives them, see :func:`raw_differences`."""
    return _merged(data, raw_differences(data, range(len(data)), *args, deal=True, **kwargs))


def _merged(data: PreferenceDataset, differences: Tensor) -> PairChoices:
    ids, rows = torch.from_numpy(data.judgement_ids), row_weights_of(data)
    choices = PairChoices(differences, data.user_offsets, rows, ids, choice_offsets_of(data))
    return merged_choices(choices, data.judgements) if data.judgements.num_repeats else choices


def shared_feature_choices(data: PreferenceDataset, *args: Any, **kwargs: Any) -> SharedChoices:
    """What :func:`feature_choices` gives, each process with the features of its own choices alone."""
    own, offsets = own_rows(len(data)), choice_offsets_of(data)
    if offsets is not None:  # no choice is cut
        ends = torch.searchsorted(offsets, torch.tensor([own.start, own.stop]))
        own = slice(*offsets[ends].tolist())
    differences = raw_differences(data, range(own.start, own.stop), *args, **kwargs)
    standardised(differences, deviation(differences, len(data)))
    merged = _merged(data, differences.new_empty(len(data), 0))
    rows = torch.from_numpy(data.judgements.rows(None if offsets is None else offsets.numpy()))
    kept = slice(*torch.searchsorted(rows, torch.tensor([own.start, own.stop])).tolist())
    if (offsets := merged.choice_offsets) is not None:
        offsets = offsets[(offsets >= kept.start) & (offsets <= kept.stop)] - kept.start
    return SharedChoices(
        differences[rows[kept] - own.start],
        own_offsets(merged.user_offsets, kept),
        None if merged.row_weights is None else merged.row_weights[kept],
        None if merged.judgements is None else merged.judgements[kept],
        offsets,
    )


def deviation(rows: Tensor, num_rows: int | None = None) -> Tensor:
    """Standard deviation [D] over rows [n, D], a block at a time in float64.

    Args:
        rows: of features; may be a memory-mapped file.
        num_rows: where the rows are this process's share, those of all processes, over which it then is.
    """
    total = sum_over_ranks if num_rows is not None else torch.clone
    num_rows = len(rows) if num_rows is None else num_rows
    zero = torch.zeros(rows.shape[1], dtype=torch.float64)
    mean = total(sum((part.double().sum(0) for part in rows.split(_BLOCK_ROWS)), zero)) / num_rows
    parts = ((part.double() - mean).square().sum(0) for part in rows.split(_BLOCK_ROWS))
    return (
        (total(sum(parts, zero)) / (num_rows - 1)).sqrt().to(torch.promote_types(rows.dtype, torch.float32))
    )


def standardised(rows: Tensor, deviation: Tensor) -> Tensor:
    """Rows [n, D] divided in place by deviations [D], where these are more than rounding."""
    scale = deviation.clamp_min(1e-6)
    for part in rows.split(_BLOCK_ROWS):
        part /= scale
    return rows
