"""Settings of every kernel test: the device, memory filled with NaN, and compilation anew.

``pytest tests/kernels`` runs on the CPU, on both paths (PyTorch, and Triton in the interpreter);
``pytest tests/kernels --device cuda`` runs the same tests on a GPU, and where there is none ``--device meta``
looks for tensors that they would leave on the CPU (:mod:`kernels_stand_in`).
"""

import contextlib
import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "meta"),
        default="cpu",
        help="where the tests of the kernels make their tensors; meta: a dry run of cuda",
    )


@contextlib.contextmanager
def cuda():
    """Make the GPU the default device."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device; leave the flag out for the CPU")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise pytest.UsageError("--device cuda runs compiled kernels; unset TRITON_INTERPRET")
    # Some images switch TF32 on by an environment variable.
    torch.set_float32_matmul_precision("highest")
    torch.set_default_device("cuda")
    try:
        yield
    finally:
        torch.set_default_device(None)


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: tests what the CPU alone has; runs there on any --device")
    config.addinivalue_line("markers", "real_device: traces, casts or mixes devices, which no stand-in can")
    # From here on, so that the tensors of parametrized cases lie there too.
    chosen = config.getoption("--device", default="cpu")
    if chosen == "cuda":
        config.kernels_device = cuda()
    elif chosen == "meta":
        from kernels_stand_in import stand_in

        config.kernels_device = stand_in()
    else:
        config.kernels_device = contextlib.nullcontext()
    config.kernels_device.__enter__()


def pytest_unconfigure(config):
    config.kernels_device.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def device(request):
    """Return the device on which the test's tensors are made unless it says another."""
    default = torch.get_default_device()
    if default.type == "meta" and request.node.get_closest_marker("real_device"):
        pytest.skip("no stand-in for a real device")
    if default.type == "cpu" or not request.node.get_closest_marker("cpu"):
        yield default
        return
    with torch.device("cpu") as cpu:
        yield cpu


@pytest.fixture(autouse=True)
def poisoned_memory(device):
    """Fill uninitialised memory with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    # On a GPU some operations of the oracles have no deterministic form, which is an error without the flag.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def no_compile_cache():
    """Compile anew: the key of PyTorch's graph cache does not hold an operator's schema or backward."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True):
        yield
