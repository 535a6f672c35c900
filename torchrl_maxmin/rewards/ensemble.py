"""Reward models that users bring: sequence classifiers as they are, side by side as one model of K groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.json_text import write_json_text
from torchrl_maxmin.core.run_folder import require_finished
from torchrl_maxmin.models.integrity import require_whole_adapter
from torchrl_maxmin.models.loading import load_classifier, load_tokenizer, load_whole, reading, require_model
from torchrl_maxmin.models.lora import import_peft, quiet_peft
from torchrl_maxmin.models.sequences import backbone_of, pad_right
from torchrl_maxmin.rewards.base import RewardModel
from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.reader import Text, TextReader

__all__ = ["RewardEnsemble", "SequenceClassifier", "is_reward_model", "load_reward_model"]

_FILE = "ensemble.json"
_LAST_LAYERS = ("score.weight", "classifier.out_proj.weight", "classifier.weight", "logits_proj.weight")


class SequenceClassifier(nn.Module):
    """Rewards of a Hugging Face sequence classifier, with its own tokenizer and text layout.

    A decoder's linear ``score`` is read at the last real token whatever the pad token is; every
    other classifier pools in its own way.

    Args:
        model: ``AutoModelForSequenceClassification`` of any architecture.
        tokenizer: its tokenizer.
        layout: see :class:`~torchrl_maxmin.rewards.reader.TextLayout`.
        label: the only output that is a reward, for a classifier with other labels beside it; all when None.

    Raises:
        UserError: for a label that the classifier has not.
    """

    def __init__(self, model: Any, tokenizer: Any, *, layout: str = "auto", label: int | None = None):
        super().__init__()
        labels = model.config.num_labels
        if label is not None and not 0 <= label < labels:
            raise UserError(
                f"no label {label} among the {labels} of {type(model).__name__}, which count from 0"
            )
        self.model, self.tokenizer, self.layout, self.label = model, tokenizer, layout, label
        self.reader = TextReader(model, tokenizer, layout=layout)
        self.num_groups: int = labels if label is None else 1
        self._reads_score = isinstance(getattr(model, "score", None), nn.Linear)
        if model.config.pad_token_id is None:  # or it refuses batches
            model.config.pad_token_id = self.reader.pad_id

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        layout: str = "auto",
        label: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SequenceClassifier:
        """Load a classifier's folder or hub name, or a peft folder of a classifier's adapter.

        Raises:
            UserError: for what cannot be had, and for a model without a trained head.
        """
        if (Path(name_or_path) / "adapter_config.json").is_file():
            with reading("adapter", name_or_path):
                model, tokenizer = _load_adapter(name_or_path, dtype)
        else:
            model, tokenizer = load_classifier(name_or_path, dtype), load_tokenizer(name_or_path)
        return cls(model, tokenizer, layout=layout, label=label)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the Hugging Face folder and its tokenizer; an adapter was merged on loading."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Raw rewards [N, K] in fp32 of padded texts [N, T]."""
        if self._reads_score:
            states, mask = self.reader.states(backbone_of(self.model), tokens, mask)
            rewards = self.model.score(self.reader.pool(states, mask))
        else:
            rewards = self.model(**self.reader.packed(tokens, mask)[0]).logits
        return (rewards if self.label is None else rewards[:, self.label, None]).float()


def _load_adapter(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The classifier below a peft adapter with the adapter merged into it, and a tokenizer."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    peft = import_peft()
    base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} lacks adapter_model.safetensors; save the adapter with save_pretrained()")
    saved = load_file(weights)
    heads = [value for name, value in saved.items() if name.endswith(_LAST_LAYERS)]
    if not heads:
        raise UserError(
            f"the adapter in {folder} came without its reward head, so it would score at random; train it "
            "with task_type SEQ_CLS, or modules_to_save naming the head ('score' or 'classifier')"
        )
    require_model(base)
    own_heads = tuple(name.removeprefix("base_model.model.") for name in saved if ".lora_" not in name)
    options: dict[str, Any] = {"num_labels": len(heads[-1]), "dtype": dtype}
    kind = AutoModelForSequenceClassification
    model = load_whole(kind, base, fresh=own_heads, foreign_heads=True, **options)
    with quiet_peft():
        adapted = peft.PeftModel.from_pretrained(model, folder)
        require_whole_adapter(adapted, "default", folder)
        merged = adapted.merge_and_unload().eval()
    own = (Path(folder) / "tokenizer_config.json").is_file()
    return merged, load_tokenizer(folder) if own else load_tokenizer(base)


