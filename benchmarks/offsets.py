"""What an offset that preferences cannot see does to the policy, with and without calibration.

A Bradley-Terry likelihood does not change when a head gains a constant, or an offset of its own for every
prompt. Trains the MaxMin policy of a demo's seeds on such heads and prints the groups' true utilities:

    python benchmarks/offsets.py runs/demo/seed-* --output_dir runs/offsets
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from unittest import mock

import torch
import yaml

from torchrl_maxmin.evaluation import SeedResult, summarise, write_summary
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig


def offset_rewards(kind: str):
    """Rewards with an offset: a constant 3 on the last head, or a normal draw of its own for every prompt."""

    class OffsetRewards(MixtureRewards):
        def __call__(self, responses):
            rewards = super().__call__(responses).clone()
            if kind == "constant":
                rewards[:, -1] += 3.0
            elif kind == "by prompt":
                tokens, mask = responses["prompt_tokens"], responses["prompt_mask"]
                for row in range(len(rewards)):
                    seed = hash(tuple(tokens[row][mask[row]].tolist())) % 2**31
                    draw = torch.randn(2, generator=torch.Generator().manual_seed(seed))
                    rewards[row] += 2.0 * draw + torch.tensor([0.0, 3.0])
            return rewards

    return OffsetRewards


def train_and_measure(seed_folder: Path, folder: Path) -> SeedResult:
    """The MaxMin policy of one seed, trained on every kind of heads under both conventions."""
    config = PPOConfig(**yaml.safe_load((seed_folder / "maxmin/config.yaml").read_text()))
    evaluation = EvaluateConfig(**yaml.safe_load((seed_folder / "evaluation/config.yaml").read_text()))
    policies = {"sft": config.model_name_or_path}
    for calibration in ("sft_std", "none"):
        for kind in ("as learned", "constant", "by prompt"):
            name = f"{calibration}, {kind}"
            output = folder / name.replace(", ", "-").replace(" ", "_")
            changed = dataclasses.replace(config, output_dir=str(output), calibration=calibration)
            with mock.patch("torchrl_maxmin.trainers.lm_ppo.MixtureRewards", offset_rewards(kind)):
                run_ppo(changed)
            policies[name] = str(output)
            outcome = json.loads((output / "summary.json").read_text())["calibration"]
            print(f"{name}: shift {outcome['shift']}, scale {outcome['scale']}", flush=True)
    specs = [f"{name}={path}" for name, path in policies.items()]
    results = str(folder / "results")
    measure_policies(
        dataclasses.replace(evaluation, policies=specs, output_dir=results, reward_model_path=None)
    )
    return SeedResult.load(folder / "results" / "result")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seed_folders", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = [train_and_measure(seed, given.output_dir / seed.name) for seed in given.seed_folders]
    summary = summarise(results)
    write_summary(given.output_dir, summary)
    for name, policy in summary["policies"].items():
        told = [
            f"{group} {mean:+.3f} [{policy['utility_interval'][group]['low']:+.3f}, "
            f"{policy['utility_interval'][group]['high']:+.3f}]"
            for group, mean in policy["utility"].items()
        ]
        print(f"{name:<22}{'   '.join(told)}")


if __name__ == "__main__":
    main()
