"""``results.md``, the CSV files and the pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frontier import (
    FrontierPoint,
    best_mixture,
    best_within,
    compare_with_sweep,
    frontier_rows,
)
from frontier_plots import plot_changes, plot_frontier, plot_series
from plan import BY_SHARE, DEMO, NAMED, Sizes, beta_name, weight_name
from tables import (
    assignment_rows,
    certificate_rows,
    exact_panel,
    points_of,
    robustness_rows,
    share_rows,
)
from unseen import PAIRS

from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.stats.interval import Interval

#: Largest relative loss of the majority's win rate that is still small.
COST = 0.05
_AVERAGES = ("average over groups", "average over people")


def write_report(homes: Sequence[Path], sizes: Sizes, folder: Path, minutes: float) -> list[str]:
    """Write everything into ``folder``; returns the findings, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, findings = _frontier(homes, sizes, folder)
    shares = share_rows(homes, sizes)
    write_csv(folder / "shares.csv", shares, ".6g")
    plot_series(
        shares,
        folder / "shares",
        x="share",
        x_label="minority of",
        key="worst",
        label="worst group's win rate against sft",
        level=0.5,
    )
    robustness, assigned = robustness_rows(homes, sizes), assignment_rows(homes)
    write_csv(folder / "robustness.csv", robustness, ".6g")
    write_csv(folder / "assignment.csv", assigned, ".6g")
    plot_changes(
        robustness,
        folder / "robustness",
        policies=("single", "maxmin"),
        panels={
            "worst group": "worst group",
            "population": "mean over the population",
            "unseen users": "unseen users",
        },
        x_label="win rate against sft",
        level=0.5,
    )
    text = [*_head(homes, sizes, minutes), *lines, *_shares(shares), *_robustness(robustness, assigned)]
    (folder / "results.md").write_text("\n".join(text) + "\n")
    worse = sum(row["maxmin is"] == "worse" for row in robustness)
    return [
        *findings,
        f"MaxMin is worse than single in {worse} of {len(robustness)} rows of the robustness table.",
    ]


def _head(homes: Sequence[Path], sizes: Sizes, minutes: float) -> list[str]:
    ppo, evaluate = sizes.stages["ppo"], sizes.stages["evaluate"]
    seeds = ", ".join(home.name.removeprefix("seed-") for home in homes)
    return [
        "# Frontier, shares and robustness on the embedded world",
        "",
        f"Written by `run.py`. Seeds {seeds}; majority to minority 10:1 unless a row says otherwise; "
        f"{sizes.num_users} users, {sizes.pairs_per_user} pairs each. Every policy had the same budget, "
        f"{ppo['num_iterations']} PPO iterations of {ppo['rollout_batch_size']} responses (the demo has "
        f"{DEMO['ppo']['num_iterations']}), and beta {ppo['beta']:g} unless its name says another; all else "
        "is as in the demo. Policies of a seed share the reference, the pairs and, where it can be the "
        f"same, the reward model. The steps of all seeds add up to {minutes:.0f} minutes.",
        "",
        "A win rate is how often a group's own true utility prefers the policy's response to the "
        f"reference's on the same held-out prompt ({evaluate['num_samples']} samples of each, ties one "
        "half); training never sees true utilities. Brackets are 95% intervals, t over seeds plus the "
        "component of the prompts that all seeds share (`stats/clustered.py`); with one seed they hold "
        "the chance of the prompts alone. For rates above .9 they may be too narrow. The worst group's is "
        "wider than each group's own (`stats.worst_of`), its estimate biased low. Changes are "
        "paired by seed and prompt.",
        "",
    ]


