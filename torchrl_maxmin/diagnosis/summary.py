"""Findings of a diagnosis as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from torchrl_maxmin.clustering.linear import LinearMixture, PairChoices
from torchrl_maxmin.clustering.selection import NumGroupsChoice
from torchrl_maxmin.diagnosis.exact import ExactOutcome
from torchrl_maxmin.diagnosis.figures import Figures
from torchrl_maxmin.diagnosis.theorem import distinctness, lemma1_bound, theorem1_bound

__all__ = ["Evidence", "summarise_evidence"]


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Material of a summary.

    Attributes:
        choices: The pairs.
        mixture: The fit to all users.
        single: The one reward.
        choice: How K was chosen; None where it was given.
        fitted: Figures of the fit.
        found: The same less the bias of the fit.
        ends: Their intervals; None without.
        outcome: The policies on pairs, rewards calibrated.
        raw: The same with rewards in log odds, as Theorem 1 has them.
        constants: D and lambda_psi.
        accuracy: Of held-out pairs, by group.
        beta: KL weight.
    """

    choices: PairChoices
    mixture: LinearMixture
    single: LinearMixture
    choice: NumGroupsChoice | None
    fitted: Figures
    found: Figures
    ends: dict[str, tuple[np.ndarray, np.ndarray]] | None
    outcome: ExactOutcome
    raw: ExactOutcome
    constants: tuple[float, float]
    accuracy: list[dict[str, Any]]
    beta: float

    @property
    def num_groups(self) -> int:
        """K."""
        return len(self.mixture.log_prior)

    @property
    def one_reward_serves(self) -> bool | None:
        """Whether one group was chosen over more; None where nothing was there to choose from."""
        if self.num_groups > 1:
            return False
        compared = self.choice is not None and len(self.choice.heldout_log_likelihood) > 1
        return True if compared else None

    def entry(self, name: str, *index: int) -> dict[str, Any]:
        """Return a figure with its interval and the fit's own number."""
        low, high = (None, None) if self.ends is None else (float(end[index]) for end in self.ends[name])
        mean, fitted = float(self.found[name][index]), float(self.fitted[name][index])
        return {"mean": mean, "low": low, "high": high, "fitted": fitted}


def summarise_evidence(evidence: Evidence) -> dict[str, Any]:
    """Summarise groups, diversity, bounds and gaps as plain JSON."""
    mixture, found, ends = evidence.mixture, evidence.found, evidence.ends
    bound, eigenvalue = evidence.constants
    smallest = evidence.raw.smallest_probability
    constants = {
        "smallest_eigenvalue": eigenvalue,
        "lipschitz": 1 / smallest if smallest > 0 else np.inf,
        "feature_bound": bound,
    }
    given = found["epsilon"], found["share"]
    lemma = lemma1_bound(*given, bound)
    printed, squared = (
        theorem1_bound(*given, beta=evidence.beta, squared=square, **constants) for square in (False, True)
    )
    away = (mixture.weight.double() - evidence.single.weight.double()).norm(dim=1).numpy()
    reference = distinctness(found["diversity"]).reference
    users = np.bincount(mixture.assignments.numpy(), minlength=evidence.num_groups)
    groups = [
        {
            "name": f"group {k}",
            "share": evidence.entry("share", k),
            "users": int(users[k]),
            "epsilon": evidence.entry("epsilon", k),
            "epsilon_from": f"group {reference[k]}" if evidence.num_groups > 1 else None,
            "distance_to_mixture": evidence.entry("distance_to_mixture", k),
            "lemma1": {"bound": float(lemma[k]), "measured": float(away[k])},
            "theorem1": {
                "printed": float(printed[k]),
                "squared": float(squared[k]),
                "measured": float(evidence.raw.single_gap.gap[k]),
                "reason": _why_no_bound(found["epsilon"][k], eigenvalue, evidence.num_groups),
            },
            "accuracy": evidence.accuracy[k],
            "alignment_gap": {
                "single": evidence.entry("single_gap", k),
                "maxmin": evidence.entry("maxmin_gap", k),
            },
        }
        for k in range(evidence.num_groups)
    ]
    outcome, choice = evidence.outcome, evidence.choice
    return {
        "num_users": len(evidence.choices.user_offsets) - 1,
        "num_pairs": evidence.choices.num_choices,
        "num_features": evidence.choices.features.shape[1],
        "num_groups": evidence.num_groups,
        "one_reward_serves": evidence.one_reward_serves,
        "beta": evidence.beta,
        "diversity": {
            "mean": found["diversity"].tolist(),
            "low": None if ends is None else ends["diversity"][0].tolist(),
            "high": None if ends is None else ends["diversity"][1].tolist(),
            "fitted": evidence.fitted["diversity"].tolist(),
            "largest": float(found["diversity"].max()),
        },
        "groups": groups,
        "constants": constants,
        "maxmin": {
            "weights": outcome.weights.tolist(),
            "utilities": outcome.maxmin.tolist(),
            "single_utilities": outcome.single.tolist(),
            "dual_value": outcome.dual_value,
        },
        "intervals": "none" if ends is None else "grouped jackknife over users, at this number of groups",
        "choice": None if choice is None else _choice_figures(choice),
    }


def _why_no_bound(epsilon: float, eigenvalue: float, num_groups: int) -> str | None:
    if num_groups == 1:
        return "one group: there is nobody to differ from, and the bound is 0"
    if epsilon <= 0:
        return "epsilon is not positive: no group is farther from another than all others are"
    if eigenvalue == 0:
        return "the features are linearly dependent on these pairs (smallest eigenvalue 0): the bound is 0"
    return None


def _choice_figures(choice: NumGroupsChoice) -> dict[str, Any]:
    return {
        "heldout_log_likelihood": {str(k): v for k, v in choice.heldout_log_likelihood.items()},
        "standard_error": {str(k): v for k, v in choice.standard_error.items()},
        "report": choice.report(),
    }
