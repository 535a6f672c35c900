"""Products of many rows with few columns: by oneDNN or BLAS, they are the same."""

import pytest
import torch
from kernels_oracles import INTERPRET, rms_error
from maxmin_kernels import _narrow, reward_heads_min
from maxmin_kernels._narrow import by_onednn, narrow_linear, narrow_sum

pytestmark = pytest.mark.cpu

SIZES = [(3, 7), (1025, 130), (2500, 64), (700, 768)]


def matrices(rows, width, columns):
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(rows, size, generator=generator) for size in (width, columns))
    return x, slope, torch.randn(columns, width, generator=generator), torch.randn(columns)


@pytest.mark.parametrize("enabled", [True, False], ids=["onednn", "without"])
@pytest.mark.parametrize("columns", [1, 2, 4, 5, 8, 70])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_products_equal_those_in_float64(monkeypatch, rows, width, columns, enabled):
    there = enabled and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", there)
    x, slope, weight, bias = matrices(rows, width, columns)
    assert by_onednn(x) == (there and rows * width >= 2**17)
    linear = narrow_linear(x, weight, bias)
    if by_onednn(x):
        assert rms_error(narrow_sum(slope, x), slope.double().T @ x.double()) < 1e-6
    assert rms_error(linear, x.double() @ weight.double().T + bias.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions_keep_their_own_product(dtype):
    x, _, weight, bias = (part.to(dtype) for part in matrices(1025, 130, 8))
    assert not by_onednn(x)
    assert torch.equal(narrow_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, slope, weight, bias = matrices(1025, 130, 8)
    x[7, 3] = bad
    found = narrow_linear(x, weight, bias).isfinite().all(-1)
    assert found.logical_not().nonzero().tolist() == [[7]]
    found = narrow_sum(slope, x).isfinite().all(0)
    assert found.logical_not().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("masked", [False, True])
def test_heads_take_the_fast_product(monkeypatch, masked):
    x, _, weight, bias = matrices(1025, 130, 8)
    row_mask = torch.rand(1025) < 0.5 if masked else None
    taken, fast = [], _narrow._product
    monkeypatch.setattr(_narrow, "_product", lambda *given: (taken.append(given), fast(*given))[1])
    rewards, *_ = reward_heads_min(x, weight, bias, row_mask=row_mask)
    expected, *_ = reward_heads_min(x, weight, bias, row_mask=row_mask, backend="torch")
    assert len(taken) == (torch.backends.mkldnn.is_available() and not INTERPRET)
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-4)
