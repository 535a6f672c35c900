"""Who is in each group, by columns of the user's own: tables by group, and whether they are related."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from torchrl_maxmin.stats.clustered import interval_over_users

__all__ = ["describe_groups", "holm", "permutation_p"]

#: Levels of a column that are shown; the rest are "other".
MOST_LEVELS = 8
#: Numbers of more distinct values are described by mean and quartiles.
FEWEST_NUMBERS = 9
#: Permutations of the users behind a p value.
NUM_PERMUTATIONS = 4999

_OTHER = "other"


def describe_groups(
    columns: Mapping[str, Sequence[str | None]],
    groups: Sequence[int],
    num_groups: int,
    seed: int = 0,
    *,
    established: bool = True,
) -> dict[str, Any]:
    """Describe the groups by columns, each user in its likeliest group, and test whether they are related.

    The test permutes the users: chi-square of the table of levels by groups, or Kruskal-Wallis of numbers
    by groups, exact (Fisher) for two levels and two groups. It is right at any size, as users choose alone.

    Args:
        columns: By name a value of every user [U]; None where there is none.
        groups: Likeliest group of every user [U].
        num_groups: K.
        seed: Of the permutations.
        established: Whether the groups are; a test of others is no finding, and none is made.

    Returns:
        ``columns``: by name ``kind`` (``levels`` or ``numbers``), ``test``, ``p``, ``p_holm`` (over the
        columns), ``related`` (p_holm < .05), ``missing`` users and ``groups``, by group ``users`` and the
        shares of the levels, or mean and quartiles; p is null, with a ``reason``, where there is no test.

    Example:
        >>> ages = ["20", "30"] * 20
        >>> found = describe_groups({"age": ages}, [0, 1] * 20, 2)["columns"]["age"]
        >>> found["test"], found["related"], found["groups"][0]["levels"]["20"]["mean"]
        ('Fisher, exact', True, 1.0)
    """
    group = np.asarray(groups)
    found = {
        name: _describe(values, group, num_groups, np.random.default_rng([seed, place]), established)
        for place, (name, values) in enumerate(columns.items())
    }
    tested = [entry for entry in found.values() if entry["p"] is not None]
    for entry, adjusted in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
        entry |= {"p_holm": adjusted, "related": adjusted < 0.05}
    return {"columns": found, "permutations": NUM_PERMUTATIONS}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's step-down rule, so that any false finding is as rare as one p value says.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def _describe(
    values: Sequence[str | None],
    groups: np.ndarray,
    num_groups: int,
    rng: np.random.Generator,
    established: bool,
) -> dict[str, Any]:
    there = np.array([value is not None for value in values], bool)
    mine, group = [value for value in values if value is not None], groups[there]
    numbers = _as_numbers(mine)
    entry: dict[str, Any] = {"missing": int((~there).sum()), "p": None, "p_holm": None, "related": None}
    if numbers is not None:
        described = _numbers_by_group(numbers, group, num_groups)
        entry |= {"kind": "numbers", "test": "Kruskal-Wallis, users permuted", "groups": described}
        distinct = len(np.unique(numbers))
    else:
        levels = [level for level, _ in Counter(mine).most_common()]
        if len(levels) > MOST_LEVELS:
            levels = [*levels[: MOST_LEVELS - 1], _OTHER]
        place = {level: i for i, level in enumerate(levels)}
        codes = np.array([place.get(value, len(levels) - 1) for value in mine], np.int64)
        table = np.zeros((len(levels), num_groups), np.int64)
        np.add.at(table, (codes, group), 1)
        entry |= {"kind": "levels", "groups": _levels_by_group(table, levels)}
        entry["test"] = "chi-square, users permuted"
        distinct = len(levels)
    if len(np.unique(group)) < 2 or distinct < 2:
        return entry | {"reason": "the users with a value have one group, or all the same value"}
    if not established:
        return entry | {"reason": "the groups are not established, and nothing is claimed on them"}
    if numbers is None:
        table = table[:, table.sum(0) > 0]
        entry["p"], exact = permutation_p(table, rng)
        if exact:
            entry["test"] = "Fisher, exact"
    else:
        entry["p"] = _kruskal_p(numbers, group, num_groups, rng)
    return entry


def _as_numbers(values: Sequence[str]) -> np.ndarray | None:
    """Values as numbers where all are, and more than a few distinct ones."""
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    if not np.isfinite(numbers).all() or len(np.unique(numbers)) < FEWEST_NUMBERS:
        return None
    return numbers


def _numbers_by_group(numbers: np.ndarray, groups: np.ndarray, num_groups: int) -> list[dict[str, Any]]:
    found = []
    for k in range(num_groups):
        mine = numbers[groups == k]
        entry: dict[str, Any] = {"users": len(mine), "mean": None, "quartiles": None}
        if len(mine):
            interval = interval_over_users(mine, scale="identity", num_resamples=0, warn=False).to_dict()
            entry["mean"] = {
                end: None if interval[end] is None or math.isnan(interval[end]) else interval[end]
                for end in ("mean", "low", "high")
            }
            entry["quartiles"] = np.quantile(mine, [0.25, 0.5, 0.75]).tolist()
        found.append(entry)
    return found


def _levels_by_group(table: np.ndarray, levels: Sequence[str]) -> list[dict[str, Any]]:
    """Shares of levels with Wilson's intervals, by group; ``table`` [levels, K]."""
    found = []
    for column in table.T.tolist():
        users, shares = sum(column), {}
        for level, count in zip(levels, column, strict=True):
            if users:
                ends = stats.binomtest(count, users).proportion_ci(method="wilson")
                shares[level] = {"mean": count / users, "low": float(ends.low), "high": float(ends.high)}
            else:
                shares[level] = {"mean": None, "low": None, "high": None}
        found.append({"users": users, "levels": shares})
    return found


