"""What every run starts from: prompts, the reference policy, and pairs of its answers with labels."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from instructions import instructions
from openings import film_openings
from scipy.special import expit
from tastes import TASTES, sentiments

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.run import resolve_device, seed_everything
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import as_completion, plain_text
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world.world import write_rows

__all__ = ["Labels", "Pairs", "Reference", "cut_sentences", "label_pairs", "make_reference", "sample_pairs"]

#: one set of held-out prompts for all seeds, so that they can be compared
TEST_SEED = 20_240_213
#: an answer of fewer is no sentence, such as the 1. of a list
FEWEST_WORDS = 3
_MAX_ROUNDS = 20  # of drawing pairs; a policy that varies at all needs two
_AT_ONCE = 64


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _draw_prompts(kind: str, number: int, num_heldout: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Prompts to train on, and held out ones, which are the same for all seeds."""
    if kind == "chat":
        drawn = instructions(number, seed), instructions(num_heldout, TEST_SEED, heldout=True)
        known, heldout = ([[{"role": "user", "content": text}] for text in part] for part in drawn)
        return known, heldout
    kept = film_openings(num_heldout, TEST_SEED)
    return [t for t in film_openings(number + num_heldout, seed) if t not in kept][:number], list(kept)


@dataclass(frozen=True)
class Reference:
    """Prompts and the reference policy: see :func:`make_reference`.

    Attributes:
        folder: gets ``prompts.jsonl``, ``prompts_test.jsonl``, and with ``sft`` the policy in ``model``.
        kind: of the prompts.
        model_name_or_path: the base model.
        num_prompts, num_test_prompts: how many at most, and held out.
        num_samples: answers of the base model's own that it is tuned on.
        temperature: of these answers.
        max_new_tokens: their tokens before they are cut.
        opinion: VADER's sentiment of such an answer at least, up or down, as many of either; 0 takes all.
        dtype: that it samples in, and pairs are sampled in.
        sft: the tuning; None keeps the base model.
        seed: of the draws.
        device: where it samples.
    """

    folder: Path
    kind: str
    model_name_or_path: str
    num_prompts: int
    num_test_prompts: int
    num_samples: int
    temperature: float
    max_new_tokens: int
    sft: SFTConfig | None
    seed: int
    device: str
    opinion: float = 0.0
    dtype: str = "float32"


def make_reference(task: Reference) -> None:
    """Write the prompts, and tune the model on answers of its own that end with a sentence.

    Left alone, SmolLM2 ends one of 30 answers within 32 tokens: "few words" would be a matter of spelling,
    and at temperature 1 it strays. Its answers at a lower temperature, cut after one to three sentences,
    teach it both to end and to stay with the subject, and nothing that it did not say itself. Four of ten
    say nothing that anyone could like or dislike; a review does, so these may be left out (``opinion``).
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    prompts, heldout = _draw_prompts(task.kind, task.num_prompts, task.num_test_prompts, task.seed)
    for name, texts in (("prompts", prompts), ("prompts_test", heldout)):
        write_rows(task.folder / f"{name}.jsonl", ({"prompt": text} for text in texts))
    if task.sft is None:
        return
    seed_everything(task.seed)
    rng = np.random.default_rng(task.seed)
    tokenizer = load_tokenizer(task.model_name_or_path)
    policy = TokenPolicy.from_pretrained(
        task.model_name_or_path,
        tokenizer,
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        device=resolve_device(task.device),
        dtype=task.dtype,
    )
    asked = [prompts[i % len(prompts)] for i in range(task.num_samples)]
    answers = _answers(policy, tokenizer, asked, 1, "answers to learn from")
    rows = []
    for prompt, (text,) in zip(asked, answers, strict=True):
        cut = cut_sentences(plain_text(text), int(rng.integers(1, 4)))
        if len(cut.split()) >= FEWEST_WORDS:
            rows.append({"prompt": prompt, "completion": as_completion(cut, prompt)})
    if task.opinion:
        rows = _opinions(rows, task.opinion)
    if not rows:  # a model that makes no sentence
        rows = [{"prompt": p, "completion": text[0]} for p, text in zip(asked, answers, strict=True)]
    write_rows(task.folder / "sft.jsonl", rows)
    run_sft(task.sft)


def _opinions(rows: list[dict[str, Any]], least: float) -> list[dict[str, Any]]:
    """The rows that praise, and as many that blame, in their order."""
    found = sentiments([plain_text(row["completion"]) for row in rows])
    sides = [np.flatnonzero(sign * found >= least) for sign in (1, -1)]
    number = min(map(len, sides))
    return [rows[i] for i in sorted(np.concatenate([side[:number] for side in sides]).tolist())]


def cut_sentences(text: str, most: int) -> str:
    """Cut a text after some whole sentences of its first paragraph; empty where none is whole.

    Example:
        >>> cut_sentences(" A fine film. It has Dr. No in it. And then", 1)
        ' A fine film.'
    """
    ends = [match.end() for match in re.finditer(r"[a-z0-9)\"'’][.!?][\"'’]?(?=\s|$)", text.split("\n")[0])]
    return text[: ends[min(most, len(ends)) - 1]] if ends else ""


def _answers(
    policy: TokenPolicy, tokenizer: Any, prompts: Sequence[Text], number: int, title: str
) -> list[list[Text]]:
    """Answers [N][number] in the kind of their prompts."""
    found: list[list[Text]] = []
    with progress_bar(title, len(prompts)) as advance:
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            sampled = sample_responses(policy, encode_prompts(tokenizer, part), number)
            texts = to_texts(tokenizer, sampled, part)[1]
            found += [texts[i : i + number] for i in range(0, len(texts), number)]
            advance(len(part))
    return found


@dataclass(frozen=True)
class Pairs:
    """Pairs of the reference's answers: see :func:`sample_pairs`."""

    folder: Path
    prompts: Path
    reference: str
    num_pairs: int
    response_length: int
    seed: int
    device: str
    dtype: str = "float32"


