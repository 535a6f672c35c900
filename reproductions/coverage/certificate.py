"""How often a certificate of the max-min gap is false, in worlds small enough to know the gap.

    python reproductions/coverage/certificate.py

Every world has prompts, responses of known probability under reference and policy, and rewards of two groups,
so that the gap is exact; certificates see samples. Ordinary worlds: policies between the reference and the
optimum, and beyond. Bad prompts: a policy that is the optimum but for a share of the prompts, where it says
the response that is worth least. Rare modes: each prompt has a response of small reference mass that is worth
8 beta more than the best other one, and the policy never says it. Writes certificate.csv
and certificate.md beside this file.
"""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.welfare import certify, solve_dual

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

POPULATION, RESPONSES = 100, 48  # prompts that there are, responses to each
SAYS_WORST = 0.98


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class World:
    """Prompts with responses of known probabilities and rewards, and policies on two kinds of them.

    Args:
        seed: of the world.
        beta: weight of the KL penalty.
        deviation: of the rewards.
        strength: the policy tilts this much of the way to the optimum.
    """

    def __init__(self, seed: int, beta: float, deviation: float = 0.5, strength: float = 1.0):
        rng = np.random.default_rng([seed, 1])
        self.beta = beta
        self.reference = log_softmax(rng.normal(size=(POPULATION, RESPONSES)))
        self.rewards = deviation * rng.normal(size=(POPULATION, RESPONSES, 2))
        self.solve(strength)

    def solve(self, strength: float) -> None:
        """Find the optimum, and the policy from it."""
        self.optimum = solve_dual(torch.from_numpy(self.rewards), self.beta, torch.from_numpy(self.reference))
        self.scores = self.rewards @ self.optimum.weights.numpy()
        self.policy = log_softmax(self.reference + strength * self.scores / self.beta)
        self.bad, self.share = self.policy, 0.0

    def says_the_worst(self, share: float) -> None:
        """On a share of the prompts the policy says the least worth response nearly always."""
        worst = np.arange(RESPONSES) == self.scores.argmin(1)[:, None]
        mixed = np.logaddexp(
            np.where(worst, np.log(SAYS_WORST), -np.inf), np.log(1 - SAYS_WORST) + self.reference
        )
        self.bad, self.share = mixed, share

    def drops_a_mode(self, mass: float, worth: float) -> None:
        """Give every prompt a response of this mass, worth so much more, that the policy never says."""
        policy = self.policy
        top = self.rewards.max(1, keepdims=True) + worth
        self.rewards = np.concatenate([self.rewards, top], 1)
        rest = self.reference + np.log1p(-mass)
        self.reference = np.concatenate([rest, np.full((POPULATION, 1), np.log(mass))], 1)
        self.solve(1.0)
        self.policy = np.concatenate([policy, np.full((POPULATION, 1), -80.0)], 1)
        self.bad, self.share = self.policy, 0.0

    def gap(self) -> float:
        """The exact gap of the policy."""
        utilities = 0.0
        for share, policy in ((1 - self.share, self.policy), (self.share, self.bad)):
            terms = self.rewards - self.beta * (policy - self.reference)[..., None]
            utilities = utilities + share * (np.exp(policy)[..., None] * terms).sum(1).mean(0)
        return max(self.optimum.value - float(np.min(utilities)), 0.0)

    def sample(self, prompts: int, responses: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """The first three arguments of certify."""
        chosen = rng.integers(POPULATION, size=prompts)
        policy = np.where(rng.random(prompts)[:, None] < self.share, self.bad[chosen], self.policy[chosen])
        reference, rewards = self.reference[chosen], self.rewards[chosen]
        half = responses // 2
        drawn = np.concatenate([draw(policy, half, rng), draw(reference, half, rng)], 1)
        log_policy, log_reference = (np.take_along_axis(p, drawn, 1) for p in (policy, reference))
        group_rewards = np.take_along_axis(rewards, drawn[..., None], 1)
        log_weights = log_reference - np.logaddexp(log_policy, log_reference) + np.log(2 / responses)
        terms = group_rewards - self.beta * (log_policy - log_reference)[..., None]
        return tuple(map(torch.from_numpy, (group_rewards, log_weights, terms[:, :half].mean(1))))


def draw(log_probs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` responses for every row of log-probabilities."""
    ends = np.exp(log_probs).cumsum(1)
    rows = np.arange(len(ends))[:, None]
    places = (ends / ends[:, -1:] + rows).ravel().searchsorted(rng.random((len(ends), count)) + rows)
    return np.minimum(places - rows * ends.shape[1], ends.shape[1] - 1)


def plan() -> list[dict[str, Any]]:
    """The cells: what is simulated, and how."""
    cells = [
        {"kind": "ordinary", "prompts": x, "responses": n, "beta": beta, "strength": strength}
        for x, n, beta, strength in product((16, 64), (64, 256), (0.05, 0.3, 0.5, 2.0), (0.0, 0.5, 1.0, 2.0))
    ]
    cells += [
        {"kind": "rare mode", "prompts": 16, "responses": 128, "beta": beta, "mass": mass, "bound": bound}
        for mass, beta, bound in product((0.001, 0.0003), (0.05, 1.0), (False, True))
    ]
    cells += [
        {"kind": "bad prompts", "prompts": x, "responses": n, "beta": beta, "share": share}
        for x, n, beta, share in product((16, 64, 256), (64, 512), (0.05, 0.5, 2.0), (0.01, 0.05, 0.2))
    ]
    return cells


def simulate(cell: dict[str, Any], replicates: int, words: dict[str, Any]) -> dict[str, Any]:
    """Certify ``replicates`` times in worlds of a cell; ``words`` are further arguments of certify."""
    outcomes = []
    for replicate in range(replicates):
        if replicate % max(replicates // 50, 1) == 0:
            world = World(replicate, cell["beta"], strength=cell.get("strength", 1.0))
            if "share" in cell:
                world.says_the_worst(cell["share"])
            if "mass" in cell:
                world.drops_a_mode(cell["mass"], 8 * cell["beta"])
            gap = world.gap()
        rng = np.random.default_rng([replicate, cell["prompts"], cell["responses"]])
        bound = {"reward_bound": float(np.abs(world.rewards).max())} if cell.get("bound") else {}
        found = certify(
            *world.sample(cell["prompts"], cell["responses"], rng), cell["beta"], **bound, **words
        )
        if found.value is None:
            outcomes.append([1, 0, 0, 0, np.nan, np.nan, gap])
        else:
            said = getattr(found, "statement", None) is not None
            outcomes.append(
                [0, found.high < gap - 1e-9, found.low > gap + 1e-9, said, found.low, found.high, gap]
            )
    null, false, above, said, low, high, gaps = np.array(outcomes, dtype=float).T
    width = high - low
    return {
        "replicates": replicates, "null": int(null.sum()), "false": int(false.sum()),
        "low_above": int(above.sum()), "stated": int(said.sum()), "gap": f"{gaps.mean():.4f}",
        "width": f"{np.nanmedian(width):.4f}" if null.sum() < replicates else "",
    }  # fmt: skip


FIELDS = (
    "kind", "prompts", "responses", "beta", "strength", "share", "mass", "bound",
    "replicates", "null", "false", "low_above", "stated", "gap", "width",
)  # fmt: skip


def rows(cells: list[dict[str, Any]], replicates: int, **words: Any) -> Iterator[dict[str, Any]]:
    """Simulate every cell; ordinary worlds are 25 a cell of 64, 1,600 in all."""
    with progress_bar("certifying", len(cells)) as advance:
        for cell in cells:
            count = max(replicates // 20, 1) if cell["kind"] == "ordinary" else replicates
            found = dict.fromkeys(FIELDS, "") | cell | simulate(cell, count, words)
            yield found
            advance(note=cell["kind"])


def table(found: list[dict[str, Any]]) -> str:
    """What came out, as Markdown: totals of ordinary worlds, rare modes, the worst cells of bad prompts."""
    kinds: dict[str, list[dict[str, Any]]] = {"ordinary": [], "rare mode": [], "bad prompts": []}
    for row in found:
        kinds[row["kind"]].append(row)
    lines = [
        "# How often a certificate is false",
        "",
        "Written by `certificate.py`, which says what the worlds are; every cell: `certificate.csv`.",
        "",
    ]
    if kinds["ordinary"]:
        runs, null, false, above = (
            sum(int(row[key]) for row in kinds["ordinary"])
            for key in ("replicates", "null", "false", "low_above")
        )
        lines += [
            f"Ordinary worlds: {runs} certificates, {null} null ({null / runs:.1%}). Of the {runs - null} "
            f"numbers {false} have the gap above the upper end, {above} below the lower one: coverage "
            f"{1 - (false + above) / max(runs - null, 1):.3f}.",
            "",
        ]
    if kinds["rare mode"]:
        lines += [
            "A response that the policy dropped, worth 8 beta more than the best other one; 16 prompts, 128 "
            "responses:",
            "",
            "| beta | reference mass | `reward_bound` | null | numbers | with a statement | false |",
            "|---:|---:|---|---:|---:|---:|---:|",
        ]
        for row in kinds["rare mode"]:
            bound = "given" if str(row["bound"]) == "True" else ""
            numbers = int(row["replicates"]) - int(row["null"])
            cells = row["beta"], row["mass"], bound, row["null"], numbers, row["stated"], row["false"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    if kinds["bad prompts"]:
        lines += [
            "A policy that says the worst response on 1, 5 or 20% of the prompts, at beta .05, .5 and 2; "
            "over these nine cells:",
            "",
            "| prompts | responses | certificates | null | most false in a cell | false in all |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        sizes: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in kinds["bad prompts"]:
            sizes.setdefault((int(row["prompts"]), int(row["responses"])), []).append(row)
        for size, mine in sizes.items():
            columns = "replicates", "null", "false"
            runs, null, wrong = ([int(row[key]) for row in mine] for key in columns)
            cells = *size, sum(runs), sum(null), max(wrong), sum(wrong)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Simulate every cell and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--kinds", nargs="*", default=["ordinary", "rare mode", "bad prompts"])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in plan() if cell["kind"] in given.kinds]
    found = []
    for row in rows(cells, given.replicates):  # a run that is cut short keeps what it has
        found.append(row)
        write_csv(given.output_dir / "certificate.csv", found)
    (given.output_dir / "certificate.md").write_text(table(found))


if __name__ == "__main__":
    run_main("certificate", main)
