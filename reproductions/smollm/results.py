"""``results.md`` and a CSV file an experiment: our numbers with intervals beside the paper's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paper import ACCURACY, FIGURE_5, WIN_RATES
from recipes import Recipe
from stages import POLICIES, Run
from tastes import TASTES, UNITS

from torchrl_maxmin.core.tables import markdown_table, write_csv
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.stats.changes import paired_change
from torchrl_maxmin.stats.clustered import interval_over_seeds
from torchrl_maxmin.stats.interval import Interval
from torchrl_maxmin.stats.rates import accuracy_by_group, rates_by_group

__all__ = ["cell_row", "section", "write_results"]

#: of everyone in a cell: (tastes, ratio) -> its runs, a seed each
Cells = Mapping[tuple[str, float], Sequence[Run]]


def cells_of(runs: Iterable[Run]) -> dict[tuple[str, float], list[Run]]:
    """Put runs that differ by the seed alone together."""
    cells: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.tastes, run.ratio), []).append(run)
    return cells


def cell_row(runs: Sequence[Run]) -> dict[str, Any]:
    """Numbers of one pair of tastes at one ratio, each with its interval: a row of the CSV file.

    Args:
        runs: finished ones, a seed each.
    """
    tastes, first = TASTES[runs[0].tastes], runs[0]
    results = [SeedResult.load(run.folder / "evaluation/result") for run in runs]
    row: dict[str, Any] = {"tastes": first.tastes, "majority": tastes.names[0], "minority": tastes.names[1]}
    row |= {"ratio": first.ratio, "seeds": len(runs), "prompts": results[0].num_prompts}
    row |= _accuracy(runs) | _clustering(runs)
    wins = {name: np.stack([result.win_matrix(name, REFERENCE) for result in results]) for name in POLICIES}
    for name, matrix in wins.items():
        rates = rates_by_group(matrix, tastes.names, [first.ratio, 1])
        row |= {f"{name} worst group is": rates.worst_group_name} | _ends(f"{name} worst", rates.worst_group)
        for g, who in enumerate(("majority", "minority")):
            row |= _ends(f"{name} {who} wins", rates.groups, g)
        for key in ("average_over_groups", "average_over_people"):
            row |= _ends(f"{name} {key.replace('_', ' ')}", getattr(rates, key))
    worst = int(wins["single"].mean((0, 1)).argmin())
    row |= _ends("maxmin less single, single's worst", _change(wins, worst))
    row |= _ends("maxmin less single, majority", _change(wins, 0))
    for name in (REFERENCE, *POLICIES):
        for key, unit in (("kl", "nats"), ("length", "tokens")):
            values = np.stack([getattr(result, key)[name].mean(-1) for result in results])
            row |= _ends(f"{name} {key}, {unit}", interval_over_seeds(values, scale="identity"))
        if results[0].utilities:
            worth = np.stack([result.utilities[name].mean(1) for result in results])
            found = interval_over_seeds(worth, scale="identity")
            for g, who in enumerate(("majority", "minority")):
                row |= _ends(f"{name} {who} utility", found, g)
    return row


def _change(wins: Mapping[str, np.ndarray], group: int) -> Interval:
    """What MaxMin gives a group more than single, paired by prompt."""
    return paired_change(wins["maxmin"][..., group], wins["single"][..., group])


_ENDS = ("", " low", " high")


def _ends(key: str, interval: Interval, index: int | None = None) -> dict[str, float]:
    values = zip(_ENDS, (interval.mean, interval.low, interval.high), strict=True)
    return {key + end: float(v if index is None else v[index]) for end, v in values}


def _accuracy(runs: Sequence[Run]) -> dict[str, float]:
    """Held-out accuracy of the single reward, in total and by true group; all seeds' users together."""
    found = [json.loads((run.folder / "ranking/ranking.json").read_text()) for run in runs]
    starts = np.cumsum([0, *(len(seed["groups"]) for seed in found)])
    right = np.concatenate([seed["right"] for seed in found])
    users = np.concatenate(
        [np.asarray(seed["users"]) + start for seed, start in zip(found, starts, strict=False)]
    )
    groups = np.concatenate([seed["groups"] for seed in found])
    both = accuracy_by_group(right, users, groups, 2, warn=False)
    (total,) = accuracy_by_group(right, users, np.zeros(len(groups), dtype=int), 1, warn=False)
    named = zip(("total", "majority", "minority"), (total, *both), strict=True)
    row: dict[str, float] = {}
    for name, interval in named:
        if interval is not None:
            row |= _ends(f"single's accuracy, {name}", interval)
    return row


