"""MaxMin-RLHF for TorchRL: learn groups from who preferred what, train for the group worst off.

The rooms, in the order in which data flows: :mod:`~torchrl_maxmin.preferences`,
:mod:`~torchrl_maxmin.rewards`, :mod:`~torchrl_maxmin.envs`, :mod:`~torchrl_maxmin.collectors`,
:mod:`~torchrl_maxmin.welfare`, :mod:`~torchrl_maxmin.objectives`,
:mod:`~torchrl_maxmin.trainers`, :mod:`~torchrl_maxmin.evaluation`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("torchrl-maxmin")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
