"""From K group utilities to one value and K group weights: welfares, adversaries, the exact dual."""

from torchrl_maxmin.welfare.adversaries import (
    ADVERSARIES,
    Adversary,
    EntropyRegularized,
    ExponentiatedGradient,
    FixedWeights,
    HardMin,
    make_adversary,
)
from torchrl_maxmin.welfare.certificate import Certificate, certify
from torchrl_maxmin.welfare.dual import DualSolution, dual_objective, solve_dual
from torchrl_maxmin.welfare.functions import Egalitarian, SoftMin, Utilitarian, Welfare

__all__ = [
    "ADVERSARIES",
    "Adversary",
    "Certificate",
    "DualSolution",
    "Egalitarian",
    "EntropyRegularized",
    "ExponentiatedGradient",
    "FixedWeights",
    "HardMin",
    "SoftMin",
    "Utilitarian",
    "Welfare",
    "certify",
    "dual_objective",
    "make_adversary",
    "solve_dual",
]
