"""How often a nominal 95% interval holds the truth, over simulated studies.

    python reproductions/coverage/run.py

Users: every user has a win rate of their own (logits scattered around the population's) and answers a few
times. Seeds: policies trained with other seeds answer the same prompts; logits of seeds, of prompts and of
the two together scatter. Beside the interval to read stand the cluster bootstrap and the two shortcuts that
papers take: percentiles over seeds, and the bootstrap that counts comparisons one by one. Writes
coverage.csv and results.md beside this file.
"""

import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit
from simulated import WORSE, centre, covered

from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.stats.clustered import ClusterBootstrap, interval_over_seeds, interval_over_users
from torchrl_maxmin.stats.interval import CoverageWarning, Interval, ends_of_worst, stack_intervals

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

MEANS = (0.2, 0.35, 0.5, 0.65, 0.8)
ANSWERS_A_PROMPT = 4


def users_study(
    rng: np.random.Generator, users: int, answers: int, mean: float, deviation: float, studies: int = 500
) -> np.ndarray:
    """User means [U, studies]."""
    logits = centre(mean, deviation) + deviation * rng.normal(size=(users, studies))
    return rng.binomial(answers, expit(logits)) / answers


def seeds_study(
    rng: np.random.Generator,
    seeds: int,
    mean: float,
    scatter: float = 0.3,
    prompts: int = 200,
    studies: int = 500,
) -> np.ndarray:
    """Win rates [S, N, studies]: prompts shared by the seeds, a few answers each."""
    mu = centre(mean, np.sqrt(scatter**2 + 1.25))
    logits = mu + scatter * rng.normal(size=(seeds, 1, studies)) + rng.normal(size=(1, prompts, studies))
    logits = logits + 0.5 * rng.normal(size=(seeds, prompts, studies))
    return rng.binomial(ANSWERS_A_PROMPT, expit(logits)) / ANSWERS_A_PROMPT


def naive(means: np.ndarray, comparisons: int) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap over comparisons, one by one: its resamples are binomial."""
    wins = np.clip(means, 0, 1)
    return tuple(stats.binom.ppf(tail, comparisons, wins) / comparisons for tail in (0.025, 0.975))


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the bootstrap over seeds alone."""
    by_seed = values.mean(axis=1)
    bootstrap = ClusterBootstrap(len(by_seed), 1)
    return tuple(np.quantile(bootstrap.seed_weights @ by_seed, [0.025, 0.975], axis=0))


def cells(studies: int) -> Iterator[dict[str, Any]]:
    """Every cell of the grid."""
    plan = [
        *(("users", n, {"answers": a, "deviation": d}, m)
          for n, a, d, m in product((30, 60, 100, 200), (4, 20), (0.0, 0.5, 1.0), MEANS)),
        *(("users, few or extreme", n, {"answers": a, "deviation": d}, m)
          for n, a, d, m in [(10, 20, 1.0, 0.2), (10, 20, 1.0, 0.5), (10, 20, 1.0, 0.8), (30, 1, 0.0, 0.92),
                             (30, 4, 1.0, 0.95), (30, 1, 0.0, 0.98)]),
        *(("seeds", n, {"scatter": s, "prompts": p}, m)
          for n, s, p, m in product((3, 6), (0.1, 0.3, 0.6), (60, 200), MEANS)),
        *((f"worst of two, {kind}", n, {"apart": apart}, WORSE)
          for (kind, n), apart in product((("users", 30), ("users", 100), ("seeds", 3), ("seeds", 6)),
                                          (0.0, 0.05, 0.1))),
    ]  # fmt: skip
    with progress_bar("simulating studies", len(plan)) as advance:
        for index, (kind, count, how, mean) in enumerate(plan):
            rng = np.random.default_rng([index, studies])
            row: dict[str, Any] = {"kind": kind, "count": count, "mean": mean}
            row |= {
                name: how.get(name, "") for name in ("answers", "deviation", "scatter", "prompts", "apart")
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CoverageWarning)
                yield row | measure(rng, kind, count, how, mean, studies)
            advance(note=kind)


def measure(
    rng: np.random.Generator, kind: str, count: int, how: dict[str, Any], mean: float, studies: int
) -> dict[str, Any]:
    """Coverage of one cell, by every interval that it has."""
    if kind.startswith("worst"):
        return worst_of_two(rng, kind, count, how["apart"], studies)
    if kind.startswith("users"):
        values = users_study(rng, count, how["answers"], mean, how["deviation"], studies)
        interval, comparisons, shortcut = interval_over_users(values), count * how["answers"], None
    else:
        values = seeds_study(rng, count, mean, how["scatter"], how["prompts"], studies)
        interval, comparisons = interval_over_seeds(values), count * how["prompts"] * ANSWERS_A_PROMPT
        shortcut = covered(*over_seeds(values), mean)
    return {
        "interval": covered(interval.low, interval.high, mean),
        "cluster bootstrap": covered(interval.bootstrap_low, interval.bootstrap_high, mean),
        "percentiles over seeds": shortcut,
        "bootstrap over comparisons": covered(*naive(interval.mean, comparisons), mean),
    }


