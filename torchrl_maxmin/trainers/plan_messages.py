"""What processes that work as one send each other: bytes, messages and seconds.

Every process has the numbers of all rows: what a rollout costs in messages grows with its rows, and with
tokens and groups, however many processes share them. Gradients are summed once an optimizer step; shards
gather a network's weights for every pass of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchrl_maxmin.trainers.plan_networks import Size

__all__ = ["Link", "Messages", "gradient_messages", "ppo_messages", "reward_messages"]

FLOAT, DOUBLE, LONG, BOOL = 4, 8, 8, 1
#: figures of a minibatch that are summed by name; about so many, which is nothing beside the rest
_LOSSES = 8


@dataclass(frozen=True)
class Link:
    """What lies between two neighbours of a ring of processes.

    Attributes:
        bandwidth: bytes a second, of its slowest part.
        latency: seconds that a message takes whatever its size.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Messages:
    """Collective operations of one kind.

    Attributes:
        what: they carry.
        kind: ``broadcast``, ``all_gather``, ``all_reduce`` or ``reduce_scatter``.
        count: how many.
        bytes: of them all together: of what every process has in the end, and for ``reduce_scatter`` of what
            is summed.
    """

    what: str
    kind: str
    count: float
    bytes: float

    def seconds(self, ranks: int, link: Link) -> float:
        """Time around a ring: all but a process's own share passes each link, and for a sum twice.

        Args:
            ranks: processes.
            link: between two of them.

        Example:
            >>> Messages("gradients", "all_reduce", 1, 8e9).seconds(8, Link(1e9, 0.0))
            14.0
        """
        turns = 2 if self.kind == "all_reduce" else 1
        passed = self.bytes if self.kind == "broadcast" else self.bytes * (ranks - 1) / ranks
        return turns * (passed / link.bandwidth + self.count * math.ceil(math.log2(ranks)) * link.latency)


def ppo_messages(
    settings: Any, networks: Sequence[Size], trained: Sequence[Size], *, columns: int, micro: int
) -> dict[str, list[Messages]]:
    """The messages of an iteration by phase; none for one process.

    Args:
        settings: a :class:`~torchrl_maxmin.trainers.plan.PlanConfig` of ``ppo``, with no flag left open.
        networks: what is read and trained in passes of its own: the policy, and a critic that is no heads.
        trained: all that is trained, heads too.
        columns: values a token; 0 without a critic.
        micro: rows of a process in memory at once.
    """
    ranks, width = settings.gpus, settings.response_length
    if ranks == 1:
        return {}
    rollout = _padded(settings.rollout_batch_size, ranks)
    mini = min(settings.mini_batch_size, settings.rollout_batch_size)
    whole, rest = divmod(settings.rollout_batch_size, mini)
    rows_a_step = [_padded(rows, ranks) for rows in [mini] * whole + [rest] * bool(rest)]
    steps = settings.num_ppo_epochs * len(rows_a_step)
    drawn = settings.rollout_batch_size * width * FLOAT
    generate = [
        Messages("uniform numbers", "broadcast", 1, drawn),
        Messages("responses", "all_gather", 3, rollout * width * (LONG + BOOL + FLOAT)),
    ]
    score = [
        Messages("reference log-probabilities", "all_gather", 1, rollout * width * FLOAT),
        Messages("rewards", "all_gather", 1, rollout * settings.num_groups * FLOAT),
        Messages("utilities", "all_reduce", 1, (settings.num_groups + 1) * DOUBLE),
    ]
    values = Messages("values", "all_gather", 1, rollout * width * columns * FLOAT)
    score += [values] if columns else []
    of_rows = settings.num_ppo_epochs * sum(rows_a_step) * width * FLOAT
    update = [
        Messages("order of minibatches", "broadcast", 1, LONG),
        Messages("log-ratios", "all_gather", steps, of_rows),
        Messages("losses", "all_reduce", steps, steps * _LOSSES * FLOAT),
    ]
    update += [Messages("values", "all_gather", steps, of_rows * columns)] if columns else []
    passes = settings.num_ppo_epochs * sum(math.ceil(rows / ranks / micro) for rows in rows_a_step)
    update += gradient_messages(settings, networks, trained, steps=steps, passes=passes)
    if settings.distributed == "fsdp2":
        policy, *critic = networks
        reads = math.ceil(rollout / ranks / settings.scoring_batch_size)
        slices = math.ceil(rollout / ranks / settings.generation_batch_size)
        # by generate before every token, where it sees that the model is sharded
        asked = 0 if policy.adapters else slices * (width + 1)
        generate.append(_gathered([policy], 1))
        generate.append(Messages("whether a response goes on", "all_reduce", asked, asked * FLOAT))
        # the reference is as large as the policy, through which heads read
        score.append(_gathered([policy, *(critic or [policy] * bool(columns))], reads))
        if columns and not critic:  # heads take the states where the policy has let its weights go
            update.append(Messages("weights", "all_gather", passes, passes * policy.root))
    return {"generate": generate, "score": score, "update": update}


