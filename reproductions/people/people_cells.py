"""What is asked of simulated people: worlds, how often an answer has to be right, one seed of one world."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import people_worlds as worlds
import torch
from scipy.optimize import linear_sum_assignment

from torchrl_maxmin.core.run import write_json
from torchrl_maxmin.diagnosis import diagnose
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.trainers.reward import user_accuracy

__all__ = ["CELLS", "Cell", "Claim", "Run", "measure"]

#: Expected and true misassignment may differ by so much.
CLOSE = 0.02

Row = Mapping[str, Any]


class Claim(NamedTuple):
    """What has to be so.

    Attributes:
        text: in words.
        right: whether it is so, from the figures of one seed.
        needed: in how many seeds it has to be so.
    """

    text: str
    right: Callable[[Row], bool]
    needed: int


@dataclass(frozen=True)
class Cell:
    """Worlds of one kind, and what has to be said of them.

    Attributes:
        section: which table it stands in.
        world: makes one from ``seed=``.
        truth: number of tastes; None where there are no groups.
        claims: what has to be so.
        seeds: how many are drawn.
        must_show: whether it is one of the lines that have to be shown.
        max_groups: largest K that is tried.
    """

    section: str
    world: Callable[..., worlds.World]
    truth: int | None
    claims: tuple[Claim, ...]
    seeds: int = 20
    must_show: bool = True
    max_groups: int = 3


@dataclass(frozen=True)
class Run:
    """One seed of one cell; its figures go to ``folder``."""

    cell: str
    seed: int
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)


def measure(run: Run) -> None:
    """Draw the world, let its people be read and diagnosed, and hold the answer against the truth.

    Intervals of costs are left out: they cost most of the time and decide nothing here.
    """
    torch.set_num_threads(1)
    cell = CELLS[run.cell]
    world = cell.world(seed=run.seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    data, differences = _read(world, run.folder)
    users = np.array([int(user[1:]) for user in data.user_ids])
    truth = world.true_groups[users]
    ask = partial(
        diagnose,
        differences,
        data.user_offsets,
        choice_offsets=data.choice_offsets,
        judgements=data.judgement_ids,
        true_groups=[str(group) for group in truth],
        num_jackknife=0,
        num_bootstrap=0,
        seed=run.seed,
        **run.options,
    )
    start = time.process_time()  # of this process: others may share the cores
    found = ask(max_groups=cell.max_groups)
    seconds = time.process_time() - start
    row = {
        "cell": run.cell,
        "seed": run.seed,
        "users": len(users),
        "pairs": len(differences),
        "truth": cell.truth,
        "num_groups": found.num_groups,
        "established": found.summary["established"],
        "seconds": seconds,
    }
    if cell.truth is not None and cell.truth > 1:
        row["adjusted_rand_index"] = found.summary["recovery"]["adjusted_rand_index"]
        if found.num_groups != cell.truth:
            found = ask(num_groups=cell.truth)
        responsibilities = found.mixture.responsibilities
        row |= {
            "balanced_accuracy": user_accuracy(responsibilities, [str(group) for group in truth])[0],
            "expected_misassignment": found.summary["misassignment"]["plain"],
            "true_misassignment": _misassignment(responsibilities.argmax(1).numpy(), truth),
            "least_misassignment": _misassignment(world.posterior()[users].argmax(1), truth),
        }
    write_json(run.folder / "row.json", row)


def _read(world: worlds.World, folder: Path) -> tuple[PreferenceDataset, torch.Tensor]:
    """Read the world's people as the program reads a file, with features of items [P, D]."""
    path = world.write(folder / ("people.csv" if world.kind == "ratings" else "people.jsonl"))
    data = PreferenceDataset.load(path)
    path.unlink()  # read into a mapped copy; hundreds of runs would fill the disk
    places = {name: i for i, name in enumerate(world.names)}
    features = torch.from_numpy(world.features).float()
    chosen, rejected = (
        features[[places[text] for text in column]] for column in (data.chosen, data.rejected)
    )
    return data, chosen - rejected


