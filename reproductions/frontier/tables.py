"""From the measurements of all seeds to rows: points, changes and intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frontier import (
    FrontierPoint,
    frontier_points,
    verdict,
    worst_group_change,
)
from frontier_plots import ExactPanel
from plan import BY_SHARE, SHORT_POLICIES, Sizes, beta_name, people_folder, policy_folder
from unseen import KINDS
from worlds import SHIFTS

from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.stats.changes import paired_change
from torchrl_maxmin.stats.clustered import interval_over_seeds
from torchrl_maxmin.stats.interval import Interval

#: Shares of the minority that the population mean is looked at under, beside the trained one.
TEST_SHARES = (0.25, 0.5, 10 / 11)


def points_of(homes: Sequence[Path], evaluation: str) -> dict[str, FrontierPoint]:
    """Points of one evaluation over the seeds' folders."""
    return frontier_points([SeedResult.load(home / evaluation / "result") for home in homes])


def ends(key: str, interval: Interval) -> dict[str, float]:
    """A number and its interval as three columns."""
    return {key: float(interval.mean), f"{key} low": float(interval.low), f"{key} high": float(interval.high)}


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def exact_panel(homes: Sequence[Path]) -> tuple[ExactPanel, list[dict[str, Any]]]:
    """The enumerable world over seeds: what is drawn, and each policy's gap to the exact optimum."""
    found = [np.load(home / "short/exact/exact.npz") for home in homes]
    optimum = np.stack([seed["optimum"] for seed in found])
    trained = {name: np.stack([seed[name].mean(axis=0) for seed in found]) for name in SHORT_POLICIES}
    rows = []
    for name, values in trained.items():
        # every seed's own worst group, against that seed's own optimum
        gaps = optimum - values.min(axis=1)
        rows.append(
            {
                "policy": name,
                "worst value": float(values.min(axis=1).mean()),
                "gap": float(gaps.mean()),
                "smallest gap": float(gaps.min()),
                "largest gap": float(gaps.max()),
                "kl": float(np.mean([seed[f"kl/{name}"].mean() for seed in found])),
                "optimum": float(optimum.mean()),
                "responses": int(found[0]["responses"]),
            }
        )
    return ExactPanel(np.stack([seed["curve"].mean(axis=1) for seed in found]), optimum, trained), rows


def certificate_rows(homes: Sequence[Path], sizes: Sizes) -> list[dict[str, Any]]:
    """MaxMin's certified distance to the optimum under its own rewards, by beta and seed."""
    beta = sizes.stages["ppo"]["beta"]
    folders = {beta: "maxmin"} | {other: policy_folder(beta_name("maxmin", other)) for other in sizes.betas}
    rows = []
    for value, name in sorted(folders.items()):
        for home in homes:
            told = _read(home / "certificates" / name / "result/result.json")
            certificate = told["extra"]["certificate"]
            keys = ("value", "low", "high", "reason")
            rows.append({"beta": value, "seed": told["seed"], **{key: certificate[key] for key in keys}})
    return rows


def share_rows(homes: Sequence[Path], sizes: Sizes) -> list[dict[str, Any]]:
    """Worst-group win rate and gain by share of the minority and reward, and the K that would be chosen."""
    rows = []
    for share in sizes.shares:
        folder = f"shares/{share:g}"
        points = points_of(homes, f"{folder}/evaluation")
        chosen = [_read(home / folder / "choice/choice.json")["num_groups"] for home in homes]
        for name in BY_SHARE:
            found = [_read(home / folder / f"reward_{name}/summary.json") for home in homes]
            accuracy = [seed["user_accuracy"] for seed in found if "user_accuracy" in seed]
            point = points[name]
            row = {"series": name, "share": share, "worst group": point.rates.worst_group_name}
            row |= ends("worst", point.rates.worst_group) | ends("worst gain", point.worst_gain)
            for k, group in enumerate(point.rates.group_names):
                row |= {group: float(point.rates.groups.mean[k])}
            row["users placed right"] = float(np.mean(accuracy)) if accuracy else ""
            row["K chosen"] = " ".join(map(str, chosen))
            rows.append(row)
    return rows


def robustness_rows(homes: Sequence[Path], sizes: Sizes) -> list[dict[str, Any]]:
    """Single against MaxMin, condition by condition and measure by measure, with paired changes."""
    evaluations = {"as trained": "frontier/evaluation"}
    evaluations |= {f"{shift} prompts": f"prompts/{shift}/evaluation" for shift in SHIFTS}
    trained_anew = {name: f"people/{people_folder(name)}" for name in sizes.disturbances}
    evaluations |= {name: f"{folder}/evaluation" for name, folder in trained_anew.items()}
    rewards = dict.fromkeys(evaluations, "reward_maxmin") | {
        name: f"{folder}/reward_maxmin" for name, folder in trained_anew.items()
    }
    rows = []
    pairs = {name: points_of(homes, folder) for name, folder in evaluations.items()}
    for name, points in pairs.items():
        single, maxmin = points["single"], points["maxmin"]
        change = worst_group_change(maxmin, single)
        rows.append(
            _row("worst group", name, single.rates.worst_group, maxmin.rates.worst_group, change)
            | {
                "single worst": single.rates.worst_group_name,
                "maxmin worst": maxmin.rates.worst_group_name,
                "K": " ".join(
                    str(_read(home / rewards[name] / "summary.json")["num_groups"]) for home in homes
                ),
            }
        )
    trained = SeedResult.load(homes[0] / "frontier/evaluation/result").group_shares[1]
    conditions = [(name, points, trained) for name, points in pairs.items()]
    conditions += [(f"minority {share:.0%} at test", pairs["as trained"], share) for share in TEST_SHARES]
    for name, points, share in conditions:
        means = {kind: points[kind].wins @ [1 - share, share] for kind in ("single", "maxmin")}
        rows.append(_means_row("population", name, means))
    for kind in KINDS:
        judged = [np.load(home / "unseen/judged.npz") for home in homes]
        means = {p: np.stack([seed[f"{p}/{kind}"] for seed in judged]) for p in ("single", "maxmin")}
        rows.append(_means_row("unseen users", kind, means))
    return rows


def _means_row(measure: str, condition: str, means: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Win rates [S, N] over seeds and prompts (or users), and their paired change."""
    one, other = (interval_over_seeds(means[kind]) for kind in ("single", "maxmin"))
    return _row(measure, condition, one, other, paired_change(means["maxmin"], means["single"]))


def _row(
    measure: str, condition: str, single: Interval, maxmin: Interval, change: Interval
) -> dict[str, Any]:
    row: dict[str, Any] = {"measure": measure, "condition": condition}
    row |= ends("single", single) | ends("maxmin", maxmin) | ends("change", change)
    return row | {"maxmin is": verdict(change), "single worst": "", "maxmin worst": "", "K": ""}


def assignment_rows(homes: Sequence[Path]) -> list[dict[str, Any]]:
    """New users by kind: put right after so many pairs, and pairs ranked right; means over seeds."""
    found = [_read(home / "unseen/assigned.json") for home in homes]
    return [
        {"kind": kind, **{key: float(np.mean([seed[kind][key] for seed in found])) for key in found[0][kind]}}
        for kind in found[0]
    ]
