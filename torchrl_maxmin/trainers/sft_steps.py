"""Supervised fine-tuning, step by step: alone or by processes that work as one, from a checkpoint if need be.

The steps are those of the Hugging Face Trainer, to rounding. Its own data parallelism counts rows twice where
an epoch does not go round, and its checkpoints hold pickles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchrl_maxmin.core.allocator import map_large_blocks
from torchrl_maxmin.core.checkpoint import (
    random_state,
    require_same_batch,
    restore_random_state,
    save_checkpoint,
    saved_state,
)
from torchrl_maxmin.core.distributed import (
    clip_gradients,
    gather_objects,
    rank,
    share_of_rows,
    start_alike,
    sum_gradients,
    sum_over_ranks,
    world_size,
)
from torchrl_maxmin.core.interruption import Interrupted, signals_held
from torchrl_maxmin.core.optimizers import MicroBatch, make_optimizer
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.run import MetricsLog, require_finite
from torchrl_maxmin.models.sequences import without_cache
from torchrl_maxmin.models.sharding import shard

__all__ = ["mean_over_tokens", "num_steps", "train_language_model"]

Row = dict[str, Any]


def mean_over_tokens(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A part's share of the mean loss over all tokens of an optimizer step."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = outputs["logits"]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)


def num_steps(config: Any, num_rows: int) -> int:
    """Optimizer steps of a run."""
    steps_per_epoch = math.ceil(num_rows / _rows_a_step(config))
    return config.max_steps if config.max_steps > 0 else math.ceil(steps_per_epoch * config.num_train_epochs)


def _rows_a_step(config: Any) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()


def train_language_model(
    config: Any,
    model: Any,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    device: torch.device,
) -> float:
    """Train a causal language model in place, every token of a step counted alike; returns the mean loss.

    Goes on from the checkpoint that the settings name, and leaves one where Ctrl-C or SIGTERM ends it.

    Args:
        config: an :class:`~torchrl_maxmin.trainers.sft.SFTConfig`; with ``fsdp2`` each process keeps a part.
        model: the model, or the peft model around it.
        rows: ``input_ids`` of each text, and how many tokens at its start are not trained on (``skip``).
        collate: makes ``input_ids``, ``attention_mask`` and ``labels`` of some rows.
        device: where to.

    Raises:
        FloatingPointError: for a loss or gradient that is NaN or infinite; the batch is saved.
    """
    from transformers import Trainer, get_scheduler

    model.to(device).train()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = without_cache(model)
    memory = map_large_blocks(model)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    if config.distributed == "fsdp2":
        shard(base)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    start_alike(p for _, p in named)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name in decayed]},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [{**group, "lr": config.learning_rate} for group in groups if group["params"]]
    optimizer = make_optimizer(groups, config.optim, config.weight_decay)
    total, batches = num_steps(config, len(rows)), _batches(len(rows), _rows_a_step(config), config.seed)
    schedule = get_scheduler(config.lr_scheduler_type, optimizer.optimizer, config.warmup_steps, total)
    torch.manual_seed(config.seed + rank())  # dropout of other rows is another
    loss, done = torch.zeros((), device=device), 0
    weights, folder = dict(named), Path(config.output_dir)
    micro_batch = MicroBatch(config.per_device_train_batch_size, sharded=config.distributed == "fsdp2")
    if (state := saved_state(config)) is not None:
        require_same_batch(state["rows"], _rows_a_step(config))
        done = state["step"]
        loss.copy_(state["loss"][rank()] if rank() < len(state["loss"]) else torch.zeros(()))
        for name, value in state["weights"].items():
            with torch.no_grad():
                weights[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        micro_batch.load_state_dict(state)
        for _ in range(done):
            next(batches)
        restore_random_state(state["random"])

    def checkpoint() -> Path:
        state = {"step": done, "loss": gather_objects(loss), "weights": weights, "random": random_state()}
        state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state |= {"rows": _rows_a_step(config), **micro_batch.state_dict()}
        return save_checkpoint(folder, done, state, config.save_total_limit or None)

    def backward(part: dict[str, torch.Tensor], num_predicted: int) -> torch.Tensor:
        inputs = {name: value.to(device) for name, value in part.items()}
        labels = inputs.pop("labels")
        with memory, torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            outputs = model(**inputs, **options)
        share = mean_over_tokens(outputs, labels, num_predicted)
        share.backward()
        return share.detach()

    def accumulate(batch: Sequence[Row]) -> torch.Tensor:
        """Compute the gradient of a step's rows; returns this process's share of their loss."""
        optimizer.zero_grad()
        try:
            parts = _parts(batch, micro_batch.size, collate)
            return sum(
                (backward(part, _num_predicted(batch)) for part in parts), torch.zeros((), device=device)
            )
        except (RuntimeError, MemoryError) as error:
            if not micro_batch.halve(error, len(batch)):
                raise
        return accumulate(batch)  # not in the clause above: the error holds memory, too

    log = MetricsLog(folder, config.report_to, keep=done)
    with signals_held() as waiting, progress_bar("fine-tuning the reference", total) as advance:
        advance(done)
        while done < total:
            batch = [rows[place] for place in next(batches)]
            share = accumulate(batch)
            loss += share
            parameters = [p for group in optimizer.groups for p in group]
            sum_gradients(parameters)
            norm = clip_gradients(parameters, 1.0)
            value, whole = float(loss + norm), partial(collate, batch)  # NaN in one step's loss stays
            require_finite(value, whole, Path(config.output_dir), "the sft loss or its gradient")
            optimizer.step()
            mean = float(sum_over_ranks(share))
            log.write(done, {"loss/sft": mean, "policy/grad_norm": norm, "lr": schedule.get_last_lr()[0]})
            schedule.step()
            done += 1
            advance(note=f"loss {mean:.3f}")
            if config.save_steps and done % config.save_steps == 0:
                checkpoint()
            if signum := waiting():
                raise Interrupted.at_checkpoint(signum, checkpoint())
    model.eval()
    return float(sum_over_ranks(loss)) / total


def _batches(num_rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Rows in an order of their own in every epoch; the last batch of one is what is left."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (part.tolist() for part in torch.randperm(num_rows, generator=generator).split(size))


def _parts(
    batch: Sequence[Row], size: int, collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]]
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's share of a batch, so many rows at once; rows that are there again predict nothing."""
    index, real = share_of_rows(len(batch))
    for places, counted in zip(index.split(size), real.split(size), strict=True):
        part = collate([batch[place] for place in places.tolist()])
        part["labels"] = part["labels"].masked_fill(~counted[:, None], -100)
        yield part


def _num_predicted(batch: Sequence[Row]) -> int:
    """Tokens that are trained on; the first of a text is predicted by nothing."""
    return max(1, sum(max(0, len(row["input_ids"]) - max(row["skip"], 1)) for row in batch))
