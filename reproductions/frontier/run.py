"""What each group gets, and at what cost: frontier, shares of the minority and robustness.

    python reproductions/frontier/run.py [--seeds 0 1 2] [--workers 2] [--smoke]

Trains every policy by the package's own stages on the embedded world, measures it on held-out prompts by the
groups' true utilities, and writes results.md, CSV files and pictures. A run that was cut off goes on where it
was; steps whose settings changed are done again. Remove runs/frontier to start over.
"""

import sys
import time
import warnings
from pathlib import Path

from torchrl_maxmin.core.tasks import run_tasks
from torchrl_maxmin.stats.interval import CoverageWarning

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main
from plan import FULL, SMOKE, SeedPlan
from report import write_report
from steps import Plan

HERE = Path(__file__).parent


def main() -> None:
    """Run what is not done yet and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one whole run each")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--smoke", action="store_true", help="every step once, on next to nothing")
    parser.add_argument("--runs_dir", type=Path, help="models and measurements; runs/frontier")
    parser.add_argument("--output_dir", type=Path, help="results; beside this file")
    given = parser.parse_args()
    if given.workers < 1 or min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        parser.error("--workers must be at least 1, and --seeds distinct numbers, none below 0")
    runs = given.runs_dir or Path("runs/frontier-smoke" if given.smoke else "runs/frontier")
    output = given.output_dir or (runs / "results" if given.smoke else HERE)
    sizes, plan = SMOKE if given.smoke else FULL, Plan()
    homes = [runs / f"seed-{seed}" for seed in given.seeds]
    for seed, home in zip(given.seeds, homes, strict=True):
        SeedPlan(plan, sizes, home, seed)
    start = time.perf_counter()
    run_tasks(plan.tasks, given.workers, overall="frontier, shares, robustness")
    minutes = (time.perf_counter() - start) / 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # results.md says so
        findings = write_report(homes, sizes, output, sum(plan.seconds().values()) / 60)
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    sys.stdout.write(f"frontier done in {minutes:.1f} min: {output / 'results.md'}\n")


if __name__ == "__main__":
    run_main("frontier", main)
