"""From K group utilities to one value and K group weights: welfares, adversaries, the exact dual."""

from torchrl_maxmin.welfare.adversaries import (
    ADVERSARIES,
    Adversary,
    EntropyRegularized,
    ExponentiatedGradient,
    FixedWeights,
    HardMin,
    ProjectedGradient,
    WelfareAdversary,
    make_adversary,
)
from torchrl_maxmin.welfare.certificate import Certificate, certify
from torchrl_maxmin.welfare.dual import DualSolution, solve_dual
from torchrl_maxmin.welfare.fair import AlphaFair, GeneralizedGini, Nash, Regret
from torchrl_maxmin.welfare.functions import Egalitarian, SoftMin, Utilitarian, Welfare
from torchrl_maxmin.welfare.names import WELFARES, make_welfare
from torchrl_maxmin.welfare.robust import Chi2Ball, CVaR, KLBall
from torchrl_maxmin.welfare.statistics import GroupStatistics

__all__ = [
    "ADVERSARIES",
    "WELFARES",
    "Adversary",
    "AlphaFair",
    "CVaR",
    "Certificate",
    "Chi2Ball",
    "DualSolution",
    "Egalitarian",
    "EntropyRegularized",
    "ExponentiatedGradient",
    "FixedWeights",
    "GeneralizedGini",
    "GroupStatistics",
    "HardMin",
    "KLBall",
    "Nash",
    "ProjectedGradient",
    "Regret",
    "SoftMin",
    "Utilitarian",
    "Welfare",
    "WelfareAdversary",
    "certify",
    "make_adversary",
    "make_welfare",
    "solve_dual",
]
