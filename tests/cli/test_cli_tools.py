"""The verbs that look at things: data, report, env."""

import json

import numpy as np

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.evaluation import SeedResult, summarise, write_summary


def test_data_check_tells_what_is_in_a_file(tmp_path, capsys):
    rows = [
        {"prompt": p, "chosen": "yes [x]", "rejected": "no", "worker": user, "group": group, "when": 3}
        for p, user, group in (("a", 1, "g"), ("b", 1, "g"), ("a", 2, "h"))
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    assert main(["data", "check", str(tmp_path / "pairs.json")]) == 0
    out, err = capsys.readouterr()
    told = {line[:16].strip(): line[16:].strip() for line in out.splitlines()}
    assert (told["pairs"], told["users"], told["ignored columns"]) == ("3", "2", "when")
    assert told["prompts"] == "2 distinct, 50% seen by two or more users"
    assert told["true groups"].startswith("g 1, h 1 users")
    assert "fewer than 5 pairs per user" in told["will be weak"]
    assert err == ""


def test_data_check_takes_columns_by_name(tmp_path, capsys):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "who": "x", "user": "y"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--user_column", "who", "--group_column", "user"]
    assert main(["data", "check", str(tmp_path / "pairs.jsonl"), *flags]) == 0
    out = capsys.readouterr().out
    assert "y 1 users" in out
    assert "one user only: groups cannot be told apart" in out


def test_report_is_written_again_from_the_summary(tmp_path, capsys):
    rng = np.random.default_rng(0)
    utilities = {name: rng.normal(size=(6, 2, 2)) for name in ("sft", "single", "maxmin")}
    write_summary(tmp_path, summarise([SeedResult(0, ["long", "short"], [0.9, 0.1], utilities)]))
    (tmp_path / "report.md").write_text("spoilt")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Win rate against sft, 1 seed" in out
    assert out.splitlines()[-1] == f"report: {tmp_path / 'report.md'}"
    report = (tmp_path / "report.md").read_text()
    assert "## Win rates by group" in report
    assert "maxmin" in report


def test_env_names_versions(capsys):
    assert main(["env"]) == 0
    out, err = capsys.readouterr()
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert {"python", "platform", "torchrl-maxmin", "torch", "torchrl", "tensordict", "cuda"} <= set(told)
    assert told["torchrl"].startswith("0.14")
    assert err == ""
