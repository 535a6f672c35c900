"""Count the bytes that the kernels touch, in Triton's interpreter, against what they must touch.

    python benchmarks/traffic.py

The floor of a call is every element of its inputs read once and every element of its outputs written once.
What is above it is the price of the launch plan, of weights that every program reads again, or of a second
pass. Caches are left out: a byte that two programs load counts twice. A missed bar sets the exit status.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import torch
from maxmin_kernels import (
    em_responsibilities,
    min_over_heads,
    plan_users,
    reward_heads_min,
    vector_gae,
)
from torch import Tensor
from triton.runtime import interpreter

# The most that the E-step and the heads should touch, over their floor.
BARS = {"em": 1.05, "heads": 1.25}


class Counter:
    """Bytes that were loaded and stored while it counted."""

    def __init__(self) -> None:
        self.loaded = 0
        self.stored = 0


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the elements under the mask of every load and store of the interpreter."""
    builder: Any = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    counter = Counter()

    def count(ptrs: Any, mask: Any) -> int:
        return int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        counter.loaded += count(ptrs, mask)
        return load(ptrs, mask, *rest)

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.stored += count(ptrs, mask)
        return store(ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield counter
    finally:
        del builder.create_masked_load, builder.create_masked_store


class Traffic(NamedTuple):
    """One counted call: what it touched, what it must touch, and the bar for the ratio (None: reported)."""

    name: str
    touched: int
    floor: int
    bar: float | None

    @property
    def ratio(self) -> float:
        return self.touched / self.floor


def measure(
    name: str, call: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor, **options: Any
) -> Traffic:
    """Count one call; ``options`` are not part of the floor."""
    with counting() as counter:
        outputs = call(*inputs, **options)
    floor = sum(x.nbytes for x in (*inputs, *outputs) if x is not None)
    return Traffic(name, counter.loaded + counter.stored, floor, BARS.get(name.split()[0]))


def em_calls() -> Iterator[Traffic]:
    for dtype, groups, counts in (
        (torch.float32, 4, [100] * 200),
        (torch.bfloat16, 8, [100] * 200),
        (torch.float32, 4, [20_000] + [50] * 400),
    ):
        pairs, kind = sum(counts), f"{str(dtype).removeprefix('torch.')} K={groups}"
        offsets = torch.tensor([0, *counts]).cumsum(0)
        scores = [torch.randn(pairs, groups, dtype=dtype) for _ in range(2)]
        prior, plan = torch.zeros(groups).log_softmax(0), plan_users(offsets)
        users = f"{len(counts)} users, {pairs} pairs"
        yield measure(f"em forward {kind}, {users}", em_responsibilities, *scores, offsets, prior, plan=plan)
        resp, grad = torch.rand(len(counts), groups), torch.randn(len(counts))
        backward = torch.ops.maxmin.em_backward
        yield measure(
            f"em backward {kind}, {users}", backward, *scores, offsets, resp, grad, **_kept(plan, groups)
        )


def _kept(plan: Any, groups: int) -> dict[str, Tensor]:
    segments = {"segment_offsets": plan.segment_offsets, "segment_user": plan.segment_user}
    return {"odds": torch.empty(0, groups), **segments}


def other_calls() -> Iterator[Traffic]:
    for rows, heads in ((4096, 8), (512, 4)):
        hidden, weight = torch.randn(rows, 256).bfloat16(), torch.randn(heads, 256).bfloat16()
        yield measure(f"heads forward bfloat16 N={rows} K={heads}", reward_heads_min, hidden, weight)
    yield measure("min_over_heads float32 N=4096 K=8", min_over_heads, torch.randn(4096, 8))
    signals = [torch.randn(4, 700, 4) for _ in range(3)]
    end = torch.zeros(4, 700, 1, dtype=torch.bool)
    yield measure("gae float32 [4, 700, 4]", vector_gae, *signals, end, end, gamma=0.99, lmbda=0.95)


def log_probs_calls() -> Iterator[Traffic]:
    """The row kernels alone: the matrix products are the library's."""
    from maxmin_kernels.log_probs.triton_kernels import log_probs_backward, log_probs_forward

    logits, targets = torch.randn(16, 50257), torch.randint(0, 50257, (16,))

    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return tuple(log_probs_forward(logits, targets, 1.0, True))

    yield measure("log_probs rows forward float32 V=50257", forward, logits, targets)
    _, total, entropy = forward(logits, targets)

    def backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(logits)
        log_probs_backward(*inputs, 1.0, out=out)
        return (out,)

    ones = torch.ones(16)
    yield measure(
        "log_probs rows backward float32 V=50257", backward, logits, targets, entropy, total, ones, ones
    )


def main() -> int:
    torch.manual_seed(0)
    print(f"{'call':60} {'touched':>12} {'floor':>12} {'ratio':>6} {'bar':>5}")
    above = 0
    for traffic in (*em_calls(), *other_calls(), *log_probs_calls()):
        bar = "" if traffic.bar is None else f"{traffic.bar:.2f}"
        print(f"{traffic.name:60} {traffic.touched:12} {traffic.floor:12} {traffic.ratio:6.3f} {bar:>5}")
        above += traffic.bar is not None and traffic.ratio > traffic.bar
    print(f"{above} above their bar")
    return bool(above)


if __name__ == "__main__":
    sys.exit(main())
