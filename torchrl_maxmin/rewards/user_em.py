"""EM over users with an M-step that converges, for whatever they chose: pairs or rankings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchrl_maxmin.rewards.choices import Expectation, harden

__all__ = ["EMFit", "UserChoices", "converged", "exact_em", "mixing_weights", "round_record"]

# A group is repaired so often at most; on users of one kind it would empty for ever.
_MAX_REPAIRS = 1


class UserChoices(Protocol):
    """What the EM asks of data, heads being [K, D]."""

    @property
    def dtype(self) -> torch.dtype:
        """What fits come back in."""
        ...

    @property
    def num_choices(self) -> float:
        """All users' choices together."""
        ...

    @property
    def choices_by_user(self) -> Tensor:
        """Choices of every user [U]."""
        ...

    def expectation(self, weight: Tensor, log_prior: Tensor) -> Expectation:
        """The E-step."""
        ...

    def maximise(self, responsibilities: Tensor, start: Tensor, l2: float) -> Tensor:
        """The M-step, to convergence."""
        ...


@dataclass(frozen=True)
class EMFit:
    """Where one run of EM ended.

    Attributes:
        weight: [K, D].
        log_prior: [K].
        responsibilities: [U, K].
        log_likelihood: nats over all choices.
        objective: what never falls, see :func:`exact_em`; restarts are scored by it.
        history: one record a round.
    """

    weight: Tensor
    log_prior: Tensor
    responsibilities: Tensor
    log_likelihood: float
    objective: float
    history: list[dict[str, Any]]


def mixing_weights(responsibilities: Tensor) -> Tensor:
    """Log mixing weights [K] from responsibilities [U, K], with one pseudo-user over all groups."""
    num_users, num_groups = responsibilities.shape
    return ((responsibilities.sum(0) + 1.0 / num_groups) / (num_users + 1)).log()


def exact_em(
    choices: UserChoices,
    start: Tensor,
    *,
    assignment: str = "soft",
    num_rounds: int = 50,
    l2: float = 1e-4,
    convergence_tolerance: float | None = None,
) -> EMFit:
    """EM from given heads, every M-step solved to convergence, in float64.

    The objective never falls but where an empty group is repaired: soft, the observed
    log-likelihood; hard, that of the likeliest groups; both with the mixing weights' pseudo-user
    and less the penalty, in nats a choice. A repair that did not pay is taken back.

    Args:
        choices: the data.
        start: heads [K, D].
        assignment: ``soft`` or ``hard``.
        num_rounds: M-steps at most.
        l2: penalty on the squared heads, in units of choices.
        convergence_tolerance: stop once no user changed group and the objective rose by less; None
            runs all rounds.
    """
    weight = start.double()
    num_groups = len(weight)
    log_prior = weight.new_full((num_groups,), 1.0 / num_groups).log()
    history: list[dict[str, Any]] = []
    before_repair: EMFit | None = None
    repairs = [0] * num_groups
    previous: Tensor | None = None
    while True:
        soft, user_ll, _ = choices.expectation(weight, log_prior)
        responsibilities = harden(soft) if assignment == "hard" else soft
        explained = user_ll + soft.max(-1).values.log() if assignment == "hard" else user_ll
        penalty = l2 * weight.square().sum()
        objective = ((explained.sum() + log_prior.mean()) / choices.num_choices - penalty).item()
        record = round_record(len(history), previous, responsibilities, user_ll, choices.num_choices)
        history.append(record | {"em/objective": objective})
        fit = EMFit(weight, log_prior, responsibilities, user_ll.sum().item(), objective, history)
        if len(history) > num_rounds or converged(history, convergence_tolerance, "em/objective"):
            break
        empty = [k for k in _empty_groups(responsibilities) if repairs[k] < _MAX_REPAIRS]
        if empty:
            if before_repair is None or objective > before_repair.objective:
                before_repair = fit
            history[-1]["em/repaired_groups"] = empty
            repairs = [count + (k in empty) for k, count in enumerate(repairs)]
            responsibilities = _repair(responsibilities, user_ll / choices.choices_by_user, empty)
        previous = responsibilities
        log_prior = mixing_weights(responsibilities)
        weight = choices.maximise(responsibilities, weight, l2)
    if before_repair is not None and before_repair.objective > fit.objective:
        return before_repair
    return fit


def round_record(
    round_index: int, previous: Tensor | None, responsibilities: Tensor, user_ll: Tensor, num_choices: float
) -> dict[str, Any]:
    """One record of a history: likelihood a choice, and how many users changed group."""
    found = responsibilities.argmax(-1)
    return {
        "round": round_index,
        "em/log_likelihood": user_ll.double().sum().item() / num_choices,
        "em/responsibility_entropy": torch.special.entr(responsibilities).sum(-1).mean().item(),
        "em/users_changed": len(found) if previous is None else int((previous.argmax(-1) != found).sum()),
        "em/repaired_groups": [],
    }


def converged(history: list[dict[str, Any]], tolerance: float | None, key: str = "em/log_likelihood") -> bool:
    """Whether no user changed group in the last round and ``key`` rose by less than ``tolerance``."""
    if tolerance is None or len(history) < 2:
        return False
    last, before = history[-1], history[-2]
    if last["em/users_changed"] or before["em/repaired_groups"]:
        return False
    return last[key] - before[key] < tolerance


def _empty_groups(responsibilities: Tensor) -> list[int]:
    """Groups that hold less than half a user."""
    mass = responsibilities.sum(0)
    return (mass < 0.5).nonzero().flatten().tolist() if len(mass) > 1 else []


def _repair(responsibilities: Tensor, log_likelihood: Tensor, empty: list[int]) -> Tensor:
    """Give empty groups one in K of the users: those whose choices [U], on average, fit worst."""
    repaired = responsibilities.clone()
    num_users, num_groups = repaired.shape
    worst = log_likelihood.nan_to_num(nan=0.0).argsort()[: max(1, num_users // num_groups)]
    for index, k in enumerate(empty):
        mine = worst[index :: len(empty)]
        repaired[mine] = nn.functional.one_hot(torch.tensor(k), num_groups).to(repaired.dtype)
    return repaired
