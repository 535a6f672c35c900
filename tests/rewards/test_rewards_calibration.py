"""Calibrations: what they leave alone, and what each of them promises."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS
from scripts import load_script

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


def with_offsets(seed, deviation, prompts=192, samples_each=8, gap=0.3):
    """Reference samples [X, n, 2] and one policy's response [X, 1, 2], whose first group is the worse."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(prompts, samples_each, 2, generator=generator)
    policy = torch.randn(prompts, 1, 2, generator=generator) + torch.tensor([0.0, gap])
    offsets = deviation * torch.randn(prompts, 1, 2, generator=generator)
    return reference, policy, offsets


def utilities(method, reference, policy):
    return Calibration.fit(reference, method).apply(policy, reference.unsqueeze(1)).double().mean((0, 1))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["sft_std", "sft_mean", "win_rate"]), st.integers(0, 2**31 - 1), st.floats(0, 10))
def test_no_offset_by_prompt_moves_utilities(method, seed, deviation):
    reference, policy, offsets = with_offsets(seed, deviation)
    plain = utilities(method, reference.double(), policy.double())
    moved = utilities(method, (reference + offsets), (policy + offsets))
    assert (moved - plain).abs().max() < 1e-5


def test_a_batch_of_prompts_names_the_true_worst_group_at_every_offset():
    """Pooled, offsets of 3 and 10 deviations name the wrong one in a quarter and a half of batches of 192."""
    for deviation in (0.0, 0.3, 1.0, 10.0):
        reference, _, offsets = with_offsets(7, deviation, prompts=1024)
        calibration = Calibration.fit((reference + offsets)[:512, :2])
        assert calibration.by_prompt == (deviation > 0.5)
        generator = torch.Generator().manual_seed(11)
        wrong, blind = 0, 0
        for _ in range(200):
            batch = torch.randperm(1024, generator=generator)[:192]
            raw = torch.randn(192, 2, generator=generator) + torch.tensor([0.0, 0.3]) + offsets[batch, 0]
            samples = (reference + offsets)[batch] if calibration.by_prompt else None
            wrong += int(calibration.apply(raw, samples).mean(0).argmin())
            blind += int(calibration.apply(raw).mean(0).argmin())
        assert wrong <= 6  # 1 in 200 expected at most
        assert deviation < 10 or blind > 50


def test_the_baseline_is_the_shrunk_mean_by_its_own_formula():
    reference, _, offsets = with_offsets(3, 1.5, prompts=60, samples_each=3)
    raw = (reference + offsets).double()
    raw[:5, 0, 1] = torch.nan  # two samples left
    raw[5, :, 0] = torch.nan  # none
    found = Calibration.fit(raw)
    x = raw.numpy()
    for k in range(2):
        rows = [row[~np.isnan(row)] for row in x[..., k]]
        within = np.mean([row.var(ddof=1) for row in rows if len(row) > 1])
        means = np.array([row.mean() for row in rows if len(row)])
        noise = within * np.mean([1 / len(row) for row in rows if len(row)])
        offset = max(means.var(ddof=1) - noise, 0)
        assert found.within_deviation[k] == pytest.approx(within**0.5, rel=1e-5)
        assert found.offset_deviation[k] == pytest.approx(offset**0.5, rel=1e-5)
        shift = np.nanmean(x[..., k])
        for row, baseline in zip(rows, found.baseline(raw)[:, k].tolist(), strict=True):
            reliability = offset / (offset + within / len(row)) if len(row) else 0
            mean = row.mean() if len(row) else shift
            assert baseline == pytest.approx((mean - shift) / within**0.5 * reliability, abs=1e-4)
    whole = found.baseline(raw, shrink=False)
    torch.testing.assert_close(whole[6], found.apply(raw[6]).mean(0))
    assert whole[5, 0].isnan()


def test_the_chance_of_another_worst_group_is_that_of_two_normals():
    reference, _, offsets = with_offsets(5, 2.0, prompts=2000)
    calibration = Calibration.fit(reference + offsets)
    variance = ((calibration.offset_deviation / calibration.scale) ** 2).double()
    within = ((calibration.within_deviation / calibration.scale) ** 2).double()
    for count in (None, 4):
        left = variance if count is None else variance * within / count / (variance + within / count)
        chance = float(torch.special.ndtr(-0.3 / (left.sum() / 192).sqrt()))
        found = calibration.wrong_worst_group(torch.tensor([0.0, 0.3]), 192, count)
        assert found == pytest.approx(chance, abs=0.006)
    assert Calibration.fit(reference, "win_rate").wrong_worst_group(torch.tensor([0.4, 0.5]), 8) == 0
    assert calibration.wrong_worst_group(torch.tensor([0.4]), 8) == 0
    single = Calibration.fit(samples(n=1), "sft_mean")
    assert single.wrong_worst_group(torch.zeros(3), 8) is None
    assert torch.equal(single.apply(samples(), samples()[:, None]), single.apply(samples()))


def test_rounding_is_no_spread():
    noise = 1.1e-6 * torch.randn(64, 4, 1, generator=torch.Generator().manual_seed(0))
    level = torch.randn(64, 1, 1, generator=torch.Generator().manual_seed(1))
    for constant in (level + noise, noise):
        with pytest.raises(UserError, match="no scale"):
            Calibration.fit(constant)
    Calibration.fit((level + noise).double())  # there it is one
    coarse = level + 0.01 * samples(groups=1, prompts=64)
    Calibration.fit(coarse)
    with pytest.raises(UserError, match="no scale"):
        Calibration.fit(coarse, dtype=torch.bfloat16)


def test_groups_trade_places_with_all_they_have():
    for method in ("sft_std", "win_rate"):
        fitted, order = Calibration.fit(samples(), method), torch.tensor([2, 0, 1])
        new, own = samples(4), samples(5)[:, None]
        moved = fitted.permute(order)
        for arguments in ((new,), (new, own)):
            there = moved.apply(*(x[..., order] for x in arguments))
            assert torch.equal(there, fitted.apply(*arguments)[..., order])


def test_the_table_of_offsets_is_written(tmp_path, monkeypatch):
    script = load_script("coverage/offsets.py")
    monkeypatch.setattr(script, "OFFSETS", (0.0, 3.0))
    monkeypatch.setattr(
        "sys.argv", ["offsets", "--calibrations", "2", "--batches", "5", f"--output_dir={tmp_path}"]
    )
    script.main()
    rows = list(csv.DictReader((tmp_path / "offsets.csv").open()))
    assert len(rows) == 3 * 2 * 2
    assert rows[0]["variance"] == rows[0]["shared_shift_variance"]
