"""The simulated people of reproductions/people: they do what the formulas say, and are diagnosed."""

import json
from functools import partial
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.stats import chisquare
from scripts import load_script

from torchrl_maxmin.clustering.judged import judged_choices
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.diagnosis.figures import Fitter, misassignment
from torchrl_maxmin.preferences import PreferenceDataset

worlds = load_script("people/people_worlds.py")
people = load_script("people/run.py")
cells = people.sys.modules["people_cells"]

KINDS = ("rankings", "best_of", "pairs", "ratings")


def test_shares_are_those_asked_for():
    world = worlds.tastes(3, shares=(5, 3, 2), num_users=200)
    assert world.shares.tolist() == [0.5, 0.3, 0.2]
    assert worlds.six_tastes(1000).shares == pytest.approx(worlds.SIX_SHARES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_world(kind):
    settings = {"kind": kind, "num_users": 20, "judgements": 5, "num_shown": 4, "features": "text"}
    first, again, other = (worlds.tastes(2, **settings, seed=seed) for seed in (1, 1, 2))
    assert (first.items == again.items).all()
    assert (first.features == again.features).all()
    assert not np.array_equal(first.items, other.items)


def test_rankings_follow_plackett_and_luce():
    world = worlds.tastes(1, num_users=20_000, num_items=3, num_shown=3)
    utilities, orders = world.taste_utilities[0], world.items.reshape(-1, 3)
    found, expected = [], []
    for order in permutations(range(3)):
        worth = np.exp(utilities[list(order)])
        expected.append(worth[0] / worth.sum() * worth[1] / worth[1:].sum())
        found.append((orders == order).all(1).sum())
    assert chisquare(found, np.array(expected) * len(orders)).pvalue > 0.001


def test_the_best_of_some_follows_luce():
    world = worlds.tastes(1, kind="best_of", num_users=20_000, num_items=4, num_shown=4)
    first = world.items[world.judgement_offsets[:-1]]
    worth = np.exp(world.taste_utilities[0])
    assert chisquare(np.bincount(first, minlength=4), worth / worth.sum() * 20_000).pvalue > 0.001


def test_ratings_are_utilities_cut_at_the_users_own_thresholds():
    world = worlds.tastes(2, kind="ratings", num_users=1500, num_items=40, judgements=40, noise=0.5)
    assert (np.diff(world.thresholds, axis=1) > 0).all()
    assert len(np.unique(world.thresholds[:, 0])) == world.num_users
    users = world.judgement_users[world.item_judgements]
    margins = world.thresholds[users] - world.utilities[users, world.items][:, None]
    below = np.exp(-np.exp(-margins))  # the Gumbel distribution
    rated_below = world.levels[:, None] > np.array([3, 2, 1, 0])  # level 0 is a rating of 5
    for cut in range(4):
        z = (rated_below[:, cut] - below[:, cut]).sum() / np.sqrt((below * (1 - below))[:, cut].sum())
        assert abs(z) < 4


def test_noisier_users_are_noisier():
    world = worlds.unequal_noise(half_random=True, kind="pairs", judgements=50, num_users=400)
    best = world.taste_utilities[0][world.items].reshape(-1, 2)
    right = (best[:, 0] > best[:, 1]).reshape(400, 50).mean(1)
    assert right[world.precision < 1].mean() < 0.56 < 0.7 < right[world.precision == 1].mean()


def test_labels_without_a_taste_are_even():
    world = worlds.random_labels(kind="best_of", num_shown=4, num_users=5000, num_items=4)
    first = world.items[world.judgement_offsets[:-1]]
    assert chisquare(np.bincount(first, minlength=4)).pvalue > 0.001


def test_a_spectrum_has_no_groups():
    world = worlds.spectrum(shape="line", num_users=500)
    assert (world.true_groups == -1).all()
    assert np.linalg.matrix_rank(world.utilities) == 2
    assert np.linalg.matrix_rank(worlds.spectrum(num_users=500).utilities) == 4
    with pytest.raises(ValueError, match="no groups"):
        world.posterior()


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_posterior_is_calibrated(kind):
    world = worlds.tastes(3, kind=kind, judgements=3 if kind == "rankings" else 12, strength=0.7, num_shown=4)
    posterior = world.posterior()
    expected = 1 - posterior.max(1).mean()
    wrong = (posterior.argmax(1) != world.true_groups).mean()
    assert expected > 0.01
    assert abs(wrong - expected) < 4 * np.sqrt(expected / world.num_users)


def test_six_tastes_are_as_hard_to_tell_apart_as_the_notes_say():
    world = worlds.six_tastes(4000)
    assert (world.posterior().argmax(1) != world.true_groups).mean() == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_choice_have_one_chosen_item(kind):
    world = worlds.tastes(2, kind=kind, num_users=30, judgements=6, num_shown=4, num_items=12)
    rows = world.rows()
    assert (np.diff(rows.users) >= 0).all()
    assert (np.diff(rows.choice_ids) >= 0).all()
    chosen, other = rows.differences.argmax(1), rows.differences.argmin(1)
    for choice in range(rows.choice_ids[-1] + 1):
        mine = rows.choice_ids == choice
        assert len(set(chosen[mine])) == len(set(rows.users[mine])) == len(set(rows.judgement_ids[mine])) == 1
        assert len(set(other[mine])) == mine.sum()
    sizes = np.bincount(rows.choice_ids)
    expected = {"rankings": [3, 2, 1] * 180, "best_of": [3] * 180, "pairs": [1] * 180}
    assert kind not in expected or sizes.tolist() == expected[kind]


def test_ratings_are_dealt_into_rankings_and_each_counts_once():
    world = worlds.tastes(2, kind="ratings", num_users=30, judgements=None, num_items=60)
    entries, offsets = worlds.strict_rankings(world.judgement_offsets, world.levels, np.random.default_rng(0))
    assert len(set(entries)) == len(entries)
    users = world.judgement_users[world.item_judgements[entries]]
    for start, stop in pairwise(offsets):
        assert len(set(users[start:stop])) == 1
        levels = world.levels[entries[start:stop]]
        assert (np.diff(levels) > 0).all()
        assert 2 <= len(levels) <= 5
    for user in range(30):  # what is left over has one level
        mine = world.item_judgements == user
        left = np.setdiff1d(np.flatnonzero(mine), entries)
        assert len(set(world.levels[left])) <= 1
    rows = world.rows()
    assert len(np.unique(rows.choice_ids)) == len(entries) - (len(offsets) - 1)
    assert rows.judgement_ids[-1] == len(offsets) - 2


@pytest.mark.parametrize("kind", ["rankings", "best_of", "pairs"])
def test_the_file_holds_the_same_judgements(kind, tmp_path):
    world = worlds.tastes(2, kind=kind, num_users=12, judgements=5, num_shown=4, num_items=9)
    data = PreferenceDataset.load(world.write(tmp_path / "people.jsonl"))
    rows = world.rows()
    read = {
        (f"u{u}", *(world.names[i] for i in pair)) for u, pair in zip(rows.users, _pairs(rows), strict=True)
    }
    users = [data.user_ids[u] for u in data.row_users.tolist()]
    assert set(zip(users, data.chosen, data.rejected, strict=True)) == read
    assert len(data) == len(rows.users)


def _pairs(rows):
    return zip(rows.differences.argmax(1).tolist(), rows.differences.argmin(1).tolist(), strict=True)


def test_ratings_are_a_table_and_arrays_have_names(tmp_path):
    world = worlds.tastes(2, kind="ratings", num_users=3, judgements=None, num_items=9)
    lines = world.write(tmp_path / "ratings.csv").read_text().splitlines()
    assert lines[0] == "user_id,item,rating,region,handedness"
    ratings = [line.split(",")[2] for line in lines[1:]]
    assert len(ratings) == len(world.items)
    assert set(ratings) <= set("12345")
    with np.load(world.write_arrays(tmp_path / "people.npz")) as arrays:
        assert arrays["feature_names"].tolist() == world.names
        assert len(arrays["groups"]) == len(arrays["differences"]) == len(arrays["choice_ids"])
    with pytest.raises(ValueError, match="not written as"):
        world.write(tmp_path / "ratings.jsonl")


def test_a_column_that_is_independent_and_one_that_is_not():
    world = worlds.tastes(2, num_users=2000)
    region = np.array(world.user_columns["region"]) == "region 0"
    left = np.array(world.user_columns["handedness"]) == "left"
    groups = world.true_groups == 0
    assert region[groups].mean() > region[~groups].mean() + 0.4
    assert abs(left[groups].mean() - left[~groups].mean()) < 0.1


# -- run.py ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rankings", "pairs"])
def test_a_seed_is_read_diagnosed_and_held_against_the_truth(kind, tmp_path, monkeypatch):
    shown = {"num_shown": 6, "judgements": 3} if kind == "rankings" else {"judgements": 20}
    tiny = cells.Cell(
        "Tiny",
        partial(worlds.tastes, 2, kind=kind, num_users=40, num_items=8, strength=2.0, **shown),
        2,
        (cells.Claim("K = 2", lambda row: row["num_groups"] == 2, 1),),
        seeds=1,
        max_groups=2,
    )
    monkeypatch.setitem(cells.CELLS, "tiny", tiny)
    folder = tmp_path / "tiny" / "seed-0"
    cells.measure(cells.Run("tiny", 0, folder, {"l2_candidates": (1e-2,), "num_folds": 2}))
    row = json.loads((folder / "row.json").read_text())
    assert (row["users"], row["num_groups"]) == (40, 2)
    assert row["adjusted_rand_index"] > 0.8
    assert row["balanced_accuracy"] > 0.95
    assert row["least_misassignment"] <= row["true_misassignment"] + 0.05 < 0.15
    assert [path.name for path in folder.iterdir()] == ["row.json"]


def test_worlds_of_all_cells_can_be_drawn():
    for name, cell in cells.CELLS.items():
        if name.endswith("-1000") or name in ("two", "six"):
            continue  # the same with more users
        world = cell.world(seed=0)
        assert {None: 1}.get(cell.truth, cell.truth) == len(set(world.true_groups.tolist())), name


def row_of(cell, seed, **figures):
    return {"cell": cell, "seed": seed, "users": 100, "pairs": 4500, "seconds": 1.5, **figures}


def test_tables_count_what_is_right_and_keep_earlier_cells(tmp_path):
    one = [row_of("one-pairs-items-100", seed, num_groups=1 + (seed == 3)) for seed in range(20)]
    three = [row_of("three", 0, truth=3, num_groups=3, established=seed > 0) for seed in (0, 1)]
    people.write_csv(tmp_path / "results.csv", one)
    before = people.read_rows(tmp_path / "results.csv")
    assert before == one
    lines = people.merged([*before, three[0]], [three[1]])
    assert lines == [*one, three[1]]
    text = "\n".join(people.tables(lines))
    assert "| K = 1 | 19 of 20 (19 of 20 needed) | 1 (19), 2 (1) |" in text
    assert "| K = 3, established | 1 of 1 (10 of 10 needed) | 3 (1) | 1 of 1 |" in text


@pytest.mark.parametrize(
    ("figures", "right"),
    [
        ({"num_groups": 1, "established": None}, True),
        ({"num_groups": 2, "established": False}, True),
        ({"num_groups": 2, "established": True}, False),
        ({"num_groups": 2, "established": None}, False),
    ],
)
def test_nothing_is_claimed_without_truth(figures, right):
    (claim,) = cells.CELLS["random-pairs"].claims
    assert claim.right(figures) is right


def test_expected_misassignment_is_held_against_the_true_one():
    figures = {"num_groups": 7, "expected_misassignment": 0.15, "true_misassignment": 0.171}
    assert [claim.right(figures) for claim in cells.CELLS["six"].claims] == [True, False]


def test_six_tastes_are_found_where_most_starts_at_random_miss_them(tmp_path):
    world = worlds.six_tastes(seed=3)
    data, differences = cells._read(world, tmp_path)
    users = [int(user[1:]) for user in data.user_ids]
    given = (differences, data.user_offsets, None, data.judgement_ids, data.choice_offsets)
    choices = judged_choices(*given)[0].find_distinct()
    fitter = Fitter({6: 1e-4}, 0, {"m_step": "exact", "num_restarts": 4, "convergence_tolerance": 1e-4})
    found = fitter(choices, 6).assignments.numpy(), world.posterior()[users].argmax(1)
    wrong, least = (cells._misassignment(groups, world.true_groups[users]) for groups in found)
    assert wrong == pytest.approx(least, abs=0.02)


def test_misassignment_is_expected_of_the_groups_that_were_found(tmp_path):
    """Fits of six tastes without some of the users, begun at random, end in other groups than the whole's."""
    world = worlds.six_tastes(seed=2)
    data, differences = cells._read(world, tmp_path)
    truth = world.true_groups[[int(user[1:]) for user in data.user_ids]]
    given = (differences, data.user_offsets, None, data.judgement_ids, data.choice_offsets)
    choices = judged_choices(*given)[0].find_distinct()
    fitter = Fitter({6: 1e-4}, 0, {"m_step": "exact", "num_restarts": 4, "convergence_tolerance": 1e-4})
    mixture = fitter(choices, 6)
    wrong = cells._misassignment(mixture.assignments.numpy(), truth)
    assert misassignment(choices, mixture, fitter, 4)["plain"] == pytest.approx(wrong, abs=0.02)


def test_cells_are_chosen_by_name_and_by_whether_they_must_show():
    assert people.choose_cells(["three", "two"], False) == ["two", "three"]
    assert all(name.startswith("stand-in-") for name in people.choose_cells(["*"], False))
    shown = people.choose_cells(["*"], True)
    assert len(shown) == 33
    assert all(cells.CELLS[name].must_show for name in shown)
    with pytest.raises(UserError, match="no cell on-"):
        people.choose_cells(["on-*"], True)
    with pytest.raises(UserError, match="leave --must_show out"):
        people.choose_cells(["stand-in-pairs-1"], True)


def test_a_cell_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    def done(run):
        run.folder.mkdir(parents=True)
        row = row_of(run.cell, run.seed, num_groups=2, established=True)
        (run.folder / "row.json").write_text(json.dumps(row))

    def here(tasks, workers, overall):
        started.extend(tasks)
        for task in tasks.values():
            task.function(task.config)

    started: list[str] = []
    monkeypatch.setattr(people, "measure", done)
    monkeypatch.setattr(people, "run_tasks", here)
    assert [row["seed"] for row in people.run_cells(["three"], 2, tmp_path, 2)] == [0, 1]
    assert len(people.run_cells(["three"], 3, tmp_path, 2)) == 3
    assert started == ["three 0/run", "three 1/run", "three 2/run"]
