"""Preference pairs with the people who labelled them, sorted by user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.preferences.loading import load_table, require_columns

__all__ = ["USER_ALIASES", "PreferenceDataset", "encode"]

USER_ALIASES = (
    "user_id",
    "worker",
    "annotator_id",
    "annotator",
    "rater_id",
    "judge",
    "uid",
    "respondent_id",
    "user",
)


def encode(tokenizer: Any, prompt: str, completion: str, max_length: int | None = None) -> list[int]:
    """Token ids of one text: the prompt with the tokenizer's own prefix, the completion, EOS.

    Prompt and completion are tokenized apart, as they are when a policy answers the prompt.
    Longer texts lose tokens of the prompt's start, never the end that a score is read at.
    """
    ids = tokenizer(prompt).input_ids
    ids = ids + tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return ids if max_length is None else ids[-max_length:]


@dataclass(frozen=True)
class PreferenceDataset:
    """Pairs (prompt, chosen, rejected) and who chose, with the rows of a user side by side.

    Build it with :meth:`load`. ``groups`` holds a ground-truth group a row where the data
    has one; nothing in training reads it.

    Attributes:
        prompts, chosen, rejected: one string a pair, length P.
        user_ids: one id a user, in order of first appearance, length U.
        user_offsets: int64 [U + 1]; the pairs of user u are rows ``offsets[u]:offsets[u + 1]``.
        groups: true group of every user, or None.

    Example:
        >>> rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "user_id": u} for u in (7, 8, 7)]
        >>> import datasets
        >>> data = PreferenceDataset.load(datasets.Dataset.from_list(rows))
        >>> data.user_ids, data.user_offsets.tolist()
        (['7', '8'], [0, 2, 3])
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    user_ids: list[str]
    user_offsets: Tensor
    groups: list[str] | None = None
    ignored_columns: list[str] = field(default_factory=list)

    @classmethod
    def load(
        cls,
        source: str | Path | Any,
        user_column: str | None = None,
        group_column: str | None = None,
        split: str = "train",
    ) -> PreferenceDataset:
        """Load and check preference pairs.

        Args:
            source: what :func:`~torchrl_maxmin.preferences.loading.load_table` takes.
            user_column: the column that says who chose; found by alias when None.
            group_column: ground truth for evaluation, or None for ``group`` where it exists.
            split: which split of a data set that has several.

        Raises:
            UserError: for a missing column, two candidate user columns, an empty table, an
                empty user id, or a pair whose chosen equals its rejected text.
        """
        table = load_table(source, split)
        if len(table) == 0:  # first: a file without rows has no columns either
            raise UserError("the preference data has no rows")
        require_columns(table, ["prompt", "chosen", "rejected"], "preference data")
        user_column = user_column or _find_user_column(table.column_names)
        require_columns(table, [user_column], "preference data (user column)")
        if group_column is not None:
            require_columns(table, [group_column], "preference data (group column)")
        elif "group" in table.column_names:
            group_column = "group"
        columns = {name: table[name][:] for name in ("prompt", "chosen", "rejected")}
        for name, values in columns.items():
            odd = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
            if odd is not None:
                raise UserError(
                    f"row {odd}: column {name!r} holds {type(values[odd]).__name__}, not text; "
                    "turn conversations into text with your tokenizer's chat template first"
                )
        same = next(
            (
                i
                for i, (c, r) in enumerate(zip(columns["chosen"], columns["rejected"], strict=True))
                if c == r
            ),
            None,
        )
        if same is not None:
            raise UserError(
                f"row {same}: chosen equals rejected ({columns['chosen'][same]!r}); drop such pairs"
            )
        users = table[user_column][:]
        empty = next(
            (i for i, user in enumerate(users) if user is None or user != user or str(user) == ""), None
        )
        if empty is not None:
            raise UserError(
                f"row {empty}: no user id in column {user_column!r}; drop the row or give it an id"
            )
        groups = table[group_column][:] if group_column else None
        ignored = [
            c
            for c in table.column_names
            if c not in ("prompt", "chosen", "rejected", user_column, group_column)
        ]
        return cls._sorted(columns, [str(user) for user in users], groups, ignored)

    @classmethod
    def _sorted(
        cls, columns: dict[str, list[str]], users: list[str], groups: list[Any] | None, ignored: list[str]
    ) -> PreferenceDataset:
        user_ids = list(dict.fromkeys(users))
        index = {user: i for i, user in enumerate(user_ids)}
        row_user = np.array([index[user] for user in users])
        order = np.argsort(row_user, kind="stable")
        counts = torch.from_numpy(np.bincount(row_user, minlength=len(user_ids)))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        by_user = None
        if groups is not None:
            by_user = [""] * len(user_ids)
            for row, group in zip(row_user, groups, strict=True):
                by_user[row] = str(group)
        return cls(
            prompts=[columns["prompt"][i] for i in order],
            chosen=[columns["chosen"][i] for i in order],
            rejected=[columns["rejected"][i] for i in order],
            user_ids=user_ids,
            user_offsets=offsets,
            groups=by_user,
            ignored_columns=ignored,
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompts)

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def row_users(self) -> Tensor:
        """User index [P] of every pair."""
        return torch.repeat_interleave(torch.arange(self.num_users), self.user_offsets.diff())

    def select_rows(self, rows: Sequence[int] | np.ndarray) -> PreferenceDataset:
        """A data set of these rows; users without a row are left out."""
        row_users = self.row_users
        columns = {
            "prompt": [self.prompts[i] for i in rows],
            "chosen": [self.chosen[i] for i in rows],
            "rejected": [self.rejected[i] for i in rows],
        }
        users = [self.user_ids[row_users[i]] for i in rows]
        groups = None if self.groups is None else [self.groups[row_users[i]] for i in rows]
        return self._sorted(columns, users, groups, self.ignored_columns)

    def split_heldout(self, fraction: float, seed: int) -> tuple[PreferenceDataset, PreferenceDataset | None]:
        """Split off a share of every user's pairs (rounded down; a lone pair stays)."""
        generator = np.random.default_rng(seed)
        held: list[int] = []
        for start, stop in zip(self.user_offsets[:-1].tolist(), self.user_offsets[1:].tolist(), strict=True):
            held.extend(start + generator.permutation(stop - start)[: int(fraction * (stop - start))])
        if not held:
            return self, None
        keep = np.setdiff1d(np.arange(len(self)), held)
        return self.select_rows(keep), self.select_rows(np.sort(held))

    def check(self) -> str:
        """One screen about the data: size, users, pairs a user, shared prompts, columns."""
        per_user = self.user_offsets.diff().double()
        low, median, high = (per_user.quantile(q).item() for q in (0.25, 0.5, 0.75))
        seen: dict[str, set[int]] = {}
        for prompt, user in zip(self.prompts, self.row_users.tolist(), strict=True):
            seen.setdefault(prompt, set()).add(user)
        shared = sum(len(users) > 1 for users in seen.values()) / len(seen)
        lines = [
            f"pairs            {len(self)}",
            f"users            {self.num_users}",
            f"pairs per user   quartiles {low:g} / {median:g} / {high:g}",
            f"prompts          {len(seen)} distinct, {shared:.0%} seen by two or more users",
        ]
        if self.groups is not None:
            shares = ", ".join(f"{name} {count}" for name, count in Counter(self.groups).most_common())
            lines.append(f"true groups      {shares} users (evaluation only, never training)")
        if self.ignored_columns:
            lines.append(f"ignored columns  {', '.join(self.ignored_columns)}")
        if self.num_users == 1:
            lines.append("will fail later  one user only: groups cannot be told apart")
        if median < 5:
            lines.append(
                "will be weak     fewer than 5 pairs per user: most users cannot be placed in a group"
            )
        return "\n".join(lines)

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


def _find_user_column(names: Sequence[str]) -> str:
    found = [alias for alias in USER_ALIASES if alias in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"several columns could be the user: {', '.join(found)}; say which with --user_column"
        )
    raise UserError(
        f"no user column among {', '.join(names)}; name it with --user_column "
        f"(known names: {', '.join(USER_ALIASES)})"
    )
