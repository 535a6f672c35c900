"""What groups want: features, pairs and items, the heads behind them, and users without names."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.special import expit

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.clustering.assignment import assign_users
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.heads import FeatureMap, load_heads
from torchrl_maxmin.clustering.items import item_pairs_of_texts, item_ranks
from torchrl_maxmin.clustering.selection import SEARCH, searched_choices
from torchrl_maxmin.clustering.wants import (
    PairContents,
    feature_contrasts,
    ordered_features,
    what_groups_want,
)
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.tables import read_csv
from torchrl_maxmin.diagnosis.analysis import diagnose
from torchrl_maxmin.diagnosis.figures import Fitter, jackknife_error
from torchrl_maxmin.diagnosis.stage import DiagnoseConfig, run_diagnose
from torchrl_maxmin.rewards import read_groups

QUICK = {"l2": [1e-3], "num_jackknife": 3, "num_bootstrap": 0, "num_groups": 2, "device": "cpu"}


def planted(seed, users, pairs, features, tastes, size=3.0):
    """Two tastes on one feature each, 60:40; and who has which."""
    rng = np.random.default_rng(seed)
    groups = (np.arange(users) >= 0.6 * users).astype(int)
    x = rng.normal(size=(users * pairs, features)).astype(np.float32)
    row_user = np.repeat(np.arange(users), pairs)
    margin = size * x[np.arange(len(x)), np.array(tastes)[groups[row_user]]]
    return x * np.where(rng.random(len(x)) < expit(margin), 1, -1)[:, None].astype(np.float32), groups


@pytest.mark.parametrize("seed", range(20))
def test_planted_features_are_named_first(seed):
    """Each group weighs its own feature more, and the other's less; nothing else is told apart as surely."""
    tastes = np.random.default_rng(100 + seed).choice(64, 2, replace=False).tolist()
    x, groups = planted(seed, 300, 20, 64, tastes)
    x, features = torch.from_numpy(x), FeatureMap.of(torch.from_numpy(x))
    choices = searched_choices(PairChoices(x, torch.arange(301) * 20), features)
    fitter = Fitter({1: 1e-3, 2: 1e-3}, seed, SEARCH)
    mixture = fitter(choices, 2)
    assert np.mean(mixture.assignments.numpy() == groups) > 0.95

    def measure(pairs, *fits):
        return {"contrast": feature_contrasts(fits[0], features)}

    errors = jackknife_error(choices, mixture, fitter, measure, 10)
    shown = PairContents(feature_names=[f"feature {j}" for j in range(64)])
    given = choices.differences, np.arange(len(x)), mixture, features, shown, None
    for k, wants in enumerate(what_groups_want(*given, errors["contrast"], 10)):
        first = wants["features"][:2]
        assert {entry["feature"] for entry in first} == {f"feature {j}" for j in tastes}
        assert all(entry["told_apart"] for entry in first)
        signs = {entry["feature"]: np.sign(entry["difference"]) for entry in first}
        assert signs == {f"feature {tastes[k]}": 1, f"feature {tastes[1 - k]}": -1}


def test_a_surer_difference_comes_before_a_larger_one():
    weight = np.array([[2.0, 1.0, 0.1], [0.0, 0.0, 0.0]])
    error = np.array([[4.0, 0.1, 0.1]] * 2)
    found = ordered_features(weight, weight, error, ["noisy", "sure", "none"], 10)[0]
    assert [entry["feature"] for entry in found] == ["sure", "none", "noisy"]
    assert [entry["told_apart"] for entry in found] == [True, False, False]
    alone = ordered_features(weight, weight, None, ["noisy", "sure", "none"], 0)[0]
    assert [(entry["feature"], entry["low"]) for entry in alone] == [
        ("noisy", None),
        ("sure", None),
        ("none", None),
    ]


@pytest.fixture
def arrays():
    x, groups = planted(0, 40, 15, 3, (0, 1), size=4.0)
    users = np.repeat([f"person{u}@example.org" for u in range(40)], 15)
    return {
        "differences": x,
        "users": users,
        "feature_names": np.array(["short|er", "kinder", "third"]),
    }, groups


def run(tmp_path, arrays, name="out", **settings):
    path = tmp_path / f"{name}.npz"
    np.savez(path, **arrays)
    return run_diagnose(DiagnoseConfig(str(path), str(tmp_path / name), **{**QUICK, **settings}))


def test_heads_assign_new_users(tmp_path, arrays):
    content, _ = arrays
    folder = run(tmp_path, content)
    heads = load_heads(folder)
    assert heads.feature_names == content["feature_names"].tolist()
    new, theirs = planted(7, 40, 15, 3, (0, 1), size=4.0)
    found = assign_users(heads.mixture, heads.standardised(torch.from_numpy(new)), torch.arange(41) * 15)
    assert np.mean(found.groups.numpy() == theirs) > 0.9
    users = list(csv.DictReader((folder / "users.csv").open()))
    own = assign_users(
        heads.mixture, heads.standardised(torch.from_numpy(content["differences"])), torch.arange(41) * 15
    )
    assert sorted(int(user["group"]) for user in users) == sorted(own.groups.tolist())
    (folder / "heads.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read heads"):
        load_heads(folder)


