"""How often a nominal 95% interval holds the true minimum of 2 to 16 groups, over simulated studies.

    python reproductions/coverage/worst.py

The worst group's rate is .6. The others are equal to it, .05 or .1 above, or spread evenly up to .2 above.
Users: 30, 100, or 30 and 100 by turns in a group of their own, logits scattered by 1, 20 answers each.
Seeds: 3 and 6 answer the same 200 prompts (as in run.py), and groups share nothing or .8 of the variance of
the effects of seeds and prompts. Beside the interval of worst_of stand [smallest low, smallest high], the
same with highs at 1 / groups of the level (Bonferroni), and the bias of the point estimate as notes tell it.
Writes worst.csv beside this file.
"""

import sys
import warnings
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import expit
from simulated import WORSE, centre

from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.stats.clustered import interval_over_seeds, interval_over_users
from torchrl_maxmin.stats.interval import CoverageWarning, Interval, ends_of_worst, stack_intervals
from torchrl_maxmin.stats.worst import bias_of_smallest

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

GROUPS = (2, 4, 8, 16)
LAYOUTS = ("equal", "one worse by .05", "one worse by .1", "spread over .2")
PROMPTS, ANSWERS = 200, 4


def rates(groups: int, layout: str) -> np.ndarray:
    """True rates of the groups [G], the worst one first."""
    above = np.linspace(0, 0.2, groups) if layout.startswith("spread") else np.zeros(groups)
    if layout.startswith("one"):
        above[1:] = float(layout.split()[-1])
    return WORSE + above


def users_study(rng: np.random.Generator, users: list[int], layout: str, studies: int) -> Interval:
    """Intervals [studies, G] of groups with so many users of their own."""
    found = []
    for count, rate in zip(users, rates(len(users), layout), strict=True):
        chances = expit(centre(rate, 1.0) + rng.normal(size=(count, studies)))
        found.append(interval_over_users(rng.binomial(20, chances) / 20, num_resamples=0))
    return stack_intervals(found)


def seeds_study(
    rng: np.random.Generator, seeds: int, groups: int, shared: float, layout: str, studies: int
) -> Interval:
    """Intervals [studies, G] of groups whose effects of seeds and of prompts have ``shared`` in common."""
    means = np.array([centre(rate, np.sqrt(0.3**2 + 1.25)) for rate in rates(groups, layout)])

    def effects(*shape: int) -> np.ndarray:
        own, common = rng.normal(size=(*shape, studies, groups)), rng.normal(size=(*shape, studies, 1))
        return np.sqrt(1 - shared) * own + np.sqrt(shared) * common

    base = means + effects(PROMPTS)
    won = np.empty((seeds, PROMPTS, studies, groups))
    for seed in range(seeds):
        logits = base + 0.3 * effects() + 0.5 * rng.normal(size=base.shape)
        won[seed] = rng.binomial(ANSWERS, expit(logits)) / ANSWERS
    return interval_over_seeds(won, num_resamples=0)


def cell(found: Interval, level: float = 0.05) -> dict[str, float]:
    """Coverage of the true minimum by every interval, and the bias, over studies."""
    assert found.ends_at is not None
    assert found.standard_error is not None
    groups = found.estimate.shape[-1]
    low, high = ends_of_worst(found)
    plain, split = found.high.min(-1), found.ends_at(1 - level / groups)[1].min(-1)
    shared = np.broadcast_to(found.correlation, found.estimate.shape[:-1])
    parts = zip(found.estimate, found.standard_error, shared, strict=True)
    biases = [bias_of_smallest(means, errors, float(both)) for means, errors, both in parts]
    about, most = np.mean(biases, axis=0)
    return {
        "coverage": float(np.mean((low <= WORSE) & (high >= WORSE))),
        "low_above": float(np.mean(low > WORSE)),
        "high_below": float(np.mean(high < WORSE)),
        "width": float(np.median(high - low)),
        "smallest_ends": float(np.mean((found.low.min(-1) <= WORSE) & (plain >= WORSE))),
        "bonferroni": float(np.mean((found.low.min(-1) <= WORSE) & (split >= WORSE))),
        "bonferroni_width": float(np.median(split - found.low.min(-1))),
        "bias": float(found.estimate.min(-1).mean() - WORSE),
        "bias_estimated": -float(about),
        "bias_bound": -float(most),
    }


def main() -> None:
    """Simulate every cell, write worst.csv and print the range by kind and number of groups."""
    parser = make_parser(__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    warnings.simplefilter("ignore", CoverageWarning)
    users = [("users", count, 0.0) for count in ("30", "100", "30 and 100")]
    plan = list(product(GROUPS, users + [("seeds", n, s) for n in (3, 6) for s in (0.0, 0.8)], LAYOUTS))
    rows: list[dict[str, object]] = []
    with progress_bar("worst of several groups", len(plan)) as advance:
        for index, (groups, (kind, count, shared), layout) in enumerate(plan):
            rng = np.random.default_rng([index, given.studies])
            if kind == "users":
                sizes = [int(part) for part in str(count).split(" and ")]
                found = users_study(rng, (sizes * groups)[:groups], layout, given.studies)
                numbers = cell(found)
            else:
                # In parts, so that memory holds a part of the 16 groups' answers.
                size = max(given.studies // 4, 1)
                parts = [seeds_study(rng, int(count), groups, shared, layout, size) for _ in range(4)]
                each = [cell(part) for part in parts]
                numbers = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
            rows.append(
                {"groups": groups, "kind": kind, "count": count, "shared": shared, "layout": layout} | numbers
            )
            advance(note=f"{groups} groups")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv(given.output_dir / "worst.csv", rows, ".4g")
    for kind, groups in product(("users", "seeds"), GROUPS):
        mine = [row for row in rows if (row["kind"], row["groups"]) == (kind, groups)]
        ranges = (
            f"{name} {min(values):.3f} to {max(values):.3f}"
            for name in ("coverage", "smallest_ends", "bonferroni")
            for values in [[row[name] for row in mine]]
        )
        console.print(f"{kind}, {groups:>2} groups: {'; '.join(ranges)}")
    console.print(given.output_dir / "worst.csv")


if __name__ == "__main__":
    run_main("worst", main)
