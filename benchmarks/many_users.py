"""How long ``reward`` takes to find groups among many users, on features that are given.

    python benchmarks/many_users.py --users 100000 --pairs 10 --features 64

Users of two tastes choose between items with random features, by Bradley-Terry. What is timed is what the
reward stage does between the trunk's features and its fine-tuning: repeats found, K chosen, evidence for the
groups, the linear mixture of all users.
"""

import argparse
import json
import time
from cProfile import Profile
from pathlib import Path
from pstats import Stats

import torch

from torchrl_maxmin.clustering.agreement import adjusted_rand_index
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.rewards.start import linear_warm_start


def make_choices(
    num_users: int, num_pairs: int, num_features: int, seed: int
) -> tuple[PairChoices, torch.Tensor]:
    """Choices of users, one in three of the second taste; and whose taste each user has [U]."""
    generator = torch.Generator().manual_seed(seed)
    taste = (torch.arange(num_users) % 3 == 0).long()
    heads = torch.randn(2, num_features, generator=generator) * 3 / num_features**0.5
    differences = torch.randn(num_users * num_pairs, num_features, generator=generator)
    margins = (differences * heads[taste.repeat_interleave(num_pairs)]).sum(-1)
    chosen = torch.rand(len(margins), generator=generator) < margins.sigmoid()
    differences[~chosen] *= -1
    return PairChoices(differences, torch.arange(num_users + 1) * num_pairs), taste


def main() -> None:
    """Time one warm start, and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    choices, taste = make_choices(options.users, options.pairs, options.features, seed=0)
    profile, started, worked = Profile(), time.perf_counter(), time.process_time()
    if options.profile:
        profile.enable()
    # as the reward stage has it
    warm = linear_warm_start(choices, "auto", 3, 0, evidence=True, num_restarts=4, assignment="soft", l2=1e-4)
    profile.disable()
    found = {
        **{name: getattr(options, name) for name in ("users", "pairs", "features", "threads")},
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "searched_users": warm.searched_users,
        "num_groups": warm.choice.num_groups,
        "agreement": round(adjusted_rand_index(taste, warm.responsibilities.argmax(-1)), 4),
        "established": warm.establishment and warm.establishment.established,
    }
    print(json.dumps(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    if options.profile:
        Stats(profile).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()
