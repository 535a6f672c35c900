"""Made-up results of an evaluation, as the stage would record them."""

import numpy as np
import torch

from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.rewards import Calibration

LENGTH = 8  # of a response, in tokens
NAMES = ["sentiment", "conciseness"]
CALIBRATION = Calibration("sft_mean", torch.tensor([0.3, -0.2]), torch.tensor([1.0, 2.0]))


def make_result(seed, oracle=True, extra=None, num_prompts=40):
    rng = np.random.default_rng(seed)

    def draw(shift, samples):
        return (rng.normal(size=(num_prompts, samples, 2)) + shift).astype(np.float32)

    utilities = {"sft": draw(0, 3), "maxmin": draw(1.0, 4), "single": draw([2.0, -0.5], 2)}
    if oracle:
        utilities["oracle"] = draw(1.1, 2)
    shapes = {policy: array.shape[:2] for policy, array in utilities.items()}
    default = {
        "em": {
            "user_accuracy": 0.97 + 0.01 * seed,
            "num_groups_selected": 2 + (seed == 2),
            "heldout_log_likelihood": -0.4 - 0.01 * seed,
            "head_accuracy": {"sentiment": 0.9, "conciseness": 0.8 + 0.02 * seed},
        },
        "certificate": {"value": 0.1 * (seed + 1), "low": 0.05, "high": 0.5 + seed, "reason": None},
        "calibration": {
            "used": "sft_std",
            "worst_group": {"sft_std": "sentiment", "win_rate": NAMES[int(seed == 1)]},
        },
        "group_users": [273, 27],
        "timings": {"ppo": 10.0 + seed},
        "note": "kept",
    }
    return SeedResult(
        seed=seed,
        group_names=NAMES,
        group_shares=[10 / 11, 1 / 11],
        utilities=utilities,
        kl={p: rng.normal(3.0, 1.0, shape) for p, shape in shapes.items() if p != "sft"},
        length={p: rng.integers(4, 20, shape) for p, shape in shapes.items()},
        extra=default if extra is None else extra,
    )


def make_histories(num_seeds=2, length=6):
    def run(s):
        return [
            {
                "rewards/0/mean": 0.1 * i + s,
                "rewards/1/mean": 0.2 * i,
                "maxmin/weights/0": 0.4,
                "maxmin/weights/1": 0.6,
            }
            for i in range(length)
        ]

    plain = [{"rewards/0/mean": 0.3 * i, "rewards/1/mean": -0.1 * i} for i in range(length)]
    return {"single": [plain] * num_seeds, "maxmin": [run(s) for s in range(num_seeds)]}


def make_wins(seed):
    rng = np.random.default_rng(seed)
    rates = {("single", "sft"): rng.random((40, 2)), ("maxmin", "sft"): rng.random((40, 2)),
             ("maxmin", "single"): rng.random((40, 2))}  # fmt: skip
    policies = ["sft", "single", "maxmin"]

    def against(policy, other):
        if policy == other:
            return np.full((40, 2), 0.5)
        return rates[policy, other] if (policy, other) in rates else 1 - rates[other, policy]

    wins = {policy: np.stack([against(policy, other) for other in policies], 1) for policy in policies}
    return SeedResult(seed, NAMES, [0.5, 0.5], wins=wins, extra={"judge": "endpoint"}), rates
