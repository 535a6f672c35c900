"""Does the program find the groups of simulated people, and none where there are none? (``make people``)

    python reproductions/people/run.py [--cells NAME ...] [--seeds N] [--output FOLDER] [--runs FOLDER]
    python reproductions/people/run.py --must_show [--cells 'one-*' ...]
    python reproductions/people/run.py --tables_only      # results.md anew from the CSV file

People of known tastes (``people_worlds.py``) rank, choose, rate and compare; the files that they leave are
read and diagnosed as anybody's are. A cell is one kind of world in several seeds, each a step of its own in
``--runs``: what is there is not done again, so that a run that was cut off goes on; after a change of the
program name another folder. ``--cells`` takes names and patterns, ``--must_show`` the cells of which it is
said how often the answer has to be right; without either, the stand-ins of one to six tastes are run.
Writes ``results.csv``, a line a seed, and ``results.md``; figures of cells that were not run again stay in
both.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from people_cells import CELLS, Cell, Run, measure

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.tables import markdown_table, write_csv, write_paragraphs
from torchrl_maxmin.core.tasks import run_tasks

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main
from steps import Plan

HERE = Path(__file__).parent
HEADER = (
    "cell",
    "users, pairs",
    "has to be so",
    "is so",
    "K chosen (times)",
    "established",
    "adjusted Rand index",
    "balanced accuracy",
    "misassigned: expected, true, least possible",
    "CPU seconds",
)


def main() -> None:
    """Run the cells that were asked for and write their tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="NAME", help="names or patterns; all")
    parser.add_argument("--must_show", action="store_true", help="the cells with a number to be reached")
    parser.add_argument("--seeds", type=int, help="how many of each cell's seeds; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/people"), help="what is done, to go on from")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results.csv and results.md")
    parser.add_argument("--tables_only", action="store_true", help="only rewrite results.md, fit nothing")
    args = parser.parse_args()
    path = args.output / "results.csv"
    if not args.tables_only:
        rows = run_cells(choose_cells(args.cells, args.must_show), args.seeds, args.runs, args.workers)
        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(path, merged(read_rows(path), rows), ".6g")
        for name in dict.fromkeys(row["cell"] for row in rows):
            for line in claims_of(CELLS[name], [row for row in rows if row["cell"] == name]):
                console.print(f"{name}: {line}")
    write_paragraphs(args.output / "results.md", tables(read_rows(path)))


def choose_cells(patterns: Sequence[str], must_show: bool) -> list[str]:
    """Names of the cells that fit; without a pattern the stand-ins, or those that must be shown."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CELLS):
            raise UserError(f"no cell {pattern}; choose from {', '.join(CELLS)}")
    wanted = [name for name in CELLS if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if must_show or list(patterns) == ["*"]:
        wanted = [name for name in wanted if CELLS[name].must_show == must_show]
    if not wanted:
        raise UserError(f"none of {', '.join(patterns)} has to be shown; leave --must_show out")
    return wanted


def run_cells(names: Sequence[str], seeds: int | None, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Figures of every seed, those that are not there yet in so many processes."""
    plan, wanted = Plan(), {}
    for name in names:
        for seed in range(CELLS[name].seeds if seeds is None else min(seeds, CELLS[name].seeds)):
            run = Run(name, seed, folder / name / f"seed-{seed}")
            wanted[plan.add(f"{name} {seed}/run", measure, run, run.folder)] = run
    if left := plan.needed(name for name in wanted if not plan.done(name)):
        run_tasks(left, workers, overall="people")
    return [json.loads((run.folder / "row.json").read_text()) for run in wanted.values()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of an earlier ``results.csv`` with numbers as numbers; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def merged(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Both, the later line of a cell and seed for the earlier one, in the order of the cells."""
    lines = {(row["cell"], row["seed"]): row for row in [*before, *now] if row["cell"] in CELLS}
    return [lines[key] for key in sorted(lines, key=lambda key: (list(CELLS).index(key[0]), key[1]))]


def claims_of(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each claim with how often it is so, such as ``K = 1 in 20 of 20 (19 of 20 needed)``."""
    lines = []
    for claim in cell.claims:
        needed = f" ({claim.needed} of {cell.seeds} needed)" if claim.needed else ""
        lines.append(f"{claim.text} in {sum(map(claim.right, rows))} of {len(rows)}{needed}")
    return lines


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a table a section."""
    parts = [
        "# Simulated people, and what the program says of them",
        "Written by `run.py` from `results.csv`.",
    ]
    by_cell = {name: [row for row in rows if row["cell"] == name] for name in CELLS}
    for section in dict.fromkeys(cell.section for cell in CELLS.values()):
        names = [name for name, cell in CELLS.items() if cell.section == section and by_cell[name]]
        if names:
            lines = [line for name in names for line in _lines(name, by_cell[name])]
            parts += [f"## {section}", markdown_table(HEADER, lines, "|---")]
    return [*parts, LEGEND]


LEGEND = """\
*Established*: how often, where more than one group was chosen, the groups were found again. The adjusted Rand
index is that of the groups at the K that was chosen; accuracy (averaged over tastes) and misassignment (over
users) are those at the true number. *Least possible* is what is misassigned by who knows tastes, shares,
noise and thresholds. Seconds are CPU time of one `diagnose`, without the intervals of costs. Means over
seeds."""


def _lines(name: str, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line a claim; the figures stand in the first."""
    cell = CELLS[name]
    chosen = Counter(row["num_groups"] for row in rows)
    several = [row for row in rows if row["num_groups"] > 1]
    established = f"{sum(row.get('established') is True for row in several)} of {len(several)}"
    misassigned = [_mean(rows, f"{which}_misassignment", ".1%") for which in ("expected", "true", "least")]
    figures = [
        ", ".join(f"{k} ({count})" for k, count in sorted(chosen.items())),
        established if several else "",
        _mean(rows, "adjusted_rand_index", ".2f"),
        _mean(rows, "balanced_accuracy", ".3f"),
        ", ".join(misassigned) if all(misassigned) else "",
        _mean(rows, "seconds", ".1f"),
    ]
    size = f"{rows[0]['users']:,}, {_mean(rows, 'pairs', ',.0f')}"
    lines: list[list[str]] = []
    for claim, text in zip(cell.claims, claims_of(cell, rows), strict=True):
        first = not lines
        count = text.removeprefix(f"{claim.text} in ")
        lines.append(
            [name if first else "", size if first else "", claim.text, count]
            + (figures if first else [""] * len(figures))
        )
    return lines


def _mean(rows: Sequence[Mapping[str, Any]], key: str, spec: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return format(sum(values) / len(values), spec) if values else ""


if __name__ == "__main__":
    run_main("people", main)
