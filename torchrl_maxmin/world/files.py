"""The embedded world as files: a blank model, texts, prompts, and people's preferences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import import_transformers, load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.world.world import (
    World,
    build_config,
    build_tokenizer,
    is_heldout,
    sample_prompts,
    sample_reviews,
)

__all__ = ["RESPONSE_LENGTH", "write_preferences", "write_world"]

RESPONSE_LENGTH = 24
_MAX_ROUNDS = 100  # of drawing pairs; a policy that varies at all needs a few
_TEST_SEED = 20_240_213  # one test set for all seeds, so that they can be compared


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_world(
    folder: Path, seed: int, num_texts: int = 16_000, num_prompts: int = 4_000, num_test_prompts: int = 512
) -> None:
    """Write what a run starts from.

    ``base_model`` (an untrained GPT-2 with its tokenizer), ``sft.jsonl`` (prompt and
    completion), ``prompts.jsonl`` and ``prompts_test.jsonl``. Test prompts are the same for
    every seed and occur in nothing that is trained on.
    """
    torch.manual_seed(seed)
    import_transformers().GPT2LMHeadModel(build_config()).save_pretrained(folder / "base_model")
    build_tokenizer().save_pretrained(folder / "base_model")
    texts = (
        {"prompt": prompt, "completion": completion}
        for prompt, completion in sample_reviews(num_texts, seed)
        if not is_heldout(prompt)
    )
    write_rows(folder / "sft.jsonl", texts)
    write_rows(
        folder / "prompts.jsonl", ({"prompt": p} for p in sample_prompts(num_prompts, seed, heldout=False))
    )
    test = sample_prompts(num_test_prompts, _TEST_SEED, heldout=True)
    write_rows(folder / "prompts_test.jsonl", ({"prompt": p} for p in test))


def write_preferences(
    folder: Path,
    world: World,
    reference_path: str | Path,
    seed: int,
    num_users: int = 300,
    pairs_per_user: int = 20,
    test_pairs_per_user: int = 5,
    device: torch.device | str = "cpu",
) -> World:
    """Let people compare pairs of the reference policy's responses.

    Every user gets prompts of their own, two responses each, and picks one by Bradley-Terry
    sampling of their group's utility. Written: ``preferences.jsonl`` and
    ``preferences_test.jsonl`` with prompt, chosen, rejected, user_id, and a group column for
    evaluation only; ``world.json`` with the utilities' standard deviations.

    Returns:
        The world, its ``utility_std`` measured on these responses.

    Raises:
        UserError: if the policy hardly ever gives two different responses to a prompt.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(reference_path))
    policy = TokenPolicy.from_pretrained(str(reference_path), tokenizer, max_new_tokens=RESPONSE_LENGTH)
    policy.to(device)
    generator = np.random.default_rng(seed)
    known = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    each = pairs_per_user + test_pairs_per_user
    groups = world.assign_users(num_users, seed)
    rows: list[dict[str, Any]] = []
    raw: list[np.ndarray] = []
    drawn: list[tuple[int, str, str, str]] = []
    with progress_bar("sampling pairs to compare", num_users * each) as advance:
        wanted = np.full(num_users, each)
        for _ in range(_MAX_ROUNDS):  # two equal responses cannot be compared and are drawn again
            users = np.repeat(np.arange(num_users), wanted)
            prompts = [known[i] for i in generator.integers(len(known), size=len(users))]
            for start in range(0, len(users), 512):
                part = prompts[start : start + 512]
                _, texts = to_texts(
                    tokenizer, sample_responses(policy, encode_prompts(tokenizer, part), 2, 1024)
                )
                raw.append(
                    world.raw_utilities([f"{p} {c}" for p, c in zip(np.repeat(part, 2), texts, strict=True)])
                )
                for i, prompt in enumerate(part):
                    first, second = texts[2 * i], texts[2 * i + 1]
                    if first != second:
                        drawn.append((users[start + i], prompt, first, second))
                        wanted[users[start + i]] -= 1
                        advance()
            if not wanted.any():
                break
        else:
            raise UserError(
                f"{reference_path} answers most prompts with one response alone, so people have nothing to "
                "compare; train it less or with a smaller rate"
            )
    world.utility_std = tuple(np.concatenate(raw).std(0).tolist())
    world.save(folder / "world.json")
    drawn.sort(key=lambda row: row[0])
    owner = np.array([groups[row[0]] for row in drawn])
    prefers_first = world.label(
        [f"{p} {a}" for _, p, a, _ in drawn], [f"{p} {b}" for _, p, _, b in drawn], owner, seed
    )
    for (user, prompt, first, second), yes in zip(drawn, prefers_first, strict=True):
        chosen, rejected = (first, second) if yes else (second, first)
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "user_id": f"user-{user:03d}",
                "group": world.group_names[groups[user]],
            }
        )
    write_rows(folder / "preferences.jsonl", (row for i, row in enumerate(rows) if i % each < pairs_per_user))
    write_rows(
        folder / "preferences_test.jsonl", (row for i, row in enumerate(rows) if i % each >= pairs_per_user)
    )
    return world