def _clustering(runs: Sequence[Run]) -> dict[str, Any]:
    """The number of groups that were found, and users put right, by seed."""
    found = [json.loads((run.folder / "reward_maxmin/summary.json").read_text()) for run in runs]
    return {
        "K found": " ".join(str(seed["num_groups"]) for seed in found),
        "users placed right": float(np.mean([seed["user_accuracy"] for seed in found])),
    }


# -- the page ----------------------------------------------------------------------------------------


def write_results(folder: Path, parts: Sequence[tuple[Recipe, Sequence[Run], float]]) -> Path:
    """Write ``results.md`` and ``<recipe>.csv``; returns the page.

    Args:
        folder: where they go.
        parts: of each recipe its finished runs, and how many minutes its finished steps took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = [_HEAD]
    for recipe, runs, minutes in parts:
        rows = [cell_row(cell) for cell in cells_of(runs).values()]
        if rows:
            write_csv(folder / f"{recipe.name}.csv", rows, ".6g")
        text += section(recipe, rows, minutes)
    path = folder / "results.md"
    path.write_text("\n\n".join(text) + "\n")
    return path


_HEAD = """# The paper's language experiments on a real model of 135 million parameters

Written by `run.py`. Users are simulated by tastes that can be computed (`tastes.py`): they choose between
two answers of the reference policy, and say nothing else (of a tie nothing at all). Training knows who
chose, but neither how many groups there are nor who belongs to which. A win rate is how often a group's own
true utility prefers the policy's answer to the reference's on held-out prompts, ties one half. Brackets are
95% intervals: t over seeds plus what the shared prompts add, with one seed the chance of the prompts alone;
accuracies are over users. The worst group's is wider than each group's own, its estimate biased low.

