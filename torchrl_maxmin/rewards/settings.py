"""Settings of every stage that fits a mixture to preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.chat import ChatSettings
from torchrl_maxmin.rewards.pairs import drop_pairs_cut_alike
from torchrl_maxmin.rewards.reader import LAYOUTS, POOLINGS, load_reader

__all__ = ["MixtureSettings"]


@dataclass(kw_only=True)
class MixtureSettings(ChatSettings):
    """Groups among the people behind preferences.

    Args:
        user_column: column that says who chose, or column.field; found by its usual names when left
            out; none makes every row a user.
        group_column: ground truth for evaluation, never for training; "group" where it exists.
        dataset_split: split of the pairs.
        layout: how the rows hold pairs; told from the columns when left out (see data check).
        ties: drop, or halve: keep a tie as both orders, each counted one half.
        tie_margin: scores that differ by no more than this tie.
        max_pairs: pairs at most that one user's scores of one prompt make.
        num_groups: groups K, or auto to choose by left-out users; 1 is single-reward RLHF.
        max_groups: largest K that auto tries.
        heldout_fraction: share of every user's pairs that accuracy is measured on.
        max_length: longest text in tokens; longer ones lose their start, but for BOS.
        pooling: where the model is read: last, mean or cls token; what suits it when left out.
        text_layout: how prompt and completion become one text: continuation, chat, concat, text_pair,
            response, or a template with {prompt} and {completion}; what suits the model when left out.
        seed: seed of everything random.
        device: cpu, cuda or auto.
    """

    user_column: str | None = None
    group_column: str | None = None
    dataset_split: str = "train"
    layout: str | None = None
    ties: str = "drop"
    tie_margin: float = 0.0
    max_pairs: int = 64
    num_groups: int | str = "auto"
    max_groups: int = 3
    heldout_fraction: float = 0.1
    max_length: int = 1024
    pooling: str | None = None
    text_layout: str | None = None
    seed: int = 0
    device: str = "auto"

    def groups(self) -> int | None:
        """``num_groups`` as a number, or None for ``"auto"``; raises :class:`UserError` for anything else."""
        if str(self.num_groups) == "auto":
            return None
        if not str(self.num_groups).isdigit() or int(self.num_groups) < 1:
            raise UserError(f"--num_groups is a positive number or auto, not {self.num_groups!r}")
        return int(self.num_groups)

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        self.groups()
        self.require_at_least(1, "max_groups", "max_pairs", "max_length")
        self.require_at_least(0, "tie_margin")
        self.require_seed()
        self.require_known(ties=("drop", "halve"))
        if not 0 <= self.heldout_fraction < 1:
            raise UserError("--heldout_fraction must be at least 0 and below 1")
        if self.pooling not in (None, *POOLINGS):
            raise UserError(f"--pooling {self.pooling!r} is none of {', '.join(POOLINGS)}")
        if self.text_layout and self.text_layout not in LAYOUTS and "{completion}" not in self.text_layout:
            raise UserError(
                f"--text_layout {self.text_layout!r} is none of {', '.join(LAYOUTS)}, "
                "and no template with {completion} in it"
            )

    def reading_options(self) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_maxmin.rewards.pairs.load_feature_trunk`."""
        return {
            "pooling": self.pooling,
            "layout": self.text_layout,
            "chat_template": self.chat_template,
            "system_prompt": self.system_prompt,
        }

    def load_pairs(self, name: str, model: str | None = None) -> PreferenceDataset:
        """Load pairs as these settings say, conversations as messages.

        Args:
            name: what :meth:`PreferenceDataset.load` takes.
            model: the model that reads them; pairs of which ``max_length`` leaves nothing different are left
                out, and named.

        Raises:
            UserError: for data that cannot be used.
        """
        data = PreferenceDataset.load(
            name,
            self.user_column,
            self.group_column,
            self.dataset_split,
            layout=self.layout,
            ties=self.ties,
            tie_margin=self.tie_margin,
            max_pairs=self.max_pairs,
            conversations="messages",
        )
        if model is None:
            return data
        return drop_pairs_cut_alike(data, load_reader(model, **self.reading_options()), self.max_length)
