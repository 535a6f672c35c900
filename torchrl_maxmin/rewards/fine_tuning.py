"""The M-step that fine-tunes a reward model: the shared trunk and all heads, by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.clustering.choices import Expectation, expectation
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.pairs import Batches, PairTokens
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE

__all__ = ["FineTuning", "FineTuningSettings"]


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings:
    """Settings of the M-step.

    Attributes:
        num_rounds: M-steps, over which the learning rates rise and fall.
        steps_per_round: optimizer steps of an M-step.
        batch_size: pairs a step.
        micro_batch_size: pairs that are in memory with their gradients at once; None takes all of a step.
        scoring_batch_size: texts that are read at once where no gradient is wanted.
        learning_rate: of the trunk.
        head_learning_rate: of the heads.
        reward_l2: penalty on squared rewards, which keeps offsets small.
        weight_decay: of AdamW.
        seed: of the batches.
    """

    num_rounds: int = 4
    steps_per_round: int = 50
    batch_size: int = 64
    micro_batch_size: int | None = None
    scoring_batch_size: int = SCORED_AT_ONCE
    learning_rate: float = 1e-5
    head_learning_rate: float = 1e-4
    reward_l2: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds."""
        return self.num_rounds * self.steps_per_round


class FineTuning:
    """An M-step of EM that takes optimizer steps on the responsibility-weighted Bradley-Terry loss.

    Args:
        mixture: the reward model, which it trains.
        pairs: training pairs as tokens.
        settings: of the optimizer.
        advance: moves a progress bar by a step.
    """

    weight = None
    max_repairs = 1

    def __init__(
        self,
        mixture: RewardMixture,
        pairs: PairTokens,
        settings: FineTuningSettings,
        advance: Callable[..., None] = lambda note: None,
    ):
        self.mixture, self.pairs, self.settings, self.advance = mixture, pairs, settings, advance
        self.optimizer = torch.optim.AdamW(
            [
                {"params": mixture.trunk_parameters(), "lr": settings.learning_rate},
                {"params": mixture.head_parameters(), "lr": settings.head_learning_rate},
            ],
            weight_decay=settings.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._warmup_cosine)
        self.batches = Batches(len(pairs), settings.batch_size, settings.seed)

    def expectation(self, log_prior: Tensor) -> Expectation:
        """The E-step at the model as it is.

        Raises:
            FloatingPointError: if the likelihood is not finite.
        """
        margins = self.pairs.margins(self.mixture, self.settings.scoring_batch_size)
        step = expectation(margins, self.pairs.user_offsets, log_prior, row_weights=self.pairs.row_weights)
        if not bool(step.log_likelihood.isfinite().all()):
            raise FloatingPointError("the log-likelihood is not finite; lower the rates")
        return step

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        """Take the optimizer steps of a round; returns the last step's loss."""
        loss = 0.0
        self.mixture.train()  # adapters' dropout alone: the trunk has none
        for _ in range(self.settings.steps_per_round):
            self.optimizer.zero_grad()
            loss = self.backward(next(self.batches), responsibilities)
            nn.utils.clip_grad_norm_(self.mixture.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.advance(note=f"loss {loss:.3f}")
        self.mixture.eval()
        return {"loss": loss}

    def backward(self, rows: list[int], responsibilities: Tensor) -> float:
        """Add the gradient of the loss on these pairs to the parameters', a micro-batch at a time.

        Every micro-batch is divided by the pairs of them all, so that their size changes nothing but memory.

        Returns:
            The loss without its penalty.
        """
        nll = 0.0
        size = self.settings.micro_batch_size or len(rows)
        for low in range(0, len(rows), size):
            part = rows[low : low + size]
            chosen, rejected = self.pairs.scores(self.mixture, part)
            weights = responsibilities[self.pairs.row_users[part]]
            if self.pairs.row_weights is not None:
                weights = weights * self.pairs.row_weights[part].unsqueeze(-1)
            weights = weights.to(chosen)
            loss = -(weights * nn.functional.logsigmoid(chosen - rejected)).sum(-1).sum() / len(rows)
            penalty = (weights * (chosen.square() + rejected.square())).sum(-1).sum() / len(rows) / 2
            (loss + self.settings.reward_l2 * penalty).backward()
            nll += loss.item()
        return nll

    def penalty(self) -> None:
        """None: these M-steps do not converge."""

    def restart(self, k: int, donor: int) -> None:
        """Start group k's head anew from the donor's, with a little noise."""
        self.mixture.reset_head_(k, donor)

    def _warmup_cosine(self, step: int) -> float:
        total = self.settings.total_steps
        warmup = max(1, total // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def state_dict(self) -> dict[str, Any]:
        """The state after the last round."""
        return {
            "model": self.mixture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.mixture.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["random"])
