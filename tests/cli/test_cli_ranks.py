"""What each of the processes that torchrun started prints."""

import pytest

from torchrl_maxmin.cli import main as cli
from torchrl_maxmin.core.errors import LostRankError, UserError


@pytest.fixture
def second(monkeypatch):
    """The second of two processes; how long it waited before it printed."""
    waited = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    return waited


def raising(error):
    def run(*_):
        raise error

    return run


def test_a_mistake_that_all_find_is_left_to_the_first(second, monkeypatch, capsys):
    """The others wait to be ended by torchrun; whoever is alone with it says it then."""
    monkeypatch.setattr(cli, "_run_stage", raising(UserError("no such model")))
    assert cli.main(["ppo"]) == 2
    assert second == [2.0]
    assert capsys.readouterr().err == "torchrl-maxmin ppo: error: no such model\n"
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["ppo"]) == 2
    assert second == [2.0]


def test_who_lost_another_says_so_at_once(second, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run_stage", raising(LostRankError("rank 1 ends")))
    assert cli.main(["ppo"]) == 1
    assert second == []
    assert capsys.readouterr().err == "torchrl-maxmin ppo: error: rank 1 ends\n"
