"""Verbs that look at things: data, reports, versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torchrl_maxmin.cli.parsing import OneLineParser, parse_config
from torchrl_maxmin.core.errors import UserError

__all__ = ["data", "data_parser", "env", "plan", "report", "training_histories"]

PACKAGES = (
    "torchrl-maxmin",
    "torch",
    "torchrl",
    "tensordict",
    "triton",
    "transformers",
    "datasets",
    "peft",
    "numpy",
    "scipy",
)

_ROLES = {
    "prompt": "prompts; none: there are none",
    "response": "the responses or items that are scored, or of their lists",
    "score": "scores",
    "chosen": "preferred texts",
    "rejected": "the others",
}


def data_parser() -> OneLineParser:
    """Make the parser of ``data``."""
    parser = OneLineParser(prog="torchrl-maxmin data", description="Look at preference data.")
    parser.add_argument("action", choices=["check"], help="the one thing that data does")
    parser.add_argument(
        "dataset_name",
        help="json, jsonl, csv, tsv, parquet, soc or soi file, folder of these, saved dataset or hub name",
    )
    parser.add_argument("--user_column", help="column that says who chose; none: every row is a user")
    for role, what in _ROLES.items():
        parser.add_argument(f"--{role}_column", help=f"column of {what} (default: found by its name)")
    parser.add_argument("--lower_is_better", action="store_true", help="lower scores are better")
    parser.add_argument("--group_column", help="ground truth for evaluation")
    parser.add_argument("--dataset_split", default="train", help="split to look at (default: train)")
    parser.add_argument("--layout", help="how the data are laid out (default: found by the columns)")
    parser.add_argument("--ties", default="drop", help="drop or halve (default: drop)")
    parser.add_argument(
        "--tie_margin", type=float, default=0.0, help="scores no further apart are a tie (default: 0)"
    )
    parser.add_argument(
        "--ratings", default="blocks", help="blocks or pairs of a user's ratings (default: blocks)"
    )
    parser.add_argument(
        "--max_pairs",
        type=int,
        default=64,
        help="most pairs of a block, or of one user's scores (default: 64)",
    )
    parser.add_argument(
        "--model_name_or_path", help="show the first pair as this model reads it, and what --max_length cuts"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="longest text in tokens (default: 1024)")
    parser.add_argument("--chat_template", help="Jinja template or its file, for lists of messages; or none")
    parser.add_argument("--system_prompt", help="opens conversations that have no system message")
    return parser


def data(arguments: list[str]) -> int:
    """``data check FILE``: one screen about a preference data set."""
    given = data_parser().parse_args(arguments)
    if given.max_length < 1:
        raise UserError("--max_length must be at least 1")
    if given.model_name_or_path is None and (given.chat_template or given.system_prompt):
        raise UserError(
            "--chat_template and --system_prompt need --model_name_or_path, whose tokens they make"
        )
    from torchrl_maxmin.core.progress import quiet
    from torchrl_maxmin.preferences import PreferenceDataset

    quiet()

    load = partial(
        PreferenceDataset.load,
        given.dataset_name,
        given.user_column,
        given.group_column,
        given.dataset_split,
        layout=given.layout,
        ties=given.ties,
        tie_margin=given.tie_margin,
        max_pairs=given.max_pairs,
        ratings=given.ratings,
        lower_is_better=given.lower_is_better,
        **{f"{role}_column": getattr(given, f"{role}_column") for role in _ROLES},
        identical="drop",  # counted here, refused where it would train
    )
    report = load().check()
    if report.pairs > 1 and report.distinct_pairs == 1:
        raise UserError(f"all {report.pairs} pairs are copies of one pair; nothing can be learned from them")
    _write(report)
    if given.model_name_or_path:
        from torchrl_maxmin.rewards.reader import load_reader
        from torchrl_maxmin.rewards.settings import tokens_report

        reader = load_reader(
            given.model_name_or_path, chat_template=given.chat_template, system_prompt=given.system_prompt
        )
        _write(tokens_report(load(conversations="messages"), reader, given.max_length))
    return 0


def report(arguments: list[str]) -> int:
    """``report FOLDER``: write ``report.md`` and ``report.html`` again and print the table."""
    parser = OneLineParser(prog="torchrl-maxmin report", description="Report of a run.")
    parser.add_argument("folder", help="folder with a summary.json")
    folder = Path(parser.parse_args(arguments).folder)
    table: Any
    from torchrl_maxmin.core.json_text import complete
    from torchrl_maxmin.core.progress import PlainConsole, quiet
    from torchrl_maxmin.core.text_escape import terminal
    from torchrl_maxmin.diagnosis.report import verdict_table, write_diagnosis
    from torchrl_maxmin.evaluation import load_summary, rich_table, write_report
    from torchrl_maxmin.rewards.report import reward_verdict, write_reward_report

    quiet()
    summary = load_summary(folder)
    with complete(folder / "summary.json"):
        if "proof_gaps" in summary:
            path, table = write_diagnosis(folder, summary), verdict_table(summary)
        elif "policies" in summary:
            path = write_report(folder, summary, histories=training_histories(folder, summary))
            table = rich_table(summary)
        elif "mixing_weights" in summary:
            path, table = write_reward_report(folder, summary), terminal(reward_verdict(summary).headline)
        else:
            raise UserError(
                f"{folder} holds no results by group; give the folder of demo, evaluate, diagnose or reward"
            )
    PlainConsole().print(table, markup=False)
    _write(f"page: {path.with_suffix('.html')}")
    _write(f"report: {path}")
    return 0


def training_histories(folder: Path, summary: Mapping[str, Any]) -> dict[str, list[list[dict[str, float]]]]:
    """Read metrics by policy, then seed, then iteration; empty for a folder that no demo wrote.

    Rewards are the true utilities, in the unit of the tables: every policy logs them beside its own rewards,
    which live on another scale for each. Weights are those of the true groups, in their order; a policy that
    was trained on other groups, or on one reward, has none.

    Args:
        folder: what the demo wrote.
        summary: its ``summary.json``.
    """
    from torchrl_maxmin.core.run import read_metrics
    from torchrl_maxmin.evaluation.results import REFERENCE

    names = [group["name"] for group in summary["groups"]]
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for entry in summary["policies"]["sft"]["per_seed"]:
        home = folder / f"seed-{entry['seed']}"
        for kind in (kind for kind in summary["policies"] if kind != REFERENCE):
            if (home / kind / "metrics.jsonl").is_file():
                heads = _heads(home / f"reward_{kind}", names)
                rows = [_of_groups(row, heads) for row in read_metrics(home / kind)]
                histories.setdefault(kind, []).append(rows)
    return histories


def _heads(reward: Path, names: Sequence[str]) -> list[int] | None:
    """Return the reward head of each group; None where they are not the same groups."""
    if not (reward / "summary.json").is_file():
        return list(range(len(names)))  # trained on the groups' own utilities
    from torchrl_maxmin.core.json_text import complete

    with complete(reward / "summary.json"):
        matched = json.loads((reward / "summary.json").read_text(encoding="utf-8")).get("head_of_group", {})
        heads = [matched.get(name) for name in names]
    return heads if sorted(map(str, heads)) == sorted(map(str, range(len(names)))) else None


def _of_groups(row: Mapping[str, float], heads: Sequence[int] | None) -> dict[str, float]:
    own = {name: value for name, value in row.items() if not name.startswith(("rewards/", "maxmin/weights/"))}
    own |= {
        name.replace("monitor", "rewards"): value
        for name, value in row.items()
        if name.startswith("monitor/")
    }
    weights = [row.get(f"maxmin/weights/{head}") for head in heads or ()]
    return own | {f"maxmin/weights/{k}": value for k, value in enumerate(weights) if value is not None}


def env(arguments: list[str]) -> int:
    """``env``: the versions that a bug report needs."""
    parser = OneLineParser(prog="torchrl-maxmin env", description="Versions, for a bug report.")
    parser.parse_args(arguments)
    import torch

    from torchrl_maxmin.core.versions import untested

    lines = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            installed = metadata.version(package)
            note = untested(package, installed)
            lines[package] = f"{installed}  ({note})" if note else installed
        except metadata.PackageNotFoundError:
            lines[package] = "not installed"
    lines["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    _write("\n".join(f"{name:<16}{value}" for name, value in lines.items()))
    return 0


def plan(arguments: list[str]) -> int:
    """``plan``: memory and time of a stage from a model's config."""
    line = "memory and time of a stage, from a model's config alone"
    from rich.table import Table

    from torchrl_maxmin.core.progress import quiet
    from torchrl_maxmin.trainers.plan import GB, PlanConfig, run_plan, verdict

    quiet()
    config = parse_config("plan", line, PlanConfig, arguments)
    found = run_plan(config)
    settings = found.settings
    table = Table(title=f"{settings.stage}, {found.parameters:,} parameters; GB by part at each phase's peak")
    table.add_column("")
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    for part in dict.fromkeys(part for phase in found.phases for part in phase.parts):
        sizes = [phase.parts.get(part, 0.0) / GB for phase in found.phases]
        if max(sizes) >= 0.0005:
            table.add_row(part, *(f"{size:.3f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("all", *(f"{phase.total / GB:.3f}" for phase in found.phases), style="bold")
    table.add_row("time", *(_duration(phase.seconds) for phase in found.phases))
    _write(table)
    flops = ", ".join(f"{value / 1e9:,.0f} GFLOP/s {name}" for name, value in found.rates["flops"].items())
    _write(
        f"time of an iteration, by rates measured here just now on {found.rates['device']} ({flops}, "
        f"{found.rates['bytes_per_second'] / GB:.0f} GB/s), with all responses of full length"
    )
    if sent := [message for phase in found.phases for message in phase.messages]:
        link = settings.link()
        seconds = sum(message.seconds(settings.gpus, link) for message in sent)
        origin = "measured, too" if found.rates["network"]["measured"] else "taken, not measured"
        size, count = sum(message.bytes for message in sent) / GB, sum(message.count for message in sent)
        _write(
            f"of it {seconds:.2g} s for {size:.3g} GB between processes in {count:,.0f} messages, at "
            f"{link.bandwidth / GB:.3g} GB/s and {1e6 * link.latency:.3g} us a message ({origin})"
        )
    _write("\n".join(verdict(found, settings)))
    return 0


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _write(what: Any) -> None:
    """Print a text, whose lines stay whole, or a table."""
    from torchrl_maxmin.core.progress import PlainConsole

    PlainConsole().print(what, soft_wrap=isinstance(what, str))
