"""What was left out of the fits, by what the data have; and rewards on prompts and items that nobody judged.

Judgements are left out whole, never a part of a ranking or of a choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.items import ItemPairs
from torchrl_maxmin.clustering.left_out import NUM_JUDGEMENT_FOLDS, heldout_of, judgement_numbers
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.stats import accuracy_by_group

__all__ = ["accuracy_on_unseen", "left_out_text", "parts_left_out"]

#: Fewer distinct prompts, or items, are not left out: too few would be judged by.
FEWEST = 20
_FRACTION = 0.2
_MOST = 0.5  # of the judgements, that may be about what is left out


def parts_left_out(choices: PairChoices, user_parts: int, looked_at_judgements: bool) -> dict[str, Any]:
    """Say in numbers which users and judgements were left out where K and its groups were asked for.

    Args:
        choices: All users.
        user_parts: Parts that the users were cut into.
        looked_at_judgements: Whether more than one group was good enough to ask the judgements.

    Example:
        >>> choices = PairChoices(torch.randn(5, 2), torch.tensor([0, 3, 4, 5]))
        >>> parts_left_out(choices, 4, True)["judgements"]
        {'count': 3, 'users': 1, 'parts': 3, 'reason': None}
    """
    num_users = len(choices.user_offsets) - 1
    unique, _ = judgement_numbers(choices)
    counts = np.bincount(unique[:, 0], minlength=num_users)
    several = counts[counts > 1]
    reason = None
    if not len(several):
        reason = "nobody has two judgements"
    elif not looked_at_judgements:
        reason = "no more than one group came so far"
    found = {"count": 0, "users": 0, "parts": 0, "reason": reason}
    if reason is None:
        parts = min(NUM_JUDGEMENT_FOLDS, int(several.max()))
        found |= {"count": int(several.sum()), "users": len(several), "parts": parts}
    return {"users": {"count": num_users, "parts": min(user_parts, num_users)}, "judgements": found}


def accuracy_on_unseen(
    choices: PairChoices,
    num_groups: int,
    fit: Mapping[str, Any],
    *,
    prompts: Sequence[Any] | None = None,
    items: ItemPairs | None = None,
    one_hot: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure whether rewards hold on prompts, and on items, that nobody of the fit has judged.

    A fifth of the judgements is left out, all those about some prompts (some items), and linear rewards are
    fitted to the rest: each user's by the group that the rest puts them in. Beside it stands the same for a
    fifth of each user's judgements, of prompts (items) that the rest knows.

    Args:
        choices: All users.
        num_groups: K.
        fit: Arguments of :func:`~torchrl_maxmin.clustering.fit_choices`.
        prompts: What each row is about [P].
        items: Items of the rows.
        one_hot: Whether the features are the items, so that nothing is known of another one.
        seed: Of what is left out, and of the starts.
        device: Where the rewards are fitted.

    Returns:
        ``prompts`` and ``items``: ``left_out`` of how many (``of``), ``judgements`` about them, ``accuracy``
        and ``accuracy_of_known``, each user counted once, with intervals over users and prompts (items), or
        the ``reason`` why there are none.
    """
    sides: dict[str, np.ndarray | str] = {
        "prompts": "no prompts are known" if prompts is None else _numbers(prompts)[:, None],
        "items": "items do not repeat",
    }
    if one_hot:
        sides["items"] = "the features are the items themselves, which say nothing of another item"
    elif items is not None:
        sides["items"] = np.stack([items.chosen, items.rejected], 1)
    _, which = judgement_numbers(choices)
    found: dict[str, Any] = {}
    drawn: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for what, ids in sides.items():
        reason = ids if isinstance(ids, str) else _why_not(what, ids, which)
        if reason is None and not isinstance(ids, str):
            out, touched = _draw(ids, which, seed)
            if touched.mean() <= _MOST:
                drawn[what] = ids, out, touched[which]
                numbers = {"left_out": int(out.sum()), "of": len(out), "judgements": int(touched.sum())}
                found[what] = numbers | {"reason": None}
                continue
            share = f"{touched.mean():.0%} of the judgements"
            reason = f"{share} are about {int(out.sum())} of {len(out)} {what} drawn to be left out"
        found[what] = {"reason": reason}
    if not drawn:
        return found
    held = heldout_of(choices, _FRACTION, seed).numpy()
    asked = num_groups, fit, seed, device
    without_held = _rest(choices, held, *asked)
    for what, (ids, out, rows) in drawn.items():
        fresh = out[ids]  # of a ranking only the rows with such an item count
        cluster = np.where(fresh[:, 0], ids[:, 0], ids[:, -1])
        rest = _rest(choices, rows, *asked)
        found[what]["accuracy"] = _accuracy(choices, *rest, rows & fresh.any(1), cluster)
        familiar = held & np.isin(ids, ids[~held]).all(1)
        found[what]["accuracy_of_known"] = _accuracy(choices, *without_held, familiar, ids[:, 0])
    return found


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """A number [P] for every value, equal for equal ones, by first appearance."""
    numbers: dict[Any, int] = {}
    return np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values))


