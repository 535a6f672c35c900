"""From pairs to groups to a policy to results, in a line of Python each.

Every function takes the flags of its verb as keywords, runs the same stage, and leaves the same folder. What
it returns finds that folder again, prints its figures, and is a table in a notebook.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.json_text import json_text
from torchrl_maxmin.core.summaries import Block, block_html, block_text

if TYPE_CHECKING:
    from torchrl_maxmin.rewards import RewardMixture

__all__ = ["Groups", "Policy", "Results", "evaluate", "fit_groups", "train_policy"]


@dataclass(frozen=True, repr=False)
class StageResult:
    """The folder that a stage left; it may be given wherever a path may.

    Attributes:
        folder: where everything is.
        summary: what ``summary.json`` there holds.
    """

    folder: Path
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Any:
        """Find the result of an earlier run again.

        Raises:
            UserError: where there is none, or the run has not come to its end.
        """
        from torchrl_maxmin.core.json_text import complete
        from torchrl_maxmin.core.run_folder import require_finished

        require_finished(folder)
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no summary.json, which a finished run writes last")
        with complete(path):
            return cls(Path(folder), json.loads(path.read_text(encoding="utf-8")))

    def block(self) -> Block:
        """Collect what is shown."""
        raise NotImplementedError

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return block_text(self.block())

    def _repr_html_(self) -> str:
        return block_html(self.block())


class Groups(StageResult):
    """What ``reward`` found: groups of users, a reward for each, and how sure both are."""

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return self.summary["num_groups"]

    @property
    def responsibilities(self) -> dict[str, list[float]]:
        """Probabilities of the groups [K] by user id."""
        from torchrl_maxmin.rewards.user_groups import read_groups

        return read_groups(self.folder)

    @property
    def model(self) -> RewardMixture:
        """The reward model, loaded anew at every call."""
        from torchrl_maxmin.rewards import RewardMixture

        return RewardMixture.from_pretrained(self.folder)

    def block(self) -> Block:
        """Collect the groups' sizes, and what the report says of each."""
        from torchrl_maxmin.clustering.wants import wants_text

        figures = self.summary
        rows = [
            [f"group {k}", f"{share:.1%}", str(users)]
            for k, (share, users) in enumerate(zip(figures["mixing_weights"], figures["users"], strict=True))
        ]
        known = figures.get("established")
        notes = [] if known is None else [f"The groups are {'' if known else 'not '}established."]
        if "user_accuracy" in figures:
            notes.append(f"{figures['user_accuracy']:.1%} of users are in the right one of the known groups.")
        notes += wants_text(figures["wants"]) if figures["wants"] else []
        return Block("Groups", str(self.folder), ["group", "share", "users"], rows, notes)


class Policy(StageResult):
    """What ``ppo`` trained: a policy, and how the worst-off group fared."""

    @property
    def metrics(self) -> list[dict[str, float]]:
        """What was logged, an entry an iteration; NaN stands for what is not finite."""
        from torchrl_maxmin.core.run import read_metrics

        return read_metrics(self.folder)

    def block(self) -> Block:
        """Collect the last group weights, and returns by group where the policy acts in an environment."""
        figures = self.summary
        weights = [f"{weight:.3f}" for weight in figures["group_weights"]]
        header, columns, notes = ["group", "last weight"], [weights], []
        if sampled := figures.get("sampled"):
            header.append("mean return")
            columns.append([_interval(entry) for entry in sampled["utilities"].values()])
        if exact := figures.get("exact"):
            header.append("exact return")
            columns.append([f"{value:.3f}" for value in exact["utilities"]])
            notes.append(
                f"Worst group: {exact['worst_group']:.3f}; the best policy gives it {exact['max_min']:.3f}."
            )
        rows = [[f"group {k}", *cells] for k, cells in enumerate(zip(*columns, strict=True))]
        warned = figures.get("warnings") or []
        notes += [f"Warning: {entry}" for entry in warned]
        return Block("Policy", str(self.folder), header, rows, notes)


