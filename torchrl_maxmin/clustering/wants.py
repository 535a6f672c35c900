"""What does each group want, beside the others? Features, pairs and items that it weighs otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import expit
from torch import Tensor

from torchrl_maxmin.clustering.heads import FeatureMap
from torchrl_maxmin.clustering.items import ItemPairs, item_pairs_of_features, item_pairs_of_texts, item_ranks
from torchrl_maxmin.clustering.linear import LinearMixture
from torchrl_maxmin.clustering.others import against_others, others_mean

__all__ = [
    "PairContents",
    "disagreements",
    "feature_contrasts",
    "items_of",
    "ordered_features",
    "wants_by_margins",
    "wants_text",
    "what_groups_want",
]

#: Features, pairs and items of a group that summary.json holds.
MOST_LISTED = 20
#: Characters of a text that summary.json holds.
MOST_CHARACTERS = 2000
_TOLD_PAIRS = 3
_TOLD_CHARACTERS = 80


def feature_contrasts(mixture: LinearMixture, features: FeatureMap) -> np.ndarray:
    """Compute standardised weights of each group less the others' mean [K, D]."""
    heads = features.heads(mixture.weight).double().numpy()
    return against_others(heads, mixture.log_prior.double().numpy())


def ordered_features(
    weight: np.ndarray,
    contrast: np.ndarray,
    error: np.ndarray | None,
    names: Sequence[str],
    num_parts: int,
    confidence: float = 0.95,
) -> list[list[dict[str, Any]]]:
    """List by group the features that it weighs otherwise than the others, the surest first.

    Sure is |difference| / error, where errors of few parts of the users, which are noisy, are drawn half way
    to the median feature's. Without errors, the largest difference is first. Intervals hold for all features
    of a group at once (Bonferroni).

    Args:
        weight: Of the groups [K, D], on standardised features.
        contrast: Less the others' mean [K, D].
        error: Standard errors of it [K, D].
        names: Of the features.
        num_parts: Parts of the users behind the errors.
        confidence: Coverage of the intervals.

    Returns:
        By group, at most :data:`MOST_LISTED` of ``feature``, ``weight``, ``others``, ``difference``, ``low``,
        ``high`` (null without errors), ``told_apart``: whether the interval leaves out 0.
    """
    num_features = len(names)
    quantile = stats.t.ppf(1 - (1 - confidence) / 2 / num_features, num_parts - 1) if num_parts > 1 else 0.0
    found = []
    for k, differences in enumerate(contrast):
        pooled = None
        if error is not None:
            pooled = np.sqrt((error[k] ** 2 + np.median(error[k]) ** 2) / 2)
        sure = np.abs(differences) / (1.0 if pooled is None else np.maximum(pooled, 1e-12))
        entries = []
        for j in np.argsort(-sure, kind="stable")[:MOST_LISTED]:
            difference = float(differences[j])
            low = high = told = None
            if pooled is not None:
                half = float(quantile * pooled[j])
                low, high = difference - half, difference + half
                told = not low <= 0 <= high
            entries.append(
                {
                    "feature": names[j],
                    "weight": float(weight[k, j]),
                    "others": float(weight[k, j]) - difference,
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "told_apart": told,
                }
            )
        found.append(entries)
    return found


class Disagreement(NamedTuple):
    """A pair on which a group thinks otherwise than the others.

    Attributes:
        row: The pair.
        flipped: Whether the group is for its rejected side, more than the others are.
        group: Probability that the group prefers that side.
        others: That the others do.
    """

    row: int
    flipped: bool
    group: float
    others: float


