"""MaxMin-RLHF for TorchRL: learn groups from who preferred what, train for the group worst off.

The rooms, in the order in which data flows: :mod:`~torchrl_maxmin.preferences`,
:mod:`~torchrl_maxmin.clustering`, :mod:`~torchrl_maxmin.rewards`, :mod:`~torchrl_maxmin.envs`,
:mod:`~torchrl_maxmin.collectors`, :mod:`~torchrl_maxmin.rollouts`, :mod:`~torchrl_maxmin.welfare`,
:mod:`~torchrl_maxmin.objectives`, :mod:`~torchrl_maxmin.trainers`, :mod:`~torchrl_maxmin.evaluation`,
:mod:`~torchrl_maxmin.diagnosis`.
"""

from importlib.metadata import PackageNotFoundError, version

from torchrl_maxmin import _moved
from torchrl_maxmin.core.versions import warn_of_mismatches

try:
    __version__ = version("torchrl-maxmin")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

_moved.install()
warn_of_mismatches()
