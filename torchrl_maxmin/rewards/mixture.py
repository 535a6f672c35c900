"""K reward heads on one trunk: one pass scores a text for every group."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from maxmin_kernels import reward_heads_min
from torch import Tensor, nn

from torchrl_maxmin.distributed import mean_over_ranks
from torchrl_maxmin.errors import UserError
from torchrl_maxmin.modules.loading import ensure_pad_token, load_tokenizer, require_model
from torchrl_maxmin.modules.sequences import backbone_of, hidden_states, last_index, pad_right
from torchrl_maxmin.preferences.dataset import encode
from torchrl_maxmin.rewards.calibration import Calibration

__all__ = ["RewardMixture"]


class RewardMixture(nn.Module):
    """Bradley-Terry reward heads of K groups on a shared Hugging Face trunk.

    The model inside is an ordinary ``AutoModelForSequenceClassification`` with
    ``num_labels=K``; its folder loads without this package and gives the same raw scores.
    What it lacks, the mixing weights and the calibration, lies beside it in ``mixture.json``.

    Args:
        model: sequence classifier of a decoder, with a linear head named ``score``.
        tokenizer: its tokenizer, with a pad token that is not EOS.
        log_prior: log mixing weights [K]; uniform when None.
        calibration: puts the heads on one scale; identity when None.

    Example:
        >>> mixture = RewardMixture.from_causal_lm("gpt2", num_groups=2)  # doctest: +SKIP
        >>> mixture.score(["the film"], ["was great"]).shape  # doctest: +SKIP
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        log_prior: Tensor | None = None,
        calibration: Calibration | None = None,
    ):
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no linear head named 'score'; reward heads need a decoder's "
                "sequence classifier (GPT-2, Llama, Qwen, Mistral, Gemma ...)"
            )
        self.model = model
        self.tokenizer = tokenizer
        groups = model.config.num_labels
        self.register_buffer(
            "log_prior", torch.full((groups,), 1.0 / groups).log() if log_prior is None else log_prior.clone()
        )
        self.calibration = calibration or Calibration.identity(groups)

    @classmethod
    def from_causal_lm(cls, name_or_path: str, num_groups: int) -> RewardMixture:
        """New heads, drawn from N(0, 1 / (hidden + 1)), on the trunk of a causal language model."""
        from transformers import AutoModelForSequenceClassification

        tokenizer = load_tokenizer(name_or_path)
        # for those who load the folder without us: absolute positions are right with padding at the end alone
        tokenizer.padding_side = "right"
        model = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, num_labels=num_groups, dtype=torch.float32
        ).eval()
        ensure_pad_token(tokenizer, model)
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
        return cls(model, tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardMixture:
        """Load what :meth:`save_pretrained` wrote; a plain classifier folder is taken uncalibrated."""
        from transformers import AutoModelForSequenceClassification

        require_model(str(folder))
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True
        )
        if loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"]))
            raise UserError(
                f"{folder} holds no reward head ({missing} missing), so it would score at random; "
                "give a folder that the reward stage wrote, or another sequence classifier"
            )
        model.eval()
        tokenizer = load_tokenizer(str(folder))
        extra = Path(folder) / "mixture.json"
        if not extra.is_file():
            return cls(model, tokenizer)
        state = json.loads(extra.read_text())
        return cls(
            model, tokenizer, torch.tensor(state["prior"]).log(), Calibration.from_dict(state["calibration"])
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the Hugging Face folder, its tokenizer and ``mixture.json``."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        state = {"prior": self.log_prior.exp().tolist(), "calibration": self.calibration.to_dict()}
        (Path(folder) / "mixture.json").write_text(json.dumps(state, indent=2) + "\n")

    @property
    def num_groups(self) -> int:
        """Number of reward heads K."""
        return self.model.config.num_labels

    def forward(self, tokens: Tensor, mask: Tensor, *, calibrated: bool = False) -> Tensor:
        """Score padded texts with every head.

        Args:
            tokens: [N, T] int64, padded on either side.
            mask: [N, T] bool, True at real tokens.
            calibrated: apply :attr:`calibration`.

        Returns:
            Rewards [N, K] in fp32, read at the last real token.
        """
        states = hidden_states(backbone_of(self.model), tokens, mask)
        last = states[torch.arange(len(tokens), device=tokens.device), last_index(mask)]
        rewards = reward_heads_min(last, self.model.score.weight, self.model.score.bias)[0]
        return self.calibration.apply(rewards) if calibrated else rewards

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        calibrated: bool = False,
        batch_size: int = 256,
        max_length: int | None = None,
    ) -> Tensor:
        """Score texts; rewards [N, K] on the CPU, whatever the batch size or padding."""
        device = self.log_prior.device
        rows = [encode(self.tokenizer, p, c, max_length) for p, c in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.empty(len(rows), self.num_groups)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            tokens, mask = pad_right([rows[i] for i in part], self.tokenizer.pad_token_id)
            scores[part] = self(tokens.to(device), mask.to(device), calibrated=calibrated).cpu()
        return scores

    def reward_fn(
        self, *, group: int | None = None, weights: Sequence[float] | None = None, adversary: Any = None
    ) -> Callable[..., list[float]]:
        """A reward function of the form that TRL's trainers take.

        Args:
            group: score for one group.
            weights: score for a fixed mixture of groups, [K].
            adversary: score for the weights of an adversary that sees each batch's mean
                reward by group, summed over all ranks first. A minimum of expectations is no
                function of one sample, so this form holds state.

        Returns:
            ``f(prompts, completions, **columns) -> list[float]`` on calibrated rewards.
        """
        if sum(option is not None for option in (group, weights, adversary)) != 1:
            raise ValueError("give exactly one of group, weights and adversary")

        def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
            scores = self.score(prompts, completions, calibrated=True)
            if group is not None:
                return scores[:, group].tolist()
            if weights is not None:
                return (scores @ torch.tensor(weights, dtype=scores.dtype)).tolist()
            return (scores @ adversary.update(mean_over_ranks(scores.sum(0), len(scores)))).tolist()

        return reward
