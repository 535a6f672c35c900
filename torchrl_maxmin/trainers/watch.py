"""Warn, once for each kind, of numbers that go wrong while a policy is trained."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.distributed import is_main_process
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.ppo_settings import PPOSettings

__all__ = ["Watch", "warnings_of"]

Row = Mapping[str, float]

_WINDOW = 10  # iterations that a number must be wrong for, or on average: one batch is noise
_KEPT = 50
_PAGE = "docs/numbers.md"


class Watch:
    """Reads the metrics of every iteration, and says in one line what they should not be.

    What each warning means and what to do about it stands in ``docs/numbers.md``, under its name; each is
    given once a run. The thresholds are the settings ``warn_*``; 0 turns one off. A resumed run reads the
    metrics that were logged before, so that it warns as one that never stopped.

    Args:
        config: the stage's settings, with its thresholds.
        history: metrics of the iterations until now, as logged; what they warn of is not printed.

    Attributes:
        found: the warnings until now: ``name``, ``iteration`` (from 1) and ``text``.

    Example:
        >>> watch = Watch(PPOSettings(output_dir="runs/ppo"))
        >>> for iteration in range(1, 12):
        ...     watch(iteration, {"val/ratio": 7.0})
        >>> [(warning["name"], warning["iteration"]) for warning in watch.found]
        [('ratio-explosion', 11)]
    """

    def __init__(self, config: PPOSettings, history: Iterable[Row] = ()):
        self.config = config
        self.found: list[dict[str, Any]] = []
        self.first: list[Row] = []
        self.rows: deque[Row] = deque(maxlen=_KEPT)
        for iteration, row in enumerate(history, start=1):
            self._read(iteration, row)

    @classmethod
    def resumed(cls, config: PPOSettings, start: int) -> Watch:
        """A watch that has read so many iterations of a run's log; of more processes the main one reads."""
        logged = start and is_main_process()
        return cls(config, islice(read_metrics(config.output_dir), start) if logged else ())

    def __call__(self, iteration: int, metrics: Row) -> None:
        """Read one iteration's metrics, and print what is wrong with them for the first time.

        Args:
            iteration: its number, from 1.
            metrics: as they are logged.
        """
        known = len(self.found)
        self._read(iteration, metrics)
        for warning in self.found[known:]:
            place = f"{_PAGE}#{warning['name']}"
            line = f"warning: iteration {warning['iteration']}: {warning['text']}; see {place}"
            if is_main_process():
                console.print(line, style="yellow", markup=False, soft_wrap=True)

    def _read(self, iteration: int, metrics: Row) -> None:
        self.rows.append(metrics)
        if len(self.first) < _WINDOW:
            self.first.append(metrics)
            return
        given = {warning["name"] for warning in self.found}
        for name, (flag, check) in CHECKS.items():
            threshold = getattr(self.config, flag)
            if threshold and name not in given and (text := check(self, threshold)):
                self.found.append({"name": name, "iteration": iteration, "text": text})

    def last(self, name: str, count: int = _WINDOW) -> list[float]:
        """A metric in the last iterations, where all of them have it and it is finite; else nothing."""
        return _column(list(self.rows)[-count:], name)

    def per_token(self, name: str, rows: Sequence[Row] | None = None) -> float | None:
        """The mean of a response's metric over some iterations, the last when None, a token."""
        rows = list(self.rows)[-_WINDOW:] if rows is None else rows
        values, lengths = _column(rows, name), _column(rows, "completions/mean_length")
        return sum(values) / sum(lengths) if values and lengths and sum(lengths) > 0 else None


def warnings_of(config: PPOSettings) -> list[dict[str, Any]]:
    """What a run that has logged its metrics was warned of, for its summary."""
    if not (Path(config.output_dir) / "metrics.jsonl").is_file():
        return []
    return Watch(config, read_metrics(config.output_dir)).found


def _column(rows: Iterable[Row], name: str) -> list[float]:
    values = [row.get(name) for row in rows]
    known = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    return [float(value) for value in values] if known else []  # type: ignore[arg-type]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _kl_below_zero(watch: Watch, threshold: float) -> str | None:
    kl = watch.last("objective/kl")
    if kl and (mean := _mean(kl)) < -threshold:
        return (
            f"objective/kl was {mean:.2f} nats on average over {_WINDOW} iterations, and a divergence is "
            "never negative: the samples are not the policy's own distribution"
        )
    return None


