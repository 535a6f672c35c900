"""Optimizer steps on a rollout: minibatches, micro-batches, clipping, schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement

from torchrl_maxmin.modules.networks import Networks
from torchrl_maxmin.objectives import MaxMinPPOLoss
from torchrl_maxmin.trainers.ppo_settings import PPOSettings
from torchrl_maxmin.trainers.run import require_finite

__all__ = ["Learner", "make_learner"]


class Learner:
    """Takes AdamW steps on minibatches of a rollout, in memory for one micro-batch.

    A minibatch is dealt in micro-batches, whose gradients add up to its own. Each role's gradient is clipped
    by itself.

    Args:
        loss: the clipped loss.
        parameters: what is trained by role, each parameter once.
        learning_rates: peak learning rate of every role.
        num_iterations: rollouts until the learning rate is 0.
        warmup_iterations: rollouts of linear warm-up before the linear decay.
        num_epochs: passes over a rollout.
        rollout_size: rows of a rollout.
        mini_batch_size: rows an optimizer step.
        micro_batch_size: rows in memory at once; ``mini_batch_size`` when None.
        max_grad_norm: of every role.
        folder: where a minibatch with a NaN goes.
        device: where rows are kept.
    """

    def __init__(
        self,
        loss: MaxMinPPOLoss,
        parameters: Mapping[str, Sequence[nn.Parameter]],
        learning_rates: Mapping[str, float],
        *,
        num_iterations: int,
        warmup_iterations: int = 0,
        num_epochs: int = 1,
        rollout_size: int,
        mini_batch_size: int,
        micro_batch_size: int | None = None,
        max_grad_norm: float = float("inf"),
        folder: Path,
        device: torch.device | str = "cpu",
    ):
        self.loss, self.num_epochs, self.num_iterations = loss, num_epochs, num_iterations
        self.max_grad_norm, self.folder = max_grad_norm, folder
        groups = [{"params": list(p), "lr": learning_rates[role]} for role, p in parameters.items()]
        self.optimizer = torch.optim.AdamW(groups, eps=1e-8, weight_decay=0.0)

        def rate(iteration: int) -> float:
            if iteration < warmup_iterations:
                return (iteration + 1) / (warmup_iterations + 1)
            return max(num_iterations - iteration, 0) / max(num_iterations - warmup_iterations, 1)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        mini_batch_size = min(mini_batch_size, rollout_size)
        self.micro_batch_size = micro_batch_size or mini_batch_size
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(rollout_size, device=device),
            sampler=SamplerWithoutReplacement(),
            batch_size=mini_batch_size,
        )

    def update(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """Take the steps of a rollout; returns the loss's outputs, averaged over them.

        Args:
            rows: what the loss reads, batch size [N].

        Raises:
            FloatingPointError: for a loss or gradient that is NaN or infinite; the minibatch is saved.
        """
        self.buffer.empty()
        self.buffer.extend(rows)
        records = []
        for _ in range(self.num_epochs):
            for minibatch in self.buffer:
                self.optimizer.zero_grad()
                losses = self.accumulate(minibatch)
                norms = [
                    nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
                    for group in self.optimizer.param_groups
                ]
                value = (losses["loss"] + sum(norms)).item()  # one wait for the device a step
                require_finite(value, minibatch, self.folder, "the PPO loss or its gradient")
                self.optimizer.step()
                records.append(losses)
        return torch.stack(records).mean(0).to_dict()

    def accumulate(self, minibatch: TensorDictBase) -> TensorDictBase:
        """Add the gradient of a minibatch up; returns the loss's outputs, and ``loss``, their sum."""
        whole = len(minibatch) <= self.micro_batch_size
        outputs = []
        for part in [minibatch] if whole else self.loss.micro_batches(minibatch, self.micro_batch_size):
            losses = self.loss(part)
            losses["loss"] = sum(value for name, value in losses.items() if name.startswith("loss_"))
            losses["loss"].backward()
            outputs.append(losses.detach())
        return outputs[0] if whole else self.loss.merge(outputs, minibatch)

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizer and schedule."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def make_learner(
    config: PPOSettings, models: Networks, num_iterations: int, rollout_size: int, **loss_options: Any
) -> Learner:
    """Build the clipped loss of some models, and who learns by it.

    Args:
        config: the stage's settings.
        models: what is trained.
        num_iterations: rollouts of the whole run.
        rollout_size: rows of a rollout.
        **loss_options: further ones of :class:`~torchrl_maxmin.objectives.MaxMinPPOLoss`.
    """
    loss = MaxMinPPOLoss(
        models.actor,
        models.critic,
        functional=False,
        clip_epsilon=config.cliprange,
        clip_value=config.cliprange_value or None,
        entropy_bonus=config.entropy_coeff > 0,
        entropy_coeff=config.entropy_coeff,
        critic_coeff=1.0,
        loss_critic_type="l2",
        **loss_options,
    )
    loss.set_keys(sample_log_prob="sample_log_prob")
    parameters = models.parameters()
    rates = {"policy": config.learning_rate, "critic": config.critic_learning_rate or config.learning_rate}
    return Learner(
        loss,
        parameters,
        rates,
        num_iterations=num_iterations,
        warmup_iterations=config.warmup_iterations,
        num_epochs=config.num_ppo_epochs,
        rollout_size=rollout_size,
        mini_batch_size=config.mini_batch_size,
        micro_batch_size=config.per_device_train_batch_size or None,
        max_grad_norm=config.max_grad_norm,
        folder=Path(config.output_dir),
        device=parameters["policy"][0].device,
    )
