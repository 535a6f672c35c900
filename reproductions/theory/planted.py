"""Diversity and alignment gap as ``diagnose`` finds them, beside their exact values on the same pairs.

    python reproductions/theory/planted.py

300 users choose 20 times each between feature vectors of 64 dimensions, with orthogonal tastes of equal norm,
and agree with their own utility 92% of the time. K is chosen, the penalty too, both by left-out users. Writes
planted.csv and planted.md beside this file.
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit, logit
from torch import Tensor

from torchrl_maxmin.clustering.solvers import fit_bradley_terry
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.diagnosis import diagnose
from torchrl_maxmin.diagnosis.figures import calibrated_margins, pair_outcome
from torchrl_maxmin.diagnosis.theorem import diversity

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

WORLDS = {"80:20": (80, 20), "10:1": (10, 1), "one group": (1,)}
AGREEMENT = 0.92


@cache
def taste_norm() -> float:
    """The norm at which choices between normal features agree with the utility so often."""
    utility = np.abs(np.random.default_rng(0).normal(size=200_000))
    return brentq(lambda norm: expit(norm * utility).mean() - AGREEMENT, 0.1, 50)


def planted(
    shares: tuple[int, ...], seed: int, users: int = 300, pairs: int = 20, features: int = 64
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Differences [P, D], user offsets [U + 1], groups [U] and exact preference probabilities [P, K]."""
    rng = np.random.default_rng([seed, *shares])
    sizes = np.floor(np.array(shares) / sum(shares) * users + 0.5).astype(int)
    sizes[0] += users - sizes.sum()
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    tastes = np.linalg.qr(rng.normal(size=(features, features)))[0][: len(sizes)] * taste_norm()
    x = rng.normal(size=(users * pairs, features))
    own = (x * tastes[np.repeat(groups, pairs)]).sum(-1)
    x *= np.where(rng.random(len(x)) < expit(own), 1, -1)[:, None]
    return torch.from_numpy(x), torch.arange(users + 1) * pairs, groups, expit(x @ tastes.T)


def exact_gaps(x: Tensor, groups: np.ndarray, probabilities: np.ndarray, beta: float) -> np.ndarray:
    """What one reward costs each group [K], from true rewards and the Bradley-Terry fit to all choices.

    The single reward is what unlimited choices on these pairs give, by every group as often as it is large.
    """
    chosen = torch.from_numpy(probabilities @ (np.bincount(groups) / len(groups)))
    single = fit_bradley_terry(torch.cat([x, -x]), l2=1e-9, row_weights=torch.cat([chosen, 1 - chosen]))
    margins, alone = (calibrated_margins(m) for m in (logit(probabilities), (x @ single).numpy()[:, None]))
    return np.maximum(pair_outcome(margins, alone, beta).single_gap.gap, 0)  # 0 but for rounding


def compare(world: str, seed: int, **size: int) -> dict[str, Any]:
    """Diversity and the largest gap, found and exact, and what else the diagnosis says."""
    x, offsets, groups, probabilities = planted(WORLDS[world], seed, **size)
    found = diagnose(x, offsets, true_groups=groups.tolist(), seed=seed).summary
    between = found["diversity"]
    gaps = [group["alignment_gap"]["single"] for group in found["groups"]]
    gap = max(gaps, key=lambda point: point["mean"])
    return {
        "world": world,
        "seed": seed,
        "K": found["num_groups"],
        "diversity": between["largest"],
        "low": max(map(max, between["low"])) if between["low"] else None,
        "high": max(map(max, between["high"])) if between["low"] else None,
        "fitted": max(map(max, between["fitted"])),
        "exact": float(diversity(probabilities).max()),
        "gap": gap["mean"],
        "gap low": gap["low"],
        "gap high": gap["high"],
        "exact gap": float(exact_gaps(x, groups, probabilities, found["beta"]).max()),
        "adjusted Rand index": found["recovery"]["adjusted_rand_index"],
        "l2": found["l2"][str(found["num_groups"])],
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Every run as CSV, the table as Markdown."""
    write_csv(folder / "planted.csv", rows, ".6g")
    lines = [
        "| planted | K chosen right | figure | found, mean | exact, mean | difference, mean | largest | "
        "intervals that hold it |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    figures = {
        "diversity": ("diversity", "exact", "low", "high"),
        "the same, as fitted": ("fitted", "exact", None, None),
        "alignment gap of the worst group": ("gap", "exact gap", "gap low", "gap high"),
    }
    for world, shares in WORLDS.items():
        mine = [row for row in rows if row["world"] == world]
        if not mine:
            continue
        right = sum(row["K"] == len(shares) for row in mine)
        for name, (key, truth, low, high) in figures.items():
            found, exact = (np.array([row[column] for row in mine]) for column in (key, truth))
            off = found - exact
            held = "none given"
            if low and all(row[low] is not None for row in mine):
                held = f"{sum(row[low] <= row[truth] <= row[high] for row in mine)} of {len(mine)}"
            lines.append(
                f"| {world} | {right} of {len(mine)} | {name} | {found.mean():.4f} | {exact.mean():.4f} "
                f"| {round(off.mean(), 4) + 0.0:+.4f} | {np.abs(off).max():.4f} | {held} |"
            )
    text = "\n".join(
        [
            "# Diversity and alignment gap by `diagnose`, beside their exact values on the same pairs",
            "",
            "300 users, 20 pairs each, 64 features, orthogonal tastes; K and the penalty by left-out users. "
            "Written by `planted.py`; every run, with intervals: `planted.csv`.",
            "",
            *lines,
            "",
            "The penalty shrinks rewards, so that a fit's diversity comes out a little low; the figure that "
            "is reported has the bias taken off that fits to simulated choices show. Where one group is "
            "planted one is chosen, and diversity and gap are 0.",
            "",
        ]
    )
    (folder / "planted.md").write_text(text)
    return text


def main() -> None:
    """Run every world and seed, and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress_bar("planted worlds", len(WORLDS) * given.seeds) as advance:
        os.environ["TORCHRL_MAXMIN_QUIET"] = "1"  # the bars of each fit would draw over this one
        for world in WORLDS:
            for seed in range(given.seeds):
                rows.append(compare(world, seed))
                advance(note=world)
    print(write(given.output_dir, rows))  # noqa: T201


if __name__ == "__main__":
    run_main("theory", main)
