"""Judgements of simulated people, what they follow from, and the files and arrays that programs read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["NUM_RATINGS", "PROMPT", "Rows", "World", "chosen_over", "strict_rankings"]

NUM_RATINGS = 5
PROMPT = "Which do you like?"


class Rows(NamedTuple):
    """Pairs as the program takes them, sorted by user; rows of one choice side by side.

    Attributes:
        differences: features(chosen) - features(other) [P, D] fp32.
        users: [P] int64.
        judgement_ids: [P] int64, the ranking, choice or pair that a row follows from.
        choice_ids: [P] int64; rows of a choice have one chosen item, which was preferred to all the others.
    """

    differences: np.ndarray
    users: np.ndarray
    judgement_ids: np.ndarray
    choice_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class World:
    """Judgements of simulated people, and what they follow from.

    Attributes:
        kind: ``rankings``, ``best_of``, ``pairs`` or ``ratings``.
        names: of the items [I].
        features: of the items [I, D].
        utilities: of the items to every user [U, I], before noise; precision is in it.
        true_groups: taste of every user [U] int64; -1 where tastes are no groups.
        taste_utilities: [G, I]; the utilities of a user are a row of it times the precision.
        precision: of every user [U]; lower is noisier.
        judgement_users: [J] int64, rising.
        judgement_offsets: [J + 1] int64, where the items of a judgement stand.
        items: [N] int64, within a judgement by level.
        levels: [N] int64, 0 for the best; equal ones were not told apart.
        thresholds: where the latent utility is cut into ratings [U, 4]; None without ratings.
        user_columns: what else is known of users; ``region`` follows the taste and ``handedness`` does not.
    """

    kind: str
    names: list[str]
    features: np.ndarray
    utilities: np.ndarray
    true_groups: np.ndarray
    taste_utilities: np.ndarray
    precision: np.ndarray
    judgement_users: np.ndarray
    judgement_offsets: np.ndarray
    items: np.ndarray
    levels: np.ndarray
    thresholds: np.ndarray | None
    user_columns: dict[str, list[str]]

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.true_groups)

    @property
    def shares(self) -> np.ndarray:
        """Share of the users who have each taste [G]; of none where tastes are no groups."""
        return np.bincount(self.true_groups[self.true_groups >= 0], minlength=1) / self.num_users

    @property
    def item_judgements(self) -> np.ndarray:
        """The judgement that every entry of ``items`` stands in [N]."""
        return np.repeat(np.arange(len(self.judgement_users)), np.diff(self.judgement_offsets))

    def rows(self) -> Rows:
        """Make the rows of all choices: of n - 1, ..., 1 rows for a ranking, one of n - 1 for the best of n.

        Of a user's ratings :func:`strict_rankings` are made, each a judgement.
        """
        entries, offsets = np.arange(len(self.items)), self.judgement_offsets
        if self.kind == "ratings":
            rng = np.random.default_rng(len(self.items))
            entries, offsets = strict_rankings(offsets, self.levels, rng)
        chosen, other = chosen_over(offsets, self.levels[entries])
        items, features = self.items[entries], self.features.astype(np.float32)
        return Rows(
            differences=features[items[chosen]] - features[items[other]],
            users=self.judgement_users[self.item_judgements[entries[chosen]]],
            judgement_ids=np.searchsorted(offsets, chosen, side="right") - 1,
            choice_ids=np.unique(chosen, return_inverse=True)[1],
        )

    def posterior(self) -> np.ndarray:
        """Responsibilities [U, G] of who knows tastes, shares, precisions and thresholds: none are better.

        Raises:
            ValueError: where tastes are no groups.
        """
        if (self.true_groups < 0).any():
            raise ValueError("tastes are no groups here")
        found = np.log(np.maximum(self.shares, 1e-300))[None].repeat(self.num_users, 0)
        entry_users = self.judgement_users[self.item_judgements]
        for g, utilities in enumerate(self.taste_utilities):
            mine = self.precision[entry_users] * utilities[self.items]
            if self.thresholds is not None:
                log_p = np.log(np.maximum(_rating_probabilities(mine, self.thresholds[entry_users]), 1e-300))
                log_p = log_p[np.arange(len(log_p)), NUM_RATINGS - 1 - self.levels]
                found[:, g] += np.bincount(entry_users, log_p, minlength=self.num_users)
            else:
                chosen, other = chosen_over(self.judgement_offsets, self.levels)
                total = np.bincount(chosen, np.exp(mine[other] - mine[chosen]), minlength=len(mine))
                found[:, g] -= np.bincount(entry_users, np.log1p(total), minlength=self.num_users)
        found = np.exp(found - found.max(1, keepdims=True))
        return found / found.sum(1, keepdims=True)

    def write(self, path: str | Path) -> Path:
        """Write the judgements as a file that the program reads: ``.csv`` for ratings, else ``.jsonl``.

        Users are ``u0``, ``u1``...; their columns stand in every row. True groups are not written.
        """
        path = Path(path)
        if (path.suffix == ".csv") != (self.kind == "ratings"):
            raise ValueError(f"{self.kind} are not written as {path.name}")
        with path.open("w", newline="", encoding="utf-8") as file:
            if self.kind == "ratings":
                table = csv.writer(file, lineterminator="\n")
                table.writerow(["user_id", "item", "rating", *self.user_columns])
                users = self.judgement_users[self.item_judgements]
                for user, item, level in zip(users, self.items, self.levels, strict=True):
                    about = (values[user] for values in self.user_columns.values())
                    table.writerow([f"u{user}", self.names[item], NUM_RATINGS - level, *about])
            else:
                file.writelines(json.dumps(row) + "\n" for row in self._json_rows())
        return path

    def write_arrays(self, path: str | Path) -> Path:
        """Write :meth:`rows` as an ``.npz`` file, with names of the features and the true groups."""
        rows = self.rows()
        np.savez(
            path,
            **rows._asdict(),
            feature_names=np.array(_feature_names(self)),
            groups=self.true_groups[rows.users],
        )
        return Path(path)

    def _json_rows(self) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(len(self.items))
        for j, user in enumerate(self.judgement_users):
            items = self.items[self.judgement_offsets[j] : self.judgement_offsets[j + 1]]
            row: dict[str, Any] = {"user_id": f"u{user}", "prompt": PROMPT}
            if self.kind == "rankings":
                row["ranked_responses"] = [self.names[i] for i in items]
            elif self.kind == "pairs":
                row |= {"chosen": self.names[items[0]], "rejected": self.names[items[1]]}
            else:
                order = rng.permutation(len(items))  # or the first would always win
                row["responses"] = [self.names[items[i]] for i in order]
                row["winner"] = int(np.flatnonzero(order == 0)[0])
            yield row | {name: values[user] for name, values in self.user_columns.items()}


def chosen_over(judgement_offsets: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries that were chosen and not [P]: each against all of its judgement that stand on a lower level.

    Args:
        judgement_offsets: [J + 1] int64.
        levels: of the entries [N] int64, 0 for the best, rising within a judgement.

    Example:
        >>> chosen_over(np.array([0, 3, 5]), np.array([0, 1, 1, 0, 1]))  # the best of three, and a pair
        (array([0, 0, 3]), array([1, 2, 4]))
    """
    judgements = np.repeat(np.arange(len(judgement_offsets) - 1), np.diff(judgement_offsets))
    keys = judgements * (int(levels.max()) + 1) + levels
    below = np.searchsorted(keys, keys, side="right")
    counts = judgement_offsets[judgements + 1] - below
    chosen = np.repeat(np.arange(len(keys)), counts)
    within = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    return chosen, np.repeat(below, counts) + within


