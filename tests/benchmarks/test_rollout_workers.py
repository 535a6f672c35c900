"""The benchmark of rollout workers: intervals of paired differences, and what a run leaves."""

import pytest
from scipy.stats import ttest_rel

WELFARE = {"trainer": [0.5, 0.8, 0.7], "turns": [0.6, 0.7, 0.9], "beside": [0.4, 0.75, 0.6]}


def test_differences_are_paired_by_seed(rollout_workers):
    runs = [
        {"source": source, "seed": seed, "welfare": value}
        for source, values in WELFARE.items()
        for seed, value in enumerate(values)
    ]
    for found in rollout_workers.differences(runs[::-1]):
        test = ttest_rel(WELFARE[found["source"]], WELFARE["trainer"])
        interval = test.confidence_interval(0.95)
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
        assert found["low"] < found["mean"] < found["high"]


def test_a_run_gives_its_curve_and_seconds(rollout_workers, tmp_path, monkeypatch):
    short = {"total_frames": 3 * 40 * 8, "frames_per_batch": 40 * 8, "num_envs": 8, "mini_batch_size": 80}
    monkeypatch.setattr(rollout_workers, "FISHWOOD", rollout_workers.FISHWOOD | short)
    run = rollout_workers.env_curve("trainer", 1, tmp_path, 2)
    assert (run["source"], run["seed"], len(run["curve"])) == ("trainer", 1, 3)
    assert run["welfare"] == pytest.approx(run["curve"][-1], abs=1e-4)
    assert run["iteration_seconds"] > 0
    assert "staleness" not in run
