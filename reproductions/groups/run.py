"""Who belongs together, on the embedded world: three experiments on the reward stage alone.

    python reproductions/groups/run.py [recovery] [table1] [figure6] [--seeds 10] [--output FOLDER]
    python reproductions/groups/run.py --tables_only     # results.md anew from the CSV files

``recovery``
    10:1 and 80:20, 300 users, 20 pairs each: are the users found, does each head follow its group's utility,
    and how many groups does the likelihood of left-out users choose?
``table1``
    The shape of the paper's Table 1: accuracy on the minority's held-out pairs as the majority grows from 1:1
    to 10:1, for a single reward, the mixture, and heads trained on the true groups.
``figure6``
    The setting of the paper's Figure 6: 2 groups of 30 users, 75 pairs each; balanced accuracy by EM round.

Each writes ``<name>.csv``, and all together ``results.md``; true groups are used to measure, and to train
where the row says so.
"""

import csv
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.core.tasks import Task, run_tasks
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import MixtureFit, fit_mixture
from torchrl_maxmin.trainers.reward import user_accuracy
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import World, sample_prompts
from torchrl_maxmin.world.world import RESPONSE_LENGTH, write_preferences, write_world

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

#: Table 1 of arXiv 2402.08925 (v2): total, majority and minority accuracy of a single reward on Tulu2-7B.
PAPER_TABLE1 = {
    "1:1": (0.686, 0.668, 0.704),
    "2:1": (0.608, 0.728, 0.488),
    "6:1": (0.588, 0.724, 0.452),
    "10:1": (0.568, 0.716, 0.420),
}
RECIPE = yaml.safe_load((files("torchrl_maxmin") / "cli/configs/demo.yaml").read_text())


@dataclass(frozen=True)
class Run:
    """One seed of one experiment, in a process of its own; its rows go to ``file``."""

    experiment: str
    seed: int
    file: Path


def call(run: Run) -> None:
    """Run one seed of one experiment and write its rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(EXPERIMENTS[run.experiment](Path(scratch), run.seed))
    write_csv(run.file, rows)


def prepare(folder: Path, seed: int) -> Path:
    """The demo's reference policy for this seed."""
    sizes = {k: v for k, v in RECIPE["world"].items() if k.startswith("num_")}
    write_world(folder, seed, **sizes)
    reference = folder / "sft"
    run_sft(
        SFTConfig(
            model_name_or_path=str(folder / "base_model"),
            dataset_name=str(folder / "sft.jsonl"),
            output_dir=str(reference),
            seed=seed,
            device="cpu",
            **RECIPE["sft"],
        )
    )
    return reference


