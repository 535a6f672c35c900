"""MaxMin PPO: Algorithm 1 of MaxMin-RLHF (arXiv 2402.08925), for language models and environments alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tensordict import TensorDictBase
from torch import Tensor

from torchrl_maxmin._moved import moved_names
from torchrl_maxmin.collectors import GroupStatistics
from torchrl_maxmin.core.checkpoint import (
    random_state,
    restore_random_state,
    save_checkpoint,
    saved_state,
)
from torchrl_maxmin.core.errors import EngineError, RewardError, UserError
from torchrl_maxmin.core.finite import require_finite_parameters
from torchrl_maxmin.core.interruption import Interrupted, signals_held
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.run import MetricsLog
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.monitors import HarmlessMonitor, Metrics, Monitor
from torchrl_maxmin.trainers.ppo_settings import PPOSettings
from torchrl_maxmin.trainers.watch import Watch

__all__ = [
    "Advantages",
    "Monitor",
    "PPOParts",
    "Rollouts",
    "find_state",
    "restore",
    "train",
    "update_metrics",
]

__getattr__ = moved_names(__name__)


class Rollouts(Protocol):
    """Iterates over batches by the policy as it is when they are asked for."""

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield batches."""

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """The state to go on from after so many batches."""

    def close(self) -> None:
        """Free what is held."""


