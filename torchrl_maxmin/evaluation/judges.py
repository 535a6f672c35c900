"""Judges: who says which of two responses is better.

A judge is any callable ``f(prompts, a, b) -> probability that a is the better one``, one number in [0, 1]
a comparison, one half for a tie. One judge stands for one group: a ground truth, a reward head, a model
behind an OpenAI-compatible endpoint (hosted, or a local server such as vLLM's), or whatever the user wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from torchrl_maxmin.core.distributed import each_row_once
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.text_escape import terminal
from torchrl_maxmin.evaluation.endpoint_judge import EndpointJudge
from torchrl_maxmin.preferences.chat import Text

__all__ = ["EndpointJudge", "Judge", "Judgements", "judge_pairs", "reward_judge", "truth_judge"]

#: ``f(prompts, a, b)``: the probability that a is better, one a comparison; strings, or lists of messages.
Judge = Callable[[Sequence[Text], Sequence[Text], Sequence[Text]], ArrayLike]

Score = Callable[[Sequence[Text], Sequence[Text]], Any]


def truth_judge(utility: Score) -> Judge:
    """Make a judge that knows the group's utility: 1, 0, or one half for equal utilities.

    Args:
        utility: ``f(prompts, completions)``, one number a completion.

    Example:
        >>> brevity = truth_judge(lambda prompts, completions: [-len(text) for text in completions])
        >>> brevity(["p", "p"], ["short", "same"], ["much longer", "equl"]).tolist()
        [1.0, 0.5]
    """
    return lambda prompts, a, b: np.sign(_margin(utility, prompts, a, b)) / 2 + 0.5


def reward_judge(score: Score, group: int | None = None) -> Judge:
    """Make a judge of a reward head: sigmoid(r(a) - r(b)), the Bradley-Terry probability.

    Args:
        score: ``f(prompts, completions)``, such as ``RewardMixture.score``; [N] or [N, K].
        group: Column of [N, K].

    Example:
        >>> judge = reward_judge(lambda prompts, completions: [[len(text), 0] for text in completions], 0)
        >>> judge(["p"], ["ab"], ["ab"]).tolist()
        [0.5]
    """

    def column(prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
        rewards = np.asarray(score(prompts, completions), dtype=np.float64)
        if rewards.ndim == 2 and group is None and rewards.shape[1] > 1:
            raise UserError(f"the rewards have {rewards.shape[1]} columns; say which by group=")
        return rewards[:, group or 0] if rewards.ndim == 2 else rewards

    return lambda prompts, a, b: expit(_margin(column, prompts, a, b))


@dataclass(frozen=True, eq=False)
class Judgements:
    """Judgements of two policies' responses.

    Attributes:
        group_names: The G groups, one judge each.
        wins: Probability that the first policy's response is the better one, both orders averaged, over
            all pairs of responses of a prompt [N, G].
        first_place: How much oftener, over both orders, what was shown first won [G]: 0 for a judge
            without position bias, 1 for one that always takes the first; NaN where one order was asked.
    """

    group_names: tuple[str, ...]
    wins: np.ndarray
    first_place: np.ndarray


def judge_pairs(
    judges: Mapping[str, Judge],
    prompts: Sequence[Text],
    responses: Sequence[Sequence[Text]],
    others: Sequence[Sequence[Text]],
    *,
    both_orders: bool = True,
) -> Judgements:
    """Ask every group's judge for every pair of two policies' responses to the same prompt.

    Args:
        judges: Group name -> judge. Groups of one population may share a judge only by sharing a taste.
        prompts: N prompts.
        responses: The policy's M responses to each prompt, ``[N][M]``.
        others: The other policy's responses, ``[N][M']``.
        both_orders: Ask (a, b) and (b, a) and average: language models favour a place. Costs twice.

    Returns:
        :class:`Judgements`; ``wins`` goes to :func:`~torchrl_maxmin.stats.rates.rates_by_group`.

    Raises:
        UserError: If lengths disagree, a prompt has no response, or a judge gives no probability for
            every comparison.

    Example:
        >>> judges = {"brief": truth_judge(lambda prompts, texts: [-len(text) for text in texts])}
        >>> judge_pairs(judges, ["p"], [["a", "abc"]], [["ab"]]).wins
        array([[0.5]])
    """
    if not judges:
        raise UserError("no judge; give one a group, such as {'group 0': judge}")
    counts = (len(prompts), len(responses), len(others))
    if len(set(counts)) != 1 or not prompts:
        raise UserError(f"{counts[0]} prompts, {counts[1]} and {counts[2]} lists of responses; give one each")
    if any(len(texts) == 0 for texts in (*responses, *others)):
        raise UserError("a prompt has no responses; leave it out of both policies")
    asked = [(n, *sides) for n in range(len(prompts)) for sides in product(responses[n], others[n])]
    rows, first, second = (list(column) for column in zip(*asked, strict=True))
    repeated = [prompts[n] for n in rows]
    per_prompt = np.bincount(rows, minlength=len(prompts))
    wins, place = [], []
    for name, judge in judges.items():
        forward = _ask(name, judge, repeated, first, second)
        probability, bias = forward, np.nan
        if both_orders:
            backward = _ask(name, judge, repeated, second, first)
            probability = (forward + 1 - backward) / 2
            bias = float((forward + backward).mean() - 1)
        wins.append(np.bincount(rows, probability, len(prompts)) / per_prompt)
        place.append(bias)
    return Judgements(tuple(judges), np.stack(wins, axis=1), np.array(place))


def _ask(
    name: str, judge: Judge, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]
) -> np.ndarray:
    def answers(rows: slice) -> np.ndarray:
        return _answers(name, judge, prompts[rows], a[rows], b[rows])

    return np.concatenate(each_row_once(answers, len(prompts)))


def _answers(
    name: str, judge: Judge, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]
) -> np.ndarray:
    try:
        answer = np.asarray(judge(prompts, a, b), dtype=np.float64)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the judge of {name!r} fails on f(prompts, a, b) with {type(error).__name__}: "
            f"{terminal(error, 300)}"
        ) from error
    if answer.shape != (len(prompts),):
        raise UserError(
            f"the judge of {name!r} gives {list(answer.shape)} for {len(prompts)} comparisons; it must give "
            "one probability each"
        )
    if not np.isfinite(answer).all() or answer.min() < 0 or answer.max() > 1:
        raise UserError(
            f"the judge of {name!r} gives a number outside [0, 1]; it must give the probability that the "
            "first response is better, one half for a tie (reward_judge makes one of rewards)"
        )
    return answer


def _margin(score: Score, prompts: Sequence[Text], a: Sequence[Text], b: Sequence[Text]) -> np.ndarray:
    return np.asarray(score(prompts, a), dtype=np.float64) - np.asarray(score(prompts, b), dtype=np.float64)
