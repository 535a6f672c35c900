"""Columns that describe users: one value a user, such as an age or a region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["values_by_user"]


def values_by_user(
    values: Iterable[Any], users: Sequence[int] | np.ndarray, num_users: int, name: str
) -> tuple[list[str | None], str | None]:
    """Find the value of each user in a column with one a row.

    Args:
        values: Of every row; None, NaN and blanks are no value.
        users: User of every row.
        num_users: How many there are.
        name: Of the column.

    Returns:
        A value a user, the most frequent where there are several (the first of equals), None where there is
        none; and a sentence about users with several, None without any.

    Example:
        >>> values_by_user(["20", 20, "30", None], [0, 0, 0, 1], 2, "age")
        (['20', None], "Column 'age': 1 of 2 users have several values; the most frequent counts.")
    """
    counts: list[Counter[str]] = [Counter() for _ in range(num_users)]
    for value, user in zip(values, users, strict=True):
        text = "" if value is None or value != value else str(value).strip()
        if text:
            counts[int(user)][text] += 1
    several = sum(len(count) > 1 for count in counts)
    note = f"Column {name!r}: {several} of {num_users} users have several values; the most frequent counts."
    found = [count.most_common(1)[0][0] if count else None for count in counts]
    return found, note if several else None