class Advantages(Protocol):
    """Maps a batch with group weights to the rows that the loss reads, and to the batch's metrics."""

    def __call__(self, batch: TensorDictBase) -> tuple[TensorDictBase, Metrics]:
        """Return rows with ``advantage`` weighted, and whitened where a critic gave it, and metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""


@dataclass
class PPOParts:
    """What :func:`train` takes beside the settings, where each is described."""

    models: Networks
    rollouts: Rollouts
    statistics: GroupStatistics
    advantages: Advantages
    learner: Learner
    monitors: Sequence[Monitor] = ()
    start: int = 0
    stop_at_gap: float = -math.inf


def train(
    config: PPOSettings,
    models: Networks,
    rollouts: Rollouts,
    statistics: GroupStatistics,
    advantages: Advantages,
    learner: Learner,
    monitors: Sequence[Monitor] = (),
    start: int = 0,
    stop_at_gap: float = -math.inf,
) -> bool:
    """Train a policy for the group that is worst off; returns whether the run is at its end.

    Args:
        config: where to log, when to save and where to stop.
        models: the networks; it alone knows how many there are.
        rollouts: gives a batch an iteration; it alone knows where responses come from.
        statistics: utilities of the groups in a batch, and the adversary that answers with their weights.
        advantages: what a batch teaches.
        learner: takes the optimizer steps.
        monitors: further metrics of an iteration, of which they are given the number (from 1), the batch and
            the metrics until then; one that fails is left out, and ends no run.
        start: iterations that were done before.
        stop_at_gap: the run ends once ``maxmin/duality_gap_high`` is at most this.

    Raises:
        FloatingPointError: for rewards, a loss or weights that are NaN or infinite; none of them is saved.
    """
    folder, stop = Path(config.output_dir), config.stop_at_iteration or learner.num_iterations
    log = MetricsLog(folder, config.report_to, keep=start)
    watch = Watch.resumed(config, start)
    finished = start == learner.num_iterations  # a run that had only to be saved
    done, numbers = start, random_state()
    harmless = [HarmlessMonitor(monitor) for monitor in monitors]

    def require_sound() -> None:
        named = ((role, p) for role, parameters in models.parameters().items() for p in parameters)
        require_finite_parameters(named, "the networks")

    def checkpoint(random: dict[str, Any] | None = None) -> Path:
        require_sound()
        state = {"iteration": done, "adversary": statistics.adversary.state_dict()}
        for part in (models, learner, advantages):
            state |= part.state_dict()
        state |= rollouts.checkpoint(done)
        # the random numbers last, since new episodes draw some
        state |= {"random": random or random_state()}
        return save_checkpoint(folder, done, state, config.save_total_limit or None)

    bar = progress_bar(f"ppo ({folder.name})", stop - start)
    # by the random numbers from before the rollout that failed
    lost = saved_on_failure(lambda: checkpoint(numbers) if done > start else None)
    with signals_held() as waiting, closing(rollouts), lost, bar as advance:
        for done, rollout in zip(range(start + 1, stop + 1), rollouts, strict=False):
            # 1. Utilities of the groups under the policy; the adversary moves their weights.
            batch = statistics(rollout)
            # 2. Advantages of every group, then their weighted sum.
            rows, metrics = advantages(batch)
            # 3. Clipped PPO, in minibatches of the rollout.
            losses = learner.update(rows)
            # 4. Log.
            metrics |= update_metrics(losses, batch["group_weights"])
            for monitor in harmless:
                metrics |= monitor(done, batch, metrics)
            log.write(done - 1, metrics | {"lr": learner.schedule.get_last_lr()[0]})
            watch(done, metrics)
            learner.schedule.step()
            # 5. Checkpoint.
            if (config.save_steps and done % config.save_steps == 0) or done == config.stop_at_iteration:
                checkpoint()
            if signum := waiting():
                raise Interrupted.at_checkpoint(signum, checkpoint())
            worst, kl = (metrics.get(f"objective/{name}") for name in ("welfare", "kl"))
            group = metrics.get("maxmin/worst_group", math.nan)
            note = "no episode ended" if worst is None else f"worst group {group:.0f} at {worst:+.2f}"
            advance(note=note if kl is None else f"{note}  kl {kl:z.1f}")
            gap = metrics.get("maxmin/duality_gap_high", math.inf)
            if finished := done == learner.num_iterations or gap <= stop_at_gap:
                break
            numbers = random_state()
    if finished:
        require_sound()
    return finished


@contextmanager
def saved_on_failure(checkpoint: Callable[[], Path | None]) -> Iterator[None]:
    """Write a checkpoint where what samples the rollouts, or rewards them, fails; name it in the error.

    Args:
        checkpoint: writes it; returns None where there is nothing to write yet.
    """
    try:
        yield
    except (EngineError, RewardError, FloatingPointError) as error:
        # a loss that is not finite leaves nothing to go on from
        if isinstance(error, FloatingPointError) and not isinstance(error.__cause__, RewardError):
            raise
        words, path = str(error), checkpoint()
        if path is not None:
            words += f"; all updates are in {path}: --resume_from_checkpoint last goes on from there"
        raise (FloatingPointError if isinstance(error, FloatingPointError) else EngineError)(words) from error


def update_metrics(losses: Mapping[str, Tensor], group_weights: Tensor) -> Metrics:
    """Metrics of the updates on one rollout.

    Args:
        losses: outputs of the loss, averaged over optimizer steps.
        group_weights: those of the rollout's rows [*B, K].
    """
    each = group_weights.flatten(0, -2)
    # one weighting for all rows, or one a prompt; a mean of equal numbers need not be their value
    weights = each[0] if bool((each == each[:1]).all()) else each.mean(0)
    metrics = {
        "policy/clipfrac_avg": losses["clip_fraction"],
        "policy/approxkl_avg": losses["kl_approx"],
        "val/ratio": losses["mean_ratio"],
        "loss/policy_avg": losses["loss_objective"],
    }
    if "loss_critic" in losses:
        metrics["loss/value_avg"] = losses["loss_critic"]
    if "entropy" in losses:
        metrics["policy/entropy_avg"] = losses["entropy"]
    metrics |= {f"maxmin/weights/{k}": weight for k, weight in enumerate(weights)}
    for k, explained in enumerate(losses.get("explained_variance", weights[:0]).reshape(-1)):
        metrics[f"val/explained_var/{'kl' if k == len(weights) else k}"] = explained
    return {name: float(value) for name, value in metrics.items()}


def find_state(config: PPOSettings, num_iterations: int) -> dict[str, Any] | None:
    """The checkpoint to go on from; None, with the output folder made, where a run begins.

    One that is at the end has only to be saved.

    Args:
        config: the stage's settings.
        num_iterations: rollouts of the whole run.

    Raises:
        UserError: where there is no such checkpoint, or it is where the run is to stop.
    """
    state = saved_state(config)
    stop = config.stop_at_iteration
    if state is not None and 0 < stop <= state["iteration"] < num_iterations:
        raise UserError(
            f"the checkpoint is at iteration {state['iteration']} already; raise --stop_at_iteration, or "
            "give 0 to run to the end"
        )
    return state


def restore(state: dict[str, Any] | None, parts: PPOParts, folder: Path) -> None:
    """Load a checkpoint, its random generators last; nothing where there is none.

    Raises:
        UserError: for a checkpoint of other settings.
    """
    if state is None:
        return
    try:
        for part in (parts.models, parts.learner):
            part.load_state_dict(state)
        parts.statistics.adversary.load_state_dict(state["adversary"])
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "the checkpoint is of other settings (sizes of the networks, groups, adversary); resume with "
            f"those of {folder / 'config.yaml'}"
        ) from error
    restore_random_state(state["random"])
