"""The M-step of EM that fine-tunes a reward mixture on preference pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.em import Expectation, MStep, posterior
from torchrl_maxmin.clustering.luce import at_rows, log_choices
from torchrl_maxmin.core.allocator import map_large_blocks
from torchrl_maxmin.core.checkpoint import require_same_batch
from torchrl_maxmin.core.distributed import (
    clip_gradients,
    gather_rows,
    of_main_process,
    share_of_rows,
    shares_rows,
    start_alike,
    sum_gradients,
    sum_over_ranks,
    world_size,
)
from torchrl_maxmin.core.finite import NonFiniteError, require_finite_parameters
from torchrl_maxmin.core.optimizers import MicroBatch, make_optimizer
from torchrl_maxmin.core.run import require_finite
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE

__all__ = ["Batches", "FineTuning", "FineTuningSettings"]


class Batches:
    """Batches of shuffled rows, epoch after epoch, from a generator that can be put back.

    Args:
        num_rows: rows to draw from; every epoch meets each once.
        batch_size: rows a batch.
        seed: of the shuffles.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self._num_rows, self._batch_size = num_rows, batch_size
        self._generator = np.random.default_rng(seed)
        self._left: list[int] = []

    def __next__(self) -> list[int]:
        while len(self._left) < min(self._batch_size, self._num_rows):
            self._left.extend(self._generator.permutation(self._num_rows).tolist())
        batch, self._left = self._left[: self._batch_size], self._left[self._batch_size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, and the rows of its epoch that are left."""
        state = self._generator.bit_generator.state
        return {"generator": state, "left": list(self._left), "batch_size": self._batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        require_same_batch(state["batch_size"], self._batch_size)
        self._generator.bit_generator.state = state["generator"]
        self._left = list(state["left"])


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings:
    """Settings of the M-step.

    Attributes:
        num_rounds: M-steps, over which the learning rates rise and fall.
        steps_per_round: optimizer steps of an M-step.
        batch_size: pairs a step, or choices among several responses.
        micro_batch_size: pairs that are in memory with their gradients at once; None takes all of a step.
        scoring_batch_size: texts that are read at once where no gradient is wanted.
        learning_rate: of the trunk.
        head_learning_rate: of the heads.
        reward_l2: penalty on squared rewards, which keeps offsets small.
        weight_decay: of AdamW.
        optim: optimizer, see :func:`~torchrl_maxmin.core.optimizers.make_optimizer`.
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
    optim: str = "adamw_torch"
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds."""
        return self.num_rounds * self.steps_per_round


class FineTuning(MStep):
    """An M-step of EM that takes optimizer steps on the responsibility-weighted loss of the choices.

    Processes that work as one read a share of the pairs each, wherever users begin and end: log-likelihoods
    of users are summed before Bayes' rule, and gradients before a step.

    Args:
        mixture: the reward model, which it trains.
        pairs: training pairs as tokens.
        settings: of the optimizer.
        on_step: called after every optimizer step with the responsibilities of its round.
    """

    max_repairs = 1

    def __init__(
        self,
        mixture: RewardMixture,
        pairs: PairTokens,
        settings: FineTuningSettings,
        on_step: Callable[[Tensor], None] = lambda responsibilities: None,
    ):
        self.mixture, self.pairs, self.settings, self.on_step = mixture, pairs, settings, on_step
        self.num_steps, self.loss = 0, 0.0  # of the round in hand, and of its last step
        start_alike(mixture.parameters())
        groups = [
            {"params": mixture.trunk_parameters(), "lr": settings.learning_rate},
            {"params": mixture.head_parameters(), "lr": settings.head_learning_rate},
        ]
        self.optimizer = make_optimizer(groups, settings.optim, settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, self._warmup_cosine)
        self.batches = Batches(pairs.num_units, settings.batch_size, settings.seed)
        self.micro_batch = MicroBatch(
            settings.micro_batch_size or settings.batch_size,
            sharded=any(hasattr(parameter, "to_local") for parameter in mixture.parameters()),
        )
        self._own_margins: Tensor | None = None

    def expectation(self, log_prior: Tensor) -> Expectation:
        """The E-step at the model as it is.

        Raises:
            NonFiniteError: if the likelihood is not finite, with the choices of a user who has none.
        """
        pairs = self.pairs
        self._own_margins = margins = pairs.own_margins(self.mixture, self.settings.scoring_batch_size)
        if shares_rows() and pairs.choice_offsets is None:
            by_user = sum_over_ranks(pairs.own_log_likelihood(margins))
            soft, log_likelihood, _ = posterior(by_user, log_prior)
            step = Expectation(soft.to(margins), log_likelihood.to(margins))
        else:  # a choice of several rows may lie with two processes: its margins are gathered
            step = pairs.expectation_of(gather_rows(margins, len(pairs)), log_prior)
        if not bool(step.log_likelihood.isfinite().all()):
            users = (~step.log_likelihood.isfinite()).nonzero()
            choices = (pairs.choice_users == int(users[0])).nonzero().flatten().tolist()
            what = "the log-likelihood of a user is not finite"
            raise NonFiniteError(f"{what}; lower the learning rates", pairs.batch_of(choices))
        return step

    def margins(self) -> Tensor:
        """Margins [P, K] of all pairs by the model as it is, kept from the last E-step."""
        if self._own_margins is None:
            self._own_margins = self.pairs.own_margins(self.mixture, self.settings.scoring_batch_size)
        return gather_rows(self._own_margins, len(self.pairs))

    @cached_property
    def memory(self) -> AbstractContextManager[None]:
        """For forward passes of training."""
        return map_large_blocks(self.mixture)

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        """Take the optimizer steps of a round; returns the last step's loss.

        Raises:
            NonFiniteError: for a loss or gradient that is NaN or infinite, with the batch.
            FloatingPointError: for such weights.
        """
        self._own_margins = None
        self.mixture.train()  # adapters' dropout alone: the trunk has none
        while self.num_steps < self.settings.steps_per_round:
            choices = next(self.batches)
            self.loss = self.accumulate(choices, responsibilities)
            norm = float(clip_gradients(list(self.mixture.parameters()), 1.0))
            batch, what = partial(self.pairs.batch_of, choices), "the reward loss or its gradient"
            require_finite(self.loss + norm, batch, None, what)
            self.optimizer.step()
            self.schedule.step()
            self.num_steps += 1
            self.on_step(responsibilities)
        self.num_steps = 0
        self.mixture.eval()
        require_finite_parameters(self.mixture.named_parameters(), "the reward model")
        return {"loss": self.loss}

    def accumulate(self, choices: list[int], responsibilities: Tensor) -> float:
        """As :meth:`backward`, once more by half as much at once where memory does not suffice."""
        try:
            return self.backward(choices, responsibilities)
        except (RuntimeError, MemoryError) as error:
            if not self.micro_batch.halve(error, len(choices) * self.pairs.most_rows):
                raise
        return self.accumulate(choices, responsibilities)  # here: the error holds memory, too

    def backward(self, choices: list[int], responsibilities: Tensor) -> float:
        """Compute the gradient of the loss on these choices, a micro-batch at a time.

        Every micro-batch is divided by the choices of them all: their size changes nothing but memory.

        Returns:
            The loss without its penalty.
        """
        self.optimizer.zero_grad()
        nll = 0.0
        index, real = share_of_rows(len(choices))
        share = [choices[i] for i in index.tolist()]
        # as many in every process, whatever their rows
        size = max(1, self.micro_batch.size // self.pairs.most_rows)
        for low in range(0, len(share), size):
            part = share[low : low + size]
            rows, offsets = self.pairs.rows_of(part)
            with self.memory:
                chosen, rejected = self.pairs.scores(self.mixture, rows)
            weights = responsibilities[self.pairs.choice_users[part]]
            if world_size() > 1:
                weights = weights * real[low : low + size, None]
            if self.pairs.choice_weights is not None:
                weights = weights * self.pairs.choice_weights[part].unsqueeze(-1)
            weights = weights.to(chosen)
            of_rows = weights
            if offsets is not None:
                offsets = offsets.to(chosen.device)
                of_rows = at_rows(weights / offsets.diff().unsqueeze(-1), offsets, len(rows))
            log_choice = log_choices(chosen - rejected, offsets)
            loss = -(weights * log_choice).sum(-1).sum() / len(choices)
            penalty = (of_rows * (chosen.square() + rejected.square())).sum(-1).sum() / len(choices) / 2
            (loss + self.settings.reward_l2 * penalty).backward()
            nll += loss.item()
        if world_size() > 1:
            sum_gradients(self.mixture.parameters())
            nll = float(sum_over_ranks(torch.tensor(nll, dtype=torch.float64)))
        return nll

    def restart(self, k: int, donor: int) -> None:
        """Start group k's head anew from the donor's, with a little noise."""
        if shares_rows():  # the same in all processes
            torch.manual_seed(of_main_process(lambda: int(torch.randint(2**62, ()))))
        self.mixture.reset_head_(k, donor)
        self._own_margins = None

    def _warmup_cosine(self, step: int) -> float:
        total = self.settings.total_steps
        warmup = max(1, total // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step."""
        return {
            "num_steps": self.num_steps,
            "loss": self.loss,
            "model": self.mixture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "random": torch.get_rng_state(),
            **self.micro_batch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.mixture.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        self.num_steps, self.loss = state["num_steps"], state["loss"]
        self.micro_batch.load_state_dict(state)
        torch.set_rng_state(state["random"])