def reward_messages(settings: Any, network: Size, heads: Size, *, passes: int) -> dict[str, list[Messages]]:
    """The messages of an optimizer step of ``reward``, and of a batch that is scored; none for one process.

    A round of EM is so many steps, the batches of a process's pairs, and the sum of users' log-likelihoods.

    Args:
        settings: a :class:`~torchrl_maxmin.trainers.plan.PlanConfig` of ``reward``, with no flag left open.
        network: the trunk.
        heads: on it.
        passes: through the trunk for a text: one an adapter.
    """
    if settings.gpus == 1:
        return {}
    network = replace(network, embeddings=0)  # nothing but the trunk reads them
    each = settings.gradient_accumulation_steps * passes
    update = gradient_messages(settings, [network], [network, heads], steps=1, passes=each)
    update.append(Messages("loss", "all_reduce", 1, DOUBLE))
    sharded = settings.distributed == "fsdp2"
    return {"update": update, "score": [_gathered([network], passes)] if sharded else []}


def gradient_messages(
    settings: Any, networks: Sequence[Size], trained: Sequence[Size], *, steps: int, passes: int
) -> list[Messages]:
    """The messages of optimizer steps; none for one process.

    Args:
        settings: with ``gpus`` and ``distributed``.
        networks: what has passes of its own.
        trained: all that is trained, heads too.
        steps: of the optimizer.
        passes: forward and backward passes of each network, in all steps.
    """
    if settings.gpus == 1:
        return []
    found: list[Messages] = []
    copies: Sequence[Size] = trained
    if settings.distributed == "fsdp2":
        # adapters are copies; a layer's weights are gathered for either half of a pass
        shards = [size for size in networks if not size.adapters]
        copies = [size for size in trained if not any(size is shard for shard in shards)]
        found.append(_gathered(networks, 2 * passes))
        if shards:
            parts, size = passes * _parts(shards), passes * sum(one.gradients for one in shards)
            found.append(Messages("gradients", "reduce_scatter", parts, size))
            norms = steps * len(shards)
            found.append(Messages("their norms", "all_reduce", norms, norms * FLOAT))
    tensors, size = sum(one.tensors for one in copies), sum(one.gradients for one in copies)
    return found + ([Messages("gradients", "all_reduce", steps * tensors, steps * size)] if tensors else [])


def _parts(networks: Sequence[Size]) -> int:
    """What is gathered by itself: a layer at a time, and then the rest."""
    return sum(one.layers + 1 for one in networks)


def _gathered(networks: Sequence[Size], passes: int) -> Messages:
    """Weights of shards; below adapters all but the output embeddings, which log-probabilities read."""
    size = sum(one.weights - (one.embeddings if one.adapters else 0) for one in networks)
    return Messages("weights", "all_gather", passes * _parts(networks), passes * size)


def _padded(rows: int, ranks: int) -> int:
    """Rows that are dealt: equally many to each process."""
    return math.ceil(rows / ranks) * ranks
