"""How log-probabilities go through the logits: chunks of tokens, blocks of the vocabulary, what is kept."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_oracles import LOW_BAR, rms_error
from maxmin_kernels import token_log_probs
from maxmin_kernels._backend import INTERPRET, keeps
from maxmin_kernels.log_probs import chunked
from maxmin_kernels.log_probs.chunked import (
    blocks,
    chunked_backward,
    chunked_forward,
    kept_rows,
    pick_chunk_size,
    pick_tile,
)
from maxmin_kernels.log_probs.transform import PLAIN, LogitTransform
from test_kernels_log_probs import make
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


@pytest.mark.parametrize(
    "transform", [PLAIN, LogitTransform(torch.zeros(100), logit_scale=0.5, softcap=3.0)], ids=["plain", "all"]
)
def test_never_holds_more_than_a_chunk_of_logits(transform):
    hidden, lm_head, targets = make(64, 4, 100)
    with LargestTensor() as largest:
        log_probs, *vectors = chunked_forward(hidden, lm_head, targets, 1.0, True, 8, *transform, False)
        vectors = targets, *vectors, torch.ones(64), torch.ones(64)
        chunked_backward(
            hidden, lm_head, *vectors, 1.0, 8, True, True, *transform, transform.bias is not None
        )
    assert log_probs.shape == (64,)
    assert 0 < largest.bytes <= 8 * 100 * 4 * (1 if hidden.device.type == "cpu" else 6)  # aligned rows


@pytest.mark.cpu  # a GPU multiplies half precision as it is
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "transform", [PLAIN, LogitTransform(None, logit_scale=0.5, softcap=3.0)], ids=["plain", "capped"]
)
def test_an_output_layer_in_half_precision_is_widened_in_blocks(transform, dtype, monkeypatch):
    """Neither pass holds a float32 copy of it, and both compute what one product would."""
    # seven blocks of 30 rows, the last of 23
    monkeypatch.setattr(chunked, "budget_elements", lambda device: 2 * 16 * 30)
    hidden, lm_head, targets = make(24, 16, 203, dtype)
    ones = torch.ones(24)
    with LargestTensor() as largest:
        outputs = chunked_forward(hidden, lm_head, targets, 0.7, True, 5, *transform, False)
        grad, *_ = chunked_backward(
            hidden, lm_head, targets, *outputs[1:], ones, ones, 0.7, 5, True, False, *transform, False
        )
    assert largest.bytes < 203 * 16 * 4
    assert grad.dtype == dtype
    leaf = hidden.double().requires_grad_()
    logits = leaf @ lm_head.double().mT
    if transform.softcap is not None:
        logits = 3.0 * torch.tanh(0.5 * logits / 3.0)
    every = (logits / 0.7).log_softmax(-1)
    expected = every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
    sum(x.sum() for x in expected).backward()
    for actual, reference in zip(outputs[:2], expected, strict=True):
        torch.testing.assert_close(actual.double(), reference.detach(), rtol=2e-6, atol=1e-5)
    assert rms_error(grad, leaf.grad) < LOW_BAR[dtype]


def test_small_problems_run_in_one_chunk_and_large_ones_in_equal_chunks():
    assert pick_chunk_size(64 * 64, 203, "cpu") == 64 * 64
    assert pick_chunk_size(0, 203, "cpu") == 1
    for device, most in (("cpu", 256), ("cuda", 2**28 // 151_936)):
        chunk = pick_chunk_size(65_537, 151_936, device)
        assert 60 <= chunk <= most
        assert -(-65_537 // chunk) * chunk - 65_537 < chunk


def test_a_gpu_gives_logits_a_hundredth_of_its_memory(monkeypatch):
    def elements(gigabytes):
        chunked.budget_elements.cache_clear()
        memory = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes > 0)
        return chunked.budget_elements("cuda")

    try:
        found = [elements(gigabytes) for gigabytes in (2, 24, 80, 0, 140)]
    finally:
        chunked.budget_elements.cache_clear()
    assert found[0] == 2**25
    assert 6 * found[2] / (80 * 2**30) == pytest.approx(0.01, rel=0.01)
    assert found[2] == found[3]
    assert found == sorted(found)


@given(
    st.integers(1, 3000),
    st.integers(1, 64),
    st.integers(1, 3000),
    st.integers(0, 50),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None)
def test_tiles_cover_all_logits_once_within_the_budget(rows, width, vocabulary, chunk_size, widened, aligned):
    tile = pick_tile(rows, width, vocabulary, "cpu", chunk_size, widened)
    assert tile.rows >= 1
    assert 1 <= tile.columns <= vocabulary
    if chunk_size and chunk_size * vocabulary >= tile.rows:
        assert min(tile.rows, rows) * tile.columns <= chunk_size * vocabulary
    covered = [i for block in blocks(vocabulary, tile.columns, aligned) for i in range(vocabulary)[block]]
    assert covered == list(range(vocabulary))


def test_what_is_odd_of_a_vocabulary_is_a_block_of_its_own():
    assert [(b.start, b.stop) for b in blocks(50257, 50257, True)] == [(0, 50240), (50240, 50257)]
    assert [(b.start, b.stop) for b in blocks(50257, 50257, False)] == [(0, 50257)]
    assert [(b.start, b.stop) for b in blocks(17, 17, True)] == [(0, 17)]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("rows", [5, 40])
def test_rows_and_vocabulary_in_parts_give_the_same_gradients(rows, chunk_size, entropy, monkeypatch):
    """More rows than tokens too, where gradients of both matrices are added up."""
    monkeypatch.setattr(chunked, "budget_elements", lambda device: 64)
    monkeypatch.setattr(chunked, "_LEAST_ROWS", 2)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, lm_head, targets = make(rows, 4, 9, dtype)
        leaves = [hidden.requires_grad_(), lm_head.requires_grad_()]
        options = {"entropy": entropy, "temperature": 0.7}
        outputs = token_log_probs(*leaves, targets, chunk_size=chunk_size, **options)
        reference = token_log_probs(*(x.double() for x in leaves), targets, backend="torch", **options)
        actual, expected = (
            torch.autograd.grad(sum(x.square().sum() for x in every if x is not None), leaves)
            for every in (outputs, reference)
        )
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert rms_error(a, b) < LOW_BAR.get(dtype, 2e-6)


@pytest.mark.cpu  # a GPU keeps nothing
@pytest.mark.skipif(INTERPRET, reason="Triton's kernels keep nothing")
def test_the_last_of_several_chunks_saves_the_backward_pass_its_product():
    """With the same gradients twice over one forward pass; nothing is kept where no gradient is wanted."""
    hidden, lm_head, targets = make(7, 4, 9)
    leaves = [hidden.requires_grad_(), lm_head.requires_grad_()]
    log_probs, _ = token_log_probs(*leaves, targets, chunk_size=3)
    rows = {saved.shape for saved in log_probs.grad_fn.saved_tensors if saved is not None}
    assert (1, 9) in rows
    first, second = (torch.autograd.grad(log_probs.sum(), leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert [keeps(*leaves), keeps(hidden.detach(), lm_head.detach())] == [True, False]
    with torch.no_grad():
        assert not keeps(*leaves)
    assert [kept_rows(n, 9, "cpu", 3) for n in (1, 3, 4, 6, 7)] == [0, 0, 1, 3, 1]
