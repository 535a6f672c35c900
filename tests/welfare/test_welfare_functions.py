import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchrl_maxmin.welfare import Egalitarian, SoftMin, Utilitarian

utilities_arrays = hnp.arrays(
    "float64", st.tuples(st.integers(1, 6)), elements=st.floats(-5, 5, allow_nan=False, width=32)
)


def test_egalitarian_takes_the_first_of_the_worst():
    utilities = torch.tensor([[2.0, 1.0, 1.0], [-3.0, 0.0, 4.0]])
    assert Egalitarian()(utilities).tolist() == [1.0, -3.0]
    assert Egalitarian().weights(utilities).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_utilitarian_weighs_by_shares_and_equally_without():
    utilities = torch.tensor([1.0, -1.0])
    assert Utilitarian([0.75, 0.25])(utilities).item() == pytest.approx(0.5)
    assert Utilitarian()(utilities).item() == pytest.approx(0.0)


def test_softmin_by_hand_and_with_a_prior():
    utilities = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = -0.5 * math.log(0.8 * math.exp(0.0) + 0.2 * math.exp(-2.0))
    assert SoftMin(0.5, prior=[0.8, 0.2])(utilities).item() == pytest.approx(expected, abs=1e-12)
    assert SoftMin(0.5)(torch.tensor([3.0, 3.0])).item() == pytest.approx(3.0)
    tiny = torch.tensor([-1e4, 1e4])
    assert SoftMin(1e-3)(tiny).item() == pytest.approx(-1e4)


@settings(max_examples=50, deadline=None)
@given(utilities_arrays)
def test_weights_are_the_gradient_and_lie_on_the_simplex(array):
    for welfare in (Egalitarian(), Utilitarian(), SoftMin(0.3)):
        utilities = torch.tensor(array, requires_grad=True)
        (gradient,) = torch.autograd.grad(welfare(utilities), utilities)
        weights = welfare.weights(utilities.detach())
        torch.testing.assert_close(gradient, weights)
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(1.0)


@settings(max_examples=50, deadline=None)
@given(utilities_arrays, st.floats(0.01, 5))
def test_softmin_lies_between_minimum_and_mean(array, temperature):
    utilities = torch.tensor(array)
    value = SoftMin(temperature)(utilities).item()
    assert utilities.min().item() - 1e-9 <= value <= utilities.mean().item() + 1e-9
    assert value <= utilities.min().item() + temperature * math.log(len(array)) + 1e-9


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1.0, 1e3, 1e7])
@pytest.mark.parametrize(
    "prior", [None, [0.7, 0.299999, 1e-6], [0.5, 0.5, 0.0]], ids=["equal", "rare", "absent"]
)
def test_softmin_keeps_its_digits_in_single_precision(temperature, prior):
    """Against 60 digits; at a temperature of 1e7 the logarithm alone would be off by 1."""
    utilities = [0.25, 1.5, -2.0]
    with localcontext(prec=60):
        shares = [Decimal(1) / 3] * 3 if prior is None else [Decimal(p) for p in prior]
        t = Decimal(temperature)
        terms = [p * (-Decimal(u) / t).exp() for p, u in zip(shares, utilities, strict=True)]
        expected = float(-t * sum(terms).ln())
        gradient = [float(term / sum(terms)) for term in terms]
    values = torch.tensor(utilities, requires_grad=True)
    value = SoftMin(temperature, prior)(values)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert values.grad.tolist() == pytest.approx(gradient, abs=1e-5)
    assert SoftMin(temperature, prior).weights(values.detach()).tolist() == pytest.approx(gradient, abs=1e-5)


@pytest.mark.parametrize("welfare", [Egalitarian(), Utilitarian(), SoftMin(1.0)], ids=repr)
@pytest.mark.parametrize(
    ("utilities", "error", "match"),
    [
        (torch.tensor([1.0, float("nan")]), ValueError, "NaN"),
        (torch.tensor([1.0, float("inf")]), ValueError, "infinite"),
        (torch.tensor([1, 2]), TypeError, "floating point"),
        (torch.zeros(3, 0), ValueError, "one entry per group"),
    ],
    ids=["nan", "inf", "integer", "empty"],
)
def test_bad_utilities_raise(welfare, utilities, error, match):
    for call in (welfare.value, welfare.weights):
        with pytest.raises(error, match=match):
            call(utilities)


def test_bad_settings_raise():
    with pytest.raises(ValueError, match="temperature must be positive"):
        SoftMin(0.0)
    with pytest.raises(ValueError, match="sum to 1"):
        Utilitarian([0.7, 0.7])
    with pytest.raises(ValueError, match="prior must be non-negative"):
        SoftMin(1.0, prior=[-0.5, 1.5])
    with pytest.raises(ValueError, match="Expected the utilities of 2 groups"):
        Utilitarian([0.5, 0.5])(torch.zeros(3))
