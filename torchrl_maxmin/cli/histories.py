"""The training curves of a demo, read back from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.run import read_metrics

__all__ = ["training_histories"]


def training_histories(folder: Path, summary: Mapping[str, Any]) -> dict[str, list[list[dict[str, float]]]]:
    """Read metrics by policy, then seed, then iteration; empty for a folder that no demo wrote.

    Rewards are the true utilities, less the reference's: every policy logs them beside its own
    rewards, which live on another scale for each.

    Args:
        folder: what the demo wrote.
        summary: its ``summary.json``.
    """
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for entry in summary["policies"]["sft"]["per_seed"]:
        reference = list(entry["utility"].values())
        for kind in summary["policies"]:
            home = folder / f"seed-{entry['seed']}" / kind
            if (home / "metrics.jsonl").is_file():
                rows = [_true_utilities(row, reference) for row in read_metrics(home)]
                histories.setdefault(kind, []).append(rows)
    return histories


def _true_utilities(row: Mapping[str, float], reference: Sequence[float]) -> dict[str, float]:
    own = {name: value for name, value in row.items() if not name.startswith("rewards/")}
    truth = {f"rewards/{k}/mean": row[f"monitor/{k}/mean"] - mean for k, mean in enumerate(reference)}
    return own | truth
