"""The gate of the operators as :mod:`torchrl_maxmin` calls them.

Margins in place of pairs of rewards, padding masked, a low-precision trunk under float32 heads, autocast
around the call, one graph of ``torch.compile``.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import maxmin_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import baselines
from ..device import Device
from ..workloads import dtype_name
from ..workloads.gae import GAMMA, LMBDA
from .checks import EXACT, LOW, Check, Function, compare, evaluate, normal, repeatable, rms
from .em import em_checks, ragged_users

TEMPERATURE = 0.7


def margins_battery(device: Device, groups: int, dtype: torch.dtype) -> Iterator[Check]:
    """E-step on margins, without a plan, with the groups' masses."""
    name = f"em margins K={groups} {dtype_name(dtype)}"
    offsets = ragged_users(device, seed=groups)
    pairs = int(offsets[-1])
    users = torch.repeat_interleave(offsets.diff(), output_size=pairs)
    inputs = [normal(device, 1, pairs, groups).to(dtype), normal(device, 3, groups).log_softmax(-1)]

    def ours(margins: Tensor, prior: Tensor) -> Any:
        return kernels.em_responsibilities(margins, None, offsets, prior, return_mass=True)

    def reference(margins: Tensor, prior: Tensor) -> Any:
        zero = torch.zeros_like(margins)
        outputs = baselines.em_eager(margins, zero, users, offsets, prior, compute=margins.dtype)
        return *outputs, outputs[0].sum(0)

    actual, expected = evaluate(ours, inputs), evaluate(reference, [x.double() for x in inputs])
    yield from em_checks(name, actual, expected, dtype)
    yield Check(f"{name} mass", rms(actual.outputs[2], expected.outputs[2]), EXACT)
    yield repeatable(device, name, ours, inputs)


def masked_heads_battery(device: Device, heads: int, dtype: torch.dtype) -> Iterator[Check]:
    """Heads with padded rows that hold NaN, with heads that are not real, and their sums."""
    rows = 37 if device.quick else 301
    head_mask = torch.arange(heads, device=device.type) % 3 != 1
    row_mask = (normal(device, 7, rows) < 0.8) | (torch.arange(rows, device=device.type) == 0)
    masks = {"head_mask": head_mask, "row_mask": row_mask}
    shapes = ((rows, 96), (heads, 96), (heads,), (heads,))
    inputs = [normal(device, seed, *shape).to(dtype) for seed, shape in enumerate(shapes)]
    inputs.append((normal(device, 9, heads).abs() + 0.5).to(dtype))
    inputs[0][~row_mask] = math.nan
    real = row_mask.unsqueeze(-1)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> Any:
        options = {"shift": shift, "scale": scale, "temperature": TEMPERATURE, "return_sums": True}
        return kernels.reward_heads_min(hidden, weight, bias, **options, **masks)

    def lowest(rewards: Tensor) -> tuple[Tensor, ...]:
        rewards = rewards.masked_fill(~real, 0.0)
        soft = -rewards.masked_fill(~head_mask, math.inf) / TEMPERATURE
        softmin = -TEMPERATURE * (soft.logsumexp(-1) - head_mask.sum().log())
        minimum = rewards.gather(-1, argmin.unsqueeze(-1)).squeeze(-1)
        return minimum, torch.where(row_mask, softmin, 0.0), rewards.sum(0)

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        rewards = (F.linear(hidden.masked_fill(~real, 0.0), weight, bias) - shift) / scale
        return rewards.masked_fill(~real, 0.0)

    def reference(*args: Tensor) -> Any:
        rewards = linear(*args)
        return rewards, *lowest(rewards)

    # Where two heads tie within rounding, either may be the minimum: the reference takes ours.
    rewards, _, argmin, *_ = (x.detach() for x in ours(*inputs))
    exact = linear(*(x.double() for x in inputs))
    excess = exact.gather(-1, argmin.unsqueeze(-1)).squeeze(-1) - exact[:, head_mask].amin(-1)
    name = f"heads masked K={heads} {dtype_name(dtype)}"
    chosen = excess[row_mask].max() / exact.abs().max()
    yield Check(f"{name} argmin above the minimum", chosen.item(), EXACT)
    yield Check(f"{name} masked heads chosen", float((~head_mask[argmin[row_mask]]).sum()), 0.0)
    yield from compare(name, ours, reference, inputs)
    yield repeatable(device, name, ours, inputs)

    def minimum(rewards: Tensor) -> Any:
        options = {"temperature": TEMPERATURE, "return_sums": True}
        return kernels.min_over_heads(rewards, **options, **masks)

    rewards = rewards.to(dtype)
    argmin = minimum(rewards)[1]
    yield from compare(f"min {name}", minimum, lowest, [rewards], exact=True)