def disagreements(
    margins: np.ndarray,
    log_prior: np.ndarray,
    keys: Callable[[int], tuple[Any, Any]],
    most: int = 5,
) -> list[list[Disagreement]]:
    """Find by group the pairs on which it differs most from the others, sides repeated only at need.

    Args:
        margins: Of every pair by every head [P, K].
        log_prior: Log shares [K].
        keys: What tells the two sides of a pair apart from those of other pairs.
        most: Pairs of a group.

    Example:
        >>> margins = np.array([[2.0, -2.0], [0.1, 0.0], [-3.0, 3.0]])
        >>> found = disagreements(margins, np.log([0.5, 0.5]), lambda row: (row, -row - 1), most=2)
        >>> [(d.row, d.flipped, round(d.group, 2)) for d in found[0]]
        [(2, True, 0.95), (0, False, 0.88)]
    """
    if margins.shape[1] == 1:
        return [[]]
    p = expit(margins).T
    others = others_mean(p, log_prior)
    found = []
    for mine, theirs in zip(p, others, strict=True):
        apart = np.abs(mine - theirs)
        count = min(len(apart), 200 * most)  # repeats of one text are passed over
        near = np.argpartition(-apart, count - 1)[:count]
        near = near[np.argsort(-apart[near], kind="stable")]
        seen: set[Any] = set()
        fresh: list[int] = []
        again: list[int] = []
        pairs: set[frozenset[Any]] = set()
        for row in near.tolist():
            sides = keys(row)
            if frozenset(sides) in pairs:
                continue
            pairs.add(frozenset(sides))
            (again if seen & set(sides) else fresh).append(row)
            if len(fresh) == most:
                break
            seen |= set(sides)
        chosen = sorted((fresh + again)[:most], key=lambda row: -apart[row])
        entries = []
        for row in chosen:
            flipped = bool(mine[row] < theirs[row])
            ends = (float(1 - side[row] if flipped else side[row]) for side in (mine, theirs))
            entries.append(Disagreement(row, flipped, *ends))
        found.append(entries)
    return found


@dataclass(frozen=True)
class PairContents:
    """What pairs are, for people to read; either texts, or names of features.

    Attributes:
        texts: Prompt, chosen and rejected text of every pair, each [P].
        feature_names: Names [D], where features mean something by themselves.
        file_rows: Row of the file that each pair stands in [P].
    """

    texts: tuple[Sequence[Any], Sequence[Any], Sequence[Any]] | None = None
    feature_names: Sequence[str] | None = None
    file_rows: Sequence[int] | np.ndarray | None = None


def items_of(contents: PairContents, differences: Tensor, rows: np.ndarray) -> ItemPairs | None:
    """Find the items that pairs are between; None where they hardly repeat.

    Args:
        contents: What there is to show.
        differences: Of the pairs, as they were given [P, D]; only asked where features have names.
        rows: Which of the pairs of ``contents`` these are [P].
    """
    if contents.feature_names is not None:
        return item_pairs_of_features(differences.float().numpy(), contents.feature_names)
    if contents.texts is None:
        return None
    _, chosen, rejected = contents.texts
    return item_pairs_of_texts(map(_shown, chosen), map(_shown, rejected), rows)


def what_groups_want(
    searched: Tensor,
    rows: np.ndarray,
    mixture: LinearMixture,
    features: FeatureMap,
    contents: PairContents,
    items: ItemPairs | None,
    errors: np.ndarray | None,
    num_parts: int,
) -> list[dict[str, Any]]:
    """Say by group which features it weighs otherwise, which pairs it sees otherwise, and how it ranks items.

    Args:
        searched: Differences of the pairs as the heads take them [P, C].
        rows: Which of the pairs of ``contents`` these are [P].
        mixture: The fit.
        features: From features as they were given to those.
        contents: What there is to show.
        items: Of :func:`items_of`.
        errors: Of :func:`feature_contrasts` [K, D].
        num_parts: Parts of the users behind them.

    Returns:
        By group ``features``, ``pairs`` and ``items``; null where the data have none to show.
    """
    log_prior = mixture.log_prior.double().numpy()
    margins = (searched @ mixture.weight.T.to(searched.dtype)).double().numpy()
    by_group = wants_by_margins(margins, log_prior, rows, contents, items)
    if len(log_prior) > 1 and (names := contents.feature_names) is not None:
        weight = features.heads(mixture.weight).double().numpy()
        contrast = feature_contrasts(mixture, features)
        listed = ordered_features(weight, contrast, errors, names, num_parts)
        for entry, mine in zip(by_group, listed, strict=True):
            entry["features"] = mine
    return by_group


