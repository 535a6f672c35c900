"""How often a policy passes both goals of the gridworld, and a picture of where it walks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_maxmin.evaluation.plots import COLOURS, FONT, WIDTH, new_figure, write_figure
from torchrl_maxmin.trainers.env_ppo import load_env_policy

PANELS = (
    ("gridworld-majority", "majority's reward alone", "a goal pays in every step"),
    ("gridworld", "MaxMin", "a goal pays in every step"),
    ("deliveries-10-1", "shares 10 : 1", "a goal pays once, moves cost"),
    ("deliveries", "MaxMin", "a goal pays once, moves cost"),
)


@torch.no_grad()
def walks(env: EnvBase, policy: Any, seed: int) -> np.ndarray:
    """Cells of an episode of every copy under the stochastic policy [N, T + 1]."""
    torch.manual_seed(seed)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(env.horizon, policy)
    cells = torch.cat([rollout["state"][:, :1, 0], rollout["next", "state"][..., 0]], 1)
    return cells.numpy()


def visits(env: EnvBase, policy: Any, seed: int) -> dict[str, float]:
    """Shares of episodes that pass the first goal, the second, and both."""
    cells, size = walks(env, policy, seed), env.size
    first, second = ((cells == goal).any(1) for goal in (size - 1, size * size - 1))
    return {
        "episodes": len(cells),
        "first": float(first.mean()),
        "second": float(second.mean()),
        "both": float((first & second).mean()),
    }


def draw_gridworld(output: Path, runs: Path) -> None:
    """Draw 40 episodes of seed 0 of each policy; writes ``gridworld`` as .png, .svg and .csv."""
    present = [panel for panel in PANELS if (runs / panel[0] / "seed-0/policy.safetensors").exists()]
    if not present:
        return
    figure, rows = new_figure(WIDTH, 4.2 * ((len(present) + 1) // 2)), []
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    axes = figure.subplots((len(present) + 1) // 2, 2, squeeze=False).ravel()
    for axis in axes[len(present) :]:
        axis.set_visible(False)
    for axis, (name, title, pays) in zip(axes, present, strict=False):
        policy, env = load_env_policy(runs / name / "seed-0")
        cells = walks(env, policy, 0)
        share = visits(env, policy, 0)["both"]
        _draw_walks(axis, cells[:40], env.size)
        axis.set_title(f"{title}\n{pays}\nboth in {share:.0%} of episodes", fontsize=FONT)
        rows += [
            {"policy": name, "episode": n, "cells": " ".join(map(str, walk))}
            for n, walk in enumerate(cells[:40])
        ]
    write_figure(figure, output / "gridworld", rows)


def _draw_walks(axis: Any, cells: np.ndarray, size: int) -> None:
    rng = np.random.default_rng(0)
    for line in range(size + 1):
        axis.plot([-0.5, size - 0.5], [line - 0.5] * 2, color="0.85", linewidth=1, zorder=0)
        axis.plot([line - 0.5] * 2, [-0.5, size - 0.5], color="0.85", linewidth=1, zorder=0)
    for row, colour, name in ((0, COLOURS[2], "1"), (size - 1, COLOURS[1], "2")):
        axis.add_patch(_square(size - 1, row, colour))
        axis.text(size - 1, row, name, ha="center", va="center", fontsize=FONT + 7, color="white", zorder=3)
    axis.text(0, 0.4, "start", ha="center", va="center", fontsize=FONT, zorder=3)
    for walk in cells:
        rows, columns = np.divmod(walk, size)
        away = rng.uniform(-0.28, 0.28, 2)
        axis.plot(columns + away[0], rows + away[1], color=COLOURS[0], alpha=0.35, linewidth=1.6, zorder=2)
    axis.set(xlim=(-0.6, size - 0.4), ylim=(size - 0.4, -0.6), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _square(column: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.75, linewidth=0, zorder=1)
