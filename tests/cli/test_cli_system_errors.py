"""In every verb what the system refuses is one line, and the exit code 1; nothing that was there is lost."""

import pytest
from cli_files import contents

from torchrl_maxmin.cli.main import main

STAGES = ["sft", "reward", "ppo", "evaluate", "diagnose", "demo", "ppo in an environment"]


def refused(capsys, words):
    assert main([str(word) for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"torchrl-maxmin {words[0]}: error: ")


@pytest.mark.parametrize("verb", STAGES)
def test_a_folder_that_cannot_be_made(verb, stage, here, capsys):
    (here / "file").write_text("kept")
    before = contents(here)
    found = refused(capsys, stage(verb, output_dir="x" * 300))
    assert found.startswith("a file's name is too long (xxx")
    found = refused(capsys, stage(verb, output_dir="file/out"))
    assert found == "a part of the path is a file and no folder (file/out); give another path"
    assert contents(here) == before


def test_verbs_that_look(here, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "report.md")

    (here / "summary.json").write_text("{}")
    monkeypatch.setattr("torchrl_maxmin.evaluation.load_summary", fail)
    assert refused(capsys, ["report", "."]).startswith("no space is left on the disk (report.md); free some")
    monkeypatch.setattr("torchrl_maxmin.preferences.PreferenceDataset.load", fail)
    assert refused(capsys, ["data", "check", "pairs.jsonl"]).startswith("no space is left on the disk")


def test_memory_in_a_stage(stage, here, capsys, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("torchrl_maxmin.trainers.sft.load_tokenizer", fail)
    assert refused(capsys, stage("sft")).startswith(
        "the memory is not enough (out); --per_device_train_batch"
    )
