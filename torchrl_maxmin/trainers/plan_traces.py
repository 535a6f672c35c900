"""Phases of a stage, and the dry runs that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from torchrl_maxmin.core.allocator import maps_large_blocks
from torchrl_maxmin.models.dry_run import Trace
from torchrl_maxmin.models.loading import load_config
from torchrl_maxmin.models.memory import Jobs
from torchrl_maxmin.models.rates import Rates
from torchrl_maxmin.models.sequences import text_config
from torchrl_maxmin.trainers.plan_messages import Messages
from torchrl_maxmin.trainers.plan_networks import Network, Size, size_of

__all__ = ["FLOAT", "Phase", "Planner"]

FLOAT = 4  # bytes: Adam's moments, adapters and heads are float32 whatever the weights are
# clipping and AdamW read and write parameter, gradient and moments so many times, in so many operations
_ADAM_PASSES, _ADAM_OPERATIONS = 3 + 18, 2 + 12
# of the activations (SmolLM2-135M): where large blocks are mapped one by one, which plans within 8% of runs
# (benchmarks/results), and where they are not: right for full copies, up to a half too low for adapters
_PIECES = {True: 0.1, False: 0.4}


@dataclass
class Phase:
    """A stretch of a stage.

    Attributes:
        name: calibrate, generate, score, update or save.
        parts: bytes by part at the phase's peak.
        seconds: time, of one iteration where there are several; None where it was not estimated.
        flags: flags that lower what this phase alone holds, of least cost first.
        messages: between processes, in an iteration.
    """

    name: str
    parts: dict[str, float]
    seconds: float | None = None
    flags: Sequence[str] = field(default_factory=tuple)
    messages: Sequence[Messages] = field(default_factory=tuple)

    @property
    def total(self) -> float:
        """Bytes at its peak."""
        return sum(self.parts.values())

    def sending(self, messages: Sequence[Messages], settings: Any) -> Phase:
        """This phase with messages, whose seconds come on top.

        Nothing overlaps: gradients are summed when all of them are there.
        """
        added = sum(message.seconds(settings.gpus, settings.link()) for message in messages)
        seconds = None if self.seconds is None else self.seconds + added
        return replace(self, messages=messages, seconds=seconds)


class Planner:
    """Traces of what a stage does, each made once however often a plan asks.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        rates: see :func:`~torchrl_maxmin.models.rates.measure_rates`; None leaves seconds 0.
        overhead: what a process holds before it has a model, by part.
    """

    def __init__(self, device: str, rates: Rates | None, overhead: dict[str, float]):
        self.device, self.rates, self.overhead = device, rates, overhead
        self._kept: dict[Hashable, Any] = {}

    def once(self, make: Callable[..., Any], *key: Hashable) -> Any:
        """``make()``, unless it was made for this key before."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def jobs(self, network: Network) -> Jobs:
        """What can be done with a network's model."""
        name = network.model_name_or_path
        return self.once(lambda: Jobs(load_config(name), self.device, self.rates), "jobs", name)

    def size(self, network: Network) -> Size:
        """What a network weighs."""
        return self.once(lambda: size_of(network), "size", network)

    def scoring(self, network: Network, rows: int, prompt: int, response: int, **what: Any) -> Trace:
        """See :meth:`~torchrl_maxmin.models.memory.Jobs.scoring`."""
        shape = (rows, prompt, response)
        key = ("scoring", network, *shape, *what.values())
        return self.once(lambda: self.jobs(network).scoring(network.build, *shape, **what), *key)

    def training(
        self,
        networks: Sequence[Network],
        losses: Sequence[Callable[..., Tensor]],
        *key: Hashable,
        **how: bool,
    ) -> Trace:
        """See :meth:`~torchrl_maxmin.models.memory.Jobs.training`; ``key`` names the losses."""
        builds = [network.build for network in networks]
        jobs = self.jobs(networks[0])
        key = ("training", *networks, *key, *how.values())
        return self.once(lambda: jobs.training(builds, losses, **how), *key)

    def sampling(
        self,
        network: Network,
        rows: int,
        prompt: int,
        response: int,
        temperature: float = 1.0,
        *,
        given: bool = False,
    ) -> tuple[dict[str, float], float]:
        """Bytes by part, and seconds, of ``rows`` responses of full length sampled at once.

        Args:
            network: samples.
            rows: how many.
            prompt: tokens of a prompt.
            response: tokens of a response.
            temperature: of the sampling.
            given: see :meth:`~torchrl_maxmin.models.memory.Jobs.drawing`.
        """
        jobs = self.jobs(network)
        first: Trace = self.once(
            lambda: jobs.prefill(network.build, rows, prompt), "prefill", network, rows, prompt
        )
        before = prompt + response - 1
        last: Trace = self.once(lambda: jobs.step(network.build, rows, before), "step", network, rows, before)
        vocabulary = text_config(load_config(network.model_name_or_path)).vocab_size
        drawn: float = self.once(
            lambda: jobs.drawing(rows, vocabulary, temperature, given=given),
            *("drawing", rows, vocabulary, temperature, given),
        )
        row = FLOAT * rows * vocabulary
        passes = max(first.peak, last.peak) - last.kept
        # scores of this step and of the last one, the model's own logits, and their softmax
        logits = (4 + (temperature != 1.0)) * row
        parts = {"KV cache": last.kept, "sampling": max(passes + row, logits)}
        return parts, first.seconds + (response - 1) * last.seconds + response * drawn

    def pieces(self, parts: dict[str, float], network: Network) -> dict[str, float]:
        """What malloc holds between live blocks of an update on a CPU.

        Args:
            parts: of the update.
            network: what is trained.
        """
        if self.device != "cpu":
            return {}
        return {"malloc's pieces": _PIECES[self.mapped(self.size(network))] * parts.get("activations", 0.0)}

    def mapped(self, *sizes: Size) -> bool:
        """Whether large blocks of the training of networks of these sizes are mapped one by one."""
        return self.device == "cpu" and maps_large_blocks(sum(size.parameters for size in sizes))

    def optimizer(self, size: Size, *, foreach: bool = True) -> tuple[float, float]:
        """Bytes that a step of AdamW holds beside its state, and its seconds.

        Args:
            size: of what is trained.
            foreach: PyTorch's default, operations over all parameters at once on a GPU and one by one on a
                CPU; False for the fused kernel.
        """
        held = FLOAT * (size.trained if self.device == "cuda" else 2 * size.largest) if foreach else 0
        held += FLOAT * size.half  # float32 gradients for the copies of half-precision weights
        if self.rates is None:
            return held, 0.0
        moved = _ADAM_PASSES * FLOAT * size.trained
        starts = size.tensors * _ADAM_OPERATIONS * self.rates.op_seconds
        return held, starts + self.rates.copy_seconds(moved, 4 * FLOAT * size.trained)
