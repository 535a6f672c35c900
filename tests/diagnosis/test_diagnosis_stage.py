"""The diagnose stage on arrays and on texts, and what it says of bad input."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import yaml
from scipy.special import expit

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.cli.parsing import parse_config
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.diagnosis.stage import DiagnoseConfig, run_diagnose
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards.pairs import feature_choices
from torchrl_maxmin.rewards.start import linear_warm_start

QUICK = {"l2": [1e-3], "num_jackknife": 2, "num_bootstrap": 2, "max_groups": 2, "device": "cpu"}


def planted(users=40, pairs=12, features=4, minority=10):
    rng = np.random.default_rng(0)
    groups = np.where(np.arange(users) < minority, 1, 0)
    x = rng.normal(size=(users * pairs, features))
    row_user = rng.permutation(np.repeat(np.arange(users), pairs))  # rows in any order
    margin = 4 * x[np.arange(len(x)), groups[row_user]]
    x *= np.where(rng.random(len(x)) < expit(margin), 1, -1)[:, None]
    return x, row_user, groups


def read(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    x, users, groups = planted()
    names = np.array([f"user {u}" for u in range(40)])
    return {"differences": x, "users": names[users], "groups": groups[users]}


@pytest.fixture
def make(tmp_path):
    def make(content=None, name="pairs.npz", **settings):
        path = tmp_path / name
        if content is not None:
            np.savez(path, **content)
        fields = {"dataset_name": str(path), "output_dir": str(tmp_path / "out"), **QUICK, **settings}
        return DiagnoseConfig(**fields)

    return make


def test_arrays_to_a_report(make, arrays):
    config = make(arrays, show_user_ids=True)
    folder = run_diagnose(config)
    summary = read(folder)
    assert summary["num_groups"] == 2
    assert [group["users"] for group in summary["groups"]] == [30, 10]
    assert summary["recovery"] == {"true_groups": {"0": 30, "1": 10}, "adjusted_rand_index": 1.0}
    assert summary["verdict"] in (folder / "report.md").read_text()
    assert "of utility against its own best policy" in summary["verdict"]
    users = {row["user"]: row for row in csv.DictReader((folder / "users.csv").open())}
    assert {user for user, row in users.items() if row["group"] == "1"} == {f"user {u}" for u in range(10)}
    for row in users.values():
        assert float(row["responsibility_0"]) + float(row["responsibility_1"]) == pytest.approx(1, abs=1e-5)
    for name in ("diagnosis.png", "diagnosis.svg", "diagnosis.csv"):
        assert (folder / "figures" / name).stat().st_size > 0
    assert (folder / "groups.csv").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text()) == dataclasses.asdict(config)


def test_chosen_and_rejected_say_the_same(make, arrays, tmp_path):
    noise = np.random.default_rng(1).normal(size=arrays["differences"].shape)
    both = {"chosen": arrays["differences"] + noise, "rejected": noise, "users": arrays["users"]}
    one = read(run_diagnose(make(arrays, output_dir=str(tmp_path / "one"))))
    other = read(run_diagnose(make(both, output_dir=str(tmp_path / "other"))))
    assert other["recovery"] is None
    assert other["diversity"]["largest"] == pytest.approx(one["diversity"]["largest"], abs=1e-6)


def test_one_taste_for_all_says_one_reward_serves(make):
    x, users, _ = planted(minority=0)
    summary = read(run_diagnose(make({"differences": x, "users": users})))
    assert (summary["num_groups"], summary["diversity"]["largest"]) == (1, 0.0)
    assert summary["verdict"].startswith("One reward serves")


def test_the_report_verb_writes_a_diagnosis_again(make, arrays, capsys):
    folder = run_diagnose(make(arrays, num_groups=2))
    text = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_text() == text
    out = capsys.readouterr().out
    assert "gap, one reward" in out
    assert out.endswith(f"report: {folder / 'report.md'}\n")


def test_the_verb_prints_its_verdict_and_where_it_wrote(make, arrays, capsys):
    config = make(arrays)
    words = ["--dataset_name", config.dataset_name, "--output_dir", config.output_dir, "--l2", "1e-3"]
    quick = ["--num_jackknife", "0", "--num_bootstrap", "0", "--num_groups", "2"]
    assert main(["diagnose", *words, *quick]) == 0
    out, err = capsys.readouterr()
    assert out == f"diagnose done: {config.output_dir}\n"
    assert "gap, one reward" in err


def test_weights_reach_the_fit(make, arrays):
    """Every pair in both directions at one half says nothing of anybody."""
    doubled = {
        "differences": np.concatenate([arrays["differences"], -arrays["differences"]]),
        "users": np.concatenate([arrays["users"]] * 2),
        "weights": np.full(2 * len(arrays["users"]), 0.5),
    }
    summary = read(run_diagnose(make(doubled, num_groups=1)))
    assert summary["num_pairs"] == len(arrays["users"])
    gap = summary["groups"][0]["alignment_gap"]["single"]["mean"]
    assert gap == pytest.approx(0, abs=1e-9)
    assert summary["maxmin"]["utilities"] == pytest.approx([0.0], abs=1e-6)


@pytest.fixture
def texts(tmp_path):
    """20 users want the longer text, 10 the shorter one."""
    rng = np.random.default_rng(2)
    words = ["the", "film", "was", "good", "and", "very", "long", "but", "also", "bad", "end"]
    rows = []
    for user in range(30):
        for _ in range(8):
            long, short = (" ".join(rng.choice(words, n)) for n in (10, 2))
            chosen, rejected = (short, long) if user < 10 else (long, short)
            group = "short" if user < 10 else "long"
            row = {"prompt": "a film", "chosen": chosen, "rejected": rejected}
            rows.append(row | {"user_id": f"u{user}", "group": group})
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def compared(summary):
    """What must not depend on how often a pair was asked; names and rows of the file do."""
    groups = [{k: v for k, v in group.items() if k != "wants"} for group in summary["groups"]]
    summary = {**summary, "groups": groups}
    return {k: v for k, v in summary.items() if k not in ("repeated_pairs", "verdict")}


def test_repeated_rows_of_arrays_are_one_judgement(make):
    """Two tastes, each pair asked five times: as if it were asked once, and as unsure."""
    x, users, groups = planted(users=60, pairs=6, minority=20)
    arrays = {"differences": x, "users": users, "groups": groups[users]}
    five = {name: values.repeat(5, 0) for name, values in arrays.items()}
    five["feature_names"] = np.array(list("abcd"))
    stated = {**five, "judgement_ids": np.arange(len(x)).repeat(5)}
    found = {}
    for name, content in (("once", arrays), ("five", five), ("stated", stated)):
        settings = {"name": f"{name}.npz", "output_dir": str(make().output_dir) + name, "num_groups": 2}
        found[name] = read(run_diagnose(make(content, **settings, l2=[1.6e-2])))
    assert compared(found["five"]) == compared(found["stated"]) == compared(found["once"])
    assert [found[name]["repeated_pairs"] for name in found] == [0, 4 * 360, 4 * 360]
    assert found["five"]["num_pairs"] == 360
    assert found["five"]["restarts"]["starts"] == 4


def test_one_taste_in_repeated_rows_of_arrays(make, capsys):
    x, users, _ = planted(users=60, pairs=6, minority=0)
    folder = run_diagnose(make({"differences": x.repeat(5, 0), "users": users.repeat(5)}, max_groups=3))
    summary = read(folder)
    assert summary["num_groups"] == 1
    assert summary["misassignment"]["plain"] == 0
    told = "1,440 pairs repeat an earlier pair of the same user and count with it as one judgement."
    assert told in (folder / "report.md").read_text()
    assert told in " ".join(capsys.readouterr().err.split())


def test_stated_judgements_are_held_out_together_and_need_not_be_numbers(make, arrays):
    """Ids that say that every row is a judgement of its own change nothing."""
    plain = read(run_diagnose(make(arrays)))
    ids = np.array([f"judgement {i:03d}" for i in range(len(arrays["users"]))])
    stated = {**arrays, "judgement_ids": ids}
    other = make(stated, name="stated.npz", output_dir=str(make().output_dir) + "2")
    assert compared(read(run_diagnose(other))) == compared(plain)
    with pytest.raises(UserError, match="judgement_ids must be"):
        run_diagnose(
            make({**arrays, "judgement_ids": ids[:-1]}, name="short.npz", output_dir=f"{other.output_dir}3")
        )


@pytest.mark.parametrize("minority", [0, 15])
def test_repeated_texts_are_one_judgement(make, tmp_path, tiny_model, minority):
    """40 users judge six pairs of texts five times; some of them, if any, want the shorter text."""
    rng = np.random.default_rng(0)
    words = ["the", "film", "was", "good", "and", "very", "long", "but", "also", "bad", "end"]
    path, rows = tmp_path / "texts.jsonl", []
    for user in range(40):
        for pair in range(6):
            long, short = (" ".join(rng.choice(words, n)) for n in (10, 2))
            likes_short = (user < minority) ^ (rng.random() < 0.15)
            chosen, rejected = (short, long) if likes_short else (long, short)
            row = {"prompt": f"film {pair}", "chosen": chosen, "rejected": rejected, "user_id": f"u{user}"}
            rows += [{**row, "group": str(user < minority)}] * 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"num_groups": 2, "l2": [0.1]} if minority else {"max_groups": 3, "l2": None}
    given = make(dataset_name=str(path), model_name_or_path=tiny_model, show_user_ids=True, **settings)
    summary = read(run_diagnose(given))
    assert summary["repeated_pairs"] == 4 * 240
    assert summary["num_pairs"] == 240
    assert summary["num_groups"] == (2 if minority else 1)
    users = list(csv.DictReader((tmp_path / "out" / "users.csv").open()))
    wrong = np.mean([(user["group"] == "1") != (int(user["user"][1:]) < minority) for user in users])
    assert summary["misassignment"]["plain"] == pytest.approx(wrong, abs=0.05)


def test_texts_by_a_frozen_model(make, texts, tiny_model):
    folder = run_diagnose(make(dataset_name=texts, model_name_or_path=tiny_model))
    summary = read(folder)
    assert summary["num_features"] == 48
    assert summary["num_groups"] == 2
    assert summary["recovery"]["adjusted_rand_index"] > 0.9
    assert summary["groups"][1]["accuracy"]["mixture"]["mean"] > 0.9


def test_reward_chooses_the_same_number_of_groups(make, texts, tiny_model):
    summary = read(run_diagnose(make(dataset_name=texts, model_name_or_path=tiny_model, l2=None)))
    data = PreferenceDataset.load(texts, conversations="messages")
    choice = linear_warm_start(feature_choices(data, tiny_model, 1024, "cpu"), "auto", 2, 0).choice
    assert choice.num_groups == summary["num_groups"] == 2
    for k, found in choice.heldout_log_likelihood.items():
        assert found == pytest.approx(summary["choice"]["heldout_log_likelihood"][str(k)], abs=1e-3)


def test_the_config_is_what_flags_say():
    flags = "--dataset_name d --output_dir o --user_column who --num_groups 3 --l2 1e-3 2e-3"
    config = parse_config("diagnose", "", DiagnoseConfig, flags.split())
    assert (config.user_column, config.groups(), config.l2) == ("who", 3, [1e-3, 2e-3])
    assert DiagnoseConfig("d", "o").groups() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": "x.jsonl"}, "texts need features"),
        ({"num_groups": "many"}, "--num_groups is a positive number or auto"),
        ({"beta": 0.0}, "--beta must be positive"),
        ({"num_jackknife": 1}, "--num_jackknife must be 0 or at least 2"),
        ({"num_bootstrap": -1}, "--num_bootstrap must be 0 or at least 2"),
        ({"num_folds": 1}, "--num_folds"),
        ({"heldout_fraction": 1.0}, "--heldout_fraction"),
        ({"l2": []}, "--l2 takes positive"),
        ({"ties": "keep"}, "--ties 'keep'"),
        ({"pooling": "max"}, "--pooling 'max'"),
        ({"text_layout": "upside down"}, "--text_layout"),
        ({"max_groups": 0}, "--max_groups must be at least 1"),
    ],
)
def test_bad_settings_are_named_before_work(make, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run_diagnose(make(**settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features": np.zeros((4, 2))}, "holds features; it needs differences"),
        ({"differences": np.zeros((4, 2))}, "it needs users"),
        ({"differences": np.zeros(4), "users": np.arange(4)}, r"must be \[pairs, features\]"),
        ({"differences": np.zeros((4, 2), int), "users": np.arange(4)}, "of floats"),
        ({"differences": np.zeros((4, 2)), "users": np.arange(3)}, r"users must be \[4\]"),
        ({"chosen": np.zeros((4, 2)), "rejected": np.zeros((4, 3)), "users": np.arange(4)}, "one shape"),
        ({"differences": np.zeros((4, 2)), "users": np.array([None] * 4)}, r"numpy\.savez"),
        (
            {"differences": np.zeros((4, 2)), "users": np.zeros(4), "groups": np.arange(4)},
            "some user has two groups",
        ),
        ({"differences": np.zeros((2, 2)), "users": np.arange(2), "weights": np.zeros(2)}, "positive"),
    ],
)
def test_bad_arrays_are_named(make, content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_diagnose(make(content))
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_full_folder_are_named(make, arrays, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run_diagnose(make())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_diagnose(make(arrays))
    for content in (b"not a zip", b"PK\x03\x04 half a zip"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot read features"):
            run_diagnose(make(name="broken.npz", output_dir=str(tmp_path / "new")))
