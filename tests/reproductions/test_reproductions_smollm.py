"""The language experiments on a real model: prompts, tastes, labels, recipes, and all of it in small."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.special import expit
from scripts import REPRODUCTIONS, load_script, on_path

pytest.importorskip("vaderSentiment", reason="pip install 'torchrl-maxmin[smollm]'")
pytest.importorskip("textstat", reason="pip install 'torchrl-maxmin[smollm]'")

on_path("real_model")
run = load_script("smollm/run.py")

import pairs  # noqa: E402
import paper  # noqa: E402
import recipes  # noqa: E402
import results  # noqa: E402
import stages  # noqa: E402
import tastes  # noqa: E402
from common import exit_code  # noqa: E402
from instructions import instructions  # noqa: E402
from openings import film_openings  # noqa: E402
from steps import Plan  # noqa: E402

from torchrl_maxmin.core.errors import UserError  # noqa: E402
from torchrl_maxmin.trainers.ppo_config import PPOConfig  # noqa: E402
from torchrl_maxmin.trainers.reward_config import RewardConfig  # noqa: E402
from torchrl_maxmin.world.world import write_rows  # noqa: E402

#: the recipes' own, where the policy stage has adapters and advantages without a critic
USE_PEFT = str({"use_peft", "advantage"} <= PPOConfig.__dataclass_fields__.keys()).lower()
RECIPES = [
    path for name in ("smollm/recipes", "tulu2") for path in sorted((REPRODUCTIONS / name).glob("*.yaml"))
]

# -- prompts -----------------------------------------------------------------------------------------------


def test_openings_are_distinct_seeded_and_varied():
    drawn = film_openings(400, 0)
    assert len(set(drawn)) == 400
    assert drawn == film_openings(400, 0) != film_openings(400, 1)
    assert all(text[0].isupper() and "{" not in text for text in drawn)
    # not one template with one slot: the first two words differ, and no place always holds the same
    assert len({tuple(text.split()[:2]) for text in drawn}) > 60
    assert len({len(text.split()) for text in drawn}) > 10
    assert not any(f" a {vowel}" in text for text in drawn for vowel in "aeiou")


def test_instructions_are_distinct_and_held_out_by_subject():
    known, heldout = instructions(240, 0), instructions(60, 1, heldout=True)
    assert len(set(known)) == 240
    assert len(set(heldout)) == 60
    assert len(set(instructions(60, 0)) & set(instructions(60, 1))) < 60
    subjects = [subject for _, about in sys.modules["instructions"]._KINDS for subject in about.split("|")]

    def about(texts):
        return {max((s for s in subjects if s in text), key=len) for text in texts}

    assert about(known).isdisjoint(about(heldout))
    with pytest.raises(ValueError, match="there are"):
        instructions(10_000, 0)


def test_training_prompts_are_none_of_the_held_out_ones():
    for kind in recipes.KINDS:
        for seed in (0, 1):
            known, heldout = pairs._draw_prompts(kind, 200, 50, seed)
            assert len(known) == 200
            assert len(heldout) == 50
            assert not any(text in heldout for text in known)
        assert pairs._draw_prompts(kind, 200, 50, 3)[1] == heldout


# -- tastes ------------------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "Why do cats purr?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def worth(name, text):
    return tastes.TASTES[name].utilities([ASKED], [answer(text)])[0]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("grade", "It is a nice way to rest.", "Vibrations of laryngeal musculature facilitate homeostasis."),
        (
            "length",
            "To rest.",
            "To rest, and to calm themselves when somebody has hurt them or they are afraid.",
        ),
        ("tone", "What a lovely and charming question!", "What a stupid and horrible question."),
    ],
)
def test_opposite_tastes_disagree_on_their_number_and_agree_on_relevance(name, first, second):
    one, other = worth(name, first), worth(name, second)
    assert one[0] > other[0]
    assert one[1] < other[1]
    assert one.sum() == pytest.approx(other.sum())  # neither speaks of cats or of purring
    spoken = worth(name, f"{first} Cats purr!").sum() - worth(name, first).sum()
    assert spoken == pytest.approx(2 / tastes.UNITS["relevance"])


def test_reviews_please_by_praise_and_by_brevity():
    found = tastes.film(["It was"] * 3, [" a wonderful, lovely film.", " awful.", ""])
    assert found[0, 0] > found[2, 0] == 0 > found[1, 0]
    assert found[:, 1].tolist() == [-4 / tastes.UNITS["words"], -1 / tastes.UNITS["words"], 0]


def test_grades_are_bounded_and_known_for_no_text():
    low, high = tastes.GRADES
    found = tastes.grades(["", "I am.", "Antidisestablishmentarianism", "??", "\n"])
    assert ((found >= low) & (found <= high)).all()
    assert found[2] == high


def test_a_missing_scorer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "textstat", None)
    with pytest.raises(UserError, match=r"package textstat: pip install 'torchrl-maxmin\[smollm\]'"):
        tastes.require_packages()


# -- labels ------------------------------------------------------------------------------------------------


def labelled(tmp_path, tau, users=(60, 20), each=(15, 5)):
    rng = np.random.default_rng(0)
    words = "a great good film that was bad awful long slow and plain".split()  # noqa: SIM905
    sides = [[" ".join(rng.choice(words, rng.integers(1, 20))) for _ in range(2)] for _ in range(1600)]
    tmp_path.mkdir(exist_ok=True)
    write_rows(tmp_path / "pairs.jsonl", ({"prompt": "It was", "a": a, "b": b} for a, b in sides))
    pairs.label_pairs(pairs.Labels(tmp_path / "labels", tmp_path, "film", users, *each, tau, 0))
    names = ("preferences", "preferences_test")
    return [pairs.read_rows(tmp_path / "labels" / f"{name}.jsonl") for name in names]


def margins(rows):
    column = [tastes.TASTES["film"].names.index(row["group"]) for row in rows]
    both = [
        tastes.film(["It was"] * len(rows), [row[side] for row in rows]) for side in ("chosen", "rejected")
    ]
    return (both[0] - both[1])[np.arange(len(rows)), column]


def test_users_without_noise_choose_what_they_like(tmp_path):
    known, heldout = labelled(tmp_path, None)
    assert (margins(known) >= 0).all()
    assert (margins(heldout) >= 0).all()
    groups = {row["user_id"]: row["group"] for row in known}
    assert {name: list(groups.values()).count(name) for name in ("positive", "concise")} == {
        "positive": 60,
        "concise": 20,
    }
    assert all(sum(row["user_id"] == user for row in known) == 15 for user in groups)
    assert all(sum(row["user_id"] == user for row in heldout) == 5 for user in groups)


def test_labels_are_as_noisy_as_tau_says(tmp_path):
    known, heldout = labelled(tmp_path, 1.5)
    margin = margins(known + heldout)
    expected = expit(1.5 * np.abs(margin))
    error = np.sqrt((expected * (1 - expected)).sum()) / len(margin)
    assert abs(np.where(margin == 0, 0.5, margin > 0).mean() - expected.mean()) < 4 * error


def test_ties_are_a_coin():
    found = pairs.prefers_first(np.zeros(4000), None, np.random.default_rng(0))
    assert abs(found.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_too_few_pairs_are_an_error(tmp_path):
    with pytest.raises(UserError, match="too few for 200 users"):
        labelled(tmp_path, None, users=(180, 20))


@pytest.mark.parametrize(
    ("text", "most", "wanted"),
    [
        (" A film. It ends", 3, " A film."),
        (" One. Two! Three? Four.", 2, " One. Two!"),
        (' He said "no." Then', 1, ' He said "no."'),
        (" No end", 1, ""),
        (" A line.\nAnother.", 3, " A line."),
        (" It cost 3.5 million. Yes.", 1, " It cost 3.5 million."),
    ],
)
def test_answers_are_cut_after_whole_sentences(text, most, wanted):
    assert pairs.cut_sentences(text, most) == wanted


# -- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_hardware_command_and_time(path):
    recipe = recipes.load_recipe(path)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for key in ("hardware:", "command:", "time:"):
        assert any(line.removeprefix("#").strip().startswith(key) for line in head), key
    assert "@" not in "".join(head)
    assert recipe.use_peft
    assert set(recipe.lora) == {"reward", "ppo"}
    for part in (recipe, recipes.shrink(recipe)):
        stages.RecipePlan(Plan(), replace(part, use_peft=False), Path("runs"), "cpu")


def test_every_policy_has_the_same_budget_and_no_reward_sees_the_true_groups(tmp_path):
    for path in run.RECIPES:
        plan = Plan()
        recipe = replace(recipes.load_recipe(path), use_peft=False)
        found = stages.RecipePlan(plan, recipe, tmp_path, "cpu")
        configs = [task.config.config for task in plan.tasks.values()]
        kinds = {
            kind: [c for c in configs if type(c).__name__ == kind] for kind in ("PPOConfig", "RewardConfig")
        }
        cells = len(recipe.tastes) * len(recipe.ratios) * len(recipe.seeds)
        assert len(found.runs) == cells
        assert len(kinds["PPOConfig"]) == len(kinds["RewardConfig"]) == 2 * cells
        for key in (
            "num_iterations",
            "rollout_batch_size",
            "num_ppo_epochs",
            "learning_rate",
            "beta",
            "seed",
        ):
            assert len({getattr(config, key) for config in kinds["PPOConfig"]}) == 1
        assert {config.num_groups for config in kinds["RewardConfig"]} == {1, "auto"}
        assert not any(config.use_true_groups for config in kinds["RewardConfig"])
        folders = [task.config.folder for task in plan.tasks.values()]
        assert len(set(folders)) == len(folders)
        assert not any(a in b.parents for a in folders for b in folders), (
            "one step's folder lies in another's"
        )


def test_a_part_needs_its_own_steps_and_what_they_share(tmp_path):
    plan = Plan()
    recipe = replace(recipes.load_recipe(run.RECIPES[1]), use_peft=False)
    found = stages.RecipePlan(plan, recipe, tmp_path, "cpu")
    (one,) = (part for part in found.runs if (part.tastes, part.ratio) == ("length", 10))
    needed = plan.needed(one.steps)
    shared = {"psoups seed-0/reference", "psoups seed-0/pairs"}
    assert {name for name in needed if "length-10-1" not in name} == shared
    assert len(needed) == len(shared) + 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "holds no recipe"),
        ("kind: film\ntitle: x\ntastes: [film]\nratios: [1]\nreferee: {}", "referee is no key"),
        ("kind: poems\ntitle: x\ntastes: [film]\nratios: [1]", "kind 'poems' is none of"),
        ("kind: film\ntitle: x\ntastes: [sour]\nratios: [1]", "tastes 'sour' are none of"),
        ("kind: film\ntitle: x\ntastes: [film]\nratios: [0.5]", "ratios of 1 and more"),
        ("kind: film\ntitle: x\ntastes: [film]", "ratios"),
        ("kind: [", "no recipe"),
    ],
)
def test_a_recipe_that_is_none_is_one_line(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        recipes.load_recipe(tmp_path / "bad.yaml")


def test_a_flag_that_a_stage_does_not_have_is_named(tmp_path):
    recipe = recipes.load_recipe(run.RECIPES[0])
    recipe = replace(recipe, use_peft=False, stages={**recipe.stages, "ppo": {"lora_rank": 3}})
    with pytest.raises(UserError, match="ppo has no flag lora_rank"):
        stages.RecipePlan(Plan(), recipe, tmp_path, "cpu")


def test_a_verb_runs_by_a_command_with_the_config_that_the_step_holds(tmp_path):
    script = tmp_path / "verb.py"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('|'.join(sys.argv[2:]))")
    recipe = replace(recipes.load_recipe(run.RECIPES[1]), use_peft=False)
    recipe = replace(recipe, launch=f"{sys.executable} {script} {tmp_path / 'said'}")
    plan = Plan()
    stages.RecipePlan(plan, recipe, tmp_path / "runs", "cpu")
    step = plan.tasks["psoups seed-0/length-10-1/reward_maxmin"].config
    step.function(step.config)
    verb, flag, path = (tmp_path / "said").read_text().split("|")
    assert (verb, flag) == ("reward", "--config")
    assert RewardConfig(**yaml.safe_load(Path(path).read_text())) == step.config.config
    failing = replace(step.config, command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(UserError, match="ended with 3"):
        stages.launch(failing)


def test_the_papers_tables_are_those_of_the_notes():
    b = [np.mean([rates[code] for code in ("P1B", "P2B", "P3B")]) for rates in paper.WIN_RATES.values()]
    assert np.round(b, 4).tolist() == [0.5719, 0.5286, 0.482, 0.4802, 0.4535]
    assert [round(np.mean(accuracy[1:]), 3) for accuracy in paper.ACCURACY.values()] == [
        0.686,
        0.608,
        0.588,
        0.568,
    ]


# -- the whole ---------------------------------------------------------------------------------------------


def in_this_process(tasks, num_workers, overall):
    """Steps one after the other: a process of its own loads torch for seconds."""
    for task in tasks.values():
        task.function(task.config)


def run_small(folder, model, patch, *more):
    arguments = ["--smoke", "--model_name_or_path", model, "--runs_dir", folder, "--workers", "1", *more]
    patch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    run.main()


@pytest.fixture(scope="module")
def small_run(tiny_chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_tasks", in_this_process)
        run_small(folder, tiny_chat_model, patch, "--use_peft", USE_PEFT)
    return folder


def test_the_whole_in_small(small_run):
    page = (small_run / "results/results.md").read_text()
    assert "Figure 5" in page
    assert "Table 1" in page
    assert "Not run yet" not in page
    for name, ours in (("imdb", "positive"), ("psoups", "elementary")):
        with (small_run / f"results/{name}.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row["majority"] == ours
        assert row["ratio"] == "10"
        assert row["prompts"] == "3"
        for key, value in row.items():
            if f"{key} low" in row:
                assert float(row[f"{key} low"]) <= float(value) + 1e-6 or row[f"{key} low"] == "nan", key
        ranking = json.loads(next(small_run.glob(f"{name}/seed-0/*/ranking/ranking.json")).read_text())
        assert len(ranking["right"]) == len(ranking["users"]) == 10
        assert sorted(ranking["groups"]) == [0] * 4 + [1]
        total = np.mean(
            [np.mean(np.array(ranking["right"])[np.array(ranking["users"]) == u]) for u in range(5)]
        )
        assert float(row["single's accuracy, total"]) == pytest.approx(total, abs=1e-5)


def test_the_true_groups_only_score(small_run):
    """The mixture is the same for other names in the group column, which evaluation alone reads."""
    for path in small_run.rglob("config.yaml"):
        text = path.read_text()
        assert "use_true_groups: true" not in text
    rows = pairs.read_rows(next(small_run.rglob("labels/preferences.jsonl")))
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "user_id", "group"}


def test_a_finished_run_is_not_done_again(small_run, tiny_chat_model, monkeypatch):
    marks = {path: path.stat().st_mtime_ns for path in small_run.rglob("done.json")}
    assert len(marks) == 2 * (2 + 7)
    monkeypatch.setattr(run, "run_tasks", in_this_process)
    text = (small_run / "results/results.md").read_text()
    run_small(small_run, tiny_chat_model, monkeypatch, "--use_peft", USE_PEFT)
    assert {path: path.stat().st_mtime_ns for path in small_run.rglob("done.json")} == marks
    assert (small_run / "results/results.md").read_text() == text


def test_parts_that_no_recipe_has_are_one_line(tiny_chat_model, tmp_path, monkeypatch, capsys):
    def main():
        run_small(tmp_path, tiny_chat_model, monkeypatch, "--use_peft", USE_PEFT, "--tastes", "sour")

    assert exit_code("smollm", main) == 2
    assert "none of the recipes has these tastes" in capsys.readouterr().err


def test_two_seeds_are_one_cell(small_run):
    found = [
        stages.Run("film", 10.0, seed, next(small_run.glob("imdb/seed-0/film-10-1")), ()) for seed in (0, 1)
    ]
    (cell,) = results.cells_of(found).values()
    one, two = results.cell_row(cell[:1]), results.cell_row(cell)
    assert (one["seeds"], two["seeds"]) == (1, 2)
    assert two["single's accuracy, total"] == pytest.approx(one["single's accuracy, total"])
    assert two["single majority wins"] == pytest.approx(one["single majority wins"])
    assert two["K found"] == f"{one['K found']} {one['K found']}"


@pytest.mark.slow
def test_the_real_model_in_small(tmp_path, monkeypatch):
    """Downloads 93 MB, and takes minutes and 9 GB."""
    pytest.importorskip("gguf")
    model = sys.modules["smollm2"].make(tmp_path / "smollm2")
    run_small(tmp_path / "runs", model, monkeypatch, "--use_peft", USE_PEFT)
    assert "Not run yet" not in (tmp_path / "runs/results/results.md").read_text()
