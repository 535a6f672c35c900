"""Groups described by columns of the user's own."""

import csv
import json

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.diagnosis.describing import describe_groups, permutation_p
from torchrl_maxmin.diagnosis.stage import DiagnoseConfig, run_diagnose
from torchrl_maxmin.preferences import PreferenceDataset

SETTINGS = {"l2": [1e-3], "num_jackknife": 0, "num_bootstrap": 0, "num_groups": 2, "device": "cpu"}


def independent_column(kind, rng, users):
    if kind == "numbers":
        return [f"{value:.3f}" for value in rng.normal(size=users)]
    levels = {"two": 2, "five": 5, "many": 30}[kind]
    return [f"level {value}" for value in rng.integers(levels, size=users)]


@pytest.mark.parametrize("kind", ["two", "five", "many", "numbers"])
def test_independent_columns_are_rarely_related(kind):
    """200 columns alone, and in families of four under Holm: at most one in twenty, but for chance."""
    rng = np.random.default_rng(0)
    groups = rng.choice(3, size=60, p=[0.5, 0.3, 0.2]).tolist()
    columns = {f"c{i}": independent_column(kind, rng, 60) for i in range(200)}
    found = describe_groups(columns, groups, 3)["columns"]
    hits = sum(entry["p"] < 0.05 for entry in found.values())
    assert hits <= stats.binom.ppf(0.999, 200, 0.05)
    families = [[found[f"c{i + j}"]["p"] for j in range(4)] for i in range(0, 200, 4)]
    assert sum(min(ps) * 4 < 0.05 for ps in families) <= stats.binom.ppf(0.999, 50, 0.05)
    if kind != "two":  # Fisher's exact test of few users is conservative
        assert hits >= stats.binom.ppf(0.001, 200, 0.05)
    assert not any(entry["related"] for entry in found.values())


def test_a_planted_column_is_related():
    rng = np.random.default_rng(0)
    groups = rng.integers(2, size=100)
    age = [f"{value:.1f}" for value in rng.normal(30 + 10 * groups, 8)]
    region = ["north" if rng.random() < (0.7, 0.2)[k] else "south" for k in groups]
    noise = [str(value) for value in rng.integers(3, size=100)]
    found = describe_groups({"age": age, "region": region, "noise": noise}, groups, 2)["columns"]
    assert [found[name]["related"] for name in found] == [True, True, False]
    assert found["age"]["kind"] == "numbers"
    first, second = (group["mean"] for group in found["age"]["groups"])
    assert first["low"] < 30 < first["high"] < second["low"] < 40 < second["high"]
    share = found["region"]["groups"][0]["levels"]["north"]
    assert share["low"] < 0.7 < share["high"]


def test_permuted_tables_agree_with_chi_square():
    table = np.array([[30, 20, 10], [20, 30, 20], [15, 20, 25]])
    p, exact = permutation_p(table, np.random.default_rng(0))
    assert not exact
    assert p == pytest.approx(stats.chi2_contingency(table).pvalue, abs=0.01)


def test_numbers_agree_with_kruskal_wallis():
    rng = np.random.default_rng(1)
    groups, numbers = rng.integers(3, size=120), rng.integers(40, size=120)
    numbers += 4 * (groups == 1)
    found = describe_groups({"n": [str(n) for n in numbers]}, groups, 3)["columns"]["n"]
    expected = stats.kruskal(*(numbers[groups == k] for k in range(3))).pvalue
    assert found["p"] == pytest.approx(expected, abs=0.015)


def test_nothing_to_test_is_said():
    found = describe_groups({"all": ["x"] * 4, "none": [None] * 4}, [0, 0, 1, 1], 2)["columns"]
    assert [entry["p"] for entry in found.values()] == [None, None]
    assert found["none"]["missing"] == 4
    one = describe_groups({"sex": ["f", "m"]}, [0, 0], 1)["columns"]["sex"]
    assert one["p"] is None


