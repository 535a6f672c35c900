"""Where EM begins: heads drawn at random, and centres of what users want otherwise than everybody."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices

__all__ = ["MANY_GROUPS", "MOST_USERS", "informed_starts"]

#: Groups from which the likelihood has so many optima that starts at random miss the best of them.
MANY_GROUPS = 4
#: Users who are asked; of more a part is drawn.
MOST_USERS = 20_000
_ROUNDS = 10
_FAR = 0.5  # of the mean length of the moves, in that of the head of all: nearer or farther, more starts miss


def informed_starts(
    choices: PairChoices, num_groups: int, count: int, generator: torch.Generator | None, l2: float
) -> Iterator[Tensor]:
    """Yield heads [K, D] to begin at: everybody's, moved to where the users of a cluster want it moved.

    What is clustered is the slope of each user's log-likelihood at the one head that serves all best, over
    the root of the user's choices, by k-means from seeds far apart (Arthur and Vassilvitskii, 2007).

    Args:
        choices: of all users.
        num_groups: K.
        count: starts.
        generator: of the seeds.
        l2: penalty on the squared head of all, in units of choices.
    """
    drawn = torch.randperm(len(choices.user_offsets) - 1, generator=generator)
    if len(drawn) > MOST_USERS:  # their slopes alone could fill the memory
        choices = choices.take_users(drawn[:MOST_USERS].sort().values)
        drawn = torch.arange(MOST_USERS)
    everyone = torch.ones(len(choices.choices_by_user), 1, device=choices.features.device)
    single = choices.maximise(everyone, torch.zeros_like(choices.features[:1]), l2)
    slopes = choices.user_slopes(single[0]) / choices.choices_by_user.clamp_min(1).sqrt().unsqueeze(1)
    slopes, single = slopes.cpu()[drawn], single.cpu()
    for _ in range(count):
        seed = int(torch.randint(2**31, (), generator=generator))
        found, _ = kmeans2(slopes.numpy(), num_groups, _ROUNDS, minit="++", missing="warn", rng=seed)
        centres = torch.from_numpy(found)
        length = _FAR * single.norm().clamp_min(1.0) / centres.norm(dim=1).mean().clamp_min(1e-12)
        yield single + length * centres
