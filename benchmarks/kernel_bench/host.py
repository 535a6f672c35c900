"""What a call costs its caller: every public operator on inputs so small that the work itself is nothing."""

from collections.abc import Iterator

import torch
from maxmin_kernels import (
    em_responsibilities,
    min_over_heads,
    plan_users,
    reward_heads_min,
    token_gae,
    token_log_probs,
    vector_gae,
)

from .device import Call, Device
from .measure import Row, set_wall

HOST_OPS = (
    "em_responsibilities",
    "reward_heads_min",
    "min_over_heads",
    "vector_gae",
    "token_gae",
    "token_log_probs",
)


def tiny_calls(device: str) -> dict[str, Call]:
    """Return one call of every operator."""
    hidden, weight, bias = (torch.randn(shape, device=device) for shape in ((8, 64), (4, 64), (4,)))
    scores = [torch.randn(16, 4, device=device) for _ in range(2)]
    offsets = torch.tensor([0, 3, 9, 16], device=device)
    prior, plan = torch.zeros(4, device=device).log_softmax(-1), plan_users(offsets)
    signals = [torch.randn(2, 16, 4, device=device) for _ in range(3)]
    end = torch.zeros(2, 16, 1, dtype=torch.bool, device=device)
    mask = torch.ones(2, 16, dtype=torch.bool, device=device)
    targets = torch.zeros(8, dtype=torch.int64, device=device)
    lm_head = torch.randn(128, 64, device=device)
    return {
        "em_responsibilities": lambda: em_responsibilities(*scores, offsets, prior, plan=plan),
        "reward_heads_min": lambda: reward_heads_min(hidden, weight, bias),
        "min_over_heads": lambda: min_over_heads(scores[0]),
        "vector_gae": lambda: vector_gae(*signals, end, end, gamma=0.99, lmbda=0.95),
        "token_gae": lambda: token_gae(scores[0][:2], signals[0], mask, gamma=0.99, lmbda=0.95),
        "token_log_probs": lambda: token_log_probs(hidden, lm_head, targets),
    }


def host_rows(device: Device) -> Iterator[Row]:
    """Time one call of every operator until it returns, without gradients."""
    for op, call in tiny_calls(device.type).items():
        row = Row(op, "", "float32", "host", "ours")
        with torch.no_grad():
            set_wall(row, device.host(call))
        yield row
