"""Processes that train one model together, started by torchrun: each does its share of the rows.

Every process holds the whole batch's numbers and runs its networks on a share of the rows; what the networks
say is gathered, and gradients are summed. So whatever is not linear (the worst group, the deviation that
whitens, a softmax over groups) is taken of all rows, in every process alike: a rank-local minimum would train
each rank for another group.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_maxmin.core.errors import LostRankError, UserError
from torchrl_maxmin.core.progress import console

__all__ = [
    "MODES",
    "across_ranks",
    "clip_gradients",
    "device_mesh",
    "each_row_once",
    "gather_objects",
    "gather_rows",
    "is_main_process",
    "mean_over_ranks",
    "of_every_process",
    "of_main_process",
    "over_ranks",
    "process_group",
    "rank",
    "restarted",
    "seed_of_rank",
    "share_of_rows",
    "shares_rows",
    "start_alike",
    "sum_gradients",
    "sum_over_ranks",
    "wait_for_all",
    "world_size",
]

MODES = ("none", "ddp", "fsdp2")

Result = TypeVar("Result")
Stage = TypeVar("Stage", bound=Callable[[Any], Any])

_sharing = False  # another library's process group is none of ours


# -- processes -------------------------------------------------------------------------------------


def across_ranks(stage: Stage) -> Stage:
    """Wrap a stage: its processes, those that torchrun started for it, work as one while it runs."""

    @functools.wraps(stage)
    def run(config: Any) -> Any:
        config.check()
        with process_group(config.distributed, config.device):
            return stage(config)

    return run  # type: ignore[return-value]


@contextmanager
def process_group(mode: str, device: str = "cpu") -> Iterator[None]:
    """Make the processes that torchrun started work as one: by gloo, between GPUs by nccl.

    Args:
        mode: ``none`` for a process by itself, ``ddp`` or ``fsdp2``. A process group that is there is taken.
        device: where networks are, ``cpu``, ``cuda`` or ``auto``; with GPUs each process takes its own.

    Raises:
        UserError: where torchrun's variables and the mode do not fit.
        LostRankError: where another process ends before this one is done.
    """
    global _sharing
    if mode == "none":
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes that would each do the whole work: "
                "give --distributed ddp or fsdp2, or start one"
            )
        yield
        return
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise UserError(
            f"--distributed {mode} is for processes that torchrun starts: torchrun --nproc_per_node N -m "
            "torchrl_maxmin VERB ...; for one process leave it out"
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    theirs = dist.is_initialized()
    if not theirs:
        store, place, size = next(dist.rendezvous("env://"))
        # torchrun may keep the store, with addresses of processes that have ended
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=place, world_size=size)
    before = signal.signal(signal.SIGTERM, _end)  # what torchrun sends when another rank has failed
    _sharing = True
    console.quiet = not is_main_process()
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of errors of its own
        lost = isinstance(error, LostRankError | dist.DistError) or "gloo/transport" in str(error)
        if not lost:
            raise
        raise LostRankError(
            f"rank {dist.get_rank()} ends since another process of the run has; what that one printed says "
            "why, and --resume_from_checkpoint last goes on from the last checkpoint"
        ) from error
    finally:
        _sharing = console.quiet = False
        signal.signal(signal.SIGTERM, before)
        if not theirs:
            dist.destroy_process_group()


def _end(*_: Any) -> None:
    raise LostRankError


def device_mesh() -> Any:
    """The processes as torch's shards know them: a row of them."""
    device = "cuda" if "nccl" in str(dist.get_backend_config()) else "cpu"
    return dist.init_device_mesh(device, (world_size(),))


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if world_size() > 1:
        dist.barrier()


def shares_rows() -> bool:
    """Whether this process is one of a group that works as one (of one process, too)."""
    return _sharing


def world_size() -> int:
    """Processes that work as one; 1 for one by itself."""
    return dist.get_world_size() if _sharing else 1


def rank() -> int:
    """The place of this process among them, from 0."""
    return dist.get_rank() if _sharing else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def seed_of_rank(seed: int) -> int:
    """A seed of its own for this process; for one by itself the seed as it is."""
    return seed * world_size() + rank()


def restarted() -> bool:
    """Whether torchrun started the processes again, after one of them had failed."""
    return _sharing and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# -- what all processes know -----------------------------------------------------------------------


def of_main_process(function: Callable[[], Result]) -> Result:
    """Call a function in the main process alone; what it returns, or its :class:`UserError`, is everyone's.

    So are random numbers that concern all: the others' generators need not be where the main one's is.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def of_every_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in every process; a :class:`UserError` of one is everyone's, and none waits for it."""
    if world_size() == 1:
        return function(*arguments)
    result: Any = None
    mistake: UserError | None = None
    try:
        result = function(*arguments)
    except UserError as error:
        mistake = error
    for found in gather_objects(mistake):
        if found is not None:
            raise found
    return result


