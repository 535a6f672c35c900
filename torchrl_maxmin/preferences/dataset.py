"""Preference pairs with the people who gave them, sorted by user."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.io.columns import PROMPT_ALIASES, USER_ALIASES
from torchrl_maxmin.preferences.io.files import open_table
from torchrl_maxmin.preferences.io.table import ArrowColumn
from torchrl_maxmin.preferences.judgements import (
    Judgements,
    PairCodes,
    codes_of_choices,
    count_once,
)
from torchrl_maxmin.preferences.report import DataReport, check_pairs
from torchrl_maxmin.preferences.schemas.layouts import find_layout
from torchrl_maxmin.preferences.schemas.pairs import LoadOptions, Origin, PairTable, build_pairs
from torchrl_maxmin.preferences.schemas.ratings import rating_notes
from torchrl_maxmin.preferences.texts import text_key

if TYPE_CHECKING:
    from torch import Tensor

_SPREAD = 0x1E3779B97F4A7C15  # far apart codes for users; sums wrap around

__all__ = ["USER_ALIASES", "PreferenceDataset", "Ranking"]


class Ranking(NamedTuple):
    """Responses to one prompt in the order in which one user put them.

    Attributes:
        prompt: the prompt.
        responses: best first.
        ranks: rank of each, the best 0; equal ranks are ties, or an order that was not asked for.
        user: index of the user.
    """

    prompt: Text
    responses: list[Text]
    ranks: list[int]
    user: int


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """Pairs (prompt, chosen, rejected) and who chose, with the rows of a user side by side.

    Build it with :meth:`load`. Texts stay in a mapped file and are read when they are asked for.
    ``groups`` holds a ground-truth group a user where the data has one; nothing in training reads it.

    Attributes:
        pairs: the texts and numbers of all pairs that were loaded.
        rows: int64 [P], the pairs of this data set among them.
        user_ids: one id a user, in order of first appearance, length U.
        offsets: int64 [U + 1], ``user_offsets`` without torch.
        groups: true group of every user, or None.
        origin: layout, columns, and what was left out.

    Example:
        >>> rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "user_id": u} for u in (7, 8, 7)]
        >>> import datasets
        >>> data = PreferenceDataset.load(datasets.Dataset.from_list(rows))
        >>> data.user_ids, data.user_offsets.tolist()
        (['7', '8'], [0, 2, 3])
    """

    pairs: PairTable
    rows: np.ndarray
    user_ids: list[str]
    offsets: np.ndarray
    groups: list[str] | None
    origin: Origin

    @classmethod
    def load(
        cls,
        source: str | Path | Any,
        user_column: str | None = None,
        group_column: str | None = None,
        split: str = "train",
        *,
        layout: str | None = None,
        ties: str = "drop",
        tie_margin: float = 0.0,
        max_pairs: int = 64,
        identical: str = "error",
        seed: int = 0,
        conversations: str = "transcript",
        ratings: str = "blocks",
        prompt_column: str | None = None,
        response_column: str | None = None,
        score_column: str | None = None,
        chosen_column: str | None = None,
        rejected_column: str | None = None,
        lower_is_better: bool = False,
        describe_columns: Sequence[str] = (),
    ) -> PreferenceDataset:
        """Load preference data of any layout of :data:`~torchrl_maxmin.preferences.schemas.layouts.LAYOUTS`.

        Args:
            source: what :func:`~torchrl_maxmin.preferences.io.files.load_table` takes.
            user_column: the column that says who chose, or ``column.field``; found by alias when None.
                ``"none"`` makes every row a user of its own.
            group_column: ground truth for evaluation; ``group_id``, ``group`` or ``data_subset`` where
                one of them exists.
            split: which split of a data set that has several.
            layout: name of the layout; found by the columns when None.
            ties: ``"drop"``, or ``"halve"``: two pairs of each tie, one in either order, with weight 1/2.
            tie_margin: scores that differ by no more than this are a tie.
            max_pairs: most pairs of one ranking that ratings make; of all ratings of one user (of one prompt)
                where they are taken as pairs.
            identical: whether equal chosen and rejected texts are an ``"error"`` or ``"drop"`` the pair;
                those of data that do not state pairs are always dropped.
            seed: of the blocks of ratings, or of the choice of ``max_pairs`` pairs where there are more.
            conversations: whether lists of messages become ``"transcript"`` strings, or stay ``"messages"``
                for a chat template.
            ratings: how a user's ratings (of one prompt, where there are prompts) are compared: ``"blocks"``
                deals them into random blocks of different values, each a ranking of its own and each rating
                in one at most, so that what a rating errs by counts once; ``"pairs"`` takes all pairs up to
                ``max_pairs`` as independent, which they are not.
            prompt_column: the column of prompts, or ``column.field``; found by its usual names when None, and
                ``"none"`` where there are none.
            response_column: likewise the column of responses or items that are scored, or of their lists.
            score_column: likewise the column of scores.
            chosen_column: likewise the column of preferred texts.
            rejected_column: likewise the column of the others.
            lower_is_better: whether lower scores are better.
            describe_columns: columns that describe users, for :meth:`user_values`.

        Raises:
            UserError: for a missing column, two candidate user columns, an empty table, an
                empty user id, a row that does not fit the layout, or data that give no pair.
        """
        options = LoadOptions(
            ties,
            tie_margin,
            max_pairs,
            identical,
            seed,
            conversations,
            ratings,
            lower_is_better,
            describe_columns,
        )
        asked = {
            "prompt": prompt_column,
            "response": response_column,
            "score": score_column,
            "chosen": chosen_column,
            "rejected": rejected_column,
        }
        columns = {role: column for role, column in asked.items() if column is not None}
        table = open_table(source, split)
        mixed = table.mixed_columns
        named = {
            *USER_ALIASES,
            *PROMPT_ALIASES,
            "chosen",
            "rejected",
            user_column,
            group_column,
            *columns.values(),
        }
        if read := [name for name in mixed if name in named]:
            raise UserError(mixed[read[0]])
        try:
            found = find_layout(table, layout, columns)
            pairs, origin = build_pairs(table, *found, user_column, group_column, options)
        except UserError as error:
            if not mixed:
                raise
            raise UserError(f"{error} (left out: {'; '.join(mixed.values())})") from error
        origin.notes += rating_notes(origin) if origin.layout in ("scores", "ratings") else []
        origin.notes += [f"Left out: {reason}." for reason in mixed.values()]
        return cls._sorted(pairs, np.arange(len(pairs.users)), origin)

    @classmethod
    def _sorted(cls, pairs: PairTable, rows: np.ndarray, origin: Origin) -> PreferenceDataset:
        """The pairs of these rows, by user in order of first appearance; users without a pair left out.

        Pairs of one choice stand together, where the first of them stands.
        """
        codes, first, row_user = np.unique(pairs.users[rows], return_index=True, return_inverse=True)
        appearance = np.argsort(first)
        row_user = np.argsort(appearance)[row_user]
        counts = np.bincount(row_user, minlength=len(codes))
        kept = codes[appearance].tolist()
        _, first, choice = np.unique(pairs.choices[rows], return_index=True, return_inverse=True)
        return cls(
            pairs=pairs,
            rows=rows[np.lexsort((first[choice], row_user))],
            user_ids=[pairs.user_ids[code] for code in kept],
            offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
            groups=None if pairs.groups is None else [pairs.groups[code] for code in kept],
            origin=origin,
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    @property
    def prompts(self) -> ArrowColumn:
        """Prompt of every pair: a sequence of P texts, read from disk as it is walked through."""
        return self._column("prompt")

    @property
    def chosen(self) -> ArrowColumn:
        """Preferred text of every pair."""
        return self._column("chosen")

    @property
    def rejected(self) -> ArrowColumn:
        """Other text of every pair."""
        return self._column("rejected")

    def _column(self, name: str) -> ArrowColumn:
        decode = json.loads if self.pairs.as_json else None
        return ArrowColumn(self.pairs.texts[name], self.rows, decode)

    @cached_property
    def judgements(self) -> Judgements:
        """Which choices are one judgement; a user's with the same texts are, pairs either way round."""
        offsets = self.choice_bounds
        starts, codes = offsets[:-1], PairCodes(*(values[self.rows] for values in self.pairs.codes))
        if len(starts) < len(self):
            codes = codes_of_choices(codes, offsets)
        users, each = self.users_of_rows[starts], np.arange(len(starts))
        weights, ids = self.pairs.weights[self.rows[starts]], self.ranking_ids[starts]
        if len(np.unique(codes.code + users * _SPREAD)) == len(starts):  # nothing to look for
            return Judgements(ids, weights, 0, 0, each, each)
        return count_once(users, codes, weights, ids)

    def _at_rows(self, values: Any) -> np.ndarray:
        """Figures of choices [C] at their pairs [P]."""
        return np.repeat(np.asarray(values), np.diff(self.choice_bounds))

    @property
    def weights(self) -> Tensor:
        """Weight [P] float32 of each pair's choice: 1; 1/2 in a halved tie; 1/m for one of m repeats.

        A likelihood that counts a tie once multiplies the choice's log-likelihood by it, in the E-step
        and in the M-step.
        """
        return _tensor(self._at_rows(np.asarray(self.judgements.weights, np.float32)))

    @property
    def distinct_rows(self) -> np.ndarray:
        """Pairs [P'] int64 that are left where repeats of a choice count with its first."""
        offsets = self.choice_bounds
        return self.judgements.rows(None if len(offsets) == len(self) + 1 else offsets)

    @property
    def judgement_ids(self) -> np.ndarray:
        """Judgement [P] int64 of every pair: ``ranking_ids``, where repeats of a choice make several one."""
        return self._at_rows(self.judgements.ids)

    @property
    def ranking_ids(self) -> np.ndarray:
        """Row [P] int64 of the source that every pair follows from; the pairs of a ranking share one."""
        return self.pairs.rankings[self.rows]

    @cached_property
    def choice_offsets(self) -> Tensor:
        """Where each choice begins, int64 [C + 1]: choice c is rows ``offsets[c]:offsets[c + 1]``.

        A choice is one response that a judgement prefers to others, a row each: n - 1 choices of
        n - 1, ..., 1 rows in a ranking of n, one in a best-of-n and in a pair, two in a halved tie. Luce's
        choice axiom gives each the log-probability -log(1 + sum of exp(-margin) over its rows), so that
        those of a ranking make Plackett-Luce, and a choice of one row is Bradley-Terry.

        Example:
            >>> import datasets
            >>> row = {"prompt": "p", "ranked_responses": ["a", "b", "c"], "user_id": "u"}
            >>> PreferenceDataset.load(datasets.Dataset.from_list([row])).choice_offsets.tolist()
            [0, 2, 3]
        """
        return _tensor(self.choice_bounds)

    @cached_property
    def choice_bounds(self) -> np.ndarray:
        """:attr:`choice_offsets` without torch."""
        starts = np.flatnonzero(np.diff(self.pairs.choices[self.rows])) + 1
        return np.concatenate([[0], starts, [len(self)]]).astype(np.int64)

    @cached_property
    def user_offsets(self) -> Tensor:
        """Where each user begins, int64 [U + 1]: pairs of user u are rows ``offsets[u]:offsets[u + 1]``."""
        return _tensor(self.offsets)

    @property
    def ignored_columns(self) -> list[str]:
        """Columns of the source that nothing reads."""
        return self.origin.ignored

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def row_users(self) -> Tensor:
        """User index [P] of every pair."""
        return _tensor(self.users_of_rows)

    @property
    def users_of_rows(self) -> np.ndarray:
        """:attr:`row_users` without torch."""
        return np.repeat(np.arange(self.num_users), np.diff(self.offsets))

    def user_values(self, column: str) -> list[str | None]:
        """The users' values [U] in one of ``describe_columns``; None where a user has none."""
        values = dict(zip(self.pairs.user_ids, self.pairs.described[column], strict=True))
        return [values[user] for user in self.user_ids]

    def rankings(self) -> Iterator[Ranking]:
        """Every judgement as one ranking, by user, as a Plackett-Luce likelihood takes it.

        A pair is a ranking of two, so that the rankings hold the whole data. Responses that
        appear in no pair of this data set are not in it.

        Example:
            >>> import datasets
            >>> row = {"prompt": "p", "responses": ["a", "b", "c"], "rank": [2, 3, 1], "user_id": "u"}
            >>> data = PreferenceDataset.load(datasets.Dataset.from_list([row]))
            >>> list(data.rankings())
            [Ranking(prompt='p', responses=['c', 'a', 'b'], ranks=[0, 1, 2], user=0)]
            >>> list(zip(data.chosen, data.rejected))
            [('c', 'a'), ('c', 'b'), ('a', 'b')]
        """
        users, ids = self.users_of_rows, self.ranking_ids
        order = np.lexsort((ids, users))
        last = np.append(np.diff(ids[order]) != 0, True)  # a judgement has one user
        ordered = self.select_rows(order)
        found: dict[str, tuple[int, Text]] = {}
        sides = zip(ordered.prompts, ordered.chosen, ordered.rejected, strict=True)
        for row, (prompt, *texts) in enumerate(sides):
            for text, rank in zip(texts, self.pairs.ranks[ordered.rows[row]].tolist(), strict=True):
                found[text_key(text)] = rank, text
            if last[row]:
                ranks, responses = zip(*sorted(found.values(), key=itemgetter(0)), strict=True)
                yield Ranking(prompt, list(responses), list(ranks), int(users[order[row]]))
                found = {}

    def select_rows(self, rows: Sequence[int] | np.ndarray) -> PreferenceDataset:
        """A data set of these rows; users without a row are left out."""
        return self._sorted(self.pairs, self.rows[np.asarray(rows, dtype=np.int64)], self.origin)

    def split_heldout(self, fraction: float, seed: int) -> tuple[PreferenceDataset, PreferenceDataset | None]:
        """Split off a share of every user's judgements (rounded down; a lone one stays).

        The pairs of a ranking, the two halves of a tie and repeats of a pair stay together.
        """
        generator, ids = np.random.default_rng(seed), self.judgement_ids
        held: list[int] = []
        for start, stop in pairwise(self.offsets.tolist()):
            _, first, judgement = np.unique(ids[start:stop], return_index=True, return_inverse=True)
            drawn = generator.permutation(len(first))[: int(fraction * len(first))]
            mine = np.argsort(np.argsort(first))[judgement]
            held.extend((start + np.flatnonzero(np.isin(mine, drawn))).tolist())
        if not held:
            return self, None
        keep = np.setdiff1d(np.arange(len(self)), held)
        return self.select_rows(keep), self.select_rows(np.sort(held))

    def check(self) -> DataReport:
        """One screen about the data, and plain sentences about what will go wrong later."""
        return check_pairs(self)

    def require_users(self, num_groups: int) -> None:
        """Raise :class:`UserError` where so many groups cannot be learned from these users."""
        if self.num_users < 2 and num_groups > 1:
            raise UserError(
                "all pairs come from one user, so groups cannot be told apart; "
                "check --user_column, or train one reward with --num_groups 1"
            )
        if num_groups > self.num_users:
            raise UserError(
                f"--num_groups {num_groups} is more than the {self.num_users} users in the data; "
                f"give at most {self.num_users}"
            )


def _tensor(values: np.ndarray) -> Tensor:
    import torch  # a look at a file needs none

    return torch.from_numpy(values)