def _frontier(homes: Sequence[Path], sizes: Sizes, folder: Path) -> tuple[list[str], list[str]]:
    points = points_of(homes, "frontier/evaluation")
    exact, exact_rows = exact_panel(homes)
    certificates = certificate_rows(homes, sizes)
    write_csv(folder / "exact.csv", exact_rows, ".6g")
    write_csv(folder / "certificates.csv", certificates, ".6g")
    sweep = ["utilitarian", *(weight_name(weight) for weight in sizes.weights)]
    betas = {
        f"{kind}, larger beta": [kind, *(beta_name(kind, beta) for beta in sizes.betas)]
        for kind in ("single", "maxmin")
    }
    plot_frontier(
        points,
        folder / "frontier",
        lines={"fixed weights": sweep, **betas},
        named=NAMED,
        cost=COST,
        exact=exact,
    )
    findings = [_against_sweep(points, sweep), *_at_a_cost(points)]
    lines = [
        "## Frontier",
        "",
        "![Worst group against majority and average, and the enumerable world](frontier.png)",
        "",
        *(f"* {finding}" for finding in findings),
        "",
        *_frontier_table(points),
        "",
        "`weight w` trains on fixed weights 1 - w and w of the calibrated heads (utilitarian is the share, "
        "about 0.09). `soft_min` (temperature .5) and `nash` weigh groups by share too. `nash` runs on win "
        "rates, with beta and the penalty for a response that does not end in that unit (divided by the "
        "square root of 12). One average counts groups alike, the other people (10:1). Numbers of the "
        "picture: [frontier.csv](frontier.csv). In its last panel bars go from the smallest to the largest "
        "over seeds.",
        "",
        *_exact(exact_rows, sizes),
        *_certificates(certificates, sizes),
    ]
    return lines, findings


def _frontier_table(points: Mapping[str, FrontierPoint]) -> list[str]:
    groups = points["maxmin"].rates.group_names
    names = [f"{name} ({who})" for name, who in zip(groups, ("majority", "minority"), strict=True)]
    return [
        _line("policy", *names, "worst group", *_AVERAGES, "KL (nats)"),
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            _line(
                row["policy"],
                *(_cell(row, key) for key in (*groups, "worst", *_AVERAGES)),
                f"{row['kl']:.1f}",
            )
            for row in frontier_rows(points.values())
        ),
    ]


def _exact(rows: Sequence[Mapping[str, Any]], sizes: Sizes) -> list[str]:
    return [
        "### The exact optimum",
        "",
        "Whole responses cannot be enumerated. Responses of two tokens can: "
        f"{sizes.short_prompts} reviews without their last two words, {rows[0]['responses']} responses "
        f"each, true utilities for rewards, beta {sizes.short['beta']:g}, "
        f"{sizes.short['num_iterations']} iterations. There `solve_dual` gives the optimum, and what a "
        "trained policy is worth is summed, not sampled. In standard deviations of the reference (right "
        "panel, [exact.csv](exact.csv)):",
        "",
        "| policy | worst group's utility less KL | short of the optimum | over seeds |",
        "|---|---:|---:|---:|",
        *(
            _line(
                row["policy"],
                f"{row['worst value']:.3f}",
                f"{row['gap']:.3f}",
                f"{row['smallest gap']:.3f} to {row['largest gap']:.3f}",
            )
            for row in rows
        ),
        "",
        f"The optimum is {rows[0]['optimum']:.3f}. `equal` weighs both groups alike: fixed weights are "
        "right only where they happen to be those of the dual.",
        "",
    ]


def _certificates(rows: Sequence[Mapping[str, Any]], sizes: Sizes) -> list[str]:
    return [
        "On whole responses samples can say, where beta is large enough, how far MaxMin is from the optimum "
        "under the rewards that it was trained on "
        f"({sizes.certificate_samples} responses to each of {sizes.certificate_prompts} prompts):",
        "",
        "| beta | seed | distance to the optimum |",
        "|---:|---:|---|",
        *(
            _line(
                f"{row['beta']:g}",
                row["seed"],
                row["reason"] or f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            )
            for row in rows
        ),
        "",
    ]


def _against_sweep(points: Mapping[str, FrontierPoint], sweep: Sequence[str]) -> str:
    found = compare_with_sweep(points["maxmin"], [points[name] for name in sweep])
    place = "on or above" if found.on_or_above else "BELOW"
    change = found.change
    return (
        f"MaxMin's worst group has {_interval(points['maxmin'].rates.worst_group)}, that of the best fixed "
        f"weights ({found.best}, chosen by these numbers) {_interval(points[found.best].rates.worst_group)}; "
        f"MaxMin less the other, paired: {float(change.mean):+.3f} [{float(change.low):+.3f}, "
        f"{float(change.high):+.3f}]. MaxMin is {place} the frontier of fixed weights within intervals."
    )