def test_rare_levels_are_put_together():
    values = [f"v{i}" for i in range(12) for _ in range(12 - i)]
    found = describe_groups({"c": values}, [0, 1] * (len(values) // 2), 2)["columns"]["c"]
    assert list(found["groups"][0]["levels"]) == [*(f"v{i}" for i in range(7)), "other"]
    assert sum(level["mean"] for level in found["groups"][0]["levels"].values()) == pytest.approx(1)


@pytest.fixture
def arrays():
    rng, users, pairs = np.random.default_rng(0), 40, 15
    groups = (np.arange(users) >= 25).astype(int)
    x, row_user = rng.normal(size=(users * pairs, 3)), np.repeat(np.arange(users), pairs)
    x *= np.where(rng.random(len(x)) < expit(4 * x[np.arange(len(x)), groups[row_user]]), 1, -1)[:, None]
    sex = np.where(groups == 1, "w", "m")
    return {"differences": x, "users": row_user, "sex": sex, "age": rng.normal(40, 9, users * pairs)}


def test_arrays_of_users_and_of_pairs(tmp_path, arrays, capsys):
    np.savez(tmp_path / "pairs.npz", **arrays)
    config = DiagnoseConfig(
        str(tmp_path / "pairs.npz"), str(tmp_path / "out"), describe_columns=["sex", "age"], **SETTINGS
    )
    folder = run_diagnose(config)
    found = json.loads((folder / "summary.json").read_text())["describing"]["columns"]
    assert (found["sex"]["related"], found["sex"]["test"]) == (True, "Fisher, exact")
    assert found["age"]["related"] is False
    assert "'age': 40 of 40 users have several values" in " ".join(capsys.readouterr().err.split())
    report = (folder / "report.md").read_text()
    assert "This describes the groups and does not explain them" in report
    assert "- sex: related to the groups" in report


def test_columns_are_not_tested_against_groups_that_are_not_established(tmp_path, arrays):
    """Everybody answers at random, and the column is made to follow the groups that are found."""
    arrays["differences"] = np.random.default_rng(1).normal(size=arrays["differences"].shape)
    settings = {**SETTINGS, "show_user_ids": True}
    np.savez(tmp_path / "pairs.npz", **arrays)
    first = run_diagnose(DiagnoseConfig(str(tmp_path / "pairs.npz"), str(tmp_path / "first"), **settings))
    with (first / "users.csv").open() as file:
        group = {int(row["user"]): row["group"] for row in csv.DictReader(file)}
    told = np.array([f"in {group[user]}" for user in arrays["users"].tolist()])
    np.savez(tmp_path / "told.npz", **arrays | {"told": told})
    config = DiagnoseConfig(
        str(tmp_path / "told.npz"), str(tmp_path / "out"), describe_columns=["told"], **settings
    )
    folder = run_diagnose(config)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["established"] is False
    found = summary["describing"]["columns"]["told"]
    assert (found["p"], found["related"]) == (None, None)
    assert [entry["levels"]["in 0"]["mean"] for entry in found["groups"]] == [1.0, 0.0]
    report = (folder / "report.md").read_text()
    assert "- told: not tested, as the groups are not established" in report
    assert "related to the groups (p" not in report


def test_an_array_that_is_not_there_is_one_line(tmp_path, arrays):
    np.savez(tmp_path / "pairs.npz", **arrays)
    settings = {**SETTINGS, "describe_columns": ["region"]}
    with pytest.raises(UserError, match="no array 'region' to describe users by"):
        run_diagnose(DiagnoseConfig(str(tmp_path / "pairs.npz"), str(tmp_path / "out"), **settings))


def test_a_column_of_texts_by_user(tmp_path):
    rows = [
        {"prompt": "p", "chosen": f"a{i}", "rejected": "b", "user_id": f"u{i % 3}", "age": age}
        for i, age in enumerate([20, 30, None, 20, 30, None, 21, 30, None])
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataset.load(str(path), describe_columns=["age"])
    assert [None if v is None else float(v) for v in data.user_values("age")] == [20, 30, None]
    assert "age" not in data.ignored_columns
    assert any("1 of 3 users have several values" in note for note in data.origin.notes)
    with pytest.raises(UserError, match="needs the column"):
        PreferenceDataset.load(str(path), describe_columns=["sex"])
