"""The networks of a PPO run by role: what is trained, and what of it is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Networks"]


class Networks:
    """A policy and a critic, whatever they share.

    The one place that knows how many networks a run has. A parameter that two roles share belongs to the
    first of them: it is clipped, optimised and saved once.

    Args:
        policy: acts; what a run saves in the end.
        critic: gives every group's values; None where advantages need none.
        actor: the policy as a loss reads it; the policy itself when None.

    Example:
        >>> policy = nn.Linear(2, 3)
        >>> critic = nn.Sequential(policy, nn.Linear(3, 1))
        >>> {role: len(parameters) for role, parameters in Networks(policy, critic).parameters().items()}
        {'policy': 2, 'critic': 2}
    """

    def __init__(self, policy: nn.Module, critic: nn.Module | None, actor: nn.Module | None = None):
        self.policy, self.critic = policy, critic
        self.actor = policy if actor is None else actor

    @property
    def roles(self) -> dict[str, nn.Module]:
        """The trained networks by role."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that are trained, by role and each once."""
        seen: set[nn.Parameter] = set()
        roles: dict[str, list[nn.Parameter]] = {}
        for role, module in self.roles.items():
            roles[role] = [p for p in module.parameters() if p.requires_grad and p not in seen]
            seen.update(roles[role])
        return roles

    def policy_parameters(self) -> list[Tensor]:
        """The policy's parameters that are trained, as they are: what a copy of it elsewhere is behind by."""
        return [parameter.detach() for parameter in self.parameters()["policy"]]

    @torch.no_grad()
    def load_policy_parameters(self, weights: Sequence[Tensor]) -> None:
        """Load what :meth:`policy_parameters` of networks with the same settings gave."""
        for own, given in zip(self.parameters()["policy"], weights, strict=True):
            own.copy_(given)

    def state_dict(self) -> dict[str, Any]:
        """The state of every trained network, by role."""
        return {role: module.state_dict() for role, module in self.roles.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: where only one of the two has a critic.
        """
        if ("critic" in state) == (self.critic is None):
            raise ValueError("a critic on one side alone: the state is of other networks")
        for role, module in self.roles.items():
            module.load_state_dict(state[role])