def _at_a_cost(points: Mapping[str, FrontierPoint]) -> list[str]:
    single = points["single"]
    found = best_within(points.values(), single, COST)
    mixed = best_mixture(points.values(), single, COST)
    out = []
    if found is not None:
        out.append(
            f"The best worst group that costs the majority at most {COST:.0%} of its win rate under single: "
            f"{found.name}, {_interval(found.rates.worst_group)}."
        )
    if mixed is not None:
        out.append(
            f"The same among mixtures, which draw a policy for every response: {mixed[1].name}, "
            f"{_interval(mixed[1].rates.worst_group)}. Both were chosen by these numbers, so they are "
            "biased high."
        )
    return out


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = {(row["series"], row["share"]): row for row in rows}
    return [
        "## Share of the minority",
        "",
        "![Worst group by share of the minority](shares.png)",
        "",
        _line("share", "K chosen", *BY_SHARE, "users placed right"),
        "|---:|---|" + "---:|" * (len(BY_SHARE) + 1),
        *(
            _line(
                f"{share:.0%}",
                cells["maxmin", share]["K chosen"],
                *(_cell(cells[name, share], "worst") for name in BY_SHARE),
                f"{cells['maxmin', share]['users placed right']:.3f}",
            )
            for share in sorted({row["share"] for row in rows})
        ),
        "",
        "The worst group's win rate, on the same pairs labelled by other people. `maxmin` is given K = 2; "
        "`low_rank` too, and its heads share two features (as SharedRep's do); `true_groups` trains a head "
        "on each true group. K chosen is what the likelihood of left-out users would choose, by seed; users "
        "placed right is `maxmin`'s, balanced over groups. Gains in utility: [shares.csv](shares.csv).",
        "",
    ]


def _robustness(rows: Sequence[Mapping[str, Any]], assigned: Sequence[Mapping[str, Any]]) -> list[str]:
    worse = [f"{row['condition']} ({row['measure']})" for row in rows if row["maxmin is"] == "worse"]
    return [
        "## Robustness: single against MaxMin",
        "",
        "![Single and MaxMin, condition by condition](robustness.png)",
        "",
        f"MaxMin is worse than single in: {'; '.join(worse) if worse else 'no row'}.",
        "",
        "| measure | condition | single | MaxMin | change | MaxMin is |",
        "|---|---|---:|---:|---:|---|",
        *(
            _line(
                row["measure"],
                row["condition"],
                _cell(row, "single"),
                _cell(row, "maxmin"),
                f"{row['change']:+.3f} [{row['change low']:+.3f}, {row['change high']:+.3f}]",
                f"**{row['maxmin is']}**" if row["maxmin is"] == "worse" else row["maxmin is"],
            )
            for row in rows
        ),
        "",
        "`population` is the mean over people at the shares of the row, 91% and 9% unless it says "
        "otherwise. Other prompts and shares at test need no training. For noise, coin tossers and "
        "adversaries both policies were trained anew, K chosen by the likelihood (K by seed: "
        "[robustness.csv](robustness.csv)). Adversaries answer the opposite of their taste; win rates are "
        "by the true tastes of the two groups. Unseen users compare a response of each policy with the "
        "reference's on 20 prompts, as noisily as those who labelled; intervals are over seeds and users. "
        "Those in between like praise and brevity half and half, and nobody in training did.",
        "",
        "New users, by their first pairs over held-out prompts: the share that MaxMin's mixture puts in the "
        "right group, and the share of 20 further pairs that rewards rank as the user did (means over "
        "seeds).",
        "",
        _line("users", *(f"{n} pairs" for n in PAIRS), "own head ranks right", "single ranks right"),
        "|---|" + "---:|" * (len(PAIRS) + 2),
        *(
            _line(
                row["kind"],
                *(_number(row.get(f"assigned right after {n}")) for n in PAIRS),
                _number(row["own head ranks right"]),
                _number(row["single reward ranks right"]),
            )
            for row in assigned
        ),
        "",
    ]


def _line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.3f} [{row[key + ' low']:.3f}, {row[key + ' high']:.3f}]"


def _interval(interval: Interval) -> str:
    return f"{float(interval.mean):.3f} [{float(interval.low):.3f}, {float(interval.high):.3f}]"
