"""A sequence classifier that somebody trained as a reward model, as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import (
    load_classifier,
    load_tokenizer,
    reading,
    require_model,
)
from torchrl_maxmin.models.sequences import backbone_of
from torchrl_maxmin.rewards.adapters import import_peft, quiet_peft
from torchrl_maxmin.rewards.reader import TextReader

__all__ = ["SequenceClassifier"]

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
        self.model, self.tokenizer, self.label = model, tokenizer, label
        self.layout = layout
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
    heads = [value for name, value in load_file(weights).items() if name.endswith(_LAST_LAYERS)]
    if not heads:
        raise UserError(
            f"the adapter in {folder} came without its reward head, so it would score at random; train it "
            "with task_type SEQ_CLS, or modules_to_save naming the head ('score' or 'classifier')"
        )
    require_model(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(heads[-1]), dtype=dtype)
    with quiet_peft():
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    own = (Path(folder) / "tokenizer_config.json").is_file()
    return merged, load_tokenizer(folder) if own else load_tokenizer(base)
