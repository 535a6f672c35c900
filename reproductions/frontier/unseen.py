"""Users whom nothing was trained on: which group they are put in, and whether the policies suit them."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from people import prefers_first
from scipy.special import expit

from torchrl_maxmin.clustering.assignment import assign_users
from torchrl_maxmin.clustering.linear import LinearMixture
from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.world import World
from torchrl_maxmin.world.world import write_preferences, write_rows

#: Kind -> how much its users care for each group's utility; the last was in no training set.
KINDS = {"sentiment": (1.0, 0.0), "conciseness": (0.0, 1.0), "in between": (0.5, 0.5)}
#: Pairs of a new user after which the assignment is looked at.
PAIRS = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Unseen:
    """New users of a seed's policies and rewards.

    Attributes:
        world: folder of the seed's world, with the reference policy.
        rewards: folders of the mixture and of the single reward.
        result: the seed's evaluation, which holds the policies' utilities on held-out prompts.
        policies: policies that the new users judge.
        folder: where ``judged.npz`` and ``assigned.json`` go.
        seed: of the pairs; what the users are and judge is the same for every seed.
        users_per_kind: new users of each kind.
        prompts_per_user: held-out prompts that each judges.
    """

    world: Path
    rewards: tuple[Path, Path]
    result: Path
    policies: tuple[str, ...]
    folder: Path
    seed: int
    users_per_kind: int = 100
    prompts_per_user: int = 20


def measure_unseen(task: Unseen) -> None:
    """Assign new users by their first pairs, and let them judge the policies."""
    task.folder.mkdir(parents=True, exist_ok=True)
    world = World.load(task.world / "world.json")
    np.savez_compressed(task.folder / "judged.npz", **_judge(task, world))
    (task.folder / "assigned.json").write_text(json.dumps(_assign(task, world), indent=2) + "\n")


def _judge(task: Unseen, world: World) -> dict[str, np.ndarray]:
    """Win rate against the reference of every policy by every new user: ``{policy}/{kind}`` [U]."""
    utilities = SeedResult.load(task.result).utilities
    reference = utilities["sft"]
    num_prompts, samples, _ = reference.shape
    out = {}
    for index, (kind, taste) in enumerate(KINDS.items()):
        # the same users, prompts and coin tosses for every seed and policy
        rng = np.random.default_rng([0, index])
        shape = (task.users_per_kind, min(task.prompts_per_user, num_prompts))
        prompts = np.stack([rng.choice(num_prompts, shape[1], replace=False) for _ in range(shape[0])])
        own, other = rng.integers(samples, size=(2, *shape))
        coin = rng.random(shape)
        for policy in task.policies:
            change = (utilities[policy][prompts, own] - reference[prompts, other]) @ np.array(taste)
            out[f"{policy}/{kind}"] = (coin < expit(world.tau * change)).mean(axis=1)
    return out


def _assign(task: Unseen, world: World) -> dict[str, dict[str, float]]:
    """By kind: how many are put right after so many pairs, and how well rewards rank their other pairs."""
    data, heldout, kinds = _new_users(task, world)
    mixture, single = (RewardMixture.from_pretrained(folder) for folder in task.rewards)
    heads = json.loads((task.rewards[0] / "summary.json").read_text())["head_of_group"]
    margins = _margins(mixture, data)
    # heads of an identity: what is assigned by are the mixture's own margins
    linear = LinearMixture(torch.eye(mixture.num_groups), mixture.log_prior.cpu(), torch.empty(0, 1), 0.0)
    found = assign_users(linear, margins, data.user_offsets)
    starts = data.user_offsets[:-1]
    counts = data.user_offsets.diff()
    other, of_single = _margins(mixture, heldout), _margins(single, heldout)[:, 0]
    head = found.groups[heldout.row_users]
    right = other[torch.arange(len(other)), head] > 0
    out: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        mine = torch.tensor([k == kind for k in kinds])
        row = mine[heldout.row_users]
        figures = {
            "own head ranks right": right[row].double().mean().item(),
            "single reward ranks right": (of_single[row] > 0).double().mean().item(),
        }
        if kind in heads:
            for pairs in PAIRS:
                last = starts + counts.clamp(max=pairs) - 1
                group = found.trajectory[last].argmax(-1)
                figures[f"assigned right after {pairs}"] = (group[mine] == heads[kind]).double().mean().item()
        out[kind] = figures
    return out


def _margins(reward: RewardMixture, data: PreferenceDataset) -> torch.Tensor:
    """Reward of the chosen less that of the rejected response [P, K]."""
    return reward.score(data.prompts, data.chosen) - reward.score(data.prompts, data.rejected)


def _new_users(task: Unseen, world: World) -> tuple[PreferenceDataset, PreferenceDataset, list[str]]:
    """Pairs of new users over held-out prompts, others of theirs that are only ranked, and their kinds."""
    folder = task.folder / "pairs"
    folder.mkdir()
    shutil.copy(task.world / "prompts_test.jsonl", folder / "prompts.jsonl")
    number = task.users_per_kind * len(KINDS)
    # a copy: the scale of the utilities is measured anew on it, and stays the seed's for everybody here
    write_preferences(
        folder, replace(world), task.world / "sft", 1_000_003 + task.seed, number, max(PAIRS), 20
    )
    kinds = [list(KINDS)[user % len(KINDS)] for user in range(number)]
    tables = []
    for index, name in enumerate(("preferences.jsonl", "preferences_test.jsonl")):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        sides = [sorted((row["chosen"], row["rejected"])) for row in rows]
        owner = [int(row["user_id"].removeprefix("user-")) for row in rows]
        tastes = np.array([KINDS[kinds[user]] for user in owner])
        rng = np.random.default_rng([task.seed, 3, index])
        first = prefers_first(world, [row["prompt"] for row in rows], sides, tastes, rng)
        for row, side, yes in zip(rows, sides, first, strict=True):
            row["chosen"], row["rejected"] = side if yes else side[::-1]
            del row["group"]
        write_rows(folder / name, rows)
        tables.append(PreferenceDataset.load(folder / name))
    data, heldout = tables
    order = [int(user.removeprefix("user-")) for user in data.user_ids]
    assert heldout.user_ids == data.user_ids
    return data, heldout, [kinds[user] for user in order]
