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
    told = {line[:17].strip(): line[17:].strip() for line in out.splitlines()}
    assert (told["layout"], told["pairs"], told["users"]) == ("pairs", "3", "2")
    assert told["columns ignored"] == "when"
    assert told["columns used"].startswith("prompt: prompt; response: chosen, rejected; user: worker")
    assert told["prompts"] == "2 distinct, 50% seen by two or more users"
    assert told["true groups"] == "g 1, h 1"
    assert "! There are few pairs per user (median 1.5)" in out
    assert err == ""


def test_data_check_takes_columns_by_name(tmp_path, capsys):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "who": "x", "user": "y"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--user_column", "who", "--group_column", "user"]
    assert main(["data", "check", str(tmp_path / "pairs.jsonl"), *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "true groups y 1" in out
    assert "All pairs come from one user, so groups cannot be told apart" in out


def test_data_check_takes_ties_and_caps(tmp_path, capsys):
    rows = [{"prompt": "p", "response": f"r{i}", "score": i // 2, "user": "u"} for i in range(8)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def told(*flags):
        assert main(["data", "check", str(tmp_path / "scores.jsonl"), *flags]) == 0
        out = capsys.readouterr().out
        return {line[:17].strip(): line[17:].strip() for line in out.splitlines()}

    blocks = told()
    assert (blocks["pairs"], blocks["likelihood"]) == ("12", "Plackett-Luce over 2 rankings of 4")
    assert blocks["judged at once"] == "quartiles 4 / 4 / 4 responses, from 4 to 4"
    plain = told("--ratings", "pairs")
    assert (plain["pairs"], plain["ties"], plain["layout"]) == ("24", "4 dropped", "scores")
    assert plain["likelihood"] == "Bradley-Terry over 24 pairs, as if they were independent"
    halved = told("--ties", "halve", "--tie_margin", "1", "--layout", "scores", "--ratings", "pairs")
    assert (halved["pairs"], halved["ties"]) == (str(12 + 2 * 16), "16 halved")
    capped = told("--max_pairs", "5", "--ratings", "pairs")
    assert capped["left out"] == "19 beyond the cap of pairs"


def test_data_check_counts_equal_texts_that_training_refuses(tmp_path, capsys):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "user": "y"}
    rows = [row, {**row, "rejected": "b"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "pairs.jsonl")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 pairs have equal chosen and rejected texts; the reward stage refuses them" in out


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
