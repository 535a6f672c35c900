"""What offsets by prompt, which preferences cannot see, do to the group that a batch of prompts calls worst.

    python reproductions/coverage/offsets.py

Two groups' rewards scatter by 1 within a prompt, and the policy gives the first group .3 less than the
second. Either both heads or one have normal offsets by prompt. A calibration is fitted on two reference
samples of 512 prompts, as ppo does; every batch is one response to each of 192 out of 1,024 prompts, with
eight reference samples of each where the calibration asks for them. Beside it stands the shift that all
prompts share.
Writes offsets.csv beside this file.
"""

import sys
from itertools import product
from pathlib import Path

import torch

from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.rewards import Calibration

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

OFFSETS = (0.0, 0.25, 0.5, 0.7, 1.0, 2.0, 3.0, 5.0, 10.0)
METHODS = ("sft_std", "sft_mean", "win_rate")
PROMPTS, FITTED, BATCH = 1024, 512, 192
GAP = 0.3


def cell(method: str, heads: int, deviation: float, calibrations: int, batches: int) -> dict[str, object]:
    """Errors and variances of calibrations x batches means; every cell has the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    spread = deviation * torch.tensor([1.0, float(heads == 2)])
    lead = torch.tensor([0.0, GAP])
    found, pooled, by_prompt = [], [], 0
    for _ in range(calibrations):
        offsets = spread * torch.randn(PROMPTS, 1, 2, generator=generator)
        fitted = torch.randn(FITTED, 2, 2, generator=generator) + offsets[:FITTED]
        samples = torch.randn(PROMPTS, 8, 2, generator=generator) + offsets
        calibration = Calibration.fit(fitted, method)
        by_prompt += calibration.by_prompt
        for _ in range(batches):
            batch = torch.randperm(PROMPTS, generator=generator)[:BATCH]
            raw = torch.randn(BATCH, 2, generator=generator) + lead + offsets[batch, 0]
            pooled.append(calibration.apply(raw).mean(0))
            own = samples[batch] if calibration.by_prompt else None
            found.append(calibration.apply(raw, own).mean(0))
    row: dict[str, object] = {
        "method": method,
        "heads_with_offsets": heads,
        "offset_deviation": deviation,
        "batches": len(found),
        "by_prompt": by_prompt / calibrations,
    }
    for name, means in (("", torch.stack(found)), ("shared_shift_", torch.stack(pooled))):
        row[f"{name}wrong_worst_group"] = float(means.argmin(-1).double().mean())
        row[f"{name}variance"] = float(means.var(0).mean())
    return row


def main() -> None:
    """Run all cells and print the worst ones."""
    parser = make_parser(__doc__)
    parser.add_argument("--calibrations", type=int, default=250)
    parser.add_argument("--batches", type=int, default=20, help="of each calibration")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = list(product(METHODS, (1, 2), OFFSETS))
    rows = []
    with progress_bar("batches with offsets by prompt", len(cells)) as advance:
        for each in cells:
            rows.append(cell(*each, given.calibrations, given.batches))
            advance()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    path = given.output_dir / "offsets.csv"
    write_csv(path, rows, ".6g")
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        worst = max(row["wrong_worst_group"] for row in mine)
        before = max(row["shared_shift_wrong_worst_group"] for row in mine)
        ratio = mine[0]["variance"] / mine[0]["shared_shift_variance"]
        console.print(
            f"{method:<9} wrong worst group in at most {worst:.2%} of batches, {before:.2%} with one shift "
            f"for all prompts; variance without offsets {ratio:.3f} of that"
        )
    console.print(path)


if __name__ == "__main__":
    run_main("offsets", main)
