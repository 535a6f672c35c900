"""Reward functions that have no answer to a whole rollout."""

import pytest
import torch
import trainers_rewards
from safetensors.torch import load_file

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.rollouts import language
from torchrl_maxmin.trainers.lm_ppo import run_ppo

ROLLOUT, SILENT = 8, [1, 3]  # responses of a rollout; the rollouts without an answer
calls = []


def answers(prompts, completions):
    """``letters``, or None for every response."""
    calls.append(len(completions))
    rollout = calls.count(ROLLOUT) - 1 if len(completions) == ROLLOUT else None
    return [None] * ROLLOUT if rollout in SILENT else trainers_rewards.letters(prompts, completions)


def never(prompts, completions):
    return [None] * len(completions)


@pytest.fixture
def printed(monkeypatch):
    calls.clear()
    lines = []
    monkeypatch.setattr(language.console, "print", lambda line, **_: lines.append(line))
    return lines


@pytest.mark.parametrize(
    "settings",
    [
        {"calibration": "sft_std"},
        {"calibration": "win_rate"},
        {"calibration": "none"},
        {"calibration": "none", "objective": "mean_of_mins"},
    ],
)
def test_a_group_without_a_reward_counts_as_the_references_mean(make_config, printed, settings):
    config = make_config(
        reward_funcs=["trainers_rewards:brevity", "test_trainers_absent:answers"],
        rollout_batch_size=ROLLOUT,
        missing_eos_penalty=0.0,
        **settings,
    )
    folder = run_ppo(config)
    rows = read_metrics(folder)
    assert len(rows) == 4
    raw = load_file(folder / "reference_rewards.safetensors")["rewards"][..., 1].double()
    mean = raw.mean()
    expected = {"sft_std": 0.0, "win_rate": torch.sigmoid(mean - raw).mean(), "none": mean}
    neutral = float(expected[config.calibration]) if config.objective == "min_of_means" else 0.0
    for iteration, row in enumerate(rows):
        assert (row["rewards/1/std"] == 0) == (iteration in SILENT)
        if iteration in SILENT:
            assert row["rewards/1/mean"] == pytest.approx(neutral, abs=1e-5)
    assert printed == [
        "no response of a batch has a reward for group(s) [1]: each counts as the reference's mean, and "
        "gives no signal"
    ]


def test_a_resumed_run_knows_the_references_mean(make_config, printed):
    settings = {
        "reward_funcs": ["trainers_rewards:brevity", "test_trainers_absent:answers"],
        "rollout_batch_size": ROLLOUT,
        "calibration": "none",
    }
    whole = run_ppo(make_config("whole", **settings))
    calls.clear()
    run_ppo(make_config("parts", stop_at_iteration=2, **settings))
    parts = run_ppo(make_config("parts", resume_from_checkpoint="last", **settings))
    for name in ("metrics.jsonl", "summary.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    assert sum("counts as the reference" in line for line in printed) == 3  # once a run


@pytest.mark.parametrize("calibration", ["sft_std", "none"])
def test_a_function_that_never_answers_is_refused_by_the_calibration(make_config, calibration):
    config = make_config(
        reward_funcs=["trainers_rewards:brevity", "test_trainers_absent:never"], calibration=calibration
    )
    with pytest.raises(UserError, match=r"no reference sample has a reward for group\(s\) \[1\]; mend"):
        run_ppo(config)