def label(
    folder: Path, reference: Path, world: World, seed: int, num_users: int = 300, pairs: int = 20
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Training and held-out pairs of people of this world."""
    write_preferences(folder, world, reference, seed, num_users, pairs, 5)
    return (
        PreferenceDataset.load(folder / "preferences.jsonl"),
        PreferenceDataset.load(folder / "preferences_test.jsonl"),
    )


def fit(
    data: PreferenceDataset, heldout: PreferenceDataset, reference: Path, seed: int, **options: Any
) -> MixtureFit:
    """The demo's reward stage."""
    recipe = RECIPE["reward"]
    settings = {
        "num_rounds": recipe["num_rounds"],
        "steps_per_round": recipe["steps_per_round"],
        "batch_size": recipe["per_device_train_batch_size"],
        "learning_rate": recipe["learning_rate"],
        "head_learning_rate": recipe["head_learning_rate"],
        "max_length": recipe["max_length"],
    }
    return fit_mixture(data, str(reference), heldout=heldout, seed=seed, **(settings | options))


def recovery(folder: Path, seed: int) -> Iterable[dict[str, Any]]:
    """Users, heads and K at 10:1 and 80:20."""
    reference = prepare(folder, seed)
    for name in ("10:1", "80:20"):
        world = World.preset(name)
        data, heldout = label(folder, reference, world, seed)
        found = fit(data, heldout, reference, seed, num_groups="auto")
        chosen = found.model.num_groups
        if chosen != 2:
            found = fit(data, heldout, reference, seed, num_groups=2)
        accuracy, heads = user_accuracy(found.responsibilities_matrix, data.groups or [])
        correlation = utility_correlation(found, world, reference, seed)
        yield {
            "world": name,
            "seed": seed,
            "num_groups_selected": chosen,
            "balanced_accuracy": round(accuracy, 4),
            **{
                f"correlation_{group}": round(correlation[heads[group], g], 4)
                for g, group in enumerate(world.group_names)
            },
        }


def utility_correlation(found: MixtureFit, world: World, reference: Path, seed: int) -> Any:
    """Correlation [K, G] of the heads with the groups' utilities over samples of the reference policy."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(reference))
    policy = TokenPolicy.from_pretrained(str(reference), tokenizer, max_new_tokens=RESPONSE_LENGTH)
    prompts = sample_prompts(512, seed, heldout=True)
    asked, texts = to_texts(tokenizer, sample_responses(policy, encode_prompts(tokenizer, prompts), 2))
    rewards = found.model.score(asked, texts).double()
    utilities = torch.as_tensor(world.utilities([f"{p} {t}" for p, t in zip(asked, texts, strict=True)]))
    both = torch.cat([rewards, utilities], 1).T
    return torch.corrcoef(both)[: rewards.shape[1], rewards.shape[1] :].numpy()


def table1(folder: Path, seed: int) -> Iterable[dict[str, Any]]:
    """Accuracy on held-out pairs of each group, by ratio and by what was trained."""
    reference = prepare(folder, seed)
    for ratio in (1, 2, 6, 10):
        world = World.preset("10:1")
        world.shares = (ratio / (ratio + 1), 1 / (ratio + 1))
        data, heldout = label(folder, reference, world, seed)
        kinds: dict[str, dict[str, Any]] = {
            "single": {"num_groups": 1},
            "mixture": {"num_groups": 2},
            "true groups": {"use_true_groups": True},
        }
        for kind, options in kinds.items():
            found = fit(data, heldout, reference, seed, **options)
            accuracy = group_accuracy(found, heldout)
            yield {"ratio": f"{ratio}:1", "seed": seed, "reward": kind, **accuracy}


def group_accuracy(found: MixtureFit, heldout: PreferenceDataset) -> dict[str, float]:
    """Share of held-out pairs that each user's own head ranks as the user did, by true group."""
    margins = found.model.score(heldout.prompts, heldout.chosen) - found.model.score(
        heldout.prompts, heldout.rejected
    )
    index = {user: i for i, user in enumerate(found.user_ids)}
    head = found.responsibilities_matrix.argmax(-1)[[index[user] for user in heldout.user_ids]]
    row_users = heldout.row_users
    right = margins[torch.arange(len(margins)), head[row_users]] > 0
    group = [(heldout.groups or [])[user] for user in row_users.tolist()]
    return {
        name: round(right[[g == name for g in group]].double().mean().item(), 4)
        for name in ("sentiment", "conciseness")
    }


def figure6(folder: Path, seed: int) -> Iterable[dict[str, Any]]:
    """Balanced accuracy of users after every EM round, 2 groups, 60 users, 75 pairs each."""
    reference = prepare(folder, seed)
    world = World.preset("10:1")
    world.shares = (0.5, 0.5)
    data, heldout = label(folder, reference, world, seed, num_users=60, pairs=75)
    accuracy: list[float] = []

    def keep(state: dict[str, Any]) -> None:
        accuracy.append(user_accuracy(state["responsibilities"], data.groups or [])[0])

    fit(data, heldout, reference, seed, num_groups=2, num_rounds=5, on_round=keep)
    for index, value in enumerate(accuracy):
        yield {"seed": seed, "round": index + 1, "balanced_accuracy": round(value, 4)}


EXPERIMENTS: dict[str, Callable[[Path, int], Iterable[dict[str, Any]]]] = {
    "recovery": recovery,
    "table1": table1,
    "figure6": figure6,
}


def main() -> None:
    """Run the experiments that were asked for and write their tables."""
    parser = make_parser(__doc__)
    parser.add_argument("experiments", nargs="*", help=f"some of {', '.join(EXPERIMENTS)}; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tables_only", action="store_true", help="only rewrite results.md, fit nothing")
    args = parser.parse_args()
    if args.tables_only:
        write_tables(args.output)
        return
    names = args.experiments or list(EXPERIMENTS)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"no experiment {unknown[0]!r}; choose from {', '.join(EXPERIMENTS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            Run(name, seed, Path(scratch) / f"{name}-{seed}.csv")
            for name in names
            for seed in range(args.seeds)
        ]
        run_tasks({f"{r.experiment} {r.seed}/run": Task(call, r) for r in runs}, args.workers)
        for name in names:
            parts = [r.file.read_text().splitlines() for r in runs if r.experiment == name]
            lines = [parts[0][0], *(line for part in parts for line in part[1:])]
            (args.output / f"{name}.csv").write_text("\n".join(lines) + "\n")
            console.print(f"{name}: {args.output / f'{name}.csv'}")
    write_tables(args.output)


