"""People whose tastes are known: rankings, choices, ratings and pairs that a random utility gives.

A user of taste g has the utility ``precision * (taste utility of the item) + Gumbel noise``, so that rankings
follow Plackett and Luce, the best of n follows Luce, pairs follow Bradley and Terry, and ratings are the
latent utility cut at thresholds of the user's own. One seed, one world, the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from people_world import Rows, World, strict_rankings

__all__ = [
    "Rows",
    "World",
    "random_labels",
    "six_tastes",
    "spectrum",
    "strict_rankings",
    "tastes",
    "unequal_noise",
]

KINDS = ("rankings", "best_of", "pairs", "ratings")
#: dimensions of what items have and tastes weigh, where features are not one-hot
NUM_FACTORS = 6
#: of precision, for users who hardly look
NEARLY_RANDOM = 0.05
#: shares of :func:`six_tastes`, and how strong what they share and what is their own are
SIX_SHARES = (0.26, 0.2, 0.17, 0.14, 0.13, 0.1)
SIX_COMMON, SIX_OWN = 0.8, 1.0
#: how people judge where nothing else is said
PAIRS: dict[str, Any] = {"kind": "pairs", "judgements": 20, "num_shown": 2}
RANKINGS: dict[str, Any] = {"kind": "rankings", "judgements": 1, "num_shown": 10}


def tastes(
    num_tastes: int = 1,
    *,
    kind: str = "rankings",
    shares: Sequence[float] | None = None,
    num_users: int = 1000,
    judgements: int | None = 1,
    num_shown: int = 10,
    num_items: int = 10,
    features: str = "one-hot",
    width: int = 64,
    strength: float = 1.5,
    noise: float = 0.0,
    precision: Callable[[np.random.Generator, int], np.ndarray] | None = None,
    seed: int = 0,
) -> World:
    """People of a few tastes that are drawn apart from one another.

    Args:
        num_tastes: G.
        kind: ``rankings`` of ``num_shown`` items, the ``best_of`` them, ``pairs``, or ``ratings`` of 1 to 5.
        shares: of the tastes; equal if None.
        num_users: U.
        judgements: rankings, choices or pairs a user, or items that a user rates; None draws 5 to 200, long
            tailed, with median 20.
        num_shown: items of a ranking or a choice.
        num_items: in all.
        features: ``one-hot`` items; ``given``, the factors that utilities are linear in; or ``text``, as an
            encoder would give them: ``width`` dense ones that hold the factors and much else.
        width: of text features.
        strength: standard deviation of a taste's utilities over the items; the Gumbel noise has 1.28.
        noise: standard deviation of the logarithm of users' precision.
        precision: draws the users' precisions [U] instead.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    if features == "one-hot":
        about_items, given = np.eye(num_items), np.eye(num_items)
    else:
        given = about_items = rng.normal(size=(num_items, NUM_FACTORS))
        if features == "text":
            about_items = _as_text_features(given, width, rng)
    utilities = rng.normal(size=(num_tastes, given.shape[1])) @ given.T
    return _draw(
        rng,
        kind=kind,
        features=about_items,
        taste_utilities=_scaled(utilities, strength),
        true_groups=_groups(rng, num_users, num_tastes, shares),
        precision=_lognormal(noise) if precision is None else precision,
        judgements=judgements,
        num_shown=num_shown,
    )


def random_labels(**settings: Any) -> World:
    """Nobody wants anything: every order is as likely. Settings of :func:`tastes`."""
    return tastes(1, **({"strength": 0.0} | settings))


def unequal_noise(*, half_random: bool = False, **settings: Any) -> World:
    """One taste, and users who follow it closely or hardly: no groups of tastes.

    Args:
        half_random: half of the users choose nearly at random; otherwise precision is lognormal with sigma 1.
        **settings: of :func:`tastes`.
    """
    return tastes(1, **({"precision": _half_random if half_random else _lognormal(1.0)} | settings))


def spectrum(
    *,
    shape: str = "gaussian",
    num_dimensions: int = 4,
    num_users: int = 1000,
    num_items: int = 60,
    strength: float = 1.5,
    seed: int = 0,
    **settings: Any,
) -> World:
    """Tastes that lie everywhere between one another, so that any groups are cuts through a continuum.

    Args:
        shape: ``gaussian``, isotropic in ``num_dimensions``; or ``line``, uniform between two tastes.
        num_dimensions: what items have and users weigh.
        num_users: U.
        num_items: in all.
        strength: typical standard deviation of a user's utilities over the items.
        seed: of everything.
        **settings: ``kind`` (``pairs``), ``judgements`` (20 a user) and ``num_shown`` of :func:`tastes`.
    """
    rng = np.random.default_rng(seed)
    given = rng.normal(size=(num_items, num_dimensions))
    if shape == "line":
        ends = np.linalg.qr(rng.normal(size=(num_dimensions, 2)))[0].T * np.sqrt(num_dimensions)
        place = rng.random((num_users, 1))
        own = (1 - place) * ends[0] + place * ends[1]
    else:
        own = rng.normal(size=(num_users, num_dimensions))
    utilities = own @ given.T * (strength / np.sqrt(num_dimensions))
    return _draw(
        rng,
        features=given,
        taste_utilities=np.zeros((0, num_items)),
        true_groups=np.full(num_users, -1),
        precision=_lognormal(0.0),
        utilities=utilities,
        **(PAIRS | settings),
    )