class Results(StageResult):
    """What ``evaluate`` measured: every policy against the reference, by group, and both averages."""

    def block(self) -> Block:
        """Collect win rates against the reference."""
        figures = self.summary
        groups = [group["name"] for group in figures["groups"]]
        header = ["win rate against sft"]
        header += [f"{group['name']} ({group['share']:.0%} of people)" for group in figures["groups"]]
        header += ["worst group", "average over groups", "average over people"]
        keys = ("worst_group_win_rate", "average_over_groups", "average_over_people")
        rows = [
            [
                name,
                *(_interval(policy["win_rate_vs_sft"][group]) for group in groups),
                *(_number(policy[key]) for key in keys),
            ]
            for name, policy in figures["policies"].items()
        ]
        seeds, confidence = len(figures["seeds"]), figures["confidence"]
        notes = [f"{seeds} seed(s), {figures['num_prompts']} prompts; {confidence:.0%} intervals."]
        certificate = figures["certificate"]
        if certificate.get("value") is not None:
            notes.append(
                f"Distance to the best policy for the worst-off group: {_interval(certificate, 'value')}."
            )
        elif certificate.get("reason"):
            notes.append(f"Distance to the best policy not known: {certificate['reason']}.")
        return Block("Results", str(self.folder), header, rows, notes)


def fit_groups(
    model_name_or_path: Any, dataset_name: Any, output_dir: str | Path | None = None, **settings: Any
) -> Groups:
    """Find groups of users in preference pairs, and fit a reward for each: the verb ``reward``.

    Args:
        model_name_or_path: language model that gives the features, usually what sft wrote.
        dataset_name: pairs; a path, a hub name, a ``datasets.Dataset`` or a list of dicts.
        output_dir: folder for the result; the first free one of ``runs/groups``, when left out.
        **settings: fields of :class:`~torchrl_maxmin.trainers.reward_config.RewardConfig`, the flags of the
            verb.

    Raises:
        UserError: before any work, for settings, a model or data that cannot be used.
    """
    from torchrl_maxmin.trainers.reward import RewardConfig, run_reward

    _require_known(RewardConfig, "fit_groups", settings)  # before data are written
    folder = _folder(output_dir, "groups")
    settings |= {"model_name_or_path": _path(model_name_or_path), "dataset_name": _data(dataset_name, folder)}
    if settings.get("eval_dataset_name") is not None:
        settings["eval_dataset_name"] = _data(settings["eval_dataset_name"], folder)
    return Groups.load(run_reward(_config(RewardConfig, "fit_groups", folder, settings)))


