"""Reward, KL, length and length hacking by group; accuracy that counts users once."""

import numpy as np
import pytest
from scipy import stats

from torchrl_maxmin.evaluation.clustered import CoverageWarning
from torchrl_maxmin.evaluation.metrics import group_accuracy_by_user, group_metrics


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    length = rng.integers(5, 60, size=(3, 40, 5)) + 100 * rng.integers(0, 3, size=(1, 40, 1))
    rewards = np.stack([0.1 * length + rng.normal(size=length.shape), rng.normal(size=length.shape)], -1)
    return rewards, rng.normal(2.0, 0.3, length.shape), length


def test_metrics_by_hand(samples):
    rewards, kl, length = samples
    found = group_metrics(rewards, kl=kl, length=length, group_names=["long", "none"], num_resamples=200)
    assert found["rewards/long/mean"]["mean"] == pytest.approx(rewards[..., 0].mean())
    assert found["objective/kl"]["mean"] == pytest.approx(kl.mean())
    assert found["completions/mean_length"]["mean"] == pytest.approx(length.mean())
    for k, name in enumerate(("long", "none")):
        x = np.concatenate([row - row.mean() for row in length.reshape(-1, 5).astype(float)])
        y = np.concatenate([row - row.mean() for row in rewards[..., k].reshape(-1, 5)])
        told = found[f"rewards/{name}/length_correlation"]
        assert told["mean"] == pytest.approx(stats.pearsonr(x, y).statistic)
        assert told["low"] < told["mean"] < told["high"]
    assert found["rewards/long/length_correlation"]["low"] > 0.8
    assert (
        found["rewards/none/length_correlation"]["low"] < 0 < found["rewards/none/length_correlation"]["high"]
    )


def test_a_prompt_that_asks_for_length_is_no_length_hacking(samples):
    _, _, length = samples
    by_prompt = np.repeat(length.mean(axis=2, keepdims=True), 5, axis=2)
    rewards = by_prompt + np.random.default_rng(1).normal(size=length.shape)
    told = group_metrics(rewards[..., None], length=length, num_resamples=200)
    assert abs(told["rewards/0/length_correlation"]["mean"]) < 0.15


def test_what_cannot_be_computed_says_why(samples):
    rewards, _, length = samples
    bare = group_metrics(rewards, num_resamples=20)
    assert bare["objective/kl"] == {"mean": None, "reason": "kl was not given"}
    assert bare["rewards/0/length_correlation"]["reason"] == "length was not given"
    single = group_metrics(rewards[:, :, :1], length=length[:, :, :1], num_resamples=20)
    assert "one sample a prompt" in single["rewards/0/length_correlation"]["reason"]
    constant = group_metrics(rewards, length=np.ones_like(length), num_resamples=20)
    assert "of one length" in constant["rewards/0/length_correlation"]["reason"]


def test_bad_metrics_are_named(samples):
    rewards, _, length = samples
    with pytest.raises(ValueError, match="length must be"):
        group_metrics(rewards, length=length[:, :, :2])
    with pytest.raises(ValueError, match="1 group names"):
        group_metrics(rewards, group_names=["a"])
    with pytest.raises(ValueError, match=r"\[S, N, M, G\]"):
        group_metrics(rewards[0, 0])


def test_accuracy_counts_users_once_and_halves_ties():
    right = np.array([1, 1, 1, 1, 0, 1, 0.5, 0])
    users = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    with pytest.warns(CoverageWarning):
        found = group_accuracy_by_user(right, users, [0, 0, 1, 1], 3)
    assert found[0].mean == pytest.approx((1 + 0.5) / 2)
    assert found[1].mean == pytest.approx(0.25)
    assert found[2] is None
    with pytest.warns(CoverageWarning):
        halves = group_accuracy_by_user([1, 0, 1], [0, 0, 0], [0], 1, row_weights=[0.5, 0.5, 1.0])
    assert halves[0].mean == pytest.approx(0.75)


def test_several_rewards_at_once_and_users_without_pairs():
    rng = np.random.default_rng(2)
    right = rng.integers(0, 2, size=(200, 2)).astype(float)
    users = rng.integers(0, 40, size=200)
    both = group_accuracy_by_user(right, users, np.zeros(60, int), 1)[0]
    for column in range(2):
        means = [right[users == u, column].mean() for u in np.unique(users)]
        assert both.mean[column] == pytest.approx(np.mean(means))
    assert both.clusters == {"users": len(np.unique(users))}
