"""Memory of a training pass: what is mapped by itself, where, and that values stay what they were."""

import os
import subprocess
import sys

import pytest
from torch import nn

from torchrl_maxmin.core import allocator
from torchrl_maxmin.core.allocator import (
    LEAST_PARAMETERS,
    MAPPED,
    map_large_blocks,
    maps_large_blocks,
)

GLIBC = allocator._glibc()


class Calls(list):
    """A C library that writes down what is asked of it."""

    def __getattr__(self, name):
        return lambda *arguments: self.append((name, *arguments))


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the C library while models of any size count as large."""
    found = Calls()
    monkeypatch.setattr(allocator, "_glibc", lambda: found)
    monkeypatch.setattr(allocator, "LEAST_PARAMETERS", 1)
    for name in [name for name in allocator.os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return found


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"HOME": "/", "LD_PRELOAD": "libfoo.so", "GLIBC_TUNABLES": "glibc.rtld.nns=4"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, False),
        ({"LD_PRELOAD": "/usr/lib/libtcmalloc.so"}, False),
    ],
    ids=str,
)
def test_what_the_user_set_is_left_alone(environment, expected, monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", Calls)
    assert maps_large_blocks(LEAST_PARAMETERS, environment) == expected
    assert not maps_large_blocks(LEAST_PARAMETERS - 1, environment)
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not maps_large_blocks(LEAST_PARAMETERS, environment)


def test_is_undone_also_by_an_error(calls):
    def train():
        with map_large_blocks(nn.Linear(2, 2)):
            assert calls == [("malloc_trim", 0), ("mallopt", -3, MAPPED)]
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert calls[2:] == [("mallopt", -3, 2**25), ("mallopt", -1, 2**26)]


def test_nothing_happens_for_small_models_and_other_devices(calls, monkeypatch):
    with map_large_blocks(nn.Linear(2, 2, device="meta")), map_large_blocks(nn.Identity()):
        pass
    monkeypatch.setattr(allocator, "LEAST_PARAMETERS", 7)
    with map_large_blocks(nn.Linear(2, 2)):
        pass
    assert calls == []


COUNTED = """
import ctypes, torch
from torch import nn
from torchrl_maxmin.core import allocator
allocator.LEAST_PARAMETERS, size = 1, allocator.MAPPED
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
glibc = allocator._glibc()
fields = {"_fields_": [(name, ctypes.c_size_t) for name in names]}
glibc.mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), fields)

def mapped_by(elements):
    before = glibc.mallinfo2().hblkhd
    kept.append(torch.empty(elements, dtype=torch.uint8))
    return glibc.mallinfo2().hblkhd - before

kept = []
with allocator.map_large_blocks(nn.Linear(2, 2)):
    print(mapped_by(32 * size) >= 32 * size, mapped_by(size // 2) == 0)
"""


@pytest.mark.skipif(not hasattr(GLIBC, "mallinfo2"), reason="another C library, or one before glibc 2.33")
def test_blocks_are_mapped_by_themselves():
    """By glibc's own count of the bytes that are mapped block by block, in a process without holes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
