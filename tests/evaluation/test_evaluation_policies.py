"""Correlation of length with reward, within prompts."""

import numpy as np
import pytest
from scipy import stats

from torchrl_maxmin.evaluation.policies import length_correlation


@pytest.fixture
def length():
    rng = np.random.default_rng(0)
    return (rng.integers(5, 60, size=(3, 40, 5)) + 100 * rng.integers(0, 3, size=(1, 40, 1))).astype(float)


def test_correlation_by_hand(length):
    rng = np.random.default_rng(1)
    for slope in (0.1, 0.0):
        rewards = slope * length + rng.normal(size=length.shape)
        x, y = ((array - array.mean(2, keepdims=True)).ravel() for array in (length, rewards))
        found = length_correlation(rewards, length, num_resamples=200)
        assert found.estimate == pytest.approx(stats.pearsonr(x, y).statistic)
        assert found.low < found.estimate < found.high
        assert (found.low, found.method) == (found.bootstrap_low, "bootstrap over seeds and prompts")
        assert found.low > 0.8 if slope else found.low < 0 < found.high


def test_a_prompt_that_asks_for_length_is_no_length_hacking(length):
    by_prompt = np.repeat(length.mean(axis=2, keepdims=True), 5, axis=2)
    rewards = by_prompt + np.random.default_rng(1).normal(size=length.shape)
    assert abs(length_correlation(rewards, length, num_resamples=200).estimate) < 0.15


def test_where_nothing_varies_there_is_no_correlation(length):
    assert length_correlation(length, np.ones_like(length)) is None
    one = np.zeros_like(length)
    one[:, 0] = length[:, 0]  # resamples without the only prompt that varies say nothing
    assert length_correlation(one, one, num_resamples=200).low == pytest.approx(1.0)