def sample_pairs(task: Pairs) -> None:
    """Write ``pairs.jsonl`` with a prompt and two different answers ``a`` and ``b`` a row.

    Raises:
        UserError: if the policy hardly ever gives two different answers to a prompt.
    """
    seed_everything(task.seed)
    tokenizer = load_tokenizer(task.reference)
    policy = TokenPolicy.from_pretrained(
        task.reference,
        tokenizer,
        max_new_tokens=task.response_length,
        device=resolve_device(task.device),
        dtype=task.dtype,
    )
    known = [row["prompt"] for row in read_rows(task.prompts)]
    rng, rows = np.random.default_rng(task.seed), []
    for _ in range(_MAX_ROUNDS):
        lacking = task.num_pairs - len(rows)
        asked = [known[i] for i in rng.integers(len(known), size=lacking)]
        found = _answers(policy, tokenizer, asked, 2, "pairs to compare")
        rows += [{"prompt": p, "a": a, "b": b} for p, (a, b) in zip(asked, found, strict=True) if a != b]
        if len(rows) == task.num_pairs:
            break
    else:
        raise UserError("the reference policy gives the same answer over and over; pairs cannot be made")
    task.folder.mkdir(parents=True, exist_ok=True)
    write_rows(task.folder / "pairs.jsonl", rows)


@dataclass(frozen=True)
class Labels:
    """Users of two tastes who label pairs: see :func:`label_pairs`.

    Attributes:
        folder: gets ``preferences.jsonl`` and ``preferences_test.jsonl``.
        pairs: folder with ``pairs.jsonl``.
        tastes: name of the pair of tastes.
        users: of the majority, and of the minority.
        pairs_per_user, test_pairs_per_user: how much everyone labels.
        tau: inverse noise; None for none.
        skip_ties: whether nobody labels two answers that are worth the same; else a coin does.
        seed: of who is who, and of the labels.
    """

    folder: Path
    pairs: Path
    tastes: str
    users: tuple[int, int]
    pairs_per_user: int
    test_pairs_per_user: int
    tau: float | None
    seed: int
    skip_ties: bool = False


def label_pairs(task: Labels) -> None:
    """Let every user choose one of two answers, each pair shown to one user.

    The ``group`` column says whose taste it was; training never reads it.
    """
    tastes, rng = TASTES[task.tastes], np.random.default_rng([task.seed, 1])
    group_of = rng.permutation(np.repeat([0, 1], task.users))
    each = task.pairs_per_user + task.test_pairs_per_user
    rows = read_rows(task.pairs / "pairs.jsonl")[: len(group_of) * each]
    if len(rows) < len(group_of) * each:
        raise UserError(f"{len(rows)} pairs are too few for {len(group_of)} users with {each} each")
    owner = np.repeat(np.arange(len(group_of)), each)
    prompts = [row["prompt"] for row in rows]
    sides = [tastes.utilities(prompts, [row[side] for row in rows]) for side in "ab"]
    margin = (sides[0] - sides[1])[np.arange(len(rows)), group_of[owner]]
    first = prefers_first(margin, task.tau, rng)
    task.folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, list[dict[str, Any]]] = {"preferences": [], "preferences_test": []}
    for place, (row, user) in enumerate(zip(rows, owner.tolist(), strict=True)):
        if task.skip_ties and margin[place] == 0:
            continue
        chosen, rejected = ("a", "b") if first[place] else ("b", "a")
        name = "preferences" if place % each < task.pairs_per_user else "preferences_test"
        out[name].append(
            {
                "prompt": row["prompt"],
                "chosen": row[chosen],
                "rejected": row[rejected],
                "user_id": f"user-{user:03d}",
                "group": tastes.names[group_of[user]],
            }
        )
    for name, labelled in out.items():
        write_rows(task.folder / f"{name}.jsonl", labelled)


def prefers_first(margin: np.ndarray, tau: float | None, rng: np.random.Generator) -> np.ndarray:
    """Whether the first of two answers is chosen [N] bool.

    Args:
        margin: utility of the first less that of the second [N].
        tau: Bradley-Terry's inverse noise; None for users who always choose the better one.
        rng: draws the answers, and tosses a coin for ties.

    Example:
        >>> prefers_first(np.array([1.0, -1.0]), None, np.random.default_rng(0)).tolist()
        [True, False]
    """
    chance = np.sign(margin) / 2 + 0.5 if tau is None else expit(tau * margin)
    return rng.random(len(margin)) < chance