def gather_objects(value: Result) -> list[Result]:
    """The values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


# -- rows ------------------------------------------------------------------------------------------


def share_of_rows(num_rows: int) -> tuple[Tensor, Tensor]:
    """Which rows of a batch are this process's.

    All processes get equally many, so that they run their networks equally often, as shards must be. Where
    the rows do not go round, the last ones get the last row again.

    Args:
        num_rows: of the batch, N.

    Returns:
        Indices int64 [ceil(N / ranks)], and which of them are not there a second time, bool.

    Example:
        >>> share_of_rows(3)
        (tensor([0, 1, 2]), tensor([True, True, True]))
    """
    size = -(-num_rows // world_size())
    index = torch.arange(size) + rank() * size
    return index.clamp(max=num_rows - 1), index < num_rows


def over_ranks(function: Callable[[Any], Any], rows: TensorDictBase) -> Any:
    """Apply a function to rows of which every process takes a share; all get the whole result.

    Args:
        function: maps a tensordict [n, ...] to a tensor or tensordict of as many rows, row by row; not one
            that calls this itself.
        rows: the same in all processes, batch size [N, ...].

    Example:
        >>> from tensordict import TensorDict
        >>> over_ranks(lambda part: part["x"] * 2, TensorDict({"x": torch.arange(3)}, [3])).tolist()
        [0, 2, 4]
    """
    if world_size() == 1:
        return function(rows)
    index, _ = share_of_rows(len(rows))
    found = function(rows[index.to(rows.device) if rows.device else index])
    return gather_rows(found, len(rows))


def each_row_once(function: Callable[[slice], Result], num_rows: int) -> list[Result]:
    """Call a function of which every process takes some rows, none of them twice, for calls that cost.

    Args:
        function: gives the result for a slice of the rows, never an empty one.
        num_rows: N.

    Returns:
        The results in the order of the rows; a :class:`UserError` of one process is everyone's.

    Example:
        >>> each_row_once(lambda rows: "abc"[rows], 3)
        ['abc']
    """
    if world_size() == 1:
        return [function(slice(0, num_rows))]
    index, real = share_of_rows(num_rows)
    results: list[Result] = []
    mistake: UserError | None = None
    try:
        if bool(real.any()):
            results.append(function(slice(int(index[0]), int(index[0]) + int(real.sum()))))
    except UserError as error:
        mistake = error
    outcomes = gather_objects((results, mistake))
    for _, mistake in outcomes:
        if mistake is not None:
            raise mistake
    return [result for results, _ in outcomes for result in results]


def gather_rows(part: Any, num_rows: int) -> Any:
    """The rows [N, ...] of a batch, from every process's share [ceil(N / ranks), ...] of them.

    Args:
        part: this process's, as :func:`share_of_rows` deals them; a tensor or a tensordict.
        num_rows: N.
    """
    if world_size() == 1:
        return part
    if not isinstance(part, Tensor):
        shape = [num_rows, *part.batch_size[1:]]
        return part.apply(lambda leaf: gather_rows(leaf, num_rows), batch_size=shape)
    sent = part.contiguous().view(torch.uint8) if part.dtype == torch.bool else part.contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts)[:num_rows].view(part.dtype)


# -- sums ------------------------------------------------------------------------------------------


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every process's value."""
    if world_size() == 1:
        return value
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def mean_over_ranks(total: Tensor, count: Tensor | float) -> Tensor:
    """Mean [K] of all ranks' rows, from this rank's column sums [K] and number of rows.

    For any process group, another library's too.
    """
    packed = torch.cat(
        [total.double(), torch.as_tensor(count, dtype=torch.float64, device=total.device).reshape(1)]
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(packed)
    return (packed[:-1] / packed[-1]).float()


@torch.no_grad()
def start_alike(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the main one's parameters, but for shards: what is drawn at random may differ."""
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            dist.broadcast(parameter, src=0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over the processes, but for those of shards, which are sums already."""
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor  # takes a second

    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in whole]:
        work.wait()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip gradients to a norm, that of whole gradients where they are shards; returns what it was."""
    if not _sharing:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    from torch.distributed.tensor import DTensor

    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = sum_over_ranks(torch.stack([shard.float().square().sum() for shard in shards]).sum())
    norm = torch.stack([squares, *(gradient.float().square().sum() for gradient in whole)]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*shards, *whole):
        gradient.mul_(factor.to(gradient.dtype))
    return norm
