"""Verbs that look at things: data, reports, versions."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path

from torchrl_maxmin.errors import UserError

__all__ = ["data", "env", "report"]


def data(arguments: list[str]) -> int:
    """``data check FILE``: one screen about a preference data set."""
    parser = argparse.ArgumentParser(prog="torchrl-maxmin data", description="Look at preference data.")
    parser.add_argument("action", choices=["check"])
    parser.add_argument("dataset_name", help="json, jsonl, csv or parquet file, saved dataset or hub name")
    parser.add_argument("--user_column", help="column that says who chose")
    parser.add_argument("--group_column", help="ground truth for evaluation")
    parser.add_argument("--dataset_split", default="train")
    given = parser.parse_args(arguments)
    from torchrl_maxmin.preferences import PreferenceDataset
    from torchrl_maxmin.progress import console

    loaded = PreferenceDataset.load(
        given.dataset_name, given.user_column, given.group_column, given.dataset_split
    )
    console.print(loaded.check(), highlight=False, markup=False)
    return 0


def report(arguments: list[str]) -> int:
    """``report FOLDER``: rewrite ``report.md`` from ``summary.json`` and print the table."""
    parser = argparse.ArgumentParser(prog="torchrl-maxmin report", description="Report of a run.")
    parser.add_argument("folder", help="folder with a summary.json")
    folder = Path(parser.parse_args(arguments).folder)
    if not (folder / "summary.json").is_file():
        raise UserError(f"no summary.json in {folder}; give the output folder of demo or evaluate")
    from torchrl_maxmin.evaluation import rich_table, write_report
    from torchrl_maxmin.progress import console

    summary = json.loads((folder / "summary.json").read_text())
    console.print(rich_table(summary))
    console.print(f"report: {write_report(folder, summary)}", highlight=False)
    return 0


def env(arguments: list[str]) -> int:
    """``env``: the versions that a bug report needs."""
    argparse.ArgumentParser(prog="torchrl-maxmin env", description="Versions, for a bug report.").parse_args(arguments)
    import torch

    from torchrl_maxmin.progress import console

    packages = ("torchrl-maxmin", "torch", "torchrl", "tensordict", "triton", "transformers", "datasets", "numpy", "scipy")
    lines = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            lines[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            lines[package] = "not installed"
    lines["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console.print("\n".join(f"{name:<16}{value}" for name, value in lines.items()), highlight=False, markup=False)
    return 0
