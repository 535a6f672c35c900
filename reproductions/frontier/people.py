"""Who labels the same pairs: other shares, noisier answers, users who answer at random or the wrong way."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import expit

from torchrl_maxmin.world import World
from torchrl_maxmin.world.world import write_rows

FILES = ("preferences.jsonl", "preferences_test.jsonl")


@dataclass(frozen=True)
class People:
    """Users who label pairs that are there already.

    Attributes:
        source: folder with ``preferences.jsonl``, ``preferences_test.jsonl`` and ``world.json``.
        folder: where the same pairs go with these people's labels, and their ``world.json``.
        seed: of who is who, and of the labels.
        shares: of the groups; None leaves those of the world.
        tau: inverse noise of the labels; None leaves the world's.
        random: share of users who toss a coin.
        adversarial: share of users who answer the opposite of what they would.
    """

    source: Path
    folder: Path
    seed: int
    shares: tuple[float, float] | None = None
    tau: float | None = None
    random: float = 0.0
    adversarial: float = 0.0


def relabel(people: People) -> None:
    """Write the pairs of ``source`` as these people label them.

    Who is random and who adversarial is drawn apart from the groups, and a larger share holds the smaller
    one. The group column keeps everybody's own group.
    """
    world = World.load(people.source / "world.json")
    if people.shares is not None:
        world = replace(world, shares=people.shares)
    if people.tau is not None:
        world = replace(world, tau=people.tau)
    files = {
        name: [json.loads(line) for line in (people.source / name).read_text().splitlines()] for name in FILES
    }
    users = sorted({row["user_id"] for rows in files.values() for row in rows})
    index_of = {user: index for index, user in enumerate(users)}
    groups = world.assign_users(len(users), people.seed)
    drawn = np.random.default_rng([people.seed, 1]).permutation(len(users)) / len(users)
    random = drawn < people.random
    adversarial = drawn >= 1 - people.adversarial
    tastes = np.eye(len(world.shares))[groups]
    people.folder.mkdir(parents=True, exist_ok=True)
    for index, (name, rows) in enumerate(files.items()):
        rng = np.random.default_rng([people.seed, 2, index])
        owner = np.array([index_of[row["user_id"]] for row in rows])
        # not as the source has them: chosen and rejected tell its labels
        sides = [sorted((row["chosen"], row["rejected"])) for row in rows]
        prompts = [row["prompt"] for row in rows]
        first = prefers_first(world, prompts, sides, tastes[owner], rng)
        first = np.where(random[owner], rng.random(len(rows)) < 0.5, first) ^ adversarial[owner]
        write_rows(
            people.folder / name,
            (
                {
                    "prompt": row["prompt"],
                    "chosen": side[0] if yes else side[1],
                    "rejected": side[1] if yes else side[0],
                    "user_id": row["user_id"],
                    "group": world.group_names[groups[user]],
                }
                for row, side, yes, user in zip(rows, sides, first, owner, strict=True)
            ),
        )
    world.save(people.folder / "world.json")


def prefers_first(
    world: World, prompts: list[str], sides: list[list[str]], tastes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Whether the first of two responses is preferred [N] bool, by Bradley-Terry on ``tastes . utilities``.

    Args:
        world: whose utilities and noise.
        prompts: [N].
        sides: two responses each [N, 2].
        tastes: how much each row's user cares for every group's utility [N, G].
        rng: draws the answers.
    """
    margin = world(prompts, [side[0] for side in sides]) - world(prompts, [side[1] for side in sides])
    return rng.random(len(prompts)) < expit(world.tau * (margin * tastes).sum(axis=1))
