"""The frontier experiment: steps done once, who labels how, the enumerable world, and all of it in small."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from scripts import on_path

from torchrl_maxmin.core.tasks import run_tasks
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.world import World, sample_prompts
from torchrl_maxmin.world.world import write_rows

FOLDER = on_path("frontier")

from people import FILES, People, relabel  # noqa: E402
from plan import FULL, SMOKE, SeedPlan  # noqa: E402
from short import log_probabilities, responses  # noqa: E402
from steps import Plan  # noqa: E402
from worlds import SHIFTS, Prompts, write_prompts  # noqa: E402

# -- steps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    folder: Path
    log: Path
    text: str
    fails: bool = False


def write_note(note):
    assert not note.folder.exists()
    note.folder.mkdir()
    with note.log.open("a") as file:
        file.write(note.text)
    if note.fails:
        raise RuntimeError("cut off")


def run_notes(tmp_path, first, second, fails=False):
    plan, log = Plan(), tmp_path / "log"
    a = plan.add("a", write_note, Note(tmp_path / "a", log, first), tmp_path / "a")
    plan.add("b", write_note, Note(tmp_path / "b", log, second, fails), tmp_path / "b", (a,))
    for task in plan.tasks.values():
        task.function(task.config)
    return log.read_text()


def test_a_finished_step_is_not_done_again(tmp_path):
    assert run_notes(tmp_path, "A", "B") == "AB"
    assert run_notes(tmp_path, "A", "B") == "AB"


def test_a_step_with_other_settings_is_done_again_and_what_follows_too(tmp_path):
    run_notes(tmp_path, "A", "B")
    assert run_notes(tmp_path, "A", "C") == "ABC"
    assert run_notes(tmp_path, "D", "C") == "ABCDC"


def test_a_step_that_was_cut_off_starts_anew(tmp_path):
    with pytest.raises(RuntimeError, match="cut off"):
        run_notes(tmp_path, "A", "B", fails=True)
    assert (tmp_path / "b").exists()
    assert run_notes(tmp_path, "A", "B") == "ABB"


def test_steps_run_in_processes(tmp_path):
    plan = Plan()
    folder = tmp_path / "prompts"
    plan.add("x/prompts", write_prompts, Prompts(folder, "long", 3), folder)
    run_tasks(plan.tasks, 1)
    assert len((folder / "prompts.jsonl").read_text().splitlines()) == 3
    assert list(plan.seconds()) == ["x/prompts"]


@pytest.mark.parametrize("sizes", [FULL, SMOKE], ids=["full", "smoke"])
def test_every_policy_has_the_same_budget(tmp_path, sizes):
    plan = Plan()
    SeedPlan(plan, sizes, tmp_path, 0)
    configs = {name: task.config.config for name, task in plan.tasks.items()}
    ppo = {name: c for name, c in configs.items() if type(c).__name__ == "PPOConfig"}
    for kinds in (
        [c for name, c in ppo.items() if "/short/" in name],
        [c for name, c in ppo.items() if "/short/" not in name],
    ):
        for key in ("num_iterations", "rollout_batch_size", "num_ppo_epochs", "learning_rate", "seed"):
            assert len({getattr(c, key) for c in kinds}) == 1
    rewards = [c for c in configs.values() if type(c).__name__ == "RewardConfig"]
    assert len({(c.num_rounds, c.steps_per_round, c.learning_rate) for c in rewards}) == 1
    # true groups train the yardstick alone
    assert {Path(c.output_dir).name for c in rewards if c.use_true_groups} == {"reward_true_groups"}
    folders = [task.config.folder for task in plan.tasks.values()]
    assert len(set(folders)) == len(folders)
    assert not any(a in b.parents for a in folders for b in folders), "one step's folder lies in another's"


# -- people ------------------------------------------------------------------------------------------------


def pairs(folder, num_users=40, each=8, turned=False):
    """A world and pairs of drawn texts; ``turned`` swaps every label."""
    folder.mkdir()
    World.preset("10:1").save(folder / "world.json")
    prompts, rng = sample_prompts(60, 0, heldout=False), np.random.default_rng(0)
    words = "great lovely awful boring the film was it and plot".split()  # noqa: SIM905
    for name in FILES:
        rows = []
        for user in range(num_users):
            for _ in range(each):
                sides = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(2)]
                sides = sides[::-1] if turned else sides
                rows.append(
                    {
                        "prompt": prompts[rng.integers(60)],
                        "chosen": sides[0],
                        "rejected": sides[1],
                        "user_id": f"user-{user:03d}",
                        "group": "sentiment",
                    }
                )
        write_rows(folder / name, rows)
    return folder


def labelled(tmp_path, name, source, **settings):
    relabel(People(source, tmp_path / name, 3, **settings))
    rows = [json.loads(line) for file in FILES for line in (tmp_path / name / file).read_text().splitlines()]
    return rows, World.load(tmp_path / name / "world.json")


def margins(rows, world):
    """Own utility of the chosen less that of the rejected response, by the group column."""
    column = [world.group_names.index(row["group"]) for row in rows]
    prompts = [row["prompt"] for row in rows]
    both = [world(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]
    return (both[0] - both[1])[np.arange(len(rows)), column]


def test_people_without_noise_follow_their_group(tmp_path):
    source = pairs(tmp_path / "source")
    rows, world = labelled(tmp_path, "out", source, shares=(0.75, 0.25), tau=1e6)
    assert (margins(rows, world) >= 0).all()
    groups = {row["user_id"]: row["group"] for row in rows}
    assert sum(group == "conciseness" for group in groups.values()) == 10
    assert (world.shares, world.tau) == ((0.75, 0.25), 1e6)
    before = [
        {row["prompt"], row["chosen"], row["rejected"], row["user_id"]}
        for file in FILES
        for row in map(json.loads, (source / file).read_text().splitlines())
    ]
    after = [{row["prompt"], row["chosen"], row["rejected"], row["user_id"]} for row in rows]
    assert after == before


def test_labels_do_not_depend_on_those_that_were_there(tmp_path):
    one, _ = labelled(tmp_path, "one", pairs(tmp_path / "a"))
    other, _ = labelled(tmp_path, "other", pairs(tmp_path / "b", turned=True))
    assert one == other


def test_labels_are_as_noisy_as_tau_says(tmp_path):
    source = pairs(tmp_path / "source", num_users=200, each=30)
    rows, world = labelled(tmp_path, "out", source, tau=1.5)
    margin = margins(rows, world)
    expected = expit(1.5 * np.abs(margin))
    error = np.sqrt((expected * (1 - expected)).sum()) / len(rows)
    agreed = np.where(margin == 0, 0.5, margin > 0).mean()
    assert abs(agreed - expected.mean()) < 4 * error


def test_adversaries_answer_the_opposite_and_the_others_as_before(tmp_path):
    source = pairs(tmp_path / "source")
    honest, _ = labelled(tmp_path, "honest", source)
    turned = {}
    for share in (0.1, 0.3):
        rows, _ = labelled(tmp_path, f"adversarial {share}", source, adversarial=share)
        changed = {}
        for old, new in zip(honest, rows, strict=True):
            assert old["group"] == new["group"]
            changed.setdefault(old["user_id"], []).append(old["chosen"] != new["chosen"])
        # texts that are equal on both sides cannot be turned
        turned[share] = {user for user, flips in changed.items() if np.mean(flips) > 0.9}
        assert not any(any(flips) for user, flips in changed.items() if user not in turned[share])
        assert len(turned[share]) == share * 40
    assert turned[0.1] < turned[0.3]


def test_coin_tossers_know_nothing(tmp_path):
    source = pairs(tmp_path / "source", num_users=100, each=20)
    rows, world = labelled(tmp_path, "out", source, random=1.0, tau=1e6)
    margin = margins(rows, world)
    right = margin[margin != 0] > 0
    assert abs(right.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(right))
    half, _ = labelled(tmp_path, "half", source, random=0.5, tau=1e6)
    assert margins(half, world).mean() > 0.3 * np.abs(margins(half, world)).mean()


# -- prompts and the enumerable world ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SHIFTS, "unfinished"])
def test_shifted_prompts_are_distinct_and_of_their_kind(tmp_path, kind):
    write_prompts(Prompts(tmp_path / "a", kind, 20))
    write_prompts(Prompts(tmp_path / "b", kind, 20))
    text = (tmp_path / "a" / "prompts.jsonl").read_text()
    assert (tmp_path / "b" / "prompts.jsonl").read_text() == text
    prompts = [json.loads(line)["prompt"] for line in text.splitlines()]
    assert len(set(prompts)) == 20
    lengths = [len(prompt.split()) for prompt in prompts]
    least, most = {"long": (6, 8), "complaining": (2, 4), "shuffled": (3, 5), "unfinished": (4, 12)}[kind]
    assert least <= min(lengths) <= max(lengths) <= most


def test_all_responses_are_enumerated_with_their_probability(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    policy = TokenPolicy.from_pretrained(tiny_model, tokenizer, max_new_tokens=2)
    prompts = encode_prompts(tokenizer, ["the film", "a dull plot was"])
    found = log_probabilities(policy, prompts)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-9)
    texts = responses(tokenizer)
    assert found.shape == (2, len(texts))
    torch.manual_seed(0)
    sampled = sample_responses(policy, prompts, 40)
    asked, written = to_texts(tokenizer, sampled)
    given = policy.log_prob(sampled).double().sum(-1).detach().numpy()
    size = len(tokenizer)
    for row, (first, second) in enumerate(sampled["action"].tolist()):
        after = first - (first > tokenizer.eos_token_id)  # the first token is any but the end
        second = second if sampled["action_mask"][row, 1] else tokenizer.eos_token_id
        index = 0 if first == tokenizer.eos_token_id else 1 + after * size + second
        assert found[row // 40, index] == pytest.approx(given[row], abs=1e-4)
        assert texts[index] == written[row].strip()
    assert len(set(asked)) == 2


# -- the whole ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_in_small_and_again_without_work(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--runs_dir", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    results = tmp_path / "runs" / "results"
    assert first.stdout.splitlines()[-1].endswith(f": {results / 'results.md'}")
    assert "the frontier of fixed weights within intervals" in first.stdout
    text = (results / "results.md").read_text()
    for picture in re.findall(r"\]\((\w+\.(?:png|csv))\)", text):
        assert (results / picture).stat().st_size > 0, picture
    with (results / "robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        low, high = float(row["change low"]), float(row["change high"])
        assert low <= float(row["change"]) <= high
        assert row["maxmin is"] == ("better" if low > 0 else "worse" if high < 0 else "not told apart")
        assert float(row["maxmin"]) - float(row["single"]) == pytest.approx(float(row["change"]), abs=1e-5)
    with (results / "exact.csv").open(newline="") as file:
        assert all(float(row["smallest gap"]) >= -1e-9 for row in csv.DictReader(file))
    marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("done.json")}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("done.json")} == marks
    assert (results / "results.md").read_text() == text
