"""The package as a whole: the interpreter's runs, import without Triton, examples in docstrings."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import maxmin_kernels
import pytest

HERE = Path(__file__).parent
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def run(*command, **environment):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=settings, check=False
    )


@pytest.fixture
def no_interpreter_run(device):
    """Skip what starts an interpreter, where all tests run in it or on a device of their own anyway."""
    if INTERPRET or device.type != "cpu":
        pytest.skip("already in the interpreter, or not about it")


@pytest.mark.usefixtures("no_interpreter_run")
@pytest.mark.parametrize(
    "room",
    ["heads", "heads_masks", "em", "gae", "token_gae", "log_probs", "log_probs_chunks", "log_probs_logits"],
)
def test_triton_kernels_pass_the_same_tests_in_the_interpreter(room):
    # Triton reads the variable when it is imported, so a process of its own.
    pytest.importorskip("triton")
    file = HERE / f"test_kernels_{room}.py"
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.usefixtures("no_interpreter_run")
def test_nothing_is_left_on_the_cpu():
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE), "--device", "meta")
    result = run(*command, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 300


@pytest.mark.usefixtures("no_interpreter_run")
def test_the_interpreter_really_runs_the_kernels():
    pytest.importorskip("triton")
    code = """
import torch
from maxmin_kernels import em_responsibilities, min_over_heads, reward_heads_min, token_log_probs, vector_gae
from maxmin_kernels.em import triton_kernels as em
from maxmin_kernels.gae import triton_kernels as gae
from maxmin_kernels.heads import triton_kernels as heads
from maxmin_kernels.log_probs import triton_kernels as log_probs

launched = []
def spy(module, name):
    original = getattr(module, name)
    def call(*args, **kwargs):
        launched.append(name)
        return original(*args, **kwargs)
    setattr(module, name, call)

names = [(heads, "heads_forward"), (heads, "min_forward"), (heads, "min_backward"), (em, "em_forward"),
         (em, "em_backward"), (gae, "gae_forward"), (log_probs, "log_probs_forward"),
         (log_probs, "log_probs_backward")]
for module, name in names:
    spy(module, name)
x = torch.randn(4, 3, requires_grad=True)
reward_heads_min(x, x.detach())[1].sum().backward()
min_over_heads(x)
em_responsibilities(x, x.detach(), torch.tensor([0, 4]), torch.zeros(3))[1].sum().backward()
end = torch.zeros(1, 4, 1, dtype=torch.bool)
vector_gae(x[None], x[None], x[None], end, end, gamma=0.9, lmbda=0.9)
token_log_probs(x, x.detach(), torch.zeros(4, dtype=torch.int64))[0].sum().backward()
assert set(launched) == {name for _, name in names}, launched
"""
    result = run("-c", code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_import_and_cpu_work_without_triton():
    code = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
import torch
from maxmin_kernels import em_responsibilities, min_over_heads, reward_heads_min, token_log_probs, vector_gae
x, offsets, end = torch.randn(4, 3), torch.tensor([0, 4]), torch.zeros(1, 4, 1, dtype=torch.bool)
assert min_over_heads(torch.tensor([2.0, 1.0]))[0] == 1
reward_heads_min(x, x)
em_responsibilities(x, x, offsets, torch.zeros(3))
token_log_probs(x, x, torch.zeros(4, dtype=torch.int64))
vector_gae(x[None], x[None], x[None], end, end, gamma=0.9, lmbda=0.9)

# What CUDA tensors would reach.
from maxmin_kernels.em.op import _em_op
from maxmin_kernels.gae.op import _gae_op
from maxmin_kernels.heads.op import _heads_op, _min_op
from maxmin_kernels.log_probs.chunked import _row_kernels

class OnCuda:
    is_cuda, dtype = True, torch.float32

calls = [
    lambda: _em_op.cuda(x, x, offsets, torch.zeros(3), [], False),
    lambda: _gae_op.cuda(x[None], x[None], x[None], end, end, None, None, 0.9, 0.9, False),
    lambda: _heads_op.cuda(x, x, None, None, None, 1.0, None, None, False),
    lambda: _min_op.cuda(x, 1.0, None, None, False),
    lambda: _row_kernels(OnCuda(), torch.float32),
]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        assert "pip install triton" in str(error), error
    else:
        raise AssertionError("no error")
"""
    result = run("-c", code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


def test_nothing_above_torch_and_triton_is_imported():
    code = """
import sys
import maxmin_kernels
import maxmin_kernels.heads.op
bad = {"torchrl", "tensordict", "transformers", "torchrl_maxmin"} & set(sys.modules)
assert not bad, bad
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["heads.op", "em.op", "em.plan", "gae.op", "log_probs.op"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"maxmin_kernels.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_is_documented():
    for name in maxmin_kernels.__all__:
        assert getattr(maxmin_kernels, name).__doc__
