"""The table of results, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: experiment -> what it is called in the table
TITLES = {
    "fruit-tree-6": "fruit tree, depth 6: MaxMin",
    "fruit-tree-6-linear": "the same: ClipPPOLoss, LineariseRewards",
    "fruit-tree-5": "fruit tree, depth 5: MaxMin",
    "fruit-tree-5-linear": "the same: ClipPPOLoss, LineariseRewards",
    "fruit-tree-7": "fruit tree, depth 7: MaxMin (min of means)",
    "fruit-tree-7-mean-of-mins": "the same: mean of mins",
    "fishwood": "fishwood: MaxMin",
    "fishwood-linear": "the same: ClipPPOLoss, LineariseRewards",
    "gridworld": "gridworld: MaxMin",
    "gridworld-majority": "the same: the majority's reward alone",
    "gridworld-costs-10-1": "gridworld, moves cost: shares 10 : 1",
    "deliveries": "gridworld, moves cost, a goal pays once: MaxMin",
    "deliveries-10-1": "the same: shares 10 : 1",
    "fishwood-gym": "fishwood through MOGymEnv: MaxMin",
}

NOTE = """
Forty episodes of seed 0 of each policy. In the left pair a goal pays in every step that ends there, for 12
steps: the exact optimum mixes, 3 in 8 episodes staying at the first goal for ever while the others go on at
once (4.375 for each group). PPO finds the pure policy next to it, which serves both groups in every episode
(4 for each). In the right pair a goal pays at its first visit alone, and visiting both is the optimum.
"""


def write_results(
    folder: Path, rows: list[dict[str, Any]], processes: dict[str, Any], seconds: float | None
) -> Path:
    """Write ``results.md``.

    Args:
        folder: where.
        rows: one a run, as ``run.py`` makes them.
        processes: what the random processes came to.
        seconds: of all runs together, where all were made at once.
    """
    total = "not all at once" if seconds is None else f"{seconds / 60:.1f} minutes on two processes"
    path = folder / "results.md"
    path.write_text(
        "# MaxMin in reinforcement learning in general\n\n"
        f"Written by `run.py` (`make rl`); all runs together: {total}. Worst group: the least of the groups' "
        "mean returns, exact for the stochastic policy where the process is known (every row but the last), "
        "over seeds: lowest, mean, highest. Every run: `results.csv`.\n\n"
        + "\n".join(table(rows))
        + "\n\n"
        + through_gymnasium(rows)
        + two_objectives(rows)
        + random_processes(processes)
        + "\n![Walks of the policies](gridworld.png)\n"
        + NOTE
    )
    return path


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The table's lines."""
    lines = [
        "| experiment | seeds | steps | worst group | exact max-min | both goals | seconds | steps / s |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["experiment"] for row in rows):
        mine = [row for row in rows if row["experiment"] == name]
        exact = all(row["worst_group"] is not None for row in mine)
        worst = [row["worst_group" if exact else "sampled_worst_group"] for row in mine]
        both = [row["visits_both"] for row in mine if row["visits_both"] is not None]
        best = f"{mine[0]['max_min']:.4f}" if exact else ""
        visited = f"{min(both):.3f} to {max(both):.3f}" if both else ""
        lines.append(
            f"| {TITLES.get(name, name)} | {len(mine)} | {mine[0]['frames']:,} | {spread(worst)} "
            f"| {best} | {visited} "
            f"| {sum(row['seconds'] for row in mine) / len(mine):.0f} "
            f"| {sum(row['frames_per_second'] for row in mine) / len(mine):,.0f} |"
        )
    return lines


def spread(values: list[float]) -> str:
    """Lowest, mean and highest."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{min(values):.3f}, **{sum(values) / len(values):.3f}**, {max(values):.3f}"


def through_gymnasium(rows: list[dict[str, Any]]) -> str:
    """A sentence on the run whose environment is MO-Gymnasium's own, where it was made."""
    return "".join(
        f"Through `MOGymEnv` the worst group of the first rollout had {row['first_worst_group']:.2f}; after "
        f"{row['frames']:,} steps it has {row['sampled_worst_group']:.2f} over sampled episodes "
        f"(95% interval {row['sampled_interval']}).\n\n"
        for row in rows
        if row["experiment"] == "fishwood-gym"
    )


def two_objectives(rows: list[dict[str, Any]]) -> str:
    """A paragraph that tells the two objectives apart by their numbers, where both were trained."""
    told = []
    for name, title in (("fruit-tree-7", "min of means"), ("fruit-tree-7-mean-of-mins", "mean of mins")):
        mine = [row for row in rows if row["experiment"] == name]
        if not mine:
            return ""
        worst = sum(row["worst_group"] for row in mine) / len(mine)
        least = sum(row["sampled_mean_of_mins"] for row in mine) / len(mine)
        told.append(f"trained for the {title} it has {worst:.3f} and {least:.3f}")
    best = sum(row["worst_group"] > 2.5896 for row in mine)
    return (
        "Depth 7 tells the two objectives apart. Least mean return of a group, and mean over episodes of the "
        f"least return: {'; '.join(told)}. The best for the second is a single fruit, worth 2.5901 to "
        f"whoever gets least (reached on {best} of {len(mine)} seeds); the fruit that is best on average has "
        "2.4858.\n\n"
    )


def random_processes(found: dict[str, Any]) -> str:
    """A paragraph on the tabular processes."""
    sizes = "2 to 6 states, actions and groups, gamma .95"
    return (
        f"{found['count']} random tabular processes ({sizes}), {found['iterations']:,} iterations of "
        "`game.play_game`: relative duality gap of the averaged play at most 1% in "
        f"{found['within']} of them, largest {found['largest']:.1e}, smallest {found['smallest']:.1e}; "
        f"distance to the linear programme's value at most {found['farthest']:.1e}; that value and its "
        f"own policy's return agree to {found['programmes']:.0e}; {found['seconds']:.0f} seconds.\n"
    )
