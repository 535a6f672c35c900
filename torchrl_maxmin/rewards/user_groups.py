"""The file of users and their groups: ids that come back as they were, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.tables import read_csv, write_csv

__all__ = ["read_groups", "write_groups"]

_SHARE = "responsibility_"


def write_groups(
    path: str | Path, user_ids: Sequence[str], responsibilities: Tensor, exact: bool = True
) -> Path:
    """Write a line a user: id, likeliest group, responsibilities; returns the path.

    Args:
        path: where to write.
        user_ids: of the users [U].
        responsibilities: [U, K].
        exact: whether a column ``user_json`` has the ids as JSON strings, which pandas, too, reads as they
            are; for names of our own it is not needed.
    """
    rows = [
        {"user": user, "group": row.index(max(row))} | {f"{_SHARE}{k}": share for k, share in enumerate(row)}
        for user, row in zip(user_ids, responsibilities.tolist(), strict=True)
    ]
    return write_csv(path, rows, ".6g", exact=["user"] if exact else [])


def read_groups(path: str | Path) -> dict[str, list[float]]:
    """Read responsibilities [K] by user id, from ``groups.csv`` of the reward stage or its folder.

    ``users.csv`` of diagnose is such a file, too.

    Raises:
        FileNotFoundError: if there is none.
        UserError: for a table of something else.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_groups(folder + "/groups.csv", ["null", "=1"], torch.eye(2))
        ...     read_groups(folder)
        {'null': [1.0, 0.0], '=1': [0.0, 1.0]}
    """
    path = Path(path)
    rows = read_csv(path / "groups.csv" if path.is_dir() else path)
    if rows and "user" not in rows[0]:
        raise UserError(f"{path} is no table of users; give groups.csv of reward, or users.csv of diagnose")
    return {
        row["user"]: [float(share) for name, share in row.items() if name.startswith(_SHARE)] for row in rows
    }
