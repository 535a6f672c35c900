"""Critics of a language model: heads on hidden states that give every group's value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_maxmin.models.language import SCORED, predicting_states
from torchrl_maxmin.models.sequences import states_width

__all__ = ["TokenCritic", "ValueHeads"]


class ValueHeads(TensorDictModuleBase):
    """One value head a group, and one for the KL penalty where there is one, on hidden states.

    Group weights move every iteration and the value of a group does not, so heads of their
    own keep every group's advantage valid whatever the weights are.

    Args:
        states: gives hidden states [B, R, width] of a tensordict, as :func:`predicting_states` does.
        width: of the hidden states, H.
        num_columns: value heads; groups, plus one for the KL column.
        backbone: the trunk that gives the states, where it is the critic's own.

    Reads what :func:`predicting_states` reads; writes ``state_value`` [B, R, num_columns] fp32.
    """

    def __init__(
        self,
        states: Callable[[TensorDictBase], Tensor],
        width: int,
        num_columns: int,
        backbone: nn.Module | None = None,
    ):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone  # before the heads: norms are summed in the order of the parameters
        self.in_keys = list(SCORED)
        self.out_keys = ["state_value"]
        self.states = states
        self.within: Callable[[], AbstractContextManager[Any]] = nullcontext  # as of TokenPolicy
        # drawing nothing: a run's random numbers do not depend on the number of groups
        self.head = nn.utils.skip_init(nn.Linear, width, num_columns)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value`` [B, R, num_columns]."""
        with self.within():
            states = self.states(tensordict)
        tensordict["state_value"] = self.head(states.to(self.head.weight.dtype)).float()
        return tensordict


class TokenCritic(ValueHeads):
    """A trunk with value heads, see :class:`ValueHeads`.

    Args:
        backbone: a Hugging Face trunk of its own (not shared with the policy).
        num_columns: value heads; groups, plus one for the KL column.
    """

    def __init__(self, backbone: nn.Module, num_columns: int):
        states = partial(predicting_states, backbone)
        super().__init__(states, states_width(backbone), num_columns, backbone)
