"""What a seed starts from: the world's files, its reference policy, its people, prompts of other kinds."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import select_num_groups
from torchrl_maxmin.rewards.pairs import feature_differences
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import World
from torchrl_maxmin.world.grammar import COMPLAINT, sample_review
from torchrl_maxmin.world.world import write_preferences, write_rows, write_world

#: The world of all experiments.
WORLD = "10:1"
_PROMPT_SEED = 7  # one set of shifted prompts for all seeds


@dataclass(frozen=True)
class Prepare:
    """A seed's world: see :func:`prepare`."""

    folder: Path
    seed: int
    num_users: int
    pairs_per_user: int
    sizes: dict[str, int]
    sft: SFTConfig


def prepare(task: Prepare) -> None:
    """The world's files, the reference policy, and people's preferences over its responses."""
    task.folder.mkdir(parents=True)
    sizes = dict(task.sizes)
    test_pairs = sizes.pop("test_pairs_per_user")
    write_world(task.folder, task.seed, **sizes)
    run_sft(task.sft)
    write_preferences(
        task.folder,
        World.preset(WORLD),
        task.sft.output_dir,
        task.seed,
        task.num_users,
        task.pairs_per_user,
        test_pairs,
        device=task.sft.device,
    )


@dataclass(frozen=True)
class Prompts:
    """``prompts.jsonl`` of one kind: a key of :data:`SHIFTS`, or ``unfinished``."""

    folder: Path
    kind: str
    number: int


def write_prompts(task: Prompts) -> None:
    """Write distinct prompts of this kind, the same for every seed."""
    draw, rng = (SHIFTS | {"unfinished": _unfinished})[task.kind], random.Random(_PROMPT_SEED)
    kept: dict[str, None] = {}
    while len(kept) < task.number:
        kept.update(dict.fromkeys(draw(rng)))
    found = list(kept)[: task.number]
    task.folder.mkdir(parents=True, exist_ok=True)
    write_rows(task.folder / "prompts.jsonl", ({"prompt": prompt} for prompt in found))


def _long(rng: random.Random) -> Iterator[str]:
    review = sample_review(rng)
    length = rng.randint(6, 8)
    if len(review) > length:
        yield " ".join(review[:length])


def _complaining(rng: random.Random) -> Iterator[str]:
    start = sample_review(rng)[: rng.randint(2, 4)]
    if COMPLAINT.intersection(start):
        yield " ".join(start)


def _shuffled(rng: random.Random) -> Iterator[str]:
    start = sample_review(rng)[: rng.randint(3, 5)]
    yield " ".join(rng.sample(start, len(start)))


def _unfinished(rng: random.Random) -> Iterator[str]:
    """Reviews that lack their last two words, for responses of two tokens."""
    review = sample_review(rng)
    if 6 <= len(review) <= 14:
        yield " ".join(review[:-2])


#: Prompts that training had none of, or few: 6 to 8 words instead of 2 to 4; with a complaint among them;
#: words in random order, which the grammar does not know.
SHIFTS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "long": _long,
    "complaining": _complaining,
    "shuffled": _shuffled,
}


@dataclass(frozen=True)
class CountGroups:
    """How many groups the likelihood of left-out users chooses for these pairs: see :func:`count_groups`."""

    pairs: Path
    reference: Path
    folder: Path
    seed: int
    max_length: int


def count_groups(task: CountGroups) -> None:
    """Write ``choice.json`` with ``num_groups``, as ``--num_groups auto`` would choose."""
    data = PreferenceDataset.load(task.pairs / "preferences.jsonl")
    with progress_bar("choosing K", 1) as advance:
        differences = feature_differences(data, str(task.reference), task.max_length, "cpu")
        choice = select_num_groups(differences, data.user_offsets, 3, seed=task.seed, num_restarts=4)
        advance()
    task.folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"num_groups": choice.num_groups}
    (task.folder / "choice.json").write_text(json.dumps(told) + "\n")
