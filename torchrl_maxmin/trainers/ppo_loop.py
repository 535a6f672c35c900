"""The loop of Algorithm 1 of MaxMin-RLHF (arXiv 2402.08925), for language models and environments alike.

:meth:`PPOLoop.train` is the algorithm. What a trainer brings is how its parts are built, how a rollout
becomes a batch with advantages, and what is worth measuring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement

from torchrl_maxmin.core.checkpoint import (
    find_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.run import MetricsLog, prepare_output_dir, require_finite, resolve_device
from torchrl_maxmin.objectives import MaxMinPPOLoss, VectorGAE
from torchrl_maxmin.trainers.ppo_settings import PPOSettings
from torchrl_maxmin.welfare import Adversary

__all__ = ["PPOLoop"]


class PPOLoop(ABC):
    """Rollout, group weights, advantages, clipped PPO, again.

    Subclasses set the attributes below in their ``__init__`` and write the abstract methods.

    Attributes:
        policy, critic: what is trained.
        loss, gae: the loss, and the advantage of every group.
        adversary: who moves the group weights.
        collector: gives a rollout an iteration.
        num_iterations: rollouts.

    Args:
        config: the stage's settings; checked here.
    """

    config: PPOSettings
    policy: nn.Module
    critic: nn.Module
    loss: MaxMinPPOLoss
    gae: VectorGAE
    adversary: Adversary
    collector: Any
    num_iterations: int
    more_iterations = "--num_iterations"  # the flag that makes a run longer

    def __init__(self, config: PPOSettings):
        config.check()
        self.config = config
        self.device = resolve_device(config.device)
        self.folder = Path(config.output_dir)
        self.start = 0

    # -- what a trainer brings --------------------------------------------------------------------

    @abstractmethod
    def _prepare(self, rollout: TensorDictBase) -> TensorDict:
        """A batch of rows with ``advantage`` [*B, 1], whitened, and ``value_target``."""

    @abstractmethod
    def _rows(self, batch: TensorDict) -> TensorDict:
        """What of the batch the optimizer steps read, one row a draw."""

    @abstractmethod
    def _measure(self, iteration: int, batch: TensorDict, losses: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of an iteration."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside what every trainer has."""

    @abstractmethod
    def _load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`_state` gave."""

    @abstractmethod
    def _finish(self) -> None:
        """Save the policy and what is known of the run."""

    def _after(self, metrics: dict[str, float]) -> bool:
        """What follows an iteration; whether the run is done before its time."""
        return False

    def _note(self, metrics: dict[str, float]) -> str:
        """What stands behind the progress bar."""
        return f"worst group {metrics['objective/welfare']:+.2f}"

    # -- the algorithm ----------------------------------------------------------------------------

    def train(self) -> None:
        """Run all iterations, save the policy and what is known of the run."""
        config = self.config
        log = MetricsLog(self.folder, config.report_to, keep=self.start)
        stop = config.stop_at_iteration or self.num_iterations
        rollouts, near_enough = iter(self.collector), False
        with progress_bar(f"ppo ({self.folder.name})", stop - self.start) as advance:
            for iteration in range(self.start, stop):
                batch = self._prepare(next(rollouts))
                losses = self._update(batch)
                metrics = self._measure(iteration, batch, losses) | {"lr": self.schedule.get_last_lr()[0]}
                log.write(iteration, metrics)
                self.schedule.step()
                near_enough = self._after(metrics)
                due = config.save_steps and (iteration + 1) % config.save_steps == 0
                if due or iteration + 1 == config.stop_at_iteration:
                    self._save(iteration + 1)
                advance(note=self._note(metrics))
                if near_enough:
                    break
        self.collector.shutdown(close_env=False)
        if stop == self.num_iterations or near_enough:
            self._finish()

    def _update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Clipped PPO on a batch; metrics averaged over optimizer steps."""
        config = self.config
        self.buffer.empty()
        self.buffer.extend(self._rows(batch))
        records = []
        for _ in range(config.num_ppo_epochs):
            for minibatch in self.buffer:
                losses = self.loss(minibatch)
                total = sum(value for name, value in losses.items() if name.startswith("loss_"))
                self.optimizer.zero_grad()
                total.backward()
                norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
                nn.utils.clip_grad_norm_(self.critic.parameters(), config.max_grad_norm)
                value = (total.detach() + norm).item()  # one wait for the device a step
                require_finite(value, minibatch, self.folder, "the PPO loss or its gradient")
                self.optimizer.step()
                records.append(losses.detach())
        return torch.stack(records).mean(0).to_dict()

    # -- parts that all trainers share ------------------------------------------------------------

    def _saved(self) -> dict[str, Any] | None:
        """The checkpoint to go on from; without one, the output folder is made."""
        if self.config.resume_from_checkpoint:
            return find_checkpoint(self.folder, self.config.resume_from_checkpoint)
        prepare_output_dir(self.folder)
        return None

    def _build_loss(self, actor: nn.Module, **options: Any) -> None:
        """The clipped loss of this actor and the critic; ``options`` are the loss's own."""
        config = self.config
        self.loss = MaxMinPPOLoss(
            actor,
            self.critic,
            functional=False,
            clip_epsilon=config.cliprange,
            clip_value=config.cliprange_value or None,
            entropy_bonus=config.entropy_coeff > 0,
            entropy_coeff=config.entropy_coeff,
            critic_coeff=1.0,
            loss_critic_type="l2",
            **options,
        )

    def _build_optimizer(self, num_rows: int) -> None:
        """Optimizer, schedule and the buffer that deals ``num_rows`` rows out."""
        config = self.config
        groups: Iterable[tuple[nn.Module, float]] = (
            (self.policy, config.learning_rate),
            (self.critic, config.critic_learning_rate or config.learning_rate),
        )
        self.optimizer = torch.optim.AdamW(
            [{"params": module.parameters(), "lr": rate} for module, rate in groups],
            eps=1e-8,
            weight_decay=0.0,
        )
        warmup, total = config.warmup_iterations, self.num_iterations

        def rate(iteration: int) -> float:
            if iteration < warmup:
                return (iteration + 1) / (warmup + 1)
            return max(total - iteration, 0) / max(total - warmup, 1)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(num_rows, device=self.device),
            sampler=SamplerWithoutReplacement(),
            batch_size=min(config.mini_batch_size, num_rows),
        )

    # -- state ------------------------------------------------------------------------------------

    def _save(self, iteration: int) -> None:
        state = {
            "iteration": iteration,
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "adversary": self.adversary.state_dict(),
            **self._state(),
            "random": random_state(),
        }
        save_checkpoint(self.folder, iteration, state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Everything but the random generators, which come last: see :meth:`_restore_random`."""
        self.start = state["iteration"]
        if self.start >= (self.config.stop_at_iteration or self.num_iterations):
            raise UserError(
                f"the checkpoint is at iteration {self.start} already; raise {self.more_iterations}"
            )
        try:
            for name in ("policy", "critic", "adversary", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "the checkpoint is of other settings (sizes of the networks, groups, adversary); resume with "
                f"those of {self.folder / 'config.yaml'}"
            ) from error
        self._load_state(state)

    def _restore_random(self, state: dict[str, Any]) -> None:
        restore_random_state(state["random"])