Where this is another experiment than the paper's: the model is SmolLM2-135M-Instruct from a four-bit file,
not Tulu2-7B or GPT-2, tuned for some steps on its own answers so that it ends them; the users' tastes and
the judge are functions of the text, not GPT-4, so that a win needs no better answer, only one more to the
taste; prompts are ours, neither IMDb's nor Koala's; policies have some thirty iterations, and no preference
prompt is appended at the test; groups are found by EM and reach the policy, where the paper's code trains
on the true ones; responses are 24 to 48 tokens at most. The paper gives one seed and no intervals; with 50
prompts its win rates are within about seven points. Compare signs and orders, not sizes."""


def section(recipe: Recipe, rows: Sequence[Mapping[str, Any]], minutes: float) -> list[str]:
    """Paragraphs on one recipe."""
    head = [f"## {recipe.title}"]
    if not rows:
        return [*head, f"Not run yet: `{recipe.name}`."]
    people, ppo = recipe.people, recipe.flags("ppo")
    noise = "without noise" if people.tau is None else f"by Bradley-Terry with tau {people.tau:g}"
    head.append(
        f"{people.majority_users} users of the majority, {people.pairs_per_user} pairs each to train on and "
        f"{people.test_pairs_per_user} held out, labelled {noise}; {rows[0]['seeds']} seed(s), "
        f"{rows[0]['prompts']} held-out prompts; {ppo['num_iterations']} iterations of "
        f"{ppo['rollout_batch_size']} responses, beta {ppo['beta']:g}, "
        f"{'adapters' if recipe.use_peft else 'all weights'}. Every number with its interval: "
        f"[{recipe.name}.csv]({recipe.name}.csv). Finished steps add up to {minutes:.0f} minutes."
    )
    parts = [*head, *_findings(rows), *_tastes_table(recipe), *_accuracy_table(rows), *_win_table(rows)]
    return [*parts, *(_figure_5(rows) if recipe.kind == "film" else []), *_details(rows)]


def _findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    key = "maxmin less single, single's worst"
    lines = []
    for row in rows:
        low, high = row[f"{key} low"], row[f"{key} high"]
        verdict = "more" if low > 0 else "less" if high < 0 else "not told apart"
        lines.append(
            f"* {_cell_name(row)}: the group that single serves worst ({row['single worst group is']}) gets "
            f"{row[key]:+.3f} [{low:+.3f}, {high:+.3f}] from MaxMin, {verdict}; the majority "
            + "{:+.3f} [{:+.3f}, {:+.3f}].".format(
                *(row[f"maxmin less single, majority{end}"] for end in _ENDS)
            )
        )
    return ["\n".join(lines)]


def _tastes_table(recipe: Recipe) -> list[str]:
    lines = [
        [f"{pair.names[side]} {pair.codes[side]}".strip(), pair.wants[side], pair.computed[side]]
        for pair in map(TASTES.__getitem__, recipe.tastes)
        for side in (0, 1)
    ]
    return [
        "### Tastes (Table 4)" if recipe.kind == "chat" else "### Tastes",
        markdown_table(["group", "wants", "computed as"], lines, rule="|---"),
    ]


def _accuracy_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("total", "majority", "minority")

    def line(row: Mapping[str, Any]) -> list[str]:
        ours = [_cell(row, f"single's accuracy, {name}") for name in names]
        known = ACCURACY.get(int(row["ratio"])) if row["tastes"] == "grade" else None
        return [_cell_name(row), *ours, "" if known is None else " / ".join(f"{x:.3f}" for x in known)]

    header = ["tastes and ratio", *names, "paper's total / majority / minority"]
    return [
        "### One reward for all (Table 1)",
        "Share of held-out pairs that the single reward ranks as their user did. The paper has P1A and P1B.",
        markdown_table(header, map(line, rows)),
    ]


def _win_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def lines() -> Iterable[list[str]]:
        for row in rows:
            for name in POLICIES:
                ours = [_cell(row, f"{name} {key}") for key in ("majority wins", "minority wins", "worst")]
                averages = [_cell(row, f"{name} average over {over}") for over in ("groups", "people")]
                yield [_cell_name(row), name, *ours, *averages, _paper_rates(row, name)]

    header = ["tastes and ratio", "policy", "majority", "minority", "worst group"]
    header += ["average over groups", "average over people"]
    return [
        "### Win rates against the reference (Tables 2 and 3)",
        "The paper's are GPT-4's win rates against Tulu2-7B; its MaxMin was trained on the true groups, once "
        "for all ratios.",
        markdown_table([*header, "paper's majority / minority"], lines()),
    ]


def _paper_rates(row: Mapping[str, Any], policy: str) -> str:
    known = WIN_RATES.get("maxmin" if policy == "maxmin" else f"single {row['ratio']:g}")
    codes = TASTES[row["tastes"]].codes
    if known is None or codes[0] not in known:
        return ""
    return " / ".join(f"{known[code]:.3f}" for code in codes)


def _figure_5(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if "sft majority utility" not in rows[0]:
        return []

    def natural(row: Mapping[str, Any], policy: str, who: str, unit: float) -> str:
        ends = sorted(row[f"{policy} {who} utility{end}"] * unit for end in (" low", " high"))
        return f"{row[f'{policy} {who} utility'] * unit:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"

    def lines() -> Iterable[list[str]]:
        for row in rows:
            for name in (REFERENCE, *POLICIES):
                ours = natural(row, name, "majority", UNITS["sentiment"])
                words = natural(row, name, "minority", -UNITS["words"])
                yield [_cell_name(row), name, ours, words, *(f"{value:g}" for value in FIGURE_5[name])]

    header = ["ratio", "policy", "sentiment (VADER)", "words", "paper's sentiment", "paper's conciseness"]
    return [
        "### Averages of the two tastes (Figure 5)",
        "Sentiment is between -1 and 1, and fewer words are better; the paper's sentiment is a classifier's "
        "logit and its conciseness a score that is better when higher, at 80:20, both read off the bars.",
        markdown_table(header, lines()),
    ]


def _details(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def line(row: Mapping[str, Any]) -> list[str]:
        policies = [
            f"{row[f'{name} kl, nats']:.1f} / {row[f'{name} length, tokens']:.1f}" for name in POLICIES
        ]
        first = f"{row['sft length, tokens']:.1f}"
        return [_cell_name(row), row["K found"], f"{row['users placed right']:.3f}", first, *policies]

    header = ["tastes and ratio", "K found, by seed", "users placed right", "reference's tokens"]
    return [
        "### Groups, distance and length",
        "Users placed right is balanced over the true groups; policies have KL in nats / tokens.",
        markdown_table([*header, *POLICIES], map(line, rows)),
    ]


def _cell_name(row: Mapping[str, Any]) -> str:
    return f"{row['majority']} to {row['minority']} {row['ratio']:g}:1"


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return ""
    return f"{row[key]:.3f} [{row[key + ' low']:.3f}, {row[key + ' high']:.3f}]"