def strict_rankings(
    judgement_offsets: np.ndarray, levels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Deal ratings into rankings of one item of each level, so that each rating counts once.

    A rating is one look at an item. Every item over all that are rated lower would count it many times: two
    or three groups are then found among 100 people of one taste.

    Args:
        judgement_offsets: [J + 1] int64.
        levels: of the entries [N] int64, rising within a judgement.
        rng: deals.

    Returns:
        Entries [N'] that stand in some ranking, best first, and offsets of the rankings.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> entries, offsets = strict_rankings(np.array([0, 3]), np.array([0, 1, 1]), rng)
        >>> entries.tolist(), offsets.tolist()  # one of the two that are equal is left over
        ([0, 2], [0, 2])
    """
    judgements = np.repeat(np.arange(len(judgement_offsets) - 1), np.diff(judgement_offsets))
    order = np.lexsort((rng.random(len(levels)), levels, judgements))
    new = np.diff(judgements, prepend=-1).astype(bool) | np.diff(levels[order], prepend=-1).astype(bool)
    first = np.flatnonzero(new)
    turn = np.arange(len(levels)) - np.repeat(first, np.diff(first, append=len(levels)))
    dealt = np.lexsort((levels[order], turn, judgements))
    entries, keys = order[dealt], np.stack([judgements[dealt], turn[dealt]])
    starts = np.flatnonzero(np.append(True, (np.diff(keys) != 0).any(0)))
    sizes = np.diff(starts, append=len(entries))
    return entries[np.repeat(sizes, sizes) > 1], np.cumsum([0, *sizes[sizes > 1]])


def _rating_probabilities(utilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Probability of every rating, lowest first [N, 5], of utilities [N] with Gumbel noise."""
    below = np.exp(-np.exp(utilities[:, None] - thresholds))
    ends = np.ones((len(below), 1))
    return np.diff(np.concatenate([0 * ends, below, ends], 1), axis=1)


def _feature_names(world: World) -> list[str]:
    if world.features.shape == (len(world.names),) * 2 and (world.features == np.eye(len(world.names))).all():
        return world.names
    return [f"feature {d}" for d in range(world.features.shape[1])]