def test_the_report_names_features_and_no_user(tmp_path, arrays):
    content, _ = arrays
    folder = run(tmp_path, content)
    report = (folder / "report.md").read_text()
    assert "## What each group wants" in report
    assert "short\\|er" in report
    assert "chosen of row" in report
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".csv", ".json", ".yaml"):
            assert "example.org" not in path.read_text()
    text = report
    (folder / "report.md").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_text() == text


def test_pseudonyms_are_undone_by_the_flag_alone(tmp_path, arrays):
    content, _ = arrays
    hidden, shown = run(tmp_path, content), run(tmp_path, content, "shown", show_user_ids=True)
    assert not (hidden / "user_ids.csv").exists()
    ids = {row["user"]: row["pseudonym"] for row in read_csv(shown / "user_ids.csv")}
    there = read_groups(hidden / "users.csv")
    assert list(there) == [f"user {n + 1}" for n in range(40)]
    named = read_groups(shown / "users.csv")
    assert set(named) == set(content["users"])
    assert {ids[user]: row for user, row in named.items()} == there
    assert [ids[user] for user in named] != list(there)  # not the order of the data


def test_one_hot_features_are_items():
    """Two groups rank five items in opposite order."""
    rng = np.random.default_rng(0)
    users, pairs = 60, 20
    sides = np.array([rng.choice(5, 2, replace=False) for _ in range(users * pairs)])
    x = np.eye(5)[sides[:, 0]] - np.eye(5)[sides[:, 1]]
    scores = np.array([[2.0, 1, 0, -1, -2], [-2.0, -1, 0, 1, 2]])[
        np.repeat(np.arange(users) >= 40, pairs) * 1
    ]
    x *= np.where(rng.random(len(x)) < expit((scores * x).sum(1)), 1, -1)[:, None]
    names = ["tuna", "eel", "egg", "squid", "<b>roe</b>"]
    contents = PairContents(feature_names=names)
    settings = {"l2_candidates": (1e-3,), "num_bootstrap": 0, "num_jackknife": 0, "num_groups": 2}
    found = diagnose(torch.from_numpy(x), torch.arange(61) * 20, contents=contents, **settings)
    first, second = (group["wants"] for group in found.summary["groups"])
    assert [entry["item"] for entry in first["items"]] == names
    assert [entry["item"] for entry in second["items"]] == names[::-1]
    assert first["items"][0]["difference"] == 4
    top = first["pairs"][0]
    assert (top["preferred"], top["other"]) == ("tuna", "<b>roe</b>")
    assert top["group"] > 0.9 > 0.1 > top["others"]


def test_texts_that_do_not_repeat_are_no_items():
    texts = [f"text {i}" for i in range(40)]
    assert item_pairs_of_texts(texts[:20], texts[20:], np.arange(20)) is None


def test_items_of_some_pairs_keep_the_order_of_these():
    chosen, rejected = ["a", "b", "c", "x"] * 15, ["b", "c", "a", "y"] * 15
    rows = np.array([row for row in range(60) if row % 4 != 3])
    found = item_pairs_of_texts(chosen, rejected, rows)
    assert found.items == [0, 1, 3]  # both sides of pair 0, the rejected one of pair 1
    margins = np.tile([[1.0, -1.0], [1.0, -1.0], [-2.0, 2.0]], (15, 1))
    ranked = item_ranks(margins, np.log([0.5, 0.5]), found)
    assert [entry["item"] for entry in ranked[0]] == [0, 1, 3]
    assert [entry["item"] for entry in ranked[1]] == [3, 1, 0]


def test_texts_are_shown_escaped(tmp_path, tiny_model):
    """Groups differ on short against long texts; what people wrote is no markup in the report."""
    rng, rows = np.random.default_rng(0), []
    for user in range(30):
        for pair in range(8):
            long = f"<script>alert({user})</script> | a very long | text {pair} " + "word " * 12
            short = f"[no](http://x.y) {rng.integers(1000)}"
            chosen, rejected = (short, long) if user < 10 else (long, short)
            rows.append(
                {"prompt": f"# film {pair}", "chosen": chosen, "rejected": rejected, "user_id": f"u{user}"}
            )
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**QUICK, "l2": [0.1], "num_jackknife": 0}
    folder = run_diagnose(DiagnoseConfig(str(path), str(tmp_path / "out"), tiny_model, **settings))
    summary = json.loads((folder / "summary.json").read_text())
    wants = summary["groups"][1]["wants"]
    assert wants["features"] is None
    assert len(wants["pairs"]) == 5
    assert all(entry["preferred"].startswith("[no]") for entry in wants["pairs"])
    assert len({entry["other"] for entry in wants["pairs"]}) == 5
    report = (folder / "report.md").read_text()
    assert "&lt;script&gt;" in report
    assert "<script>" not in report
    assert "http://x.y" not in report
    lines = [line for line in report.splitlines() if "&lt;script" in line]
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    heads = load_heads(folder)
    assert (heads.feature_names, heads.origin) == (None, {"model": tiny_model})