def six_tastes(num_users: int = 2000, seed: int = 0, **settings: Any) -> World:
    """Six tastes over ten one-hot items, one ranking of all ten each, as people who rank sushi are.

    All tastes share what most people like; the posterior of who knows them misassigns one user in seven.

    Args:
        num_users: U.
        seed: of the users; the tastes are the same for all seeds.
        **settings: ``judgements``, ``num_shown`` and ``kind`` of :func:`tastes`.
    """
    fixed = np.random.default_rng(6)
    common, own = fixed.normal(size=10), np.linalg.qr(fixed.normal(size=(10, 10)))[0][:6]
    utilities = SIX_COMMON * common + SIX_OWN * _scaled(own, 1.0)
    rng = np.random.default_rng(seed)
    return _draw(
        rng,
        features=np.eye(10),
        taste_utilities=utilities,
        true_groups=_groups(rng, num_users, 6, SIX_SHARES),
        precision=_lognormal(0.0),
        **(RANKINGS | settings),
    )


def _draw(
    rng: np.random.Generator,
    *,
    kind: str,
    features: np.ndarray,
    taste_utilities: np.ndarray,
    true_groups: np.ndarray,
    precision: Callable[[np.random.Generator, int], np.ndarray],
    judgements: int | None,
    num_shown: int,
    utilities: np.ndarray | None = None,
) -> World:
    """Let everybody judge."""
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    num_users, num_items = len(true_groups), len(features)
    each = precision(rng, num_users)
    mine = each[:, None] * (taste_utilities[true_groups] if utilities is None else utilities)
    counts = _long_tail(rng, num_users) if judgements is None else np.full(num_users, judgements)
    thresholds = None
    if kind == "ratings":
        counts = np.minimum(counts, num_items)
        users, sizes = np.arange(num_users), counts
        items = np.concatenate([rng.permutation(num_items)[:count] for count in counts])
    else:
        shown = 2 if kind == "pairs" else num_shown
        users, sizes = np.repeat(np.arange(num_users), counts), np.full(counts.sum(), shown)
        items = np.argsort(rng.random((len(users), num_items)), axis=1)[:, :shown].ravel()
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    place = np.repeat(np.arange(len(users)), sizes)
    latent = mine[users[place], items] + rng.gumbel(size=len(items))
    if kind == "ratings":
        thresholds = _own_thresholds(rng, mine)
        levels = (latent[:, None] < thresholds[users[place]]).sum(1)
    else:
        order = np.lexsort((-latent, place))
        latent, items = latent[order], items[order]
        levels = np.arange(len(items)) - offsets[place]
        levels = np.minimum(levels, 1) if kind == "best_of" else levels
    order = np.lexsort((levels, place))
    region = np.where(rng.random(num_users) < 0.6, true_groups, rng.integers(0, 4, num_users))
    hand = rng.random(num_users) < 0.3
    return World(
        kind=kind,
        names=[f"item {i}" for i in range(num_items)],
        features=features,
        utilities=mine,
        true_groups=true_groups.astype(np.int64),
        taste_utilities=taste_utilities,
        precision=each,
        judgement_users=users,
        judgement_offsets=offsets,
        items=items[order],
        levels=levels[order],
        thresholds=thresholds,
        user_columns={
            "region": [f"region {r}" for r in region],
            "handedness": ["left" if left else "right" for left in hand],
        },
    )


def _groups(
    rng: np.random.Generator, num_users: int, num_tastes: int, shares: Sequence[float] | None
) -> np.ndarray:
    """The taste of every user [U]; counts follow the shares to the user, and the order is random."""
    each = np.full(num_tastes, 1 / num_tastes) if shares is None else np.asarray(shares) / np.sum(shares)
    if len(each) != num_tastes:
        raise ValueError(f"{len(each)} shares for {num_tastes} tastes")
    ends = np.floor(np.cumsum(each) * num_users + 0.5).astype(int)
    return rng.permutation(np.repeat(np.arange(num_tastes), np.diff(ends, prepend=0)))


def _scaled(utilities: np.ndarray, strength: float) -> np.ndarray:
    """Utilities [G, I] with mean 0 and this standard deviation over the items."""
    centred = utilities - utilities.mean(1, keepdims=True)
    return strength * centred / centred.std(1, keepdims=True)


def _as_text_features(factors: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Dense features [I, width], half of whose variance is the factors, as unit vectors."""
    mixed = factors @ rng.normal(size=(factors.shape[1], width)) / np.sqrt(factors.shape[1])
    mixed += rng.normal(size=mixed.shape)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def _lognormal(sigma: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, num_users: np.exp(sigma * rng.normal(size=num_users))


def _half_random(rng: np.random.Generator, num_users: int) -> np.ndarray:
    return np.where(rng.permutation(num_users) < num_users // 2, NEARLY_RANDOM, 1.0)


def _long_tail(rng: np.random.Generator, num_users: int) -> np.ndarray:
    """5 to 200 judgements a user, half of them at most 20."""
    return np.clip(np.exp(rng.normal(np.log(20), 1.0, num_users)).round(), 5, 200).astype(int)


def _own_thresholds(rng: np.random.Generator, utilities: np.ndarray) -> np.ndarray:
    """Where each user cuts: how generous and how reluctant to use the ends of the scale differ [U, 4]."""
    spread = np.sqrt(utilities.var(1, keepdims=True) + np.pi**2 / 6)
    generous, stretch = rng.normal(0, 0.5, (len(spread), 1)), np.exp(rng.normal(0, 0.3, (len(spread), 1)))
    cuts = np.array([-1.2, -0.4, 0.4, 1.2])
    return np.euler_gamma + utilities.mean(1, keepdims=True) + spread * (stretch * cuts - generous)
