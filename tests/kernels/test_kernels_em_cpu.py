"""E-step on a CPU: blocks of pairs, rows gathered as numbers, odds kept for the gradient."""

import pytest
import torch
from kernels_oracles import em_oracle, gradients, rms_error
from maxmin_kernels import em_responsibilities
from maxmin_kernels.em.cpu import em_backward_cpu, em_forward_cpu
from maxmin_kernels.em.naive import em_backward_naive

pytestmark = pytest.mark.cpu


def make(groups):
    counts = torch.tensor([0, 3, 0, 40, 7, 1, 0, 0, 8, 0])
    offsets = torch.cat([torch.tensor([0]), counts.cumsum(0)])
    chosen, rejected = (torch.randn(int(offsets[-1]), groups) for _ in range(2))
    return chosen, rejected, offsets, torch.randn(groups).log_softmax(0)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_cpu_blocks_never_cut_a_user(monkeypatch, block):
    chosen, rejected, offsets, log_prior = make(3)
    whole = em_responsibilities(chosen, rejected, offsets, log_prior, backend="torch")
    gradient = em_backward_naive(chosen, rejected, offsets, *whole)
    monkeypatch.setattr("maxmin_kernels.em.cpu.BLOCK_PAIRS", block)
    interleaved = torch.stack([offsets, offsets], -1)[:, 0]
    *found, _ = em_forward_cpu(chosen, rejected, interleaved, log_prior)
    for actual, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(actual, expected)
    found = em_backward_cpu(chosen, rejected, offsets, *whole, odds=torch.empty(0, 3))
    for actual, expected in zip(found, gradient, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, None], ids=str)
def test_cpu_backward_gathers_rows_of_every_width(monkeypatch, groups, low, other):
    monkeypatch.setattr("maxmin_kernels.em.cpu.BLOCK_PAIRS", 16)
    chosen, rejected, offsets, log_prior = make(groups)
    chosen, rejected = chosen.to(low), None if other is None else rejected.to(other)
    arguments = (chosen, rejected, offsets)
    outputs = em_responsibilities(*arguments, log_prior, backend="torch")
    gradient = em_backward_naive(*arguments, *outputs)
    *again, odds = em_forward_cpu(*arguments, log_prior, keep=True)
    for kept in (odds[:0], odds):
        for actual, expected in zip(em_backward_cpu(*arguments, *outputs, kept), gradient, strict=True):
            torch.testing.assert_close(actual, expected)
    for actual, expected in zip(again, outputs, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_gradient_from_kept_odds_at_any_margin(dtype):
    margin = torch.tensor([0.0, 1e-3, 20.0, 87.0, 89.0, 300.0, 800.0, 1e30, torch.inf], dtype=torch.float64)
    chosen = torch.cat([margin, -margin, torch.tensor([torch.nan])]).to(dtype).unsqueeze(1)
    offsets = torch.arange(len(chosen) + 1)  # a user a pair: what is not finite stays with its own
    prior, ones = torch.zeros(1), torch.ones(len(chosen))
    odds = em_forward_cpu(chosen, None, offsets, prior, keep=True)[2]
    slope, _ = em_backward_cpu(chosen, None, offsets, ones.to(dtype).unsqueeze(1), ones, odds)
    expected = torch.sigmoid(-chosen.double())
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=smallest, equal_nan=True)


@pytest.mark.parametrize("kept", [2**24, 0])
def test_gradients_are_those_of_the_oracle_with_and_without_odds(monkeypatch, kept):
    monkeypatch.setattr("maxmin_kernels.em.op.KEPT_ODDS", kept)
    chosen, rejected, offsets, log_prior = make(4)
    _, grads = gradients(
        lambda *x: em_responsibilities(x[0], x[1], offsets, x[2])[1:], [chosen, rejected, log_prior]
    )
    wide = [x.double() for x in (chosen, rejected, log_prior)]
    _, expected = gradients(lambda *x: em_oracle(x[0], x[1], offsets, x[2])[1:], wide)
    for actual, reference in zip(grads, expected, strict=True):
        assert rms_error(actual, reference) < 2e-6
