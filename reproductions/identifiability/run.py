"""What linear mixtures say of planted groups: how many there are, and who can be told apart.

    python reproductions/identifiability/run.py

Users with orthogonal tastes of equal norm choose between feature vectors and agree with their own utility
92% of the time. For ten seeds: the K that is chosen at 20 pairs a user, and the expected and the true
misassignment at 5, 10 and 20. Writes results.csv and results.md beside this file.
"""

import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq, linear_sum_assignment
from scipy.special import expit
from torch import Tensor

from torchrl_maxmin.clustering import select_num_groups
from torchrl_maxmin.clustering.identifiability import identifiability_report
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.tables import write_csv

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

WORLDS = {"one group": (1,), "80:20": (80, 20), "10:1": (10, 1), "60:25:15": (60, 25, 15)}
PAIRS = (5, 10, 20)
AGREEMENT = 0.92
FIT = {"m_step": "exact", "convergence_tolerance": 1e-4, "num_rounds": 100, "num_restarts": 2}


@cache
def taste_norm() -> float:
    """The norm at which choices between normal features agree with the utility so often."""
    utility = np.abs(np.random.default_rng(0).normal(size=200_000))
    return brentq(lambda norm: expit(norm * utility).mean() - AGREEMENT, 0.1, 50)


def planted(
    shares: Sequence[int], pairs: int, seed: int, users: int = 300, features: int = 64
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Feature differences [P, D], user offsets [U + 1] and true groups [U]."""
    rng = np.random.default_rng(seed)
    sizes = np.floor(np.array(shares) / sum(shares) * users + 0.5).astype(int)
    sizes[0] += users - sizes.sum()
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    tastes = np.linalg.qr(rng.normal(size=(features, features)))[0][: len(sizes)] * taste_norm()
    x = rng.normal(size=(users * pairs, features))
    margins = (x * tastes[np.repeat(truth, pairs)]).sum(-1)
    x *= np.where(rng.random(len(x)) < expit(margins), 1, -1)[:, None]
    return torch.from_numpy(x), torch.arange(users + 1) * pairs, truth


def misassignment(found: Tensor, truth: np.ndarray) -> tuple[float, float]:
    """Share of users in a wrong group, plain and averaged over true groups, under the best matching."""
    num_groups = truth.max() + 1
    counts = np.zeros((num_groups, num_groups))
    np.add.at(counts, (truth, found.numpy()), 1)
    share = counts / counts.sum(1, keepdims=True)
    rows, columns = linear_sum_assignment(share, maximize=True)
    return 1 - counts[rows, columns].sum() / len(truth), 1 - share[rows, columns].mean()


def choose(world: str, seed: int, pairs: int = 20, **size: int) -> dict[str, float]:
    """The number of groups by every criterion."""
    shares = WORLDS[world]
    differences, offsets, _ = planted(shares, pairs, seed, **size)
    choice = select_num_groups(
        differences,
        offsets,
        max(3, len(shares) + 1),
        seed=seed,
        l2_candidates=(3e-4, 1e-3),
        diagnostics=True,
        num_refits=2,
        **FIT,
    )
    return {
        "K by left-out users": choice.num_groups,
        "K by left-out pairs": choice.num_groups_by_pairs,
        "K by BIC": choice.num_groups_by_bic,
        "stability at the true K": choice.stability[len(shares)],
    }


def identify(world: str, pairs: int, seed: int, **size: int) -> dict[str, float]:
    """What the report expects, and what is true of its fit."""
    shares = WORLDS[world]
    differences, offsets, truth = planted(shares, pairs, seed, **size)
    fit = FIT | ({"num_restarts": 6} if pairs < 10 else {})  # few pairs have many local optima
    report = identifiability_report(
        differences, offsets, len(shares), seed=seed, l2_candidates=(3e-4, 1e-3, 2e-3), **fit
    )
    plain, balanced = misassignment(report.mixture.assignments, truth)
    left_out, _ = misassignment(report.posterior.argmax(-1), truth)
    return {
        "expected misassignment": report.misassignment,
        "true misassignment": plain,
        "true misassignment, left out": left_out,
        "expected, balanced": report.balanced_misassignment,
        "true, balanced": balanced,
        "flagged": float(not report.identifiable),
        "more pairs asked for": float(
            "nan" if report.more_pairs_per_user is None else report.more_pairs_per_user
        ),
        "l2": report.l2,
    }


def choice_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: how often each criterion was right."""
    lines = [
        "| planted | left-out users | left-out pairs | BIC | stability at the true K, lowest |",
        "|---|---|---|---|---|",
    ]
    for world, shares in WORLDS.items():
        mine = [row for row in rows if row["world"] == world and "K by BIC" in row]
        if mine:
            right = [
                f"{sum(row[f'K by {by}'] == len(shares) for row in mine)} of {len(mine)}"
                for by in ("left-out users", "left-out pairs", "BIC")
            ]
            lowest = min(row["stability at the true K"] for row in mine)
            lines.append(f"| {world}, K={len(shares)} | {' | '.join(right)} | {lowest:.2f} |")
    return lines


def identifiability_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: misassignment as expected and as it is."""
    lines = [
        "| planted | pairs | expected, mean | true, mean | largest difference | true, left out, mean "
        "| largest difference | balanced: expected, mean | true, mean | true, highest | flagged "
        "| more pairs asked for, median |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for world in WORLDS:
        for pairs in PAIRS:
            mine = [
                row for row in rows if (row["world"], row["pairs"]) == (world, pairs) and "flagged" in row
            ]
            if not mine:
                continue
            column = {key: np.array([row[key] for row in mine]) for key in mine[0] if key != "world"}
            expected, true = column["expected misassignment"], column["true misassignment"]
            left_out = column["true misassignment, left out"]
            flagged = column["flagged"] > 0
            asked = np.median(column["more pairs asked for"][flagged]) if flagged.any() else 0
            lines.append(
                f"| {world} | {pairs} | {expected.mean():.1%} "
                f"| {true.mean():.1%} | {np.abs(expected - true).max():.1%} "
                f"| {left_out.mean():.1%} | {np.abs(expected - left_out).max():.1%} "
                f"| {column['expected, balanced'].mean():.1%} | {column['true, balanced'].mean():.1%} "
                f"| {column['true, balanced'].max():.1%} | {flagged.sum()} of {len(mine)} | {asked:g} |"
            )
    return lines


def write(folder: Path, rows: list[dict[str, Any]], seeds: int) -> str:
    """Every figure as a line of results.csv; the tables as results.md."""
    run = ("world", "pairs", "seed")
    figures = [
        {**{key: row[key] for key in run}, "quantity": name, "value": f"{row[name]:.6g}"}
        for row in rows
        for name in row
        if name not in run
    ]
    write_csv(folder / "results.csv", figures)
    text = "\n".join(
        [
            "# Planted groups: how many, and who is in which",
            "",
            "300 users, 64 features, orthogonal tastes of equal norm, choices that agree with the utility "
            f"{AGREEMENT:.0%} of the time, {seeds} seeds. Written by `run.py`; all figures: `results.csv`.",
            "",
            "## The number of groups is chosen right, 20 pairs a user",
            "",
            *choice_table(rows),
            "",
            "## Misassignment, expected from left-out users and true of the fit",
            "",
            *identifiability_table(rows),
            "",
            "Expected: by the posteriors of users left out of the fit. True: of the fit to all users, and "
            "of the left-out users themselves. Balanced: averaged over groups. Flagged: the balanced "
            "expectation is above 5% in more than one in ten resamples of the users.",
            "",
        ]
    )
    (folder / "results.md").write_text(text)
    return text


def main() -> None:
    """Run every world and seed, and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    torch.set_num_threads(1)
    groups = [world for world, shares in WORLDS.items() if len(shares) > 1]
    runs = [(choose, world, 20) for world in WORLDS]
    runs += [(identify, world, pairs) for world in groups for pairs in PAIRS]
    rows = []
    with progress_bar("planted worlds", len(runs) * given.seeds) as advance:
        os.environ["TORCHRL_MAXMIN_QUIET"] = "1"  # the bars of each fit would draw over this one
        for run, world, pairs in runs:
            for seed in range(given.seeds):
                figures = run(world, pairs=pairs, seed=seed)
                rows.append({"world": world, "pairs": pairs, "seed": seed} | figures)
                advance(note=f"{world}, {pairs} pairs")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    print(write(given.output_dir, rows, given.seeds))  # noqa: T201


if __name__ == "__main__":
    run_main("identifiability", main)