def worst_of_two(
    rng: np.random.Generator, kind: str, count: int, apart: float, studies: int
) -> dict[str, Any]:
    """The interval of the worst of two groups, and a t interval over every seed's own minimum."""
    groups: list[Interval] = []
    minima = []
    for mean in (WORSE, WORSE + apart):
        if kind.endswith("users"):
            groups.append(interval_over_users(users_study(rng, count, 20, mean, 1.0, studies)))
        else:
            values = seeds_study(rng, count, mean, studies=studies)
            groups.append(interval_over_seeds(values))
            minima.append(values.mean(axis=1))
    both = stack_intervals(groups)
    own = None
    if minima:
        least = np.minimum(*minima)
        half = stats.t.ppf(0.975, count - 1) * least.std(axis=0, ddof=1) / np.sqrt(count)
        own = covered(least.mean(axis=0) - half, least.mean(axis=0) + half, WORSE)
    return {
        "interval": covered(*ends_of_worst(both), WORSE),
        "cluster bootstrap": covered(both.bootstrap_low.min(-1), both.bootstrap_high.min(-1), WORSE),
        "t over each seed's minimum": own,
        "bias of the point estimate": float(both.mean.min(-1).mean() - WORSE),
    }


FIELDS = (
    "kind", "count", "mean", "answers", "deviation", "scatter", "prompts", "apart", "interval",
    "cluster bootstrap", "percentiles over seeds", "bootstrap over comparisons", "t over each seed's minimum",
    "bias of the point estimate",
)  # fmt: skip
COLUMNS = FIELDS[8:]


def write(folder: Path, rows: list[dict[str, Any]], studies: int) -> str:
    """Every cell as CSV, ranges by kind and count as Markdown."""
    cells = [
        {
            key: f"{row[key]:.4f}" if key in COLUMNS and row.get(key) is not None else row.get(key)
            for key in FIELDS
        }
        for row in rows
    ]
    write_csv(folder / "coverage.csv", cells)
    lines = [
        "| what | cells | " + " | ".join(COLUMNS) + " |",
        "|---|---:" + "|---:" * len(COLUMNS) + "|",
    ]
    for kind, count in dict.fromkeys((row["kind"], row["count"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["count"]) == (kind, count)]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in mine if row.get(column) is not None]
            spec = "+.3f" if column.startswith("bias") else ".3f"
            cells.append(f"{min(values):{spec}} to {max(values):{spec}}" if values else "")
        lines.append(f"| {kind}, {count} | {len(mine)} | {' | '.join(cells)} |")
    main = [row for row in rows if row["kind"] != "users, few or extreme"]
    inside = sum(0.92 <= row["interval"] <= 0.98 for row in main)
    text = "\n".join(
        [
            "# How often a nominal 95% interval holds the truth",
            "",
            f"{studies} simulated studies a cell; smallest and largest share over the cells. Written by "
            "`run.py`; every cell: `coverage.csv`. Means .2 to .8; logits of users scattered by 0, .5 or 1, "
            "4 or 20 answers each; logits of seeds scattered by .1, .3 or .6, 60 or 200 prompts that all "
            "seeds share, scattered by 1, seed and prompt together by .5, 4 answers each. `interval` is the "
            "one to read: `interval_over_users`, `interval_over_seeds`, and of two groups that of `worst_of` "
            "(more groups: `worst.csv`).",
            "",
            *lines,
            "",
            f"The interval holds the truth in .92 to .98 of the studies in {inside} of {len(main)} cells "
            "with 30 users and more, 3 and 6 seeds, and for the worst of two groups. Few users and rates "
            "near 1, where it may not, come with a warning. The shortcuts do not cover: percentiles over a "
            "few seeds, comparisons counted one by one where users or prompts differ, and a t interval over "
            "every seed's own minimum, which is biased low.",
            "",
        ]
    )
    (folder / "results.md").write_text(text)
    return text


def main() -> None:
    """Simulate every cell and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    print(write(given.output_dir, list(cells(given.studies)), given.studies))  # noqa: T201


if __name__ == "__main__":
    run_main("coverage", main)