def permutation_p(table: np.ndarray, rng: np.random.Generator) -> tuple[float, bool]:
    """Test whether levels and groups are independent, given both margins, as permutations of users do.

    Args:
        table: Users of each level in each group [levels, groups], no margin 0.
        rng: Draws the tables.

    Returns:
        The p value, and whether it is exact.

    Example:
        >>> p, exact = permutation_p(np.array([[8, 0], [0, 8]]), np.random.default_rng(0))
        >>> round(p, 5), exact
        (0.00016, True)
    """
    if table.shape == (2, 2):
        return float(stats.fisher_exact(table)[1]), True
    rows, columns = table.sum(1), table.sum(0)
    expected = np.outer(rows, columns) / table.sum()
    # Chi-square less a constant: permuted tables have the same margins.
    drawn = stats.random_table(rows, columns, seed=rng).rvs(NUM_PERMUTATIONS)
    statistic, seen = ((tables**2 / expected).sum((-2, -1)) for tables in (drawn, table))
    return float((1 + (statistic >= seen * (1 - 1e-12)).sum()) / (1 + NUM_PERMUTATIONS)), False


def _kruskal_p(numbers: np.ndarray, groups: np.ndarray, num_groups: int, rng: np.random.Generator) -> float:
    """Test by permutations; ties change H by a factor that permutations leave as it is."""
    ranks = stats.rankdata(numbers)
    ranks -= ranks.mean()
    counts = np.maximum(np.bincount(groups, minlength=num_groups), 1)

    def spread(order: np.ndarray) -> float:
        return float((np.bincount(order, ranks, num_groups) ** 2 / counts).sum())

    seen = spread(groups) * (1 - 1e-12)
    beyond = sum(spread(rng.permutation(groups)) >= seen for _ in range(NUM_PERMUTATIONS))
    return (1 + beyond) / (1 + NUM_PERMUTATIONS)
