"""One comparison of the gate: values, gradients and bits of a function against a reference in float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import Device

EXACT = 5e-6
LOW = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
RUNS = 10
QUICK_RUNS = 2

Function = Callable[..., Sequence[Tensor]]


class Check(NamedTuple):
    """One comparison: it holds if the error is a number and not above the bar."""

    name: str
    error: float
    bar: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bar


class Results(NamedTuple):
    """Floating-point outputs of a function, and the gradients of a fixed combination of them."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def rms(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the error over the norm of the expected value, NaN if either is not finite."""
    expected = expected.double()
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)
    return error.item()


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return one fixed random weight per element, the same for every dtype and device."""
    draws = []
    for index, output in enumerate(outputs):
        source = torch.Generator().manual_seed(index)
        draws.append(torch.randn(output.shape, generator=source).to(output))
    return draws


def evaluate(function: Function, inputs: Sequence[Tensor]) -> Results:
    """Run the function on fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [x for x in function(*leaves) if x.is_floating_point()]
    active = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(active, leaves, cotangents(active)) if active else ()
    return Results([x.detach() for x in outputs], list(gradients))


def low_bar(dtype: torch.dtype, eager_error: float, elements: int) -> float:
    """Return the bar in low precision: twice the error of eager PyTorch in the same dtype, within reason.

    Something is added for results of few elements, in which eager PyTorch may be exact by chance.
    """
    chance = torch.finfo(dtype).eps / math.sqrt(max(elements, 1))
    return LOW[dtype] if math.isnan(eager_error) else min(LOW[dtype], 2 * eager_error + chance)


def compare(
    name: str, ours: Function, reference: Function, inputs: Sequence[Tensor], exact: bool = False
) -> Iterator[Check]:
    """Hold values and gradients against the reference in float64.

    Args:
        name: What the checks are called.
        ours: From the inputs to outputs.
        reference: The same in plain PyTorch, which computes in the dtype of its inputs.
        inputs: Floating-point inputs, all of one dtype.
        exact: Whether values from low precision are as good as from float32, nothing being rounded on the
            way; gradients are rounded in any case.
    """
    dtype = inputs[0].dtype
    low = dtype != torch.float32
    actual = evaluate(ours, inputs)
    expected = evaluate(reference, [x.double() for x in inputs])
    yardstick = evaluate(reference, inputs) if low else expected
    for kind in ("outputs", "gradients"):
        triples = zip(*(getattr(r, kind) for r in (actual, expected, yardstick)), strict=True)
        for index, (mine, wide, theirs) in enumerate(triples):
            as_float32 = not low or (exact and kind == "outputs")
            bar = EXACT if as_float32 else low_bar(dtype, rms(theirs, wide), wide.numel())
            yield Check(f"{name} {kind.removesuffix('s')} {index}", rms(mine, wide), bar)


def repeatable(device: Device, name: str, function: Function, inputs: Sequence[Tensor]) -> Check:
    """Count the runs, of ten (quick: of two), whose outputs or gradients differ in a bit from the first's."""
    first = evaluate(function, inputs)
    different = 0
    for _ in range((QUICK_RUNS if device.quick else RUNS) - 1):
        again = evaluate(function, inputs)
        same = all(
            torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
        )
        different += not same
    return Check(f"{name} runs that differ", float(different), 0.0)


def normal(device: Device, seed: int, *shape: int) -> Tensor:
    """Return random numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device.type)
