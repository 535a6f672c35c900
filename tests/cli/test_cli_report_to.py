"""Metrics of every verb that trains: documented names, the same for a logger, which ends no run."""

import json
import re
from pathlib import Path

import pytest
from cli_files import PAIR, write_rows

import torchrl_maxmin
from torchrl_maxmin.cli.main import main

PACKAGE = Path(torchrl_maxmin.__file__).parent
DOCUMENTED = set(re.findall(r"`([a-z]+(?:/[\w{}]+)*)`", (PACKAGE.parent / "docs" / "metrics.md").read_text()))
TINY = {
    "sft": {"max_steps": 2, "max_length": 16},
    "reward": {
        "num_rounds": 2,
        "steps_per_round": 1,
        "max_length": 16,
        "response_length": 2,
        "calibration": "none",
        "identifiability": "false",
        "feature_cache": "false",
    },
    "ppo in an environment": {"total_frames": 192, "eval_episodes": 8},
}


def plain(name):
    return re.sub(r"/\d+", "/{k}", name)


@pytest.mark.parametrize("verb", TINY)
def test_a_logger_gets_what_the_file_gets_under_documented_names(verb, stage, here, capsys):
    rows = [
        {**PAIR, "prompt": f"the film {i}", "user_id": user}
        for user in ("ann", "bob", "eve")
        for i in range(4)
    ]
    write_rows(here / "pairs.jsonl", rows)
    words = stage(verb, report_to="csv", **TINY[verb])
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) == 2
    names = {name for row in rows for name in row if name != "step"}
    assert {plain(name) for name in names} <= DOCUMENTED
    (scalars,) = (here / "out" / "logs").glob("*/scalars")
    found = {
        path.relative_to(scalars).with_suffix("").as_posix().replace("_", "/", 1)
        for path in scalars.rglob("*.csv")
    }
    assert {name.replace("_", "/", 1) for name in names} == found


def test_every_name_in_the_code_is_documented():
    prefixes = "objective|policy|val|rewards|maxmin|em|loss|monitor|rollout|completions"
    pattern = rf'"((?:{prefixes})/[a-z_]+(?:/[a-z_]+)?)"'
    found = {
        name
        for room in ("trainers", "clustering", "rollouts")
        for path in (PACKAGE / room).glob("*.py")
        for name in re.findall(pattern, path.read_text())
    }
    assert len(found) > 20
    # of the linear search for groups, whose history is in summary.json
    assert found - {"em/objective"} <= DOCUMENTED


@pytest.mark.parametrize("when", ["it is made", "it logs"])
def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(when, stage, here, capsys, monkeypatch):
    class Broken:
        def log_scalar(self, *_, **__):
            raise ConnectionError("no network\x1b[31m")

    def make(*_, **__):
        if when == "it is made":
            raise ConnectionError("no network\x1b[31m")
        return Broken()

    monkeypatch.setattr("torchrl.record.loggers.get_logger", make)
    words = stage("ppo in an environment", report_to="csv", eval_episodes=8)
    assert main([str(word) for word in words]) == 0
    err = capsys.readouterr().err
    assert err.count("warning: csv fails, and is left out: no network") == 1
    assert "\x1b" not in err
    assert len((here / "out" / "metrics.jsonl").read_text().splitlines()) == 2
