"""One EM iteration, streamed, against the same in whole tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def em_iteration():
    sys.path.insert(0, str(BENCHMARKS))
    import em_iteration

    sys.path.remove(str(BENCHMARKS))
    return em_iteration


@pytest.mark.parametrize(("pairs", "users", "groups"), [(5000, 300, 8), (3001, 7, 3), (2000, 1999, 1)])
def test_the_streamed_pass_equals_whole_tensors(em_iteration, pairs, users, groups):
    choices, weight, log_prior = em_iteration.problem(pairs, users, 24, groups)
    assert len(choices.user_offsets) == users + 1
    assert choices.user_offsets.diff().min() >= 1
    found = choices.expectation(weight, log_prior, gradient=True, block_rows=700)
    whole = em_iteration.eager(choices, weight, log_prior)
    torch.testing.assert_close(found.responsibilities, whole.responsibilities, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.log_likelihood, whole.log_likelihood, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.gradient, whole.gradient, atol=2e-3, rtol=1e-4)
    assert em_iteration.disagreement(found, whole) < 1e-4


def test_a_wrong_gradient_is_noticed(em_iteration):
    data = em_iteration.problem(500, 40, 8, 2)
    whole = em_iteration.eager(*data)
    wrong = whole._replace(gradient=whole.gradient * 1.01)
    assert em_iteration.disagreement(wrong, whole) == pytest.approx(0.01, rel=1e-3)


def test_quick_mode_runs():
    command = [sys.executable, str(BENCHMARKS / "em_iteration.py"), "--quick", "--threads", "1"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "ours" in result.stdout
    assert "MiB beyond the features" in result.stdout