def _misassignment(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the users who are not in the group that stands for their taste."""
    table = np.zeros((found.max() + 1, truth.max() + 1))
    np.add.at(table, (found, truth), 1)
    return 1 - table[linear_sum_assignment(-table)].sum() / len(truth)


# -- what has to be right --------------------------------------------------------------------------


def _has(num_groups: int, within: int = 0) -> Callable[[Row], bool]:
    return lambda row: abs(row["num_groups"] - num_groups) <= within


def _nothing_claimed(row: Row) -> bool:
    return row["num_groups"] == 1 or row["established"] is False


def _established(row: Row) -> bool:
    return row["num_groups"] == row["truth"] and row["established"] is True


def _as_expected(row: Row) -> bool:
    return abs(row["expected_misassignment"] - row["true_misassignment"]) <= CLOSE


# -- the worlds ------------------------------------------------------------------------------------

#: how people judge; a user gives 5 to 200 judgements, long tailed, where nothing else is said
JUDGED: dict[str, dict[str, Any]] = {
    "rankings-5": {"kind": "rankings", "num_shown": 5, "judgements": 1},
    "rankings-10": {"kind": "rankings", "num_shown": 10, "judgements": 1},
    "ratings": {"kind": "ratings", "judgements": None, "noise": 0.5},
    "best-of-4": {"kind": "best_of", "num_shown": 4, "judgements": None},
    "pairs": {"kind": "pairs", "judgements": None},
}
#: what is judged
TEXTS: dict[str, Any] = {"features": "text", "num_items": 200, "width": 64}
TEN_ITEMS: dict[str, Any] = {"features": "one-hot", "num_items": 10}
#: enough that few choices of a user repeat one another, which would count as one
FORTY_ITEMS: dict[str, Any] = {"features": "one-hot", "num_items": 40}
RATED_ITEMS: dict[str, Any] = {"features": "given", "num_items": 200}

_TWENTY_PAIRS: dict[str, Any] = {"kind": "pairs", "judgements": 20, "num_items": 60, "features": "given"}


def _settings(kind: str, items: str) -> dict[str, Any]:
    own = {"ratings": RATED_ITEMS, "best-of-4": FORTY_ITEMS, "pairs": FORTY_ITEMS}
    return JUDGED[kind] | (TEXTS if items == "texts" else own.get(kind, TEN_ITEMS))


def _one_taste() -> dict[str, Cell]:
    return {
        f"one-{kind}-{items}-{users}": Cell(
            "One taste",
            partial(worlds.tastes, 1, num_users=users, **_settings(kind, items)),
            1,
            (Claim("K = 1", _has(1), 19),),
        )
        for kind in JUDGED
        for items in ("items", "texts")
        for users in (100, 1000)
    }


def _several_tastes() -> dict[str, Cell]:
    section = "Two and six tastes, rankings of ten items by 2,000 users"
    two = partial(worlds.tastes, 2, num_users=2000, **_settings("rankings-10", "items"))
    calibrated = Claim("expected misassignment within 2 points of the true one", _as_expected, 10)
    return {
        "two": Cell(section, two, 2, (Claim("K = 2", _has(2), 10),), seeds=10),
        "six": Cell(
            section,
            worlds.six_tastes,
            6,
            (Claim("K = 5, 6 or 7", _has(6, 1), 9), calibrated),
            seeds=10,
            max_groups=8,
        ),
    }


def _no_groups() -> dict[str, Cell]:
    pairs, rankings = _TWENTY_PAIRS, worlds.RANKINGS | TEN_ITEMS
    spectrum_rankings = worlds.RANKINGS | {"num_items": 10}
    made: dict[str, Callable[..., worlds.World]] = {
        "random-pairs": partial(worlds.random_labels, **pairs),
        "random-rankings": partial(worlds.random_labels, **rankings),
        "spectrum-pairs": worlds.spectrum,
        "spectrum-rankings": partial(worlds.spectrum, **spectrum_rankings),
        "line-pairs": partial(worlds.spectrum, shape="line"),
        "line-rankings": partial(worlds.spectrum, shape="line", **spectrum_rankings),
        "noise-pairs": partial(worlds.unequal_noise, **pairs),
        "noise-rankings": partial(worlds.unequal_noise, **rankings),
        "half-random-pairs": partial(worlds.unequal_noise, half_random=True, **pairs),
        "half-random-rankings": partial(worlds.unequal_noise, half_random=True, **rankings),
    }
    claims = (Claim("no group claimed: K = 1, or not established", _nothing_claimed, 19),)
    return {
        name: Cell("Groups without truth", partial(world, num_users=300), None, claims)
        for name, world in made.items()
    }


def _planted() -> dict[str, Cell]:
    return {
        "three": Cell(
            "Three tastes, 20 pairs a user",
            partial(worlds.tastes, 3, shares=(5, 3, 2), num_users=300, **_TWENTY_PAIRS),
            3,
            (Claim("K = 3, established", _established, 10),),
            seeds=10,
            max_groups=4,
        )
    }


def _stand_ins() -> dict[str, Cell]:
    """One to six tastes of every kind of judgement, for a look at how the answers go with the number."""
    return {
        f"stand-in-{kind}-{tastes}": Cell(
            f"Stand-ins: {kind}",
            partial(worlds.tastes, tastes, num_users=400, **_settings(kind, "items")),
            tastes,
            (Claim(f"K = {tastes}", _has(tastes), 0),),
            seeds=3,
            must_show=False,
            max_groups=6,
        )
        for kind in ("rankings-10", "ratings", "best-of-4", "pairs")
        for tastes in (1, 2, 3, 6)
    }


CELLS: dict[str, Cell] = {
    **_one_taste(),
    **_several_tastes(),
    **_no_groups(),
    **_planted(),
    **_stand_ins(),
}