def _kl_above_target(watch: Watch, threshold: float) -> str | None:
    target = getattr(watch.config, "kl_target", 0.0)
    if getattr(watch.config, "kl_controller", "") != "adaptive" or not target:
        return None
    kl = watch.last("objective/kl")
    if kl and min(kl) > threshold * target:
        return f"objective/kl is {_mean(kl):.1f} nats, far above --kl_target {target:g}"
    return None


def _kl_far(watch: Watch, threshold: float) -> str | None:
    kl = watch.per_token("objective/kl")
    if kl is not None and kl > threshold:
        return f"objective/kl is {kl:.2f} nats a token: the policy answers as the reference hardly ever does"
    return None


def _ratio_explosion(watch: Watch, threshold: float) -> str | None:
    ratios = watch.last("val/ratio", 3)
    if ratios and (min(ratios) > threshold or max(ratios) < 1 / threshold):
        return (
            f"val/ratio, the mean probability ratio of an update, is {ratios[-1]:.3g} and should be about 1"
        )
    return None


def _entropy_collapse(watch: Watch, threshold: float) -> str | None:
    """Of a language model's responses, a token; else the policy's own, where it is logged and above 0."""
    now, before = (watch.per_token("objective/entropy", rows) for rows in (None, watch.first))
    if now is None or before is None:
        each = watch.last("policy/entropy_avg"), _column(watch.first, "policy/entropy_avg")
        now, before = (_mean(values) if values else None for values in each)
    if now is None or before is None or before <= 0 or now < 0:
        return None
    if now < threshold * before:
        return f"the policy's entropy fell from {before:.3g} to {now:.3g} nats: it says one thing alone"
    return None


def _group_falls(watch: Watch, threshold: float) -> str | None:
    rows = list(watch.rows)[-2 * _WINDOW :]
    names = [name for name in rows[-1] if name.startswith("maxmin/weights/")]
    weighs_minimum = f"rewards/{len(names)}/mean" in rows[-1]  # and no group
    if len(rows) < 2 * _WINDOW or weighs_minimum:
        return None
    for k in range(len(names)):
        weights = _column(rows, f"maxmin/weights/{k}")
        means, spread = _column(rows, f"rewards/{k}/mean"), _column(rows, f"rewards/{k}/std")
        if weights and min(weights) > 0.9 and means and spread:
            before, now = _mean(means[:_WINDOW]), _mean(means[_WINDOW:])
            # nothing is certain to a tenth of its size, where all responses get one reward
            unit = max(_mean(spread), 0.1 * abs(before))
            if before - now > threshold * unit:
                fall = f"from {before:.3g} to {now:.3g}"
                return f"rewards/{k}/mean falls, {fall}, while group {k} has all the weight"
    return None


def _value_loss_explosion(watch: Watch, threshold: float) -> str | None:
    losses = _column(watch.rows, "loss/value_avg")
    if len(losses) < _WINDOW + 3:
        return None
    usual = max(_median(losses[:-3]), 1e-3)  # of nearly nothing, any number is a multiple
    if min(losses[-3:]) > threshold * usual:
        return f"loss/value_avg is {losses[-1]:.3g}, and was {usual:.3g}: the critic has come apart"
    return None


#: by the section of the page: the setting that is its threshold, and what finds it
CHECKS: dict[str, tuple[str, Callable[[Watch, float], str | None]]] = {
    "kl-below-zero": ("warn_kl_below_zero", _kl_below_zero),
    "kl-above-target": ("warn_kl_target", _kl_above_target),
    "far-from-the-reference": ("warn_kl", _kl_far),
    "ratio-explosion": ("warn_ratio", _ratio_explosion),
    "entropy-collapse": ("warn_entropy", _entropy_collapse),
    "group-falls": ("warn_group", _group_falls),
    "value-loss-explosion": ("warn_value", _value_loss_explosion),
}