def masked_gae_battery(device: Device, columns: int, dtype: torch.dtype) -> Iterator[Check]:
    """Trajectories of unequal lengths with holes; NaN where nothing is valid."""
    steps = 20 if device.quick else 1500
    signals = [normal(device, seed, 5, steps, columns).to(dtype) for seed in range(3)]
    chance = normal(device, 4, 5, steps, 1)
    flags = [chance < -2.5, chance < -2.8]
    lengths = torch.tensor([steps, steps // 2, 1, 0, steps - 1], device=device.type)
    mask = (torch.arange(steps, device=device.type) < lengths.unsqueeze(-1)) & (chance.squeeze(-1) < 2.5)
    clean = [x.masked_fill(~mask.unsqueeze(-1), 0.0) for x in signals]
    for dirty in signals[::2]:
        dirty[~mask] = math.nan
    signals[1][~mask] = 0.0  # where it is masked, the target is the value itself
    weights = normal(device, 8, columns).abs()

    def ours(*signals: Tensor) -> Any:
        options = {"gamma": GAMMA, "lmbda": LMBDA, "mask": mask}
        *estimates, moments = kernels.vector_gae(
            *signals, *flags, weights=weights, return_moments=True, **options
        )
        plain = kernels.vector_gae(*signals, *flags, **options)
        return *estimates, *moments, *plain

    def reference(*_: Tensor) -> Any:
        # A masked step carries nothing on, as an end does, and has no advantage.
        wide = [x.double() for x in clean]
        stops = [flags[0] | ~mask.unsqueeze(-1), flags[1]]
        carried = F.pad(~mask[:, 1:], (0, 1)).unsqueeze(-1)
        advantage, _ = baselines.gae_eager(*wide, stops[0] | carried, stops[1], GAMMA, LMBDA)
        advantage = advantage.masked_fill(~mask.unsqueeze(-1), 0.0)
        weighted = (advantage * weights.double()).sum(-1, keepdim=True)
        valid = weighted[mask]
        moments = weighted.new_tensor(len(valid)), valid.mean(), valid.var(correction=0)
        estimates = advantage, advantage + wide[1]
        return *estimates, weighted, *moments, *estimates

    name = f"gae masked K={columns} {dtype_name(dtype)}"
    with torch.no_grad():
        pairs = zip(ours(*signals), reference(), strict=True)
        for index, (mine, wide) in enumerate(pairs):
            yield Check(f"{name} output {index}", rms(mine, wide), EXACT)
    yield repeatable(device, name, ours, signals)


def by_dtype(name: str, ours: Function, reference: Function, inputs: Sequence[Tensor]) -> Iterator[Check]:
    """Hold float32 values against float64, and every gradient by the dtype of its own leaf."""
    actual, expected = evaluate(ours, inputs), evaluate(reference, [x.double() for x in inputs])
    for index, (mine, wide) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        yield Check(f"{name} output {index}", rms(mine, wide), EXACT)
    for index, (mine, wide) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        yield Check(f"{name} gradient {index}", rms(mine, wide), LOW.get(inputs[index].dtype, EXACT))


def mixed_battery(device: Device, op: str) -> Iterator[Check]:
    """A low-precision trunk and float32 heads: both are widened."""
    targets = torch.arange(33, device=device.type)

    def rewards(hidden: Tensor, weight: Tensor) -> Any:
        return kernels.reward_heads_min(hidden, weight)[:1]

    def rewards_reference(hidden: Tensor, weight: Tensor) -> Any:
        return (F.linear(hidden, weight),)

    def log_probs(hidden: Tensor, lm_head: Tensor) -> Any:
        return kernels.token_log_probs(hidden, lm_head, targets)[:1]

    calls = {
        "heads": (rewards, rewards_reference, 5),
        "log_probs": (log_probs, lambda *x: baselines.log_probs_eager(*x, targets), 203),
    }
    ours, reference, rows = calls[op]
    inputs = [normal(device, 0, 33, 64).bfloat16(), normal(device, 1, rows, 64) / 8]
    yield from by_dtype(f"{op} mixed", ours, reference, inputs)


def transformed_battery(device: Device, dtype: torch.dtype) -> Iterator[Check]:
    """Log-probabilities of logits that a model scales, shifts and caps (Cohere, Phi, Gemma 2)."""
    targets = torch.arange(33, device=device.type)
    scale, softcap = 0.25, 3.0

    def ours(hidden: Tensor, lm_head: Tensor, bias: Tensor) -> Any:
        options = {"logit_scale": scale, "softcap": softcap, "bias": bias}
        return kernels.token_log_probs(
            hidden, lm_head, targets, temperature=TEMPERATURE, entropy=True, **options
        )

    def reference(hidden: Tensor, lm_head: Tensor, bias: Tensor) -> Any:
        logits = softcap * torch.tanh((scale * (hidden @ lm_head.mT) + bias) / softcap)
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        chosen = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_p.exp() * log_p).sum(-1)

    name = f"log_probs transformed {dtype_name(dtype)}"
    inputs = [normal(device, 0, 33, 64), normal(device, 1, 203, 64), normal(device, 2, 203)]
    inputs = [x.to(dtype) for x in inputs]
    yield from by_dtype(name, ours, reference, inputs)
    yield repeatable(device, name, ours, inputs)


def product_calls(device: Device) -> dict[str, tuple[Function, list[Tensor]]]:
    """Return one call of every operator with the inputs that get a gradient."""
    offsets = torch.tensor([0, 3, 3, 40], device=device.type)
    targets = torch.arange(33, device=device.type)
    mask = torch.arange(30, device=device.type).expand(2, 30) < 20
    end = torch.zeros(2, 30, 1, dtype=torch.bool, device=device.type)
    hidden = normal(device, 0, 33, 64)

    def log_probs(hidden: Tensor, lm_head: Tensor) -> Any:
        return kernels.token_log_probs(hidden, lm_head, targets, temperature=TEMPERATURE, entropy=True)

    def gae(*signals: Tensor) -> Any:
        return kernels.vector_gae(*signals, end, end, gamma=GAMMA, lmbda=LMBDA, mask=mask)

    return {
        "em": (
            lambda margins, prior: kernels.em_responsibilities(margins, None, offsets, prior),
            [normal(device, 1, 40, 4), normal(device, 2, 4).log_softmax(-1)],
        ),
        "heads": (kernels.reward_heads_min, [hidden, normal(device, 1, 5, 64), normal(device, 2, 5)]),
        "gae": (gae, [normal(device, seed, 2, 30, 3) for seed in range(3)]),
        "log_probs": (log_probs, [hidden, normal(device, 1, 203, 64) / 8]),
    }


def surroundings_battery(device: Device, op: str) -> Iterator[Check]:
    """Under autocast and in one graph of ``torch.compile``, an operator returns the same bits as outside."""
    call, inputs = product_calls(device)[op]
    alone = evaluate(call, inputs)

    def under_autocast(*args: Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return call(*args)

    expected = alone
    if op == "log_probs":  # the one that follows autocast: both matrices are cast
        expected = evaluate(lambda *x: call(*(y.bfloat16() for y in x)), inputs)
    yield _different(f"{op} under autocast", expected, evaluate(under_autocast, inputs))
    torch.compiler.reset()
    # Not through Inductor, which takes seconds a graph and sees an operator as one opaque call.
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    yield _different(f"{op} compiled", alone, evaluate(compiled, inputs))
    torch.compiler.reset()


def _different(name: str, expected: Any, actual: Any) -> Check:
    pairs = [(a, b) for x, y in zip(expected, actual, strict=True) for a, b in zip(x, y, strict=True)]
    return Check(f"{name} tensors that differ", float(sum(not torch.equal(a, b) for a, b in pairs)), 0.0)
