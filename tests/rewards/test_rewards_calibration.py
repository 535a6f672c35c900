"""Calibrations: what they leave alone, and what each of them promises."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.rewards import Calibration


def samples(seed=0, prompts=50, n=3, groups=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, n, groups, generator=generator) * torch.tensor([0.5, 2.0, 7.0][:groups])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["sft_std", "sft_mean", "win_rate"]),
    st.lists(st.floats(-20, 20), min_size=3, max_size=3),
    st.integers(0, 10),
)
def test_a_constant_on_a_head_changes_nothing(method, constants, seed):
    raw, new = samples(seed), samples(seed + 1)
    shifted = torch.tensor(constants)
    fitted = Calibration.fit(raw, method)
    plain, other = fitted.apply(new), Calibration.fit(raw + shifted, method).apply(new + shifted)
    # reward and shift are rounded where the constant is still on them; then the difference and the quotient
    largest = torch.cat([raw + shifted, new + shifted]).abs().amax((0, 1))
    bar = EPS * (largest / fitted.scale + 4 * plain.abs())
    assert ((other - plain).abs() <= bar).all()


def test_none_changes_nothing_and_keeps_the_constant():
    raw = samples()
    assert torch.equal(Calibration.fit(raw, "none").apply(raw), raw)
    assert torch.equal(Calibration.identity(3).apply(raw + 5), raw + 5)


def test_offsets_of_every_prompt_leave_the_scale_but_not_a_pooled_one():
    raw = samples()
    offsets = 10 * torch.randn(50, 1, 3, generator=torch.Generator().manual_seed(9))
    scale = Calibration.fit(raw).scale
    torch.testing.assert_close(Calibration.fit(raw + offsets).scale, scale, atol=1e-5, rtol=1e-5)
    pooled, pooled_shifted = raw.std((0, 1)), (raw + offsets).std((0, 1))
    assert (pooled_shifted > 1.3 * pooled).all()  # the trap this avoids


def test_sft_std_gives_zero_mean_and_unit_within_prompt_deviation():
    raw = samples(prompts=40, n=4) + 3 * torch.randn(40, 1, 3)
    calibrated = Calibration.fit(raw).apply(raw).double()
    torch.testing.assert_close(
        calibrated.mean((0, 1)), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0
    )
    within = (
        sum(((row - row.mean(0)) ** 2).sum(0) / 3 for row in calibrated) / 40
    )  # unbiased variance of each prompt's four samples, averaged
    torch.testing.assert_close(within, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_sft_mean_keeps_the_scale():
    raw = samples() + 4
    calibrated = Calibration.fit(raw, "sft_mean").apply(raw)
    torch.testing.assert_close(calibrated.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(calibrated.std((0, 1)), raw.std((0, 1)))


def test_win_rate_is_the_mean_chance_of_beating_a_reference_sample():
    reference, new = samples(), samples(3, prompts=4)
    rates = Calibration.fit(reference, "win_rate").apply(new)
    assert rates.shape == new.shape
    assert ((rates >= 0) & (rates <= 1)).all()
    expected = torch.empty_like(new)
    flat = reference.reshape(-1, 3)
    for i in range(4):
        for j in range(3):
            for k in range(3):
                expected[i, j, k] = (1 / (1 + (flat[:, k] - new[i, j, k]).double().exp())).mean()
    torch.testing.assert_close(rates, expected, atol=1e-5, rtol=1e-5)
    # of the reference against itself: one half
    own = Calibration.fit(reference, "win_rate").apply(reference).mean((0, 1))
    torch.testing.assert_close(own, torch.full((3,), 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["sft_std", "sft_mean", "win_rate", "none"])
def test_survives_json(method):
    fitted, new = Calibration.fit(samples(), method), samples(4)
    again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again.method == method
    assert torch.equal(again.apply(new), fitted.apply(new))


def test_errors():
    with pytest.raises(UserError, match=r"unknown calibration 'z_score'.*sft_std"):
        Calibration.fit(samples(), "z_score")
    with pytest.raises(UserError, match="two or more reference samples a prompt"):
        Calibration.fit(samples(n=1), "sft_std")
    Calibration.fit(samples(n=1), "sft_mean")
    constant = samples()
    constant[..., 1] = torch.arange(50.0)[:, None]  # differs between prompts, never within
    with pytest.raises(UserError, match=r"head\(s\) \[1\]"):
        Calibration.fit(constant, "sft_std")