def write_tables(folder: Path) -> None:
    """``results.md``: the tables of the experiments whose figures lie in the folder."""
    parts = [
        "# Who belongs together, on the embedded world",
        "",
        "Written by `run.py` from the CSV files.",
        "",
    ]
    for name, table in TABLES.items():
        if (folder / f"{name}.csv").is_file():
            with (folder / f"{name}.csv").open(newline="") as file:
                parts += table(list(csv.DictReader(file)))
    (folder / "results.md").write_text("\n".join(parts))


def recovery_table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: by world, over seeds."""
    lines = [
        "## Recovery: 300 users, 20 pairs each",
        "",
        "| world | K = 2 chosen | balanced accuracy, lowest | correlation of the majority's head with its "
        "utility, mean and lowest | of the minority's |",
        "|---|---|---|---|---|",
    ]
    for world in dict.fromkeys(row["world"] for row in rows):
        mine = [row for row in rows if row["world"] == world]
        chosen = sum(row["num_groups_selected"] == "2" for row in mine)
        cells = [f"{chosen} of {len(mine)}", f"{min(float(row['balanced_accuracy']) for row in mine):.3f}"]
        for group in ("sentiment", "conciseness"):
            values = [float(row[f"correlation_{group}"]) for row in mine]
            cells.append(f"{sum(values) / len(values):.3f}, {min(values):.3f}")
        lines.append(f"| {world} | {' | '.join(cells)} |")
    return [*lines, ""]


def table1_table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: accuracy by ratio beside the paper's, mean over seeds with the lowest and the highest."""
    seeds = len({row["seed"] for row in rows})
    kinds = ("single", "mixture", "true groups")
    lines = [
        f"## The paper's Table 1: accuracy on held-out pairs, {seeds} seeds",
        "",
        "The paper's figures are those of a single reward on Tulu2-7B and prompted preferences (arXiv "
        "2402.08925, v2), one seed; ours are mean [lowest, highest] over seeds of another world, so that the "
        "shape compares and the numbers do not. Total is the mean of the two groups, as in the paper.",
        "",
        "| majority : minority | accuracy | paper, single | "
        + " | ".join(f"ours, {k}" for k in kinds)
        + " |",
        "|---|---|---:|" + "---:|" * len(kinds),
    ]
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        for place, label in enumerate(("total", "majority", "minority")):
            cells = [f"{PAPER_TABLE1[ratio][place]:.3f}"]
            for kind in kinds:
                mine = [r for r in rows if (r["ratio"], r["reward"]) == (ratio, kind)]
                groups = [(float(r["sentiment"]), float(r["conciseness"])) for r in mine]
                values = [(sum(pair) / 2, *pair)[place] for pair in groups]
                mean = sum(values) / len(values)
                cells.append(f"{mean:.3f} [{min(values):.3f}, {max(values):.3f}]")
            lines.append(f"| {ratio} | {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def figure6_table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: seeds with every user in the right group, by round."""
    lines = [
        "## The setting of the paper's Figure 6: 2 groups of 30 users, 75 pairs each",
        "",
        "| EM round | seeds with every user in the right group |",
        "|---|---|",
    ]
    for index in dict.fromkeys(row["round"] for row in rows):
        mine = [float(row["balanced_accuracy"]) == 1 for row in rows if row["round"] == index]
        lines.append(f"| {index} | {sum(mine)} of {len(mine)} |")
    return [*lines, ""]


TABLES: dict[str, Callable[[list[dict[str, str]]], list[str]]] = {
    "recovery": recovery_table,
    "table1": table1_table,
    "figure6": figure6_table,
}


if __name__ == "__main__":
    run_main("groups", main)
