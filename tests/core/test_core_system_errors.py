"""What the system refuses is one line with the path and what to do; other errors stay as they are."""

import errno
import os
import resource
import stat
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from torchrl_maxmin.core.errors import EngineError, LostRankError, SystemFailure, UserError
from torchrl_maxmin.core.system_errors import explained, system_message

TENSORS = {"a": torch.zeros(50_000)}


@contextmanager
def limited(which, most):
    """Lower a limit of this process for a while; Python ignores the signal of files that grow too large."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def line(action, folder=None):
    with pytest.raises(SystemFailure) as refused, explained(folder):
        action()
    (text,) = str(refused.value).splitlines()
    return text


WRITERS = {
    "text": lambda path: Path(path).write_text("x" * 10_000),
    "torch": lambda path: torch.save(TENSORS, path),
    "safetensors": lambda path: save_file(TENSORS, path),
    "numpy": lambda path: np.savez(str(path) + ".npz", a=np.zeros(10_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_each_library_that_writes(writer, tmp_path):
    write = WRITERS[writer]
    path = tmp_path / "x"
    with limited(resource.RLIMIT_FSIZE, 1000):
        found = line(lambda: write(path), tmp_path)
    full = ("a file would be larger than is allowed", "no space is left on the disk")
    assert found.startswith(full)
    assert str(tmp_path) in found
    found = line(lambda: write(tmp_path / ("x" * 300)), tmp_path)
    assert found.startswith(f"a file's name is too long ({tmp_path}")
    found = line(lambda: write(tmp_path / "gone" / "x"), tmp_path)
    assert found.startswith(f"there is no such file or folder ({tmp_path}/gone")
    (tmp_path / "x.npz").unlink(missing_ok=True)
    for name in ("x", "x.npz"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
    found = line(lambda: write(path), tmp_path)
    assert found.startswith(f"there is a folder where a file is meant ({tmp_path}")


def test_too_many_files(tmp_path):
    lowest = os.dup(0)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest):
        found = line(lambda: (tmp_path / "x").write_text("x"))
    assert (
        found == f"too many files are open ({tmp_path}/x); raise the limit (ulimit -n), or use fewer workers"
    )


def test_a_full_disk(tmp_path):
    full = Path("/dev/full")
    if not (full.exists() and stat.S_ISCHR(full.stat().st_mode)):
        pytest.skip("no /dev/full here")
    (tmp_path / "log").symlink_to(full)
    found = line(lambda: (tmp_path / "log").write_text("x" * 100_000), tmp_path)  # a write names no path
    assert found.startswith(f"no space is left on the disk ({tmp_path}); free some space")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o500)
    assert line(lambda: (tmp_path / "x").write_text("x")).startswith(f"permission is denied ({tmp_path}/x)")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (PermissionError(errno.EACCES, "x", "/a/b"), "permission is denied (/a/b); change the permissions"),
        (OSError(errno.EROFS, "x", b"/a/b"), "the file system can only be read (/a/b); give a folder"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up (/out); free some space"),
        (OSError(errno.EIO, "x"), "the disk could not be read or written (/out); check the disk"),
        (NotADirectoryError(errno.ENOTDIR, "x", "/a"), "a part of the path is a file and no folder (/a)"),
        (OSError("[Errno 28] Error writing bytes to file"), "no space is left on the disk (/out)"),
        (OSError(errno.EXDEV, "odd"), "the system refused ([Errno 18] odd) (/out)"),
        (MemoryError(), "the memory is not enough (/out); --per_device_train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the memory is not enough"),
        (BrokenProcessPool("ended"), "a worker process was ended, as systems do for want of memory (/out)"),
        (RuntimeError("can't start new thread"), "no further process can be started"),
    ],
)
def test_errors_that_are_hard_to_have(error, start):
    assert system_message(error, "/out").startswith(start)


def test_real_want_of_memory():
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**14), lambda: bytearray(10**15)):
        assert line(allocate).startswith("the memory is not enough; --per_device_train_batch_size")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no space is left"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        UserError("out of memory"),
        EngineError("CUDA out of memory"),
        LostRankError("out of memory"),
        KeyError("No space left on device"),
        FloatingPointError("nan"),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, explained("/out"):
        raise error
    assert raised.value is error