class RewardEnsemble(RewardModel):
    """Rewards [N, K] of several models, each with its own tokenizer and text layout.

    The columns of the members stand side by side, in their order: K members with one output
    each, one with K, or any mix of them. Their scales differ, so calibrate before any minimum.

    Args:
        members: classifiers, or mixtures, which count with their raw rewards.
        log_prior: log mixing weights [K]; uniform when None.
        calibration: puts the rewards on one scale; identity when None.

    Example:
        >>> ensemble = RewardEnsemble.from_pretrained(  # doctest: +SKIP
        ...     ["Ray2333/gpt2-large-helpful-reward_model", "Ray2333/gpt2-large-harmless-reward_model"],
        ...     layouts="text_pair",
        ... )
        >>> ensemble.score(["How do I ..."], ["Just ..."]).shape  # doctest: +SKIP
        torch.Size([1, 2])
    """

    def __init__(
        self,
        members: Sequence[SequenceClassifier | RewardMixture],
        log_prior: Tensor | None = None,
        calibration: Calibration | None = None,
    ):
        if not members:
            raise UserError("an ensemble needs one reward model at least")
        super().__init__(sum(member.num_groups for member in members), log_prior, calibration)
        self.members = nn.ModuleList(members)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Sequence[str],
        *,
        layouts: str | Sequence[str] = "auto",
        labels: Sequence[int | None] | None = None,
        prior: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> RewardEnsemble:
        """Load reward models.

        Args:
            source: names or folders of the models, or what :meth:`save_pretrained` wrote, or a
                json file like it: ``{"members": [{"name_or_path": ..., "layout": ..., "label": ...}]}``.
            layouts: one for all models, or one each, see
                :class:`~torchrl_maxmin.rewards.reader.TextLayout`; mixtures keep their own.
            labels: for each model the output that is its reward, or None for all of them.
            prior: shares of the K groups; equal when None.
            dtype: of the models.

        Raises:
            UserError: for a model, a file or an option that cannot be used.
        """
        if isinstance(source, (str, Path)):
            return cls._from_file(Path(source), dtype)
        names = [str(name) for name in source]
        layouts = [layouts] * len(names) if isinstance(layouts, str) else layouts
        labels = [None] * len(names) if labels is None else labels
        if not len(names) == len(layouts) == len(labels):
            raise UserError(
                f"{len(names)} models, {len(layouts)} layouts and {len(labels)} labels do not match"
            )
        ensemble = cls([_load_member(*each, dtype) for each in zip(names, layouts, labels, strict=True)])
        if prior is not None:
            if len(prior) != ensemble.num_groups or min(prior) <= 0:
                raise UserError(f"prior must be {ensemble.num_groups} positive shares, one a group")
            ensemble.log_prior.copy_(torch.tensor(prior).log().log_softmax(-1))
        return ensemble

    @classmethod
    def _from_file(cls, path: Path, dtype: torch.dtype) -> RewardEnsemble:
        path = path / _FILE if path.is_dir() else path
        try:
            state = json.loads(path.read_text())
            entries = [{"name_or_path": e} if isinstance(e, str) else e for e in state["members"]]
            names = [entry["name_or_path"] for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no ensemble of reward models: give a list of names, or a json file like "
                '{"members": [{"name_or_path": "..."}]}'
            ) from error
        inside = [str(path.parent / name) if (path.parent / name).is_dir() else name for name in names]
        labels: list[Any] = [entry.get("label") for entry in entries]
        ensemble = cls.from_pretrained(
            inside,
            layouts=[entry.get("layout", "auto") for entry in entries],
            labels=labels,
            prior=state.get("prior"),
            dtype=dtype,
        )
        if "calibration" in state:
            ensemble.calibration = Calibration.from_dict(state["calibration"])
        return ensemble

    def save_pretrained(self, folder: str | Path) -> None:
        """Write every member to a folder of its own, and ``ensemble.json``."""
        entries: list[dict[str, Any]] = []
        for index, member in enumerate(self.scorers()):
            entries.append({"name_or_path": f"member_{index}"})
            member.save_pretrained(Path(folder) / f"member_{index}")
            if isinstance(member, SequenceClassifier):
                entries[-1] |= {"layout": member.layout, "label": member.label}
        state = {
            "members": entries,
            "prior": self.log_prior.exp().tolist(),
            "calibration": self.calibration.to_dict(),
        }
        write_json_text(Path(folder) / _FILE, state)

    def forward(
        self, prompts: Sequence[Text], completions: Sequence[Text], *, calibrated: bool = False
    ) -> Tensor:
        """Rewards [N, K] in fp32 of texts in one batch, with gradients, where the first member is."""
        columns = []
        for member in self.scorers():
            device = next(member.parameters()).device
            tokens, mask = pad_right(member.reader.encode(prompts, completions), member.reader.pad_id)
            columns.append(member(tokens.to(device), mask.to(device)))
        rewards = torch.cat([column.to(columns[0].device) for column in columns], -1)
        return self.calibration.apply(rewards) if calibrated else rewards

    def scorers(self) -> list[SequenceClassifier | RewardMixture]:
        """The members."""
        return list(self.members)  # type: ignore[arg-type]


def load_reward_model(name_or_path: str | Path) -> RewardMixture | RewardEnsemble:
    """Load reward heads of any kind by the name that a user gives.

    Args:
        name_or_path: a folder of :meth:`RewardMixture.save_pretrained` or
            :meth:`RewardEnsemble.save_pretrained`, an ensemble's json file, or any sequence
            classifier (folder, hub name, peft folder).

    Raises:
        UserError: for what is none of these, and for models without a trained head.
    """
    path = Path(name_or_path)
    require_finished(path)
    if path.suffix == ".json" or (path / _FILE).is_file():
        return RewardEnsemble.from_pretrained(path)
    if (path / "mixture.json").is_file():
        return RewardMixture.from_pretrained(path)
    return RewardEnsemble.from_pretrained([str(path)])


def is_reward_model(spec: str) -> bool:
    """Whether this names reward heads on disk: a folder, or the json file of an ensemble."""
    path = Path(spec)
    if path.suffix != ".json" or not path.is_file():
        return path.is_dir()
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and "members" in content


def _load_member(
    name: str, layout: str, label: int | None, dtype: torch.dtype
) -> SequenceClassifier | RewardMixture:
    if not (Path(name) / "mixture.json").is_file():
        return SequenceClassifier.from_pretrained(name, layout=layout, label=label, dtype=dtype)
    if layout != "auto" or label is not None:
        raise UserError(f"{name} is a reward mixture: it has its own layout, and no labels")
    return RewardMixture.from_pretrained(name)
