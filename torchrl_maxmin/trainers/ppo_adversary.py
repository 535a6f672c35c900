"""From the settings of the policy stage to who moves the group weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.trainers.ppo_settings import PPOSettings
from torchrl_maxmin.welfare import (
    Adversary,
    FixedWeights,
    GeneralizedGini,
    Welfare,
    WelfareAdversary,
    make_adversary,
    make_welfare,
)

__all__ = ["adversary_of"]

_PARAMETER = {
    "soft_min": "temperature",
    "kl_ball": "radius",
    "chi2_ball": "radius",
    "cvar": "level",
    "alpha_fair": "alpha",
}


def adversary_of(
    config: PPOSettings,
    num_groups: int,
    shares: Tensor | None,
    *,
    scale: float = 1.0,
    disagreement: float = 0.0,
) -> Adversary:
    """The adversary that ``--objective``, ``--welfare`` and ``--adversary`` ask for.

    Args:
        config: the stage's settings, checked.
        num_groups: K.
        shares: the groups' shares of the population [K]; None where they are not known (reward
            functions), which then count alike.
        scale: what the adversary divides utilities by; 1 where the reward is calibrated.
        disagreement: what a group gets in the worst case, from which Nash and alpha-fairness count.

    Raises:
        UserError: where ``--group_weights`` are not as many as the groups.
    """
    if config.welfare == "fixed":
        if len(config.group_weights) != num_groups:
            raise UserError(
                f"--group_weights gives {len(config.group_weights)} weights, but the reward has {num_groups} "
                "groups; give one a group"
            )
        return FixedWeights(config.group_weights)
    point = torch.full((num_groups,), 1.0 / num_groups) if shares is None else shares.cpu()
    if config.objective == "mean_of_mins":
        return FixedWeights([1.0])
    if config.welfare == "utilitarian" or config.objective == "mean_of_prompt_mins":
        # population shares where they are known: an equal-weight mean is another welfare;
        # weights by prompt need no adversary
        return FixedWeights(point)
    if num_groups == 1:
        return FixedWeights([1.0])
    options: dict[str, Any] = {
        "step_decay": config.adversary_step_decay,
        "optimistic": config.adversary_optimistic,
    }
    if config.welfare != "egalitarian":
        return WelfareAdversary(num_groups, _welfare(config, num_groups, point, disagreement), **options)
    settings: dict[str, dict[str, float]] = {
        "entropy_regularized": {"tau": config.tau, "scale": scale},
        "exponentiated_gradient": {"step_size": config.adversary_step_size, "scale": scale},
        "projected_gradient": {"step_size": config.adversary_step_size, "scale": scale},
        "hard_min": {},
    }
    return make_adversary(config.adversary, num_groups, **settings[config.adversary], **options)


def _welfare(config: PPOSettings, num_groups: int, shares: Tensor, disagreement: float) -> Welfare:
    if config.welfare == "generalized_gini":
        return GeneralizedGini.leximin(num_groups, config.welfare_parameter)
    settings: dict[str, Any] = {"prior" if config.welfare == "soft_min" else "shares": shares}
    if config.welfare in ("nash", "alpha_fair"):
        settings["disagreement"] = disagreement
    if config.welfare in _PARAMETER:
        settings[_PARAMETER[config.welfare]] = config.welfare_parameter
    return make_welfare(config.welfare, **settings)
