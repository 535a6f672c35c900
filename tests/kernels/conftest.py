"""Settings of every kernel test, on both paths (PyTorch, and Triton in the interpreter)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def no_compile_cache():
    """Compile anew: the key of PyTorch's graph cache does not hold an operator's schema or backward."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True):
        yield
