"""Who judges at the evaluation stage: utilities of single responses, or comparisons of two."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.evaluation.endpoint import EndpointJudge
from torchrl_maxmin.evaluation.judges import Judge, judge_pairs
from torchrl_maxmin.preferences import World
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.rewards.ensemble import is_reward_model
from torchrl_maxmin.rewards.source import ask, count_columns, load_functions, require_finite_rewards

__all__ = ["PairJudges", "UtilityJudge", "load_judge"]


@dataclass(frozen=True)
class UtilityJudge:
    """Says what a response is worth to each group.

    Attributes:
        kind: ``world``, ``reward heads`` or ``function``.
        group_names: The G groups.
        group_shares: Population shares [G].
        score: ``f(prompts, completions)``, one number a response or one a group.
    """

    kind: str
    group_names: list[str]
    group_shares: list[float]
    score: Callable[..., Any]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Utilities [N, G]; raises :class:`UserError` where one is no number."""
        return _utilities(self.score, prompts, completions)


@dataclass(frozen=True)
class PairJudges:
    """Say which of two responses is the better one, a judge a group.

    Attributes:
        kind: ``endpoint`` or ``comparisons``.
        judges: Group name -> judge.
    """

    kind: str
    judges: dict[str, Judge] = field(repr=False)

    @property
    def group_names(self) -> list[str]:
        """The G groups."""
        return list(self.judges)

    @property
    def group_shares(self) -> list[float]:
        """Equal shares [G]: judges do not say how many people they stand for."""
        return [1 / len(self.judges)] * len(self.judges)

    def compare(
        self, prompts: Sequence[str], responses: Mapping[str, Sequence[Sequence[str]]]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Every policy against every other, in both orders.

        Args:
            prompts: N prompts.
            responses: Policy -> its responses to each prompt [N][M].

        Returns:
            Policy -> probability [N, P, G] that its response is better than each policy's, as
            :class:`~torchrl_maxmin.evaluation.results.SeedResult` takes it; and by group how much oftener
            the response shown first won.
        """
        names = list(responses)
        wins = {name: np.full((len(prompts), len(names), len(self.judges)), 0.5) for name in names}
        pairs = [(i, j) for j in range(len(names)) for i in range(j)]
        first_place = []
        with progress_bar("judging pairs of policies", len(pairs)) as advance:
            for i, j in pairs:
                one, other = names[i], names[j]
                told = judge_pairs(self.judges, prompts, responses[one], responses[other])
                wins[one][:, j], wins[other][:, i] = told.wins, 1 - told.wins
                first_place.append(told.first_place)
                advance(note=f"{one} and {other}")
        bias = np.mean(first_place, axis=0) if first_place else np.zeros(len(self.judges))
        return wins, dict(zip(self.judges, bias.tolist(), strict=True))


def load_judge(
    spec: str,
    prompts: Sequence[str],
    device: torch.device,
    model: str | None = None,
    criteria: Sequence[str] | None = None,
) -> UtilityJudge | PairJudges:
    """The judge that ``--judge`` names, asked once to see that it answers.

    Args:
        spec: A world's json, a reward folder, an endpoint's address, or ``module:name`` of a function
            ``f(prompts, completions)``, of one ``f(prompts, a, b)``, or of a dict group -> such a one.
        prompts: Those that it will be asked about; the first is asked about at once.
        device: Where reward heads compute.
        model: The endpoint's name of its model.
        criteria: What each group wants, ``name=words``; for an endpoint.

    Raises:
        UserError: For a judge that is not there or does not answer.
    """
    if spec.startswith(("http://", "https://")):
        judges = _endpoint_judges(spec, model, criteria)
        return _asked(PairJudges("endpoint", judges), prompts[0])
    if model is not None or criteria is not None:
        raise UserError("--judge_model and --judge_criteria belong to a --judge that is an http address")
    if is_reward_model(spec):
        mixture = load_reward_model(spec).to(device)
        names = [f"group {k}" for k in range(mixture.num_groups)]
        shares = mixture.log_prior.exp().cpu().tolist()
        return UtilityJudge("reward heads", names, shares, partial(mixture.score, calibrated=True))
    function: Any = load_functions([spec])[0]
    if isinstance(function, World):
        count_columns(function, "judge", prompts)
        return UtilityJudge("world", list(function.group_names), list(function.shares), function)
    if isinstance(function, Mapping):
        judges = {str(name): judge for name, judge in function.items()}
        return _asked(PairJudges("comparisons", judges), prompts[0])
    if _takes_pairs(function):
        return _asked(PairJudges("comparisons", {"group 0": function}), prompts[0])
    count = count_columns(function, "judge", prompts)
    names = [f"group {k}" for k in range(count)]
    return UtilityJudge("function", names, [1 / count] * count, function)


def _endpoint_judges(url: str, model: str | None, criteria: Sequence[str] | None) -> dict[str, Judge]:
    if model is None or not criteria:
        raise UserError(
            f"the judge at {url} needs --judge_model, and --judge_criteria with what each group wants, "
            'such as brief="short, plain answers"'
        )
    split = [text.partition("=") for text in criteria]
    odd = [text for text, (name, _, words) in zip(criteria, split, strict=True) if not name or not words]
    if odd:
        raise UserError(f"--judge_criteria takes name=words; {odd[0]!r} is not that")
    judges: dict[str, Judge] = {name: EndpointJudge(url, model, words) for name, _, words in split}
    if len(judges) < len(split):
        raise UserError("--judge_criteria names a group twice; give each a name of its own")
    return judges


def _takes_pairs(function: Any) -> bool:
    """Whether a callable takes prompts and two lists of responses."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 3


def _asked(judges: PairJudges, prompt: str) -> PairJudges:
    """The judges, once each has answered: before thousands of responses are sampled."""
    judge_pairs(judges.judges, [prompt], [["b"]], [["c"]], both_orders=False)
    return judges


def _utilities(
    function: Callable[..., Any], prompts: Sequence[str], completions: Sequence[str]
) -> np.ndarray:
    values = ask(function, prompts, completions, "judge")
    require_finite_rewards(values, "judge")
    return values
