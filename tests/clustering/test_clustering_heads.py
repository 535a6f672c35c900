"""The features that are searched: wide ones by components, those of thousands of items sparse."""

import numpy as np
import pytest
import torch

from torchrl_maxmin.clustering import heads
from torchrl_maxmin.clustering.heads import FeatureMap, principal_axes
from torchrl_maxmin.clustering.items import item_pairs_of_features


def one_hot_pairs(num_pairs, num_items, seed=0, skew=1.2):
    """Pairs of items, some of which are met far more often than others."""
    rng = np.random.default_rng(seed)
    chance = np.arange(1, num_items + 1.0) ** -skew
    first = rng.choice(num_items, num_pairs, p=chance / chance.sum())
    second = (first + 1 + rng.integers(num_items - 1, size=num_pairs)) % num_items
    x = np.zeros((num_pairs, num_items), np.float32)
    x[np.arange(num_pairs), first], x[np.arange(num_pairs), second] = 1, -1
    return torch.from_numpy(x), first, second


def test_sparse_axes_span_what_dense_ones_do():
    x, *_ = one_hot_pairs(4000, 60)
    scale = torch.ones(60)
    dense = principal_axes(x, 5, scale)
    sparse = heads._sparse_axes(heads._as_sparse(x), scale, 5)
    torch.testing.assert_close(sparse.T @ sparse, torch.eye(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(sparse @ sparse.T, dense @ dense.T, atol=1e-4, rtol=0)
    again = heads._sparse_axes(heads._as_sparse(x), scale, 5)
    assert torch.equal(sparse, again)


def test_thousands_of_one_hot_items_make_no_square_matrix(monkeypatch):
    monkeypatch.setattr(heads, "WIDE", 200)
    x, *_ = one_hot_pairs(3000, 300)
    expected = FeatureMap.of(x)
    torch.testing.assert_close(expected.scale, x.std(0))
    monkeypatch.setattr(heads, "principal_axes", lambda *_: pytest.fail("all items by all"))
    found = FeatureMap.of(x)
    assert torch.equal(found.axes, expected.axes)
    assert found(x).shape == (3000, 128)
    torch.testing.assert_close(found(x), (x / found.scale) @ found.axes)


def test_rows_of_many_features_stay_dense(monkeypatch):
    monkeypatch.setattr(heads, "WIDE", 140)
    x = torch.randn(300, 150, generator=torch.Generator().manual_seed(0))
    assert heads._as_sparse(x) is None
    found = FeatureMap.of(x)
    axes = principal_axes(x / x.std(0), 128).float()
    assert torch.equal(found.axes, axes)
    torch.testing.assert_close(found(x), (x / x.std(0)) @ axes, atol=0, rtol=0)


def test_items_are_read_off_more_rows_than_a_block():
    x, first, second = one_hot_pairs(9000, 12)
    found = item_pairs_of_features(x.numpy(), [str(i) for i in range(12)])
    assert (found.chosen == first).all()
    assert (found.rejected == second).all()
    x[8500, first[8500]] = 0.5  # in the second block
    assert item_pairs_of_features(x.numpy(), [str(i) for i in range(12)]) is None
