"""Hostile names and texts from one end to the other: reports, plots and the terminal show them, no more."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from datasets import load_dataset
from hostile import NAMES, USER_IDS, rendered, words
from page_reader import check_sources, read_page
from rich.console import Console

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.manifest import require_whole
from torchrl_maxmin.core.text_escape import terminal
from torchrl_maxmin.evaluation import SeedResult, rich_table, summarise, write_summary
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import read_groups

USERS = [user for user in USER_IDS if user.strip()]  # nobody is a blank
SHORT = [name for name in NAMES if len(name) < 200]
QUICK = {"num_groups": 2, "l2": [0.1], "num_jackknife": 2, "num_bootstrap": 0}


@pytest.fixture(scope="module")
def evaluation():
    """Results whose groups, policies and figures have such names."""
    rng = np.random.default_rng(0)
    groups = NAMES[:7]
    policies = ["sft", "single", "maxmin", *NAMES]
    answer = {"text": NAMES[0], "scores": dict.fromkeys(groups, 0.5)}
    asked = {"prompt": NAMES[7], "prompt_index": 0, "responses": dict.fromkeys(policies, answer)}
    extra = {
        "responses": {"scores": "utility", "random": [asked], "disagreement": []},
        "em": {"user_accuracy": 0.9, "head_accuracy": dict.fromkeys(groups, 0.5), NAMES[0]: NAMES[1]},
        "certificate": {"value": None, "reason": f"no policy named {NAMES[0]!r}"},
        "calibration": {"used": NAMES[7], "worst_group": {NAMES[7]: groups[0], "none": groups[1]}},
        "group_users": list(range(len(groups))),
        "judge": "endpoint",
        "judge_first_place": dict.fromkeys(groups, 0.1),
    }
    utilities = {name: rng.normal(size=(20, 2, len(groups))) for name in policies}
    sizes = {name: rng.random((20, 2)) for name in policies}
    shares = [1 / len(groups)] * len(groups)
    result = SeedResult(0, groups, shares, utilities, kl=sizes, length=sizes, extra=extra)
    return summarise([result], num_resamples=20)


def replaced(value, names):
    """A summary in which every text that is not read as a word of ours is a hostile one."""
    if isinstance(value, dict):
        ours = {"method", "judge", "shares_are", "kind"}
        return {key: item if key in ours else replaced(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, names) for item in value]
    return next(names) if isinstance(value, str) else value


def endless():
    while True:
        yield from SHORT


def report(folder, capsys):
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert words(err) == ""
    return words(out), (folder / "report.md").read_text(encoding="utf-8")


def test_report_of_hostile_policies_and_groups(evaluation, tmp_path, capsys):
    write_summary(tmp_path, evaluation)
    out, text = report(tmp_path, capsys)
    tokens = rendered(text)
    heads = [token.content for token in tokens if token.type == "inline"]
    shown = " ".join(part.content for token in tokens for part in token.children or ())
    assert "maxmin" in heads
    for name in SHORT:
        assert terminal(name) in shown, name
    assert "report: " in out
    page = read_page(tmp_path)
    assert check_sources(page, evaluation) > 100
    read = " ".join(" ".join(page.by_section.values()).split())
    for name in SHORT[:7]:
        assert " ".join(terminal(name).split()) in read, name
    svg = (tmp_path / "figures" / "win_rates.svg").read_text(encoding="utf-8")
    assert "<script" not in svg


def test_a_table_is_inert_in_any_console(evaluation):
    console = Console(width=3000, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(evaluation))
    out = words(console.export_text())
    assert "[/] [bold red]x[/bold red] :bomb:" in out


@pytest.mark.parametrize("kind", ["texts", "arrays"])
def test_diagnose_and_its_report(kind, diagnosed, tmp_path, capsys):
    folder, err = diagnosed[kind]
    words(err)
    text = (folder / "report.md").read_text(encoding="utf-8")
    rendered(text)
    assert list(read_groups(folder / "users.csv")) == USERS
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    hidden = json.dumps(replaced(summary, endless()))
    (tmp_path / "summary.json").write_text(hidden)
    _, text = report(tmp_path, capsys)
    rendered(text)
    check_sources(read_page(tmp_path), json.loads(hidden))
    assert not any(user in (folder / "report.html").read_text() for user in ("用户", "\u202egnp", "@SUM(A1)"))


def test_reward_gives_back_every_id(diagnosed, tiny_model, tmp_path, capsys):
    texts, folder = diagnosed["texts"][0].parent / "texts.jsonl", tmp_path / "reward"
    settings = {"model_name_or_path": tiny_model, "dataset_name": str(texts), "output_dir": str(folder)}
    settings |= {"num_groups": 2, "num_rounds": 1, "steps_per_round": 2, "num_restarts": 1}
    settings |= {"calibration": "none", "device": "cpu", "heldout_fraction": 0.25}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(settings))
    assert main(["reward", "--config", str(tmp_path / "reward.yaml")]) == 0
    for stream in capsys.readouterr():
        words(stream)
    assert list(read_groups(folder)) == USERS
    page = read_page(folder)
    check_sources(page, json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    assert not any(user in (folder / "report.html").read_text() for user in ("用户", "\u202egnp", "@SUM(A1)"))
    assert main(["report", str(folder)]) == 0
    rendered((folder / "report.md").read_text(encoding="utf-8"))
    require_whole(folder)
    words(capsys.readouterr().out)
    path = folder / "groups.csv"
    assert pandas.read_csv(path)["user_json"].map(json.loads).tolist() == USERS
    table = load_dataset("csv", data_files=str(path), cache_dir=str(tmp_path), split="train")
    assert list(map(json.loads, table["user_json"])) == USERS


@pytest.fixture(scope="module")
def diagnosed(tiny_model, tmp_path_factory):
    """Folders of two runs, and what they wrote to stderr: on texts, and on features with names."""
    home, found = tmp_path_factory.mktemp("hostile"), {}
    rng = np.random.default_rng(0)
    users = [user for user in USERS for _ in range(4)]
    column = "[/] a|b <b>"
    texts = [
        {
            "prompt": SHORT[n % len(SHORT)],
            "chosen": f"the film was great . {SHORT[(n + 1) % len(SHORT)]}",
            "rejected": f"dull {SHORT[(n + 3) % len(SHORT)]}",
            "user_id": user,
            column: SHORT[n // 4 % len(SHORT)],
        }
        for n, user in enumerate(users)
    ]
    arrays = {
        "differences": rng.normal(size=(len(users), 3)).astype(np.float32) + 0.5,
        "users": np.array(users),
        "feature_names": np.array(SHORT[:3]),
        column: np.array([row[column] for row in texts]),
    }
    (home / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    np.savez(home / "arrays.npz", **arrays)
    for kind, suffix in (("texts", "jsonl"), ("arrays", "npz")):
        settings = {"dataset_name": str(home / f"{kind}.{suffix}"), "output_dir": str(home / kind)}
        settings |= {"describe_columns": [column], "show_user_ids": True, "device": "cpu"} | QUICK
        settings |= {"model_name_or_path": tiny_model} if kind == "texts" else {}
        (home / f"{kind}.yaml").write_text(yaml.safe_dump(settings))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            assert main(["diagnose", "--config", str(home / f"{kind}.yaml")]) == 0, err.getvalue()
        found[kind] = home / kind, err.getvalue() + out.getvalue()
    return found


def test_data_check_of_hostile_columns(tmp_path, capsys):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "who": "u"}
    rows = [
        row | {"chosen": f"a{n}", "who": f"u{n % 3}", "group": f"{SHORT[n % 3]}"} | dict.fromkeys(NAMES, n)
        for n in range(9)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = ["--user_column", "who", "--group_column", "group"]
    assert main(["data", "check", str(tmp_path / "pairs.jsonl"), *chosen]) == 0
    out, err = capsys.readouterr()
    assert words(err) == ""
    told = " ".join(words(out).split())
    assert "columns ignored" in told
    assert "[/] [bold red]x[/bold red] :bomb:" in told
    words(str(PreferenceDataset.load(tmp_path / "pairs.jsonl", "who").check()))


@pytest.mark.parametrize("name", SHORT)
def test_an_error_shows_a_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", name]) == 2
    assert main(["report", name]) == 2
    assert main([f"verb {name}"]) == 2
    err = words(capsys.readouterr().err)
    assert len(err.splitlines()) == 3
    assert not list(Path(tmp_path).iterdir())
