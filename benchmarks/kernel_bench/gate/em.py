"""The gate of the E-step."""

from collections.abc import Iterator
from typing import Any

import maxmin_kernels as kernels
import torch
from maxmin_kernels.em.plan import SEGMENT_PAIRS
from torch import Tensor

from .. import baselines
from ..device import Device
from ..workloads import EStep, dtype_name
from .checks import EXACT, LOW, Check, Function, Results, cotangents, evaluate, normal, repeatable, rms

SAMPLED_USERS = 1000


def responsibility_bar(log_likelihood: Tensor) -> Tensor:
    """Return the bar of each user: four roundings of the sums whose softmax the responsibilities are."""
    roundings = 4 * torch.finfo(torch.float32).eps * log_likelihood.double().abs()
    return roundings.clamp(min=EXACT)


def em_pair(user_offsets: Tensor, pairs: int, plan: Any) -> tuple[Function, Function]:
    """Return ours and the reference as functions of chosen, rejected and prior."""
    users = torch.repeat_interleave(user_offsets.diff(), output_size=pairs)

    def ours(chosen: Tensor, rejected: Tensor, prior: Tensor) -> Any:
        return kernels.em_responsibilities(chosen, rejected, user_offsets, prior, plan=plan)

    def reference(chosen: Tensor, rejected: Tensor, prior: Tensor) -> Any:
        return baselines.em_eager(chosen, rejected, users, user_offsets, prior, compute=chosen.dtype)

    return ours, reference


def em_checks(name: str, actual: Results, expected: Results, dtype: torch.dtype) -> Iterator[Check]:
    """Hold an E-step against float64: ``actual`` and ``expected`` are of the same users."""
    bars = responsibility_bar(expected.outputs[1])
    errors = (actual.outputs[0].double() - expected.outputs[0]).abs().amax(-1)
    worst = (errors / bars).argmax()  # NaN counts as the largest
    yield Check(f"{name} responsibilities", errors[worst].item(), bars[worst].item())
    yield Check(f"{name} log-likelihood", rms(actual.outputs[1], expected.outputs[1]), EXACT)
    for index, (mine, wide) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        bar = max(bars.max().item(), LOW.get(dtype, 0.0))
        yield Check(f"{name} gradient {index}", rms(mine, wide), bar)


def ragged_users(device: Device, seed: int) -> Tensor:
    """Return offsets of users, some without pairs, one with a tenth of all pairs and more than a segment."""
    source = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 200, (20 if device.quick else 150,), generator=source)
    counts[::10] = 0
    counts[7] = max(int(counts.sum()) // 9, SEGMENT_PAIRS + 1)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device.type)


def em_battery(device: Device, groups: int, dtype: torch.dtype, margin: float) -> Iterator[Check]:
    """Ragged users, with a plan and without."""
    name = f"em K={groups} {dtype_name(dtype)} margin {margin:g}"
    offsets = ragged_users(device, groups)
    pairs = int(offsets[-1])
    scores = [(margin * normal(device, seed, pairs, groups)).to(dtype) for seed in (1, 2)]
    inputs = [*scores, normal(device, 3, groups).log_softmax(-1)]
    ours, reference = em_pair(offsets, pairs, kernels.plan_users(offsets))
    actual = evaluate(ours, inputs)
    yield from em_checks(name, actual, evaluate(reference, [x.double() for x in inputs]), dtype)
    yield repeatable(device, name, ours, inputs)
    without_plan = evaluate(em_pair(offsets, pairs, None)[0], inputs)
    unequal = sum(not torch.equal(a, b) for a, b in zip(actual.outputs, without_plan.outputs, strict=True))
    yield Check(f"{name} outputs that a plan changes", float(unequal), 0.0)


def em_timed(device: Device, workload: EStep) -> Iterator[Check]:
    """Run the full size, and hold some users against float64: every user stands for itself."""
    inputs = workload.make(device.type)
    offsets, scores = inputs["user_offsets"], [inputs["chosen"], inputs["rejected"]]
    ours, _ = em_pair(offsets, workload.pairs, inputs["plan"])
    everything = evaluate(ours, [*scores, inputs["log_prior"]])
    users = workload.users
    sample = torch.linspace(0, users - 1, min(SAMPLED_USERS, users), device=device.type).long().unique()
    counts = offsets.diff()[sample]
    part = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
    starts = torch.repeat_interleave(offsets[sample] - part[:-1], counts)
    rows = starts + torch.arange(int(part[-1]), device=device.type)
    actual = Results([x[sample] for x in everything.outputs], [x[rows] for x in everything.gradients[:2]])
    weights = cotangents([everything.outputs[1]])[0][sample].double()
    leaves = [x.detach()[rows].double().requires_grad_() for x in scores]
    _, reference = em_pair(part, len(rows), None)
    resp, likelihood = reference(*leaves, inputs["log_prior"].double())
    gradients = torch.autograd.grad(likelihood, leaves, weights)
    expected = Results([resp, likelihood.detach()], list(gradients))
    yield from em_checks(f"em {workload.size} {dtype_name(workload.dtype)}", actual, expected, workload.dtype)
