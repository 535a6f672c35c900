"""Welfares by name, as a command line gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl_maxmin.welfare.fair import AlphaFair, GeneralizedGini, Nash, Regret
from torchrl_maxmin.welfare.functions import Egalitarian, SoftMin, Utilitarian, Welfare
from torchrl_maxmin.welfare.robust import Chi2Ball, CVaR, KLBall

__all__ = ["WELFARES", "make_welfare"]


#: The names that :func:`make_welfare` knows.
WELFARES: dict[str, Callable[..., Welfare]] = {
    "egalitarian": Egalitarian,
    "utilitarian": Utilitarian,
    "soft_min": SoftMin,
    "kl_ball": KLBall,
    "chi2_ball": Chi2Ball,
    "cvar": CVaR,
    "nash": Nash,
    "alpha_fair": AlphaFair,
    "generalized_gini": GeneralizedGini,
    "regret": lambda best, welfare="egalitarian", **settings: Regret(make_welfare(welfare, **settings), best),
}


def make_welfare(name: str | Welfare, **settings: Any) -> Welfare:
    """Build a welfare from its name.

    Args:
        name: one of :data:`WELFARES`; or a welfare without settings, which is returned.
        **settings: the arguments of that class; ``regret`` takes ``best``, and ``welfare`` (a name or an
            object, egalitarian without one) with its settings.

    Raises:
        ValueError: if the name is unknown, a setting is out of range, or an object has settings beside it.

    Example:
        >>> from torchrl_maxmin.welfare import make_welfare
        >>> make_welfare("cvar", level=0.2).level
        0.2
        >>> make_welfare("regret", best=[1.0, 0.5], welfare="soft_min", temperature=0.1).welfare
        SoftMin(temperature=0.1, prior=None)
    """
    if not isinstance(name, str):
        if settings:
            raise ValueError(
                f"{sorted(settings)} are settings of a welfare by name, but an object was given."
            )
        return name
    if name not in WELFARES:
        raise ValueError(f"Unknown welfare {name!r}. Known are: {', '.join(sorted(WELFARES))}.")
    return WELFARES[name](**settings)
