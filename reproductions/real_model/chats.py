"""Chat prompts, two answers each, and simulated people who choose between them by what can be counted.

``brief`` people like few words. ``learned`` people like long words. Both are functions of the answer's text
alone, so that nothing has to be downloaded to know who is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from torchrl_maxmin.world.world import write_rows

__all__ = ["FILES", "GROUPS", "PROMPTS", "TASTES", "tastes", "write_chats"]

Message = dict[str, str]

_QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What does a bee do in winter?",
    "Explain what a loan is.",
    "Name three rivers in Africa.",
    "Why do cats purr?",
    "How does a bicycle stay upright?",
    "What should I pack for a week in the mountains?",
    "Write a sentence about autumn.",
    "What is the difference between weather and climate?",
    "How can I sleep better?",
    "Who wrote Hamlet, and what is it about?",
    "Give me an idea for a birthday present.",
    "What is photosynthesis?",
    "How do I ask my landlord for a repair?",
)
_SYSTEM: Message = {"role": "system", "content": "You are a patient teacher. Answer in your own words."}
_TAUGHT = ("What is a fraction?", "Why do ships float?", "What is gravity?", "How do vaccines work?")
#: (first question, its answer, what is asked next)
_LONGER = (
    ("I have a headache.", "I am sorry to hear that. Did you drink enough today?", "Not really. What now?"),
    ("Suggest a book.", "Try a collection of short stories.", "Why short stories?"),
    ("Is tea healthy?", "In moderation, yes.", "How much is moderation?"),
    ("My plant is dying.", "How often do you water it?", "Every day."),
)
#: one question, questions under a system message, and conversations of several turns
PROMPTS: tuple[list[Message], ...] = (
    *([{"role": "user", "content": text}] for text in _QUESTIONS),
    *([_SYSTEM, {"role": "user", "content": text}] for text in _TAUGHT),
    *(
        [
            {"role": "user", "content": first},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": then},
        ]
        for first, answer, then in _LONGER
    ),
)

#: group -> its people
GROUPS = {"brief": 8, "learned": 4}
FILES = ("sft", "preferences", "prompts", "heldout")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def _brevity(text: str) -> float:
    return -float(len(_words(text)))


def _learning(text: str) -> float:
    words = _words(text)
    return sum(map(len, words)) / len(words) if words else 0.0


TASTES: Mapping[str, Callable[[str], float]] = {"brief": _brevity, "learned": _learning}


def tastes(answers: Sequence[str]) -> np.ndarray:
    """What every answer is worth to every group, [N, G]."""
    return np.array([[taste(answer) for taste in TASTES.values()] for answer in answers])


def write_chats(
    folder: Path,
    prompts: Sequence[list[Message]],
    answers: Sequence[Sequence[str]],
    *,
    num_heldout: int = 8,
    pairs_per_user: int = 6,
    seed: int = 0,
) -> dict[str, Path]:
    """Write what the four verbs read, every text as messages.

    Args:
        folder: for the files.
        prompts: N conversations.
        answers: two or more to every prompt.
        num_heldout: prompts, spread over all kinds, that only ``evaluate`` sees.
        pairs_per_user: choices of every person, at most one a training prompt.
        seed: of who is asked what, and of their doubts.

    Returns:
        Files by name: ``sft`` (prompt, completion: the answer that both groups like best), ``preferences``
        (prompt, chosen, rejected, user, group), ``prompts`` and ``heldout`` (prompt).
    """
    rng = np.random.default_rng(seed)
    worth = np.stack([tastes(given) for given in answers])  # [N, n, G]
    worth = (worth - worth.mean((0, 1))) / worth.std((0, 1))
    heldout = set(np.linspace(0, len(prompts) - 1, num_heldout).round().astype(int).tolist())
    training = [index for index in range(len(prompts)) if index not in heldout]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [
            {"prompt": prompts[i], "completion": _answer(answers[i][int(worth[i].mean(-1).argmax())])}
            for i in training
        ],
        "prompts": [{"prompt": prompts[i]} for i in training],
        "heldout": [{"prompt": prompts[i]} for i in sorted(heldout)],
        "preferences": [],
    }
    for group, (name, people) in enumerate(GROUPS.items()):
        for person in range(people):
            for i in rng.choice(training, min(pairs_per_user, len(training)), replace=False).tolist():
                a, b = rng.choice(len(answers[i]), 2, replace=False).tolist()
                if answers[i][a] == answers[i][b]:
                    continue
                if rng.random() > expit(4 * (worth[i, a, group] - worth[i, b, group])):
                    a, b = b, a
                row = {"prompt": prompts[i], "chosen": _answer(answers[i][a])}
                row |= {"rejected": _answer(answers[i][b]), "user": f"{name}-{person}", "group": name}
                rows["preferences"].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in FILES}
    for name, path in files.items():
        write_rows(path, rows[name])
    return files


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
