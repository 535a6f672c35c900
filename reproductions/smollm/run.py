"""The paper's two language experiments on a real pretrained model, which needs no model hub.

    python reproductions/smollm/run.py [--recipes FILE ...] [--tastes ...] [--ratios ...] [--smoke]

A recipe says what is trained and how much; recipes/imdb.yaml and recipes/psoups.yaml are the paper's two.
Every run of one is a pair of tastes, a ratio of users and a seed: people label pairs, a single reward and a
mixture are fitted, a policy is trained on each and measured by the true tastes. A run that was cut off goes
on where it was; steps whose settings changed are done again. results.md and a CSV file a recipe hold all
runs that are finished, those of earlier calls too. Remove the folder of the runs to start over.
"""

import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "real_model")]

from common import make_parser, run_main
from recipes import load_recipe, shrink
from results import write_results
from smollm2 import make
from stages import RecipePlan
from steps import Plan
from tastes import require_packages

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.tasks import run_tasks
from torchrl_maxmin.models.loading import require_causal_lm
from torchrl_maxmin.stats.interval import CoverageWarning

HERE = Path(__file__).parent
RECIPES = [HERE / "recipes/imdb.yaml", HERE / "recipes/psoups.yaml"]


def main() -> None:
    """Run what is not done yet and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--recipes", type=Path, nargs="+", default=RECIPES, help="YAML files; both by default"
    )
    parser.add_argument("--tastes", nargs="+", help="only these of a recipe's pairs of tastes")
    parser.add_argument("--ratios", type=float, nargs="+", help="only these of its ratios")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than a recipe's, a run each")
    parser.add_argument(
        "--use_peft", choices=("true", "false"), help="adapters or all weights, whatever it says"
    )
    parser.add_argument("--model_name_or_path", help="another base model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--smoke", action="store_true", help="every step once, on next to nothing")
    parser.add_argument("--runs_dir", type=Path, help="models and measurements; runs/smollm-experiments")
    parser.add_argument("--output_dir", type=Path, help="results; beside this file")
    given = parser.parse_args()
    if given.workers < 1:
        parser.error("--workers must be at least 1")
    require_packages()
    runs = given.runs_dir or Path(f"runs/smollm-experiments{'-smoke' * given.smoke}")
    output = given.output_dir or (runs / "results" if given.smoke else HERE)
    plan, plans, wanted = Plan(), [], []
    for path in given.recipes:
        recipe = load_recipe(path)
        if given.seeds:
            recipe = recipe.with_parts(seeds=given.seeds)
        if given.use_peft:
            recipe = replace(recipe, use_peft=given.use_peft == "true")
        if given.model_name_or_path:
            recipe = replace(recipe, model_name_or_path=given.model_name_or_path)
        recipe = shrink(recipe) if given.smoke else recipe
        found = RecipePlan(plan, recipe, runs / recipe.name, given.device)
        plans.append(found)
        wanted += [
            step
            for run in found.runs
            if run.tastes in (given.tastes or recipe.tastes) and run.ratio in (given.ratios or recipe.ratios)
            for step in run.steps
        ]
    if not wanted:
        raise UserError("none of the recipes has these tastes at these ratios")
    for name in {found.recipe.model_name_or_path for found in plans}:
        if name == str(Path("runs/smollm2")):
            make(Path(name))
        require_causal_lm(name)
    start = time.perf_counter()
    run_tasks(plan.needed(wanted), given.workers, overall="language experiments")
    minutes = (time.perf_counter() - start) / 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # results.md says so
        seconds = plan.seconds()
        parts = [
            (
                found.recipe,
                [run for run in found.runs if all(map(plan.done, run.steps))],
                sum(s for name, s in seconds.items() if name.split()[0] == found.recipe.name) / 60,
            )
            for found in plans
        ]
        page = write_results(output, parts)
    sys.stdout.write(f"smollm done in {minutes:.1f} min: {page}\n")


if __name__ == "__main__":
    run_main("smollm", main)
