"""Users in files that others may see: by numbers that say nothing of who they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.rewards.user_groups import write_groups

__all__ = ["pseudonyms", "write_users"]


def pseudonyms(num_users: int, seed: int) -> list[str]:
    """Name users ``user 1``, ``user 2``, ... in an order drawn by a seed.

    Whoever has the data and the seed finds the users again, and nobody else.

    Example:
        >>> sorted(pseudonyms(3, seed=0))
        ['user 1', 'user 2', 'user 3']
    """
    order = np.random.default_rng([seed, num_users]).permutation(num_users)
    return [f"user {number + 1}" for number in order.tolist()]


def write_users(
    folder: Path, user_ids: Sequence[str], responsibilities: Tensor, seed: int, show_ids: bool
) -> None:
    """Write ``users.csv``: the likeliest group and the responsibilities of every user.

    Users have pseudonyms and stand in the order of these, unless ids are to be shown; then ``user_ids.csv``
    says which pseudonym of the same data and seed is whose.

    Args:
        folder: Where to write.
        user_ids: Of the users [U].
        responsibilities: [U, K].
        seed: Of the pseudonyms.
        show_ids: Whether to write ids.
    """
    names = pseudonyms(len(user_ids), seed)
    if show_ids:
        rows = [{"pseudonym": name, "user": user} for name, user in zip(names, user_ids, strict=True)]
        write_csv(folder / "user_ids.csv", rows, exact=["user"])
        write_groups(folder / "users.csv", user_ids, responsibilities)
        return
    order = sorted(range(len(names)), key=lambda u: int(names[u].removeprefix("user ")))
    write_groups(folder / "users.csv", [names[u] for u in order], responsibilities[order], exact=False)