def _why_not(what: str, ids: np.ndarray, which: np.ndarray) -> str | None:
    """Why prompts or items are not left out; None where they can be."""
    distinct, num_judgements = len(np.unique(ids)), int(which.max()) + 1
    if distinct == 1:
        return f"there are no {what}" if what == "prompts" else "there is one item"
    if num_judgements < 2 * distinct:
        return f"{what} hardly repeat"
    return f"{distinct} {what} are too few, of {FEWEST}" if distinct < FEWEST else None


def _draw(ids: np.ndarray, which: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ids until a fifth of the judgements are about one: of the ids [I], and of the judgements [J]."""
    num_ids, num_judgements = int(ids.max()) + 1, int(which.max()) + 1
    place = np.random.default_rng([seed, num_ids]).permutation(num_ids)
    first = np.full(num_judgements, num_ids)
    for side in ids.T:
        np.minimum.at(first, which, place[side])
    reached = np.bincount(first, minlength=num_ids).cumsum()
    most = int(np.searchsorted(reached, _FRACTION * num_judgements))
    return place <= most, first <= most


def _rest(
    choices: PairChoices,
    left_out: np.ndarray,
    num_groups: int,
    fit: Mapping[str, Any],
    seed: int,
    device: torch.device | str,
) -> tuple[LinearMixture, Tensor]:
    """A fit without the rows ``left_out`` [P], and which users [U] have others."""
    known = choices.keep_rows(torch.from_numpy(~left_out))
    mixture = fit_choices(known.to(device), num_groups, seed, **fit).to("cpu")
    return mixture, known.choices_by_user > 0


def _accuracy(
    choices: PairChoices, mixture: LinearMixture, there: Tensor, scored: np.ndarray, clusters: np.ndarray
) -> dict[str, Any] | None:
    """How often users' own rewards rank the rows ``scored`` [P] as they did; None without such rows."""
    rows = (torch.from_numpy(scored) & there[choices.row_users]).nonzero().flatten()
    users = choices.row_users[rows]
    margins = choices.differences[rows] @ mixture.weight.T
    margins = margins.gather(1, mixture.assignments[users].unsqueeze(1)).squeeze(1)
    (found,) = accuracy_by_group(
        (margins.sign() + 1) / 2,
        users,
        torch.zeros(len(there), dtype=torch.int64),
        1,
        row_weights=None if choices.row_weights is None else choices.row_weights[rows],
        prompts=clusters[rows.numpy()].tolist(),
        num_resamples=0,
        warn=False,
    )
    return None if found is None else dict(zip(("mean", "low", "high"), found.to_list(), strict=True))


def left_out_text(found: Mapping[str, Any]) -> list[str]:
    """Say in words what was left out, and what came of it.

    Args:
        found: ``users`` and ``judgements`` of :func:`parts_left_out`, ``pairs`` of the held-out figures of
            heads, ``prompts`` and ``items`` of :func:`accuracy_on_unseen`; any of them may be missing.

    Example:
        >>> print(*left_out_text({"judgements": {"reason": "nobody has two judgements"}}))
        no judgements of known users were left out: nobody has two judgements
    """
    lines = []
    if users := found.get("users"):
        lines.append(
            f"each of the {users['count']:,} users was left out once, in {users['parts']} parts, where the "
            "number of groups, the penalties and the groups were judged"
        )
    if judgements := found.get("judgements"):
        if judgements["reason"]:
            lines.append(f"no judgements of known users were left out: {judgements['reason']}")
        else:
            lines.append(
                f"each of {judgements['count']:,} judgements of {judgements['users']:,} users who made "
                f"several was left out once, in {judgements['parts']} parts of each user's, never a part of "
                "a ranking or choice"
            )
    if pairs := found.get("pairs"):
        if pairs["reason"]:
            lines.append(f"no pairs were held out for the accuracy by group: {pairs['reason']}")
        else:
            lines.append(
                f"accuracy by group is of {pairs['count']:,} held-out pairs: {pairs['judgements']:,} whole "
                f"judgements of {pairs['users']:,} users ({pairs['origin']})"
            )
    for what in ("prompts", "items"):
        part = found.get(what)
        if part is None:
            continue
        if part["reason"]:
            lines.append(f"no {what} were left out: {part['reason']}")
            continue
        text = (
            f"{part['left_out']:,} of {part['of']:,} {what} were left out with all {part['judgements']:,} "
            f"judgements about them: linear rewards fitted to the rest rank {_rate(part['accuracy'])} of "
            "their pairs as the users did"
        )
        if part["accuracy_of_known"] is not None:
            text += f" ({_rate(part['accuracy_of_known'])} of left-out pairs about {what} that the fit knows)"
        lines.append(text)
    return lines


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none"
    ends = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['mean']:.3f}{ends}"
