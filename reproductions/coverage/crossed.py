"""How often a nominal 95% interval holds the mean where users answer prompts that other users answer too.

    python reproductions/coverage/crossed.py

60 users answer 10, 30 or 100 prompts: all of them, 5 or 20 drawn for every user, or two each. Logits of users
and of prompts scatter by 1 or .5; where prompts are alike, by 0. Beside the interval over users and prompts
stands the one over users alone. Writes crossed.csv beside this file.
"""

import sys
import warnings
from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import expit
from simulated import centre, covered

from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.stats.clustered import interval_over_users
from torchrl_maxmin.stats.crossed import interval_over_users_and_prompts
from torchrl_maxmin.stats.interval import CoverageWarning

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

USERS = 60
PROMPTS = (10, 30, 100)
DESIGNS = ("all", "some", "two")
DEVIATIONS = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (1.0, 0.0))
MEANS = (0.5, 0.7)


def drawn(rng: np.random.Generator, prompts: int, design: str) -> tuple[np.ndarray, np.ndarray]:
    """Users and prompts of the answers, both [P]."""
    some = 5 if prompts < 20 else 20
    answers = {"all": prompts, "some": some, "two": 2}[design]
    shown = [rng.choice(prompts, answers, replace=False) for _ in range(USERS)]
    return np.repeat(np.arange(USERS), answers), np.concatenate(shown)


def cell(
    rng: np.random.Generator,
    prompts: int,
    design: str,
    scatter: tuple[float, float],
    mean: float,
    studies: int,
) -> dict[str, float]:
    """Coverage of the mean by both intervals."""
    users, ids = drawn(rng, prompts, design)
    logits = centre(mean, np.hypot(*scatter)) + scatter[0] * rng.normal(size=(USERS, studies))[users]
    logits += scatter[1] * rng.normal(size=(prompts, studies))[ids]
    won = (rng.random(logits.shape) < expit(logits)).astype(np.float64)
    both = interval_over_users_and_prompts(won, users, ids, num_resamples=0)
    answers = len(users) // USERS
    alone = interval_over_users(won.reshape(USERS, answers, studies).mean(axis=1), num_resamples=0)
    return {
        "coverage": covered(both.low, both.high, mean),
        "users_alone": covered(alone.low, alone.high, mean),
        "width": float(np.median(both.high - both.low)),
        "warned": float(any("prompts that users share are few" in note for note in both.notes)),
    }


def main() -> None:
    """Simulate every cell, write crossed.csv and print the range by number of prompts."""
    parser = make_parser(__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    warnings.simplefilter("ignore", CoverageWarning)
    plan = list(product(PROMPTS, DESIGNS, DEVIATIONS, MEANS))
    rows: list[dict[str, object]] = []
    with progress_bar("shared prompts", len(plan)) as advance:
        for index, (prompts, design, scatter, mean) in enumerate(plan):
            rng = np.random.default_rng([index, given.studies])
            row = {"users": USERS, "prompts": prompts, "answered": design, "mean": mean}
            row |= {"user_deviation": scatter[0], "prompt_deviation": scatter[1]}
            rows.append(row | cell(rng, prompts, design, scatter, mean, given.studies))
            advance()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv(given.output_dir / "crossed.csv", rows, ".4g")
    for prompts in PROMPTS:
        for name in ("coverage", "users_alone"):
            values = [row[name] for row in rows if row["prompts"] == prompts]
            console.print(f"{prompts} prompts: {name} {min(values):.3f} to {max(values):.3f}")
    console.print(given.output_dir / "crossed.csv")


if __name__ == "__main__":
    run_main("crossed", main)
