"""Load the benchmarks' package and script from their folder, which is on no path.

The folder stays off ``sys.path``: a ``kernels.py`` there would hide Hugging Face's package of that name.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("kernel_bench", BENCHMARKS / "kernel_bench" / "__init__.py")


@pytest.fixture(scope="session")
def script():
    """The script as a module: ``script.main(arguments)``."""
    return load("benchmarks_kernels_script", BENCHMARKS / "kernels.py")


@pytest.fixture(scope="session")
def portable():
    return load("benchmarks_portable_script", BENCHMARKS / "portable.py")


@pytest.fixture(scope="session")
def facts():
    return load("facts", BENCHMARKS / "facts.py")


@pytest.fixture(scope="session")
def rollout_workers(facts):
    load("learning_curve", BENCHMARKS / "learning_curve.py")
    return load("rollout_workers", BENCHMARKS / "rollout_workers.py")


@pytest.fixture(scope="session")
def plan_script(facts):
    return load("benchmarks_plan_script", BENCHMARKS / "plan.py")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu():
    from kernel_bench.device import Cpu

    return Cpu(threads=1, quick=True)
