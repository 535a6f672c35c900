"""Operators with sizes: their random inputs, their floors, and every implementation that is timed on them.

A workload is one size of one operator. Its implementations take the same inputs and return the same outputs,
``ours`` first. Inputs that are prepared once per data set (the plan, the user of each pair) are made here, so
that no implementation pays for them.
"""

from .base import AUTOTUNED, DEFAULT, Implementation, Inputs, Workload, dtype_name, one_line
from .em import EStep
from .gae import GAE, TokenGAE
from .heads import Heads
from .log_probs import LogProbs

__all__ = [
    "AUTOTUNED",
    "DEFAULT",
    "GAE",
    "EStep",
    "Heads",
    "Implementation",
    "Inputs",
    "LogProbs",
    "TokenGAE",
    "Workload",
    "dtype_name",
    "one_line",
]
