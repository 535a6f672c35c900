"""Optimizer steps on a rollout: minibatches, micro-batches, clipping, schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement

from torchrl_maxmin.core.allocator import map_large_blocks
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
from torchrl_maxmin.core.optimizers import MicroBatch, make_optimizer
from torchrl_maxmin.core.run import require_finite
from torchrl_maxmin.masks import ROW_LENGTHS, SHIFTED_VALID, to_device
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.objectives import MaxMinPPOLoss
from torchrl_maxmin.trainers.ppo_settings import PPOSettings

__all__ = ["Learner"]


class Learner:
    """Takes optimizer steps on minibatches of a rollout, in memory for one micro-batch.

    A minibatch is dealt in micro-batches, whose gradients add up to its own; processes that work as one take
    a share of its rows each. Each role's gradient is clipped by itself.

    Args:
        config: the stage's settings.
        models: what is trained.
        num_iterations: rollouts of the whole run, until the learning rate is 0.
        rollout_size: rows of a rollout.
        optim: the optimizer, see :func:`~torchrl_maxmin.core.optimizers.make_optimizer`.
        **loss_options: further ones of :class:`~torchrl_maxmin.objectives.MaxMinPPOLoss`.
    """

    def __init__(
        self,
        config: PPOSettings,
        models: Networks,
        num_iterations: int,
        rollout_size: int,
        optim: str = "adamw_torch",
        **loss_options: Any,
    ):
        self.num_iterations, self.num_epochs = num_iterations, config.num_ppo_epochs
        self.max_grad_norm, self.folder = config.max_grad_norm, Path(config.output_dir)
        mini_batch_size = min(config.mini_batch_size, rollout_size)
        self.micro_batch = MicroBatch(
            config.per_device_train_batch_size or mini_batch_size,
            sharded=getattr(config, "distributed", "none") == "fsdp2",
        )
        options: dict[str, Any] = {
            "clip_epsilon": config.cliprange,
            "clip_value": config.cliprange_value or None,
            "entropy_bonus": config.entropy_coeff > 0,
            "entropy_coeff": config.entropy_coeff,
            "critic_coeff": None if models.critic is None else 1.0,
            "loss_critic_type": "l2",
        }
        self.loss = MaxMinPPOLoss(models.actor, models.critic, functional=False, **options, **loss_options)
        self.loss.set_keys(sample_log_prob="sample_log_prob")
        self.memory = map_large_blocks(self.loss)
        roles = models.parameters()
        for parameters in roles.values():
            start_alike(parameters)
        rates = {
            "policy": config.learning_rate,
            "critic": config.critic_learning_rate or config.learning_rate,
        }
        groups = [{"params": parameters, "lr": rates[role]} for role, parameters in roles.items()]
        self.optimizer = make_optimizer(groups, optim)
        warmup = config.warmup_iterations

        def rate(iteration: int) -> float:
            if iteration < warmup:
                return (iteration + 1) / (warmup + 1)
            return max(num_iterations - iteration, 0) / max(num_iterations - warmup, 1)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, rate)
        self.device = roles["policy"][0].device
        self.generator = torch.Generator() if shares_rows() else None
        # Of the numbers of the rows alone: the host knows which ones a minibatch has.
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(rollout_size, device="cpu"),
            sampler=SamplerWithoutReplacement(),
            batch_size=mini_batch_size,
            generator=self.generator,
        )

    def update(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """Take the steps of a rollout; returns the loss's outputs, averaged over them.

        Args:
            rows: what the loss reads, batch size [N].

        Raises:
            FloatingPointError: for a loss or gradient that is NaN or infinite; the minibatch is saved.
        """
        if self.generator is not None:  # all processes deal the same minibatches
            self.generator.manual_seed(of_main_process(lambda: int(torch.randint(2**62, ()))))
        lengths = rows.get_non_tensor(ROW_LENGTHS, None)
        rows = rows.exclude(ROW_LENGTHS).to(self.device)
        self.buffer.empty()
        self.buffer.extend(torch.arange(len(rows)))
        records, values, dealt = [], [], []
        for index in (part for _ in range(self.num_epochs) for part in self.buffer):
            minibatch = rows[to_device(index, self.device)]
            if lengths is not None:
                minibatch.set_non_tensor(ROW_LENGTHS, lengths.take(index))
            losses = self.accumulate(minibatch)
            norms = [clip_gradients(parameters, self.max_grad_norm) for parameters in self.optimizer.groups]
            values.append(losses["loss"] + sum(norms))
            self.optimizer.step()
            records.append(losses)
            dealt.append(index)
        # one wait for the device a rollout
        for value, index in zip(torch.stack(values).tolist(), dealt, strict=True):
            what = "the PPO loss or its gradient"
            require_finite(value, lambda index=index: rows[index.to(self.device)], self.folder, what)
        return torch.stack(records).mean(0).to_dict()

    def accumulate(self, minibatch: TensorDictBase) -> TensorDictBase:
        """Compute the gradient of a minibatch; returns the loss's outputs, and ``loss``, their sum.

        Where memory does not suffice, micro-batches are halved, once in a run.
        """
        whole = len(minibatch) <= self.micro_batch.size and world_size() == 1
        outputs: list[TensorDictBase] = []
        networks = losses = loss = None
        try:
            for part in [minibatch] if whole else self._parts(minibatch):
                each: list[TensorDictBase] = []
                networks = self.loss.losses_by_network(part)  # in memory one at a time
                while True:
                    with self.memory:  # for the forward pass alone
                        losses = next(networks, None)
                    if losses is None:
                        break
                    loss = sum(value for name, value in losses.items() if name.startswith("loss_"))
                    # not before: the backward pass takes the memory that this frees
                    if not (outputs or each):
                        self.optimizer.zero_grad()
                    loss.backward()
                    each.append(losses.detach().set("loss", loss.detach()))
                total = sum(losses["loss"] for losses in each)
                for losses in each[1:]:
                    each[0].update(losses)
                outputs.append(each[0].set("loss", total))
        except (RuntimeError, MemoryError) as error:
            if not self.micro_batch.halve(error, len(minibatch)):
                raise
            outputs, networks, losses, loss = [], None, None, None  # free what they hold
        if not outputs:  # not in the clause above: the error holds memory, too
            return self.accumulate(minibatch)
        for parameters in self.optimizer.groups:
            sum_gradients(parameters)
        return outputs[0] if whole else self.loss.merge(_of_all_ranks(outputs, len(minibatch)), minibatch)

    def _parts(self, minibatch: TensorDictBase) -> Iterator[TensorDictBase]:
        """This process's micro-batches of a minibatch, each with its rows' lengths, if there are any."""
        index, lengths = torch.arange(len(minibatch)), minibatch.get_non_tensor(ROW_LENGTHS, None)
        (mine,) = self.loss.micro_batches(minibatch, len(minibatch))
        if world_size() > 1:
            index, real = share_of_rows(len(minibatch))
            mine, key = mine[index.to(self.device)], self.loss.loss_mask_key
            key = SHIFTED_VALID if key == "auto" else key
            mask, real = mine.get(key, None), real.to(self.device)
            mine[key] = real if mask is None else mask & real.unsqueeze(-1)
        size = self.micro_batch.size
        for part, rows in zip(mine.split(size), index.split(size), strict=True):
            yield part if lengths is None else part.copy().set_non_tensor(ROW_LENGTHS, lengths.take(rows))

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizer and schedule, and the micro-batches that memory sufficed for."""
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        return state | self.micro_batch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.micro_batch.load_state_dict(state)


def _of_all_ranks(outputs: Sequence[TensorDictBase], num_rows: int) -> Sequence[TensorDictBase]:
    """The outputs of every process's micro-batches of a minibatch [num_rows], as of one."""
    if world_size() == 1:
        return outputs
    by_row = [name for name in ("log_ratio", "value") if outputs[0].get(name, None) is not None]
    sums = torch.stack([output.exclude(*by_row) for output in outputs]).sum(0)
    names = list(sums.keys())
    for name, total in zip(names, sum_over_ranks(torch.stack([sums[n] for n in names])), strict=True):
        sums[name] = total
    for name in by_row:
        sums[name] = gather_rows(torch.cat([output[name] for output in outputs]), num_rows)
    return [sums]
