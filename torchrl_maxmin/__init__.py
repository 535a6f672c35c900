"""MaxMin-RLHF for TorchRL: learn groups from who preferred what, train for the group worst off.

The rooms, in the order in which data flows: :mod:`~torchrl_maxmin.preferences`,
:mod:`~torchrl_maxmin.clustering`, :mod:`~torchrl_maxmin.rewards`, :mod:`~torchrl_maxmin.envs`,
:mod:`~torchrl_maxmin.collectors`, :mod:`~torchrl_maxmin.rollouts`, :mod:`~torchrl_maxmin.welfare`,
:mod:`~torchrl_maxmin.objectives`, :mod:`~torchrl_maxmin.trainers`, :mod:`~torchrl_maxmin.evaluation`,
:mod:`~torchrl_maxmin.diagnosis`. On top of them stand :mod:`~torchrl_maxmin.api`, whose three functions
:func:`fit_groups`, :func:`train_policy` and :func:`evaluate` are imported from here, and the command line.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torchrl_maxmin import _moved
from torchrl_maxmin.core.versions import warn_of_mismatches

if TYPE_CHECKING:
    from torchrl_maxmin.api import evaluate, fit_groups, train_policy

__all__ = ["evaluate", "fit_groups", "train_policy"]

try:
    __version__ = version("torchrl-maxmin")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

_moved.install()
warn_of_mismatches()


def __getattr__(name: str) -> Any:
    """Import the functions of :mod:`~torchrl_maxmin.api` when they are asked for, and torch only then."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("torchrl_maxmin.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