def wants_by_margins(
    margins: np.ndarray,
    log_prior: np.ndarray,
    rows: np.ndarray,
    contents: PairContents,
    items: ItemPairs | None,
) -> list[dict[str, Any]]:
    """Say by group which pairs it sees otherwise and how it ranks items, whatever gave the rewards.

    Args:
        margins: Of the pairs by the groups' rewards [P, K].
        log_prior: Log shares of the groups [K].
        rows: Which of the pairs of ``contents`` these are [P].
        contents: What there is to show.
        items: Of :func:`items_of`.

    Returns:
        As :func:`what_groups_want`, without ``features``.
    """
    by_group: list[dict[str, Any]] = [{"features": None, "pairs": None, "items": None} for _ in log_prior]
    if len(log_prior) == 1:
        return by_group
    sides = _sides(rows, items, contents)

    def keys(row: int) -> tuple[Any, Any]:
        found = sides(row)
        return found["chosen"], found["rejected"]

    for entry, found in zip(by_group, disagreements(margins, log_prior, keys), strict=True):
        entry["pairs"] = [_pair_entry(sides(pair.row), pair) for pair in found]
    if items is not None:
        for entry, ranked in zip(by_group, item_ranks(margins, log_prior, items), strict=True):
            entry["items"] = [each | {"item": _item_text(each["item"], contents)} for each in ranked] or None
    return by_group


def wants_text(wants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tell in a few lines what groups want.

    Args:
        wants: By group, of :func:`what_groups_want`.

    Example:
        >>> pair = {"prompt": None, "preferred": "tea", "other": "milk", "group": 0.9, "others": 0.2}
        >>> print(*wants_text([{"items": None, "pairs": [pair]}, {"items": None, "pairs": []}]), sep=chr(10))
        group 0 prefers 'tea' to 'milk' (probability 0.90; the others 0.20)
    """
    lines = []
    for k, group in enumerate(wants):
        if items := group["items"]:
            first = ", ".join(_in_a_line(entry["item"]) for entry in items[:3])
            lines.append(f"group {k} ranks {len(items)} items; first come {first}")
            apart = max(items, key=lambda entry: abs(entry["difference"]))
            if apart["difference"]:
                ranks = f"rank {apart['rank']}; to the others {apart['rank_by_others']}"
                lines.append(f"group {k} differs most on {_in_a_line(apart['item'])} ({ranks})")
        for pair in (group["pairs"] or [])[:_TOLD_PAIRS]:
            preferred, other = (_in_a_line(pair[side]) for side in ("preferred", "other"))
            odds = f"probability {pair['group']:.2f}; the others {pair['others']:.2f}"
            about = "" if not pair["prompt"] else f", asked {_in_a_line(pair['prompt'])}"
            lines.append(f"group {k} prefers {preferred} to {other} ({odds}{about})")
    return lines


def _in_a_line(text: str) -> str:
    """A text as a quoted line, and not much of it."""
    return repr(text if len(text) <= _TOLD_CHARACTERS else f"{text[: _TOLD_CHARACTERS - 3]}...")


def _sides(
    rows: np.ndarray, items: ItemPairs | None, contents: PairContents
) -> Callable[[int], dict[str, Any]]:
    """What to show of the two sides of a pair."""

    def of(row: int) -> dict[str, Any]:
        source = int(rows[row])
        place = source if contents.file_rows is None else int(contents.file_rows[source])
        if contents.texts is not None:
            prompt, chosen, rejected = (_shown(column[source]) for column in contents.texts)
            return {"row": place, "prompt": prompt, "chosen": chosen, "rejected": rejected}
        if items is not None:
            chosen, rejected = (items.items[side[row]] for side in (items.chosen, items.rejected))
            return {"row": place, "prompt": None, "chosen": str(chosen), "rejected": str(rejected)}
        ends = {name: f"{name} of row {place} of the file" for name in ("chosen", "rejected")}
        return {"row": place, "prompt": None, **ends}

    return of


def _pair_entry(sides: dict[str, Any], pair: Disagreement) -> dict[str, Any]:
    preferred, other = ("rejected", "chosen") if pair.flipped else ("chosen", "rejected")
    texts = {"prompt": sides["prompt"], "preferred": sides[preferred], "other": sides[other]}
    cut = {name: None if text is None else text[:MOST_CHARACTERS] for name, text in texts.items()}
    return {**cut, "row": sides["row"], "group": pair.group, "others": pair.others}


def _item_text(item: Any, contents: PairContents) -> str:
    if contents.texts is None:
        return str(item)
    return _shown(contents.texts[1 + item % 2][item // 2])[:MOST_CHARACTERS]


def _shown(text: Any) -> str:
    """A text as it is, a conversation as lines."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in text)
