"""Cutting users with many pairs into segments, so that no part of the GPU waits for one of them.

Who has how many pairs does not change over EM iterations: build the plan once per data set. Its tensors
have sizes that follow from the number of users and pairs alone, so that nothing waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT_PAIRS = 1024


class UserPlan(NamedTuple):
    """Segments of at most ``SEGMENT_PAIRS`` pairs, each of one user. Built by :func:`plan_users`.

    Attributes:
        segment_offsets: ``[S + 1]`` first pair of each segment; trailing segments are unused.
        segment_user: ``[S]`` user of each segment, -1 where unused.
        segment_slot: ``[S]`` row of the partial sum if the user has several segments, else -1.
        split_user: ``[L]`` users with several segments, -1 where unused.
        split_offsets: ``[L + 1]`` rows of partial sums of each of them.
    """

    segment_offsets: Tensor
    segment_user: Tensor
    segment_slot: Tensor
    split_user: Tensor
    split_offsets: Tensor


def check_offsets_shape(user_offsets: Tensor) -> None:
    """Raise unless the offsets are ``[U + 1]`` int64."""
    if user_offsets.dtype != torch.int64:
        raise TypeError(f"user_offsets must be int64, got {user_offsets.dtype}; convert it with .long().")
    if user_offsets.ndim != 1 or user_offsets.shape[0] == 0:
        raise ValueError(f"user_offsets must be [U + 1], got shape {tuple(user_offsets.shape)}.")


def check_user_offsets(user_offsets: Tensor, num_pairs: int | None = None) -> None:
    """Raise unless the offsets start at 0, never fall, and end at ``num_pairs``. Waits for the device.

    Raises:
        TypeError: If they are not int64.
        ValueError: If they are not ``[U + 1]`` or their values are impossible.
    """
    check_offsets_shape(user_offsets)
    first, last = int(user_offsets[0]), int(user_offsets[-1])
    rising = bool((user_offsets[1:] >= user_offsets[:-1]).all())
    if first != 0 or not rising or (num_pairs is not None and last != num_pairs):
        raise ValueError(
            f"user_offsets must start at 0, never fall, and end at the number of pairs ({num_pairs}); got "
            f"first {first}, last {last}, rising {rising}. Sort the pairs by user and take "
            "the cumulative sum of their counts, with a 0 in front."
        )


def build_plan(user_offsets: Tensor, num_pairs: int, segment_pairs: int = SEGMENT_PAIRS) -> UserPlan:
    """Build the plan without a look at any value, hence without waiting for the device."""
    device, users = user_offsets.device, user_offsets.shape[0] - 1
    # sum_u max(1, ceil(n_u / C)) <= U + P // C, and users of more than C pairs are at most P // (C + 1).
    num_segments = users + num_pairs // segment_pairs
    num_split = num_pairs // (segment_pairs + 1)
    counts = user_offsets.diff()
    pieces = ((counts + segment_pairs - 1) // segment_pairs).clamp(min=1)
    ends = pieces.cumsum(0)

    segment = torch.arange(num_segments, device=device)
    owner = torch.searchsorted(ends, segment, right=True)
    used = owner < users
    if users == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return UserPlan(zero, empty, empty, empty, zero)
    safe = owner.clamp(max=users - 1)
    piece = segment - (ends - pieces)[safe]
    starts = torch.where(used, user_offsets[safe] + piece * segment_pairs, num_pairs)
    last = torch.full((1,), num_pairs, dtype=torch.int64, device=device)

    split = pieces > 1
    rows = torch.where(split, pieces, 0)
    row_ends = rows.cumsum(0)
    slot = torch.where(used & split[safe], (row_ends - rows)[safe] + piece, -1)

    # Users with several segments, packed to the front; the others are written to a place that is cut off.
    place = torch.where(split, split.long().cumsum(0) - 1, num_split)
    split_user = torch.full((num_split + 1,), -1, dtype=torch.int64, device=device)
    split_user = split_user.scatter(0, place, torch.arange(users, device=device))[:num_split]
    total = row_ends[-1:]
    firsts = torch.where(split_user >= 0, (row_ends - rows)[split_user.clamp(min=0)], total)
    return UserPlan(
        torch.cat([starts, last]),
        torch.where(used, owner, -1),
        slot,
        split_user,
        torch.cat([firsts, total]),
    )


def plan_of(plan: Sequence[Tensor], user_offsets: Tensor, num_pairs: int) -> UserPlan:
    """Return the plan that was given, or else build one; on the device, without waiting for it."""
    if plan:
        return UserPlan(*plan)
    if user_offsets.is_cuda:
        rising = (user_offsets.diff() >= 0).all()
        ends = (user_offsets[0] == 0) & (user_offsets[-1] == num_pairs)
        torch._assert_async(rising & ends, "user_offsets must rise from 0 to the number of pairs")
    return build_plan(user_offsets, num_pairs)


def plan_users(user_offsets: Tensor) -> UserPlan:
    """Check the offsets and cut long users into segments, once per data set.

    Args:
        user_offsets: ``[U + 1]`` int64: the pairs of user u are rows ``user_offsets[u]:user_offsets[u + 1]``.

    Returns:
        The plan to pass as ``plan=`` to :func:`maxmin_kernels.em_responsibilities`, on the same device.

    Raises:
        TypeError: If the offsets are not int64.
        ValueError: If they do not start at 0 or fall somewhere.

    Example:
        >>> import torch
        >>> from maxmin_kernels import plan_users
        >>> plan_users(torch.tensor([0, 3, 1500])).segment_offsets.tolist()
        [0, 3, 1027, 1500]
    """
    check_user_offsets(user_offsets)
    return build_plan(user_offsets, int(user_offsets[-1]))
