"""Choose responses that a page shows side by side: some at random, some where groups disagree most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.comparison import MAXMIN
from torchrl_maxmin.evaluation.policies import BASELINE
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult

__all__ = ["NUM_SHOWN", "responses_to_show"]

#: Prompts that are shown of either kind.
NUM_SHOWN = 4
_MOST_CHARACTERS = 1200


def responses_to_show(
    result: SeedResult, prompts: Sequence[str], read: Callable[[str, Sequence[int]], Sequence[str]]
) -> dict[str, Any]:
    """Choose prompts, and of every policy one response to each, drawn at random.

    The disagreement of the groups on a prompt is the largest less the smallest change that a group sees
    from one policy's response to the other's: from single to maxmin where both are there.

    Args:
        result: What was measured.
        prompts: The held-out prompts [N], as text.
        read: Gives the responses of a policy at places of its samples [N * M], as text.

    Returns:
        ``scores``: ``utility`` of the response that is shown, or ``win rate`` of all the policy's responses
        to that prompt against the reference's, where judges compared pairs; ``random`` and
        ``disagreement``: lists of ``{prompt, prompt_index, responses}``, with ``{text, scores}`` of every
        policy and the scores of every group.
    """
    rng = np.random.default_rng([result.seed, 7])
    count = result.num_prompts
    samples = {policy: _samples(result, policy) for policy in result.policies}
    drawn = {policy: rng.integers(samples[policy], size=count) for policy in result.policies}
    scores = {policy: _scores(result, policy, drawn[policy]) for policy in result.policies}
    others = [policy for policy in result.policies if policy != REFERENCE]
    policy = MAXMIN if MAXMIN in others else others[-1] if others else REFERENCE
    baseline = BASELINE if BASELINE in others and policy != BASELINE else REFERENCE
    change = scores[policy] - scores[baseline]
    apart = change.max(-1) - change.min(-1)
    largest = np.argsort(-apart, kind="stable")[:NUM_SHOWN] if apart.any() else np.array([], int)
    chosen = np.sort(rng.choice(count, size=min(NUM_SHOWN, count), replace=False))

    def entries(places: np.ndarray) -> list[dict[str, Any]]:
        if not len(places):
            return []
        texts = {
            name: read(name, [int(n) * samples[name] + int(drawn[name][n]) for n in places])
            for name in result.policies
        }
        return [
            {"prompt": _short(prompts[n]), "prompt_index": int(n), "responses": {
                name: {"text": _short(texts[name][row]),
                       "scores": dict(zip(result.group_names, scores[name][n].tolist(), strict=True))}
                for name in result.policies
            }}
            for row, n in enumerate(places)
        ]  # fmt: skip

    kind = "win rate" if result.wins else "utility"
    return {"scores": kind, "random": entries(chosen), "disagreement": entries(largest)}


def _samples(result: SeedResult, policy: str) -> int:
    """Responses a prompt of a policy."""
    of: Mapping[str, np.ndarray] = result.length if result.wins else result.utilities
    return of[policy].shape[1]


def _scores(result: SeedResult, policy: str, drawn: np.ndarray) -> np.ndarray:
    """What each group says of the policy's response to each prompt [N, G]."""
    if result.wins:
        return result.win_matrix(policy, REFERENCE)
    return result.utilities[policy][np.arange(len(drawn)), drawn].astype(np.float64)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " ..."
