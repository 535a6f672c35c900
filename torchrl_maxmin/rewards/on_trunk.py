"""Reward mixtures that read the states of a policy's own frozen trunk, in place of a trunk of theirs.

The reward stage with LoRA leaves the trunk as it was, so that PPO on the same one need not hold it twice:
the mixture's adapters stand beside the policy's and the critic's, and its heads read what comes out. What is
the same is told by the weights, see :meth:`SavedMixture.difference`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run_folder import require_finished
from torchrl_maxmin.models.integrity import require_same_tensors
from torchrl_maxmin.models.loading import OWN_PAD, load_config, load_tokenizer, reading
from torchrl_maxmin.models.sequences import backbone_of, states_width, text_config
from torchrl_maxmin.models.weights import config_difference, read_weight, saved_weights, weights_difference
from torchrl_maxmin.rewards import adapters as lora
from torchrl_maxmin.rewards.base import RewardHeads, RewardModel, read_heads, require_heads
from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.mixture import RewardMixture

__all__ = ["SavedMixture"]

_PREFIX = "reward_"  # of the adapters' names beside the policy's


@dataclass(frozen=True)
class SavedMixture:
    """A reward mixture on disk, of which everything but the trunk is read.

    Attributes:
        folder: what :meth:`~torchrl_maxmin.rewards.RewardMixture.save_pretrained` wrote.
        state: its ``mixture.json``.

    Example:
        >>> saved = SavedMixture.find("runs/reward")  # doctest: +SKIP
        >>> if saved.difference(reference.model, tokenizer) is None:  # doctest: +SKIP
        ...     mixture = saved.on(networks)
    """

    folder: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, name_or_path: str | Path) -> SavedMixture | None:
        """The mixture that a folder holds; None for any other reward model.

        Raises:
            UserError: for one that lacks its heads or adapters.
        """
        folder = Path(name_or_path)
        require_finished(folder)
        path = folder / "mixture.json"
        if not path.is_file():
            return None
        with reading("mixture.json", str(folder)):
            saved = cls(folder, json.loads(path.read_text()))
        if "heads" in saved.state:
            require_heads(folder)
        lora.require_adapters(folder, saved.names)
        return saved

    @property
    def form(self) -> dict[str, Any]:
        """The entry ``heads`` of its ``mixture.json``, which a sequence classifier has not."""
        plain = {"adapters": None, "base": None, "pooling": None, "num_groups": len(self.state["prior"])}
        return self.state.get("heads", plain)

    @property
    def base(self) -> Path:
        """The folder of the trunk."""
        return Path(self.form["base"] or self.folder)

    @property
    def names(self) -> list[str]:
        """Of the adapters, and of their folders."""
        kind = self.form["adapters"]
        return [] if kind is None else lora.adapter_names(kind, self.form["num_groups"])

    @property
    def num_groups(self) -> int:
        """Number of groups K."""
        return self.form["num_groups"]

    @property
    def log_prior(self) -> Tensor:
        """Log mixing weights [K]."""
        return torch.tensor(self.state["prior"]).log()

    @property
    def num_tokens(self) -> int:
        """Rows of the trunk's embeddings."""
        return text_config(load_config(str(self.base))).vocab_size

    def difference(self, model: Any, tokenizer: Any) -> str | None:
        """Say why a policy's trunk is not this mixture's own.

        It is where the configs agree, and every weight, read in the policy's dtype, equals the policy's to
        the bit; the row of a pad token that was added, which no text holds, is left out. Paths say nothing.

        Args:
            model: the policy's language model, without adapters.
            tokenizer: the policy's.

        Returns:
            A few words, or None where it is the mixture's own.
        """
        if not self.base.is_dir():
            return f"{self.base} is no folder whose weights can be compared"
        if any(isinstance(lora.read_targets(self.folder, name), str) for name in self.names):
            return "its adapters are placed by a pattern of names"
        if "heads" not in self.state and "score.weight" not in saved_weights(self.folder):
            return f"{self.folder} holds no head 'score' to read"
        if key := config_difference(self.base, model.config):
            return f"{key} of its config differs"
        tokenizers = (tokenizer, load_tokenizer(str(self.folder)))
        padding = {each.pad_token_id for each in tokenizers if each.pad_token == OWN_PAD}
        return weights_difference(self.base, model, self.num_tokens, padding)

    def _heads(self, width: int) -> RewardHeads:
        if "heads" in self.state:
            return read_heads(self.folder, self.form, width)
        weight = read_weight(saved_weights(self.folder)["score.weight"], "score.weight")
        with torch.device("meta"):
            heads = RewardHeads("linear", width, self.num_groups)
        wanted = {"score.weight": heads.output.weight}
        require_same_tensors({"score.weight": weight}, wanted, "reward heads", self.folder)
        heads.output.weight = nn.Parameter(weight.float())
        return heads

    def shared_with(self, model: Any, tokenizer: Any) -> SavedMixture | RewardModel:
        """This mixture where its trunk is a policy's own; else the model loaded whole, and a line why."""
        found = self.difference(model, tokenizer)
        if found is None:
            return self
        console.print(f"the reward model keeps a trunk of its own, the policy's is another: {found}")
        with torch.random.fork_rng(devices=[]):  # adapters are drawn at random before they are loaded
            return RewardMixture.from_pretrained(self.folder)

    def on(self, networks: Any) -> RewardMixture:
        """Put heads and adapters on the trunk of a policy, frozen; rewards are read in the trunk's dtype.

        Args:
            networks: a :class:`~torchrl_maxmin.models.shared.SharedTrunk` whose trunk is this mixture's own,
                see :meth:`difference`.
        """
        model = networks.adapted
        names = {_PREFIX + name: lora.adapter_folder(self.folder, name) for name in self.names}
        networks.add_frozen_adapters(names)
        trunk = backbone_of(model)
        mixture = RewardMixture(
            model,
            load_tokenizer(str(self.folder)),
            self.log_prior,
            Calibration.from_dict(self.state["calibration"]),
            heads=self._heads(states_width(trunk)).requires_grad_(False),
            pooling=self.form["pooling"],
            layout=self.state.get("layout"),
            adapters=self.form["adapters"],
            switch=networks.switch,
            names=list(names) or [None],
        )
        mixture.num_tokens = self.num_tokens
        return mixture.to(next(trunk.parameters()).device)
