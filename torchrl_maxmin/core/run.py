"""What every stage does around its work: seeds, output folder, resolved config, metrics."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from torchrl_maxmin.core.distributed import is_main_process, of_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.finite import NonFiniteError, nonfinite_batch
from torchrl_maxmin.core.json_text import write_json_text
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.text_escape import terminal

__all__ = [
    "MetricsLog",
    "prepare_output_dir",
    "require_finite",
    "resolve_device",
    "seed_everything",
    "write_config",
    "write_json",
]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """The torch device of ``--device``; raises :class:`UserError` where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; give cpu, cuda, cuda:0 or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this torch sees no GPU; use --device cpu or install a CUDA build")
    return device


def prepare_output_dir(path: str | Path) -> Path:
    """Create an output folder; raises :class:`UserError` if it holds anything already."""
    folder = Path(path)

    def prepare() -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output folder {folder} is not empty; choose another --output_dir or remove it")
        folder.mkdir(parents=True, exist_ok=True)

    of_main_process(prepare)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write json whole or not at all; of processes that work as one, the main one writes."""
    if not is_main_process():
        return
    partial = path.with_suffix(".partial")
    write_json_text(partial, content)
    os.replace(partial, path)


def write_config(folder: Path, config: Any) -> None:
    """Write the resolved config of a stage; the file is what ``--config`` takes, to begin or to go on."""
    if not is_main_process():
        return
    partial = folder / ".config.yaml.partial"
    partial.write_text(config_text(config))
    os.replace(partial, folder / "config.yaml")


def config_text(config: Any) -> str:
    """A config as YAML, without where a run went on."""
    settings = asdict(config)
    if settings.get("resume_from_checkpoint"):
        settings["resume_from_checkpoint"] = None
    return yaml.safe_dump(settings, sort_keys=False)


class MetricsLog:
    """One json object a line in ``metrics.jsonl``, and any TorchRL logger beside it.

    Args:
        folder: where the file goes.
        report_to: a TorchRL logger (``csv``, ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``) or None;
            one that fails is left out from then on, with a warning, and ends no run.
        keep: lines to keep of a file that is there already (on resume).
    """

    def __init__(self, folder: Path, report_to: str | None = None, keep: int = 0):
        self.writes = is_main_process()
        if not self.writes:
            return
        self.path = folder / "metrics.jsonl"
        kept = _readable(self.path, keep) if keep and self.path.is_file() else []
        self.path.write_text("".join(line + "\n" for line, _ in kept))
        self.logger, self.report_to = None, report_to
        if report_to:
            try:
                from torchrl.record.loggers import get_logger

                own = {"trackio_kwargs": {"project": "torchrl-maxmin"}}  # of the others' no option
                self.logger = get_logger(report_to, str(folder / "logs"), folder.name, **own)
            except Exception as error:
                self._leave_out(error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step."""
        if not self.writes:
            return
        numbers = ((name, float(value)) for name, value in metrics.items())
        row = {"step": step, **{name: n if math.isfinite(n) else None for name, n in numbers}}
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.logger is not None:
            try:
                for name, value in metrics.items():
                    self.logger.log_scalar(name, float(value), step=step)
            except Exception as error:  # a full disk there, a network that is gone
                self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        words = terminal(error, 300) or type(error).__name__
        console.print(f"warning: {self.report_to} fails, and is left out: {words}", soft_wrap=True)
        self.logger = None


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Read what :class:`MetricsLog` wrote; null, which stands for what is not finite, comes back as NaN.

    Lines that are damaged are left out, with a warning.
    """
    rows = _readable(Path(folder) / "metrics.jsonl")
    return [{name: math.nan if n is None else n for name, n in row.items()} for _, row in rows]


def _readable(path: Path, most: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The first lines of a file of metrics that are as they were written, each with its row."""
    found = []
    lines = [line for line in path.read_bytes().decode(errors="replace").split("\n") if line][:most]
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if (
                isinstance(row, dict)
                and "step" in row
                and all(n is None or isinstance(n, int | float) for n in row.values())
            ):
                found.append((line, row))
    if len(found) < len(lines):
        text = f"warning: {len(lines) - len(found)} lines of {path} are damaged, and left out"
        console.print(text, markup=False, soft_wrap=True)
    return found


def require_finite(value: float, batch: Any, folder: Path | None, what: str) -> None:
    """Stop the run on a NaN or infinity, with the offending batch saved for inspection.

    Args:
        value: what must be finite.
        batch: what gave it: a TensorDict, a dict of tensors, or a function that makes one.
        folder: where the batch goes; None leaves it in the error.
        what: words for the value.

    Raises:
        FloatingPointError: naming the file of the batch.
        NonFiniteError: without a folder.

    Example:
        >>> require_finite(0.5, {}, None, "the loss")
        >>> require_finite(float("nan"), {}, None, "the loss")
        Traceback (most recent call last):
        torchrl_maxmin.core.finite.NonFiniteError: the loss is nan
    """
    if math.isfinite(value):
        return
    batch = batch() if callable(batch) else batch
    if folder is None:
        raise NonFiniteError(f"{what} is {value}", batch)
    raise nonfinite_batch(batch, folder, f"{what} is {value}")


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in its place; a crash leaves the old one or the new one, never half."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
