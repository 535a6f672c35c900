"""Run the diagnose stage: does one reward serve the people behind these preferences?"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.heads import Heads
from torchrl_maxmin.clustering.selection import L2_CANDIDATES
from torchrl_maxmin.clustering.wants import PairContents
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import resolve_device, seed_everything
from torchrl_maxmin.core.run_folder import stage
from torchrl_maxmin.diagnosis.analysis import ONE_USER, check_pairs, diagnose
from torchrl_maxmin.diagnosis.describing import describe_groups
from torchrl_maxmin.diagnosis.people import write_users
from torchrl_maxmin.diagnosis.report import verdict_table, write_diagnosis
from torchrl_maxmin.diagnosis.verdict import repeats_text, verdict
from torchrl_maxmin.evaluation.summary import write_summary
from torchrl_maxmin.models.loading import require_model
from torchrl_maxmin.preferences.describing import values_by_user
from torchrl_maxmin.preferences.texts import text_key
from torchrl_maxmin.rewards.settings import MixtureSettings

__all__ = ["DiagnoseConfig", "run_diagnose"]

# Settings that diagnose takes under the same name.
_OPTIONS = ("max_groups", "beta", "heldout_fraction", "num_folds", "num_jackknife", "num_bootstrap", "seed")


@dataclass
class DiagnoseConfig(MixtureSettings):
    """What one reward for all costs the groups among the users.

    Args:
        dataset_name: pairs; json, jsonl, csv or parquet file, saved dataset or hub name with columns
            prompt, chosen, rejected and a user; or an npz file of features, with arrays differences [P, D]
            (or chosen and rejected [P, D]) and users [P]; and where there are any groups [P], weights [P],
            judgement_ids [P] (pairs of one ranking share one, and stand best item first: each item over those
            after it; without, equal rows of a user count as one judgement), choice_ids [P] (rows of one
            choice among several items, which stand side by side) and feature_names [D].
        output_dir: folder for the results; must be empty or absent.
        model_name_or_path: frozen encoder or language model that gives the features of texts; an npz file
            needs none.
        beta: KL weight of the alignment gap, rewards calibrated as sft_std has it.
        l2: penalties to choose among by left-out users; as many as there are cost as many times the fits.
        num_folds: parts that the users are cut into for the choices.
        num_jackknife: parts that the users are cut into for the intervals; 0 gives none.
        num_bootstrap: simulated choices that the bias of the fit is measured on; 0 leaves it in.
        describe_columns: columns of your own about the users, one value each, such as age, sex or region; a
            table by group, and whether they are related.
        show_user_ids: false names users by numbers (user 1, user 2, ...) in every file; true writes their
            ids, and user_ids.csv with the number that each has in a run of the same data and seed.
        resume_from_checkpoint: last finishes the diagnosis in output_dir.
    """

    dataset_name: str
    output_dir: str
    model_name_or_path: str | None = None
    beta: float = 0.5
    heldout_fraction: float = field(default=0.2, kw_only=True)
    l2: list[float] | None = None
    num_folds: int = 4
    num_jackknife: int = 10
    num_bootstrap: int = 20
    describe_columns: list[str] | None = None
    show_user_ids: bool = False
    resume_from_checkpoint: str | None = None

    @property
    def is_array_file(self) -> bool:
        """Whether the data are features already."""
        return self.dataset_name.endswith(".npz")

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        super().check()
        if not self.is_array_file and self.model_name_or_path is None:
            raise UserError(
                "texts need features: name a frozen encoder by --model_name_or_path, or give an .npz file of "
                "features as --dataset_name"
            )
        self.require_at_least(2, "num_folds")
        self.require_positive("beta")
        for name in ("num_jackknife", "num_bootstrap"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise UserError(f"--{name} must be 0 or at least 2")
        if self.l2 is not None and not (self.l2 and all(0 < value < math.inf for value in self.l2)):
            raise UserError("--l2 takes positive penalties")


@dataclass(frozen=True)
class _Pairs:
    """Features of pairs, rows sorted by user."""

    differences: Tensor
    user_offsets: Tensor
    user_ids: list[str]
    row_weights: Tensor | None = None
    judgements: np.ndarray | Tensor | None = None
    choice_offsets: Tensor | None = None
    groups: list[str] | None = None
    repeated: int = 0
    prompts: list[str] | None = None
    contents: PairContents | None = None
    described: dict[str, list[str | None]] = field(default_factory=dict)


@stage("diagnose", inputs=("dataset_name", "model_name_or_path"))
def run_diagnose(config: DiagnoseConfig) -> Path:
    """Diagnose preference data; returns the folder.

    The folder holds ``summary.json``, ``report.md``, ``report.html``, ``groups.csv`` (a line a group),
    ``users.csv`` (responsibilities by user),
    ``heads.safetensors`` (:func:`~torchrl_maxmin.clustering.heads.load_heads`),
    ``figures/diagnosis`` as .png, .svg and .csv, and ``config.yaml``.

    Raises:
        UserError: before any work, for data, models or folders that cannot be used.
    """
    config.check()
    num_groups, columns, folder = config.groups(), config.describe_columns or [], Path(config.output_dir)
    device = resolve_device(config.device)
    if config.is_array_file:
        pairs = _from_arrays(Path(config.dataset_name), columns)
        check_pairs(pairs.differences, pairs.user_offsets, num_groups, config.beta, pairs.groups)
    else:
        require_model(str(config.model_name_or_path))
        data = config.load_pairs(config.dataset_name, config.model_name_or_path, describe_columns=columns)
        if data.num_users < 2:
            raise UserError(ONE_USER)
        data.require_users(num_groups or 2)
        from torchrl_maxmin.rewards.pairs import raw_feature_choices

        model, reading = str(config.model_name_or_path), config.reading_options() | config.feature_options()
        choices = raw_feature_choices(data, model, config.max_length, device, **reading)
        known = choices.user_offsets, data.user_ids
        judged = choices.row_weights, choices.judgements, choices.choice_offsets
        every = [text_key(prompt) for prompt in data.prompts]
        distinct = data.distinct_rows
        prompts = [every[row] for row in distinct.tolist()]
        texts = data.select_rows(distinct)
        contents = PairContents(texts=(texts.prompts, texts.chosen, texts.rejected))
        described = {name: data.user_values(name) for name in columns}
        pairs = _Pairs(choices.differences, *known, *judged, data.groups)
        pairs = replace(pairs, repeated=data.judgements.num_repeats, prompts=prompts)
        pairs = replace(pairs, contents=contents, described=described)
    seed_everything(config.seed)
    found = diagnose(
        pairs.differences,
        pairs.user_offsets,
        num_groups=num_groups,
        row_weights=pairs.row_weights,
        judgements=pairs.judgements,
        choice_offsets=pairs.choice_offsets,
        prompts=pairs.prompts,
        true_groups=pairs.groups,
        contents=pairs.contents,
        l2_candidates=L2_CANDIDATES if config.l2 is None else config.l2,
        device=device,
        **{name: getattr(config, name) for name in _OPTIONS},
    )
    summary = found.summary
    summary["repeated_pairs"] += pairs.repeated  # of texts, which are merged before
    mixture = found.mixture
    if pairs.described:
        groups = mixture.assignments.tolist()
        summary["describing"] = describe_groups(
            pairs.described, groups, found.num_groups, config.seed,
            established=summary["established"] is not False,
        )  # fmt: skip
    write_diagnosis(folder, summary)
    names = None if pairs.contents is None else pairs.contents.feature_names
    origin = {"model": str(config.model_name_or_path)} if names is None else {"file": config.dataset_name}
    weight, scale = found.features.heads(mixture.weight), found.features.scale
    Heads(weight, scale, mixture.log_prior, names, origin).save(folder / "heads.safetensors")
    write_users(folder, pairs.user_ids, mixture.responsibilities, config.seed, config.show_user_ids)
    write_summary(folder, {**summary, "verdict": verdict(summary)})
    if summary["repeated_pairs"]:
        console.print(f"! {repeats_text(summary['repeated_pairs'])}")
    console.print(verdict_table(summary))
    return folder


def _from_arrays(path: Path, columns: Sequence[str] = ()) -> _Pairs:
    """Read features from an npz file, rows sorted by user in order of first appearance."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UserError(f"cannot read features from {str(path)!r}: there is no such file") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read features from {str(path)!r}: {error}; write it by numpy.savez, without objects"
        ) from error
    there = ", ".join(arrays) or "nothing"
    if "differences" in arrays:
        differences = arrays["differences"]
    elif {"chosen", "rejected"} <= set(arrays):
        chosen, rejected = arrays["chosen"], arrays["rejected"]
        if chosen.shape != rejected.shape:
            shapes = f"{list(chosen.shape)} and {list(rejected.shape)}"
            raise UserError(f"{path}: chosen and rejected must be of one shape, got {shapes}")
        differences = chosen - rejected
    else:
        raise UserError(
            f"{path} holds {there}; it needs differences, or chosen and rejected [pairs, features]"
        )
    if "users" not in arrays:
        raise UserError(f"{path} holds {there}; it needs users, one id a pair")
    if differences.ndim != 2 or not np.issubdtype(differences.dtype, np.floating):
        raise UserError(
            f"{path}: features must be [pairs, features] of floats, got {list(differences.shape)} of "
            f"{differences.dtype}"
        )
    for name in ("users", "groups", "weights", "judgement_ids", "choice_ids"):
        if name in arrays and arrays[name].shape != (len(differences),):
            raise UserError(f"{path}: {name} must be [{len(differences)}], one a pair")
    codes, first, which = np.unique(arrays["users"], return_index=True, return_inverse=True)
    appearance = np.argsort(first)
    row_user = np.argsort(appearance)[which]
    order = np.argsort(row_user, kind="stable")
    counts = torch.from_numpy(np.bincount(row_user))
    groups = None
    if "groups" in arrays:
        owners = set(zip(row_user.tolist(), arrays["groups"].tolist(), strict=True))
        if len(owners) > len(codes):
            raise UserError(f"{path}: some user has two groups; give each user one")
        groups = [str(arrays["groups"][i]) for i in first[appearance]]
    names = [f"feature {j}" for j in range(differences.shape[1])]
    if "feature_names" in arrays:
        names = [str(name) for name in arrays["feature_names"].tolist()]
        if len(names) != differences.shape[1]:
            raise UserError(f"{path}: {len(names)} feature_names for {differences.shape[1]} features")
    described = {name: _values(path, arrays, name, row_user, len(codes)) for name in columns}
    weights = torch.from_numpy(arrays["weights"][order]).float() if "weights" in arrays else None
    if weights is not None and not bool((weights > 0).all()):
        raise UserError(f"{path}: weights must be positive; leave out pairs that do not count")
    return _Pairs(
        torch.from_numpy(differences if (np.diff(order) == 1).all() else differences[order]),
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        [str(code) for code in codes[appearance]],
        weights,
        arrays["judgement_ids"][order] if "judgement_ids" in arrays else None,
        _choice_offsets(arrays["choice_ids"][order], row_user[order]) if "choice_ids" in arrays else None,
        groups,
        contents=PairContents(feature_names=names, file_rows=order),
        described=described,
    )


def _values(
    path: Path, arrays: dict[str, Any], name: str, row_user: np.ndarray, num_users: int
) -> list[str | None]:
    """Values of the users [U] in an array of that name, [P], or [U] in order of first appearance."""
    values = arrays.get(name)
    if values is None:
        raise UserError(f"{path} has no array {name!r} to describe users by; it holds {', '.join(arrays)}")
    if values.shape not in ((len(row_user),), (num_users,)):
        raise UserError(f"{path}: {name} must be [{len(row_user)}], one a pair, or [{num_users}], one a user")
    users = row_user if len(values) == len(row_user) else np.arange(num_users)
    found, note = values_by_user(values.tolist(), users, num_users, name)
    if note:
        console.print(note, markup=False, highlight=False)
    return found


def _choice_offsets(ids: np.ndarray, users: np.ndarray) -> Tensor:
    """Rows of choices [C + 1] by an id of every row [P]; those of one choice stand side by side."""
    change = np.flatnonzero((ids[1:] != ids[:-1]) | (users[1:] != users[:-1])) + 1
    return torch.from_numpy(np.concatenate([[0], change, [len(ids)]]).astype(np.int64))