def train_policy(
    model_name_or_path: Any = None,
    dataset_name: Any = None,
    groups: Any = None,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Policy:
    """Train a policy for the group that is worst off: the verb ``ppo``, in an environment with ``env_id``.

    Args:
        model_name_or_path: the reference policy, usually what sft wrote.
        dataset_name: prompts; a path, a hub name, a ``datasets.Dataset`` or a list of dicts with ``prompt``.
        groups: what :func:`fit_groups` returned, or another reward folder (``reward_model_path``).
        output_dir: folder for the policy; the first free one of ``runs/policy``, when left out.
        **settings: fields of :class:`~torchrl_maxmin.trainers.ppo_config.PPOConfig` or, with ``env_id``, of
            :class:`~torchrl_maxmin.trainers.env_ppo_config.EnvPPOConfig`: the flags of the verb.

    Raises:
        UserError: before any work, for settings, models, data or an environment that cannot be used.
    """
    folder = _folder(output_dir, "policy")
    if "env_id" in settings:
        from torchrl_maxmin.trainers.env_ppo import EnvPPOConfig, run_env_ppo

        _require_known(EnvPPOConfig, "train_policy", settings)
        given = {"model_name_or_path": model_name_or_path, "dataset_name": dataset_name, "groups": groups}
        for name in (name for name, value in given.items() if value is not None):
            raise UserError(f"{name} goes with a language model: leave it or env_id out")
        return Policy.load(run_env_ppo(_config(EnvPPOConfig, "train_policy", folder, settings)))
    from torchrl_maxmin.trainers.lm_ppo import PPOConfig, run_ppo

    _require_known(PPOConfig, "train_policy", settings)
    if model_name_or_path is not None:
        settings["model_name_or_path"] = _path(model_name_or_path)
    if dataset_name is not None:
        settings["dataset_name"] = _data(dataset_name, folder)
    if groups is not None:
        settings["reward_model_path"] = _path(groups)
    return Policy.load(run_ppo(_config(PPOConfig, "train_policy", folder, settings)))


def evaluate(
    policies: Mapping[str, Any] | Sequence[str],
    dataset_name: Any,
    judge: Any,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Results:
    """Measure policies against the reference, by group, on held-out prompts: the verb ``evaluate``.

    Args:
        policies: folders or what :func:`train_policy` returned, by name; ``sft``, the reference, is one.
        dataset_name: held-out prompts; a path, a hub name, a ``datasets.Dataset`` or a list of dicts.
        judge: who says what a response is worth to each group: what :func:`fit_groups` returned, whose
            certificate is then added, or whatever ``--judge`` takes.
        output_dir: folder for the results; the first free one of ``runs/results``, when left out.
        **settings: fields of :class:`~torchrl_maxmin.evaluation.settings.EvaluateConfig`, the flags of the
            verb.

    Raises:
        UserError: before any work, for settings, policies, data or a judge that cannot be used.
    """
    from torchrl_maxmin.evaluation.measure import EvaluateConfig, run_evaluate

    _require_known(EvaluateConfig, "evaluate", settings)
    folder = _folder(output_dir, "results")
    if isinstance(policies, Mapping):
        policies = [f"{name}={_path(policy)}" for name, policy in policies.items()]
    if isinstance(judge, Groups) and any(spec.startswith("maxmin=") for spec in policies):
        settings = {"reward_model_path": judge, **settings}
    if settings.get("reward_model_path") is not None:
        settings["reward_model_path"] = _path(settings["reward_model_path"])
    settings |= {
        "policies": list(policies),
        "judge": _path(judge),
        "dataset_name": _data(dataset_name, folder),
    }
    return Results.load(run_evaluate(_config(EvaluateConfig, "evaluate", folder, settings)))


def _require_known(config_class: type, function: str, settings: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a keyword that a config has no field for, with the nearest one."""
    fields = [field.name for field in dataclasses.fields(config_class)]
    for name in settings:
        if name not in fields:
            close = get_close_matches(name, fields, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{function} has no argument {name!r}{hint}")


def _config(config_class: type, function: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Build the config of a stage; an argument that it lacks is named."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if (field.default, field.default_factory) == missing and name not in (*settings, "output_dir"):
            raise UserError(f"{function} needs {name}")
    return config_class(**settings, output_dir=str(folder))


def _folder(output_dir: str | Path | None, name: str) -> Path:
    """The folder that was given, or the first of ``runs/NAME``, ``runs/NAME-2`` ... that is not there."""
    if output_dir is not None:
        return Path(output_dir)
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _data(source: Any, folder: Path) -> Any:
    """Return the path of data; what is in memory is written beside ``folder``, under its own checksum.

    A run can go on, and be told from another, by files alone.
    """
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, list | tuple) and all(isinstance(row, Mapping) for row in source):
        content = "".join(json_text(dict(row), indent=None) + "\n" for row in source).encode()
        suffix = "jsonl"
    elif hasattr(source, "to_parquet") and hasattr(
        source, "column_names"
    ):  # a Dataset, which may not be installed
        from io import BytesIO

        buffer = BytesIO()
        source.to_parquet(buffer)
        content, suffix = buffer.getvalue(), "parquet"
    else:
        raise UserError(
            f"cannot read data from a {type(source).__name__}; give a path, a hub name, a datasets.Dataset "
            "(Dataset.from_pandas) or a list of dicts"
        )
    path = folder.with_name(f"{folder.name}-data-{hashlib.sha256(content).hexdigest()[:12]}.{suffix}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _interval(entry: Mapping[str, Any], key: str = "mean") -> str:
    ends = entry.get("low"), entry.get("high")
    text = _number(entry[key])
    return text if None in ends else f"{text} [{_number(ends[0])}, {_number(ends[1])}]"
