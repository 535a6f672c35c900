"""A working folder, flags with which every stage would run in it, and what a refusal looks like."""

from collections import Counter, defaultdict

import pytest
from cli_files import PAIR, contents, write_rows

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.world import World


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a few good files in it."""
    monkeypatch.chdir(tmp_path)
    users = [{**PAIR, "user_id": user} for user in ("ann", "ann", "bob", "bob", "eve", "eve")]
    write_rows(tmp_path / "pairs.jsonl", users)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the film"}, {"prompt": "a story"}])
    World.preset("10:1").save(tmp_path / "world.json")
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Run a command that must fail; returns its one line."""

    def run(*words):
        before = contents(here), set(here.rglob("*"))
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith(f"torchrl-maxmin {words[0]}: error: ")
        assert (contents(here), set(here.rglob("*"))) == before
        return lines[0]

    return run


@pytest.fixture
def stage(tiny_model):
    """Flags with which each stage would run."""

    def flags(verb, **changes):
        common = {"model_name_or_path": tiny_model, "output_dir": "out"}
        base = {
            "sft": {**common, "dataset_name": "pairs.jsonl"},
            "reward": {**common, "dataset_name": "pairs.jsonl", "num_groups": 2},
            "ppo": {**common, "dataset_name": "prompts.jsonl", "reward_funcs": "world.json"},
            "evaluate": {
                "policies": f"[sft={tiny_model}, maxmin={tiny_model}]",
                "dataset_name": "prompts.jsonl",
                "output_dir": "out",
                "judge": "world.json",
            },
            "diagnose": {**common, "dataset_name": "pairs.jsonl", "num_groups": 2},
            "demo": {"output_dir": "out"},
            "ppo in an environment": {
                "env_id": "gridworld",
                "output_dir": "out",
                "num_envs": 8,
                "frames_per_batch": 96,
                "total_frames": 192,
                "device": "cpu",
            },
        }[verb]
        given = {name: value for name, value in (base | changes).items() if value is not None}
        return [verb.split()[0], *(part for name, value in given.items() for part in (f"--{name}", value))]

    return flags


def pytest_terminal_summary(terminalreporter):
    """What became of random models, verb by verb; rows travel as properties of the reports."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in report.user_properties
        if name == "verb" and report.when == "call"
    ]
    if not rows:
        return
    cases: dict[tuple[str, str], list[int]] = defaultdict(list)
    for verb, line, number in rows:
        cases[verb, line].append(number)
    ran = Counter(number for _, line, number in rows if line == "ran")
    terminalreporter.section(f"{sum(count == 4 for count in ran.values())} settings ran through four verbs")
    for (verb, line), numbers in sorted(cases.items(), key=lambda row: (row[0][0], -len(row[1]))):
        terminalreporter.write_line(f"{verb:<9}{len(numbers):>4}  {line}  (first: {numbers[0]})")
