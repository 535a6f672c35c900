"""Policy and critic have their gradients clipped, each apart."""

import math

import pytest
import torch
from trainers_runs import EnvPPORun, PPORun

# AdamW takes steps of lr * g / (|g| + 1e-8): a gradient of norm 1e-12 moves nothing by more than lr / 10,000.
TINY = 1e-12


def moved(trainer):
    """The largest change of a parameter over a run, of the policy and of the critic."""
    parts = {"policy": trainer.policy, "critic": trainer.critic}
    before = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    trainer.train()
    return {
        name: max(
            (now.detach() - then).abs().max().item()
            for now, then in zip(part.parameters(), before[name], strict=True)
        )
        for name, part in parts.items()
    }


@pytest.mark.parametrize("kind", ["language", "environment"])
def test_a_clipped_gradient_moves_neither_policy_nor_critic(kind, make_config, make_env_config):
    rate = 1e-2

    def run(limit):
        torch.manual_seed(0)
        settings = {"max_grad_norm": limit, "learning_rate": rate}
        if kind == "language":
            return moved(PPORun(make_config(f"clipped {limit}", num_iterations=2, **settings)))
        return moved(EnvPPORun(make_env_config(f"clipped {limit}", **settings)))

    free, clipped = run(math.inf), run(TINY)
    for name in ("policy", "critic"):
        assert free[name] > rate / 2
        assert clipped[name] < rate / 100
