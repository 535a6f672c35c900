"""Rows, sums and random numbers of processes that work as one."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from tensordict import TensorDict
from torch import nn

from torchrl_maxmin.core import distributed
from torchrl_maxmin.core.checkpoint import random_state, restore_random_state, save_checkpoint
from torchrl_maxmin.core.distributed import (
    across_ranks,
    clip_gradients,
    each_row_once,
    gather_objects,
    gather_rows,
    is_main_process,
    of_every_process,
    of_main_process,
    over_ranks,
    process_group,
    rank,
    restarted,
    seed_of_rank,
    share_of_rows,
    shares_rows,
    start_alike,
    sum_gradients,
    sum_over_ranks,
    world_size,
)
from torchrl_maxmin.core.errors import LostRankError, UserError
from torchrl_maxmin.core.serial import load_state


@given(num_rows=st.integers(1, 40), world=st.integers(1, 9))
def test_every_row_is_somebodys_once(num_rows, world):
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: world)
        for place in range(world):
            patch.setattr(distributed, "rank", lambda place=place: place)
            shares.append(share_of_rows(num_rows))
    assert {len(index) for index, _ in shares} == {-(-num_rows // world)}
    assert [row for index, real in shares for row in index[real].tolist()] == list(range(num_rows))
    assert all(row == num_rows - 1 for index, real in shares for row in index[~real].tolist())
    # what is gathered begins with all rows in their order
    assert torch.cat([index for index, _ in shares])[:num_rows].tolist() == list(range(num_rows))


def everything(num_rows):
    """What one of the processes sees."""
    with process_group("ddp"):
        rows = TensorDict({"x": torch.arange(num_rows), "mask": torch.arange(num_rows) % 3 == 0}, [num_rows])
        seen = []

        def double(part):
            seen.append(len(part))
            return TensorDict({"y": part["x"] * 2.0, "not": ~part["mask"]}, part.batch_size)

        found = over_ranks(double, rows)
        torch.manual_seed(rank())  # generators that are not in step
        layer = nn.Linear(2, 1)
        start_alike(layer.parameters())
        (layer(torch.full((1, 2), 3.0 + rank())).sum()).backward()
        sum_gradients(layer.parameters())
        norm = clip_gradients(list(layer.parameters()), 1.0)
        return {
            "doubled": found["y"].tolist(),
            "not": found["not"].tolist(),
            "seen": seen,
            "tensor": over_ranks(lambda part: part["x"] + 1, rows).tolist(),
            "sum": sum_over_ranks(torch.tensor([1.0, rank()])).tolist(),
            "once": each_row_once(lambda part: list(range(num_rows))[part], num_rows),
            "steps": over_ranks(lambda part: part, rows.unsqueeze(-1).expand(num_rows, 3)).batch_size,
            "seed": seed_of_rank(5),
            "drawn": of_main_process(lambda: torch.rand(2)).tolist(),
            "gathered": gather_objects(rank()),
            "norm": float(norm),
            "gradient": layer.weight.grad.flatten().tolist(),
            "start": layer.weight.tolist(),
            "main": (is_main_process(), shares_rows(), world_size()),
        }


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_processes_see_the_same(num_rows):
    views = on_ranks(2, everything, num_rows)
    for place, view in enumerate(views):
        assert view.pop("seen") == [-(-num_rows // 2)]
        assert view.pop("main") == (place == 0, True, 2)
        assert view.pop("seed") == 10 + place
        assert [row for part in view["once"] for row in part] == list(range(num_rows))
        assert all(view["once"])
        assert view["steps"] == (num_rows, 3)
        assert view["doubled"] == [2.0 * i for i in range(num_rows)]
        assert view["not"] == [i % 3 != 0 for i in range(num_rows)]
        assert view["tensor"] == [i + 1 for i in range(num_rows)]
        assert view["sum"] == [2.0, 1.0]
        assert view["gathered"] == [0, 1]
        # gradients 3 and 4 of either weight, 1 and 1 of the bias
        assert view["norm"] == pytest.approx((7**2 + 7**2 + 2**2) ** 0.5)
        assert view["gradient"] == pytest.approx([7 / 102**0.5] * 2, rel=1e-5)
    assert views[0] == views[1]
    torch.manual_seed(0)
    assert views[0]["start"] == nn.Linear(2, 1).weight.tolist()
    assert views[0]["drawn"] == pytest.approx(torch.rand(2).tolist())


def _refuse_row_2(rows):
    if rows.start == 2:
        raise UserError("row 2")


def fail():
    """A mistake that the main process finds, and an error that is nobody else's."""
    with process_group("ddp"):

        def find():
            raise UserError("no such folder")

        try:
            of_main_process(find)
        except UserError as error:
            message = str(error)
        with pytest.raises(UserError, match="row 2"):  # of the second process
            each_row_once(_refuse_row_2, 3)
        with pytest.raises(UserError, match="row 2"):
            of_every_process(_refuse_row_2, slice(1 + rank(), 3))
        assert of_every_process(rank) == rank()
    with pytest.raises(RuntimeError, match="ours"), process_group("ddp"):
        raise RuntimeError("ours")
    with pytest.raises(LostRankError, match="ends since another"), process_group("ddp"):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:2")
    return message, shares_rows()


def test_mistakes_of_the_main_process_are_everyones():
    assert on_ranks(2, fail) == [("no such folder", False)] * 2


def keep(folder):
    """Generators of every process, in a checkpoint that the main one writes."""
    with process_group("ddp"):
        torch.manual_seed(10 + rank())
        path = save_checkpoint(folder, 1, {"random": random_state()})
        drawn = torch.rand(1).item()
        torch.manual_seed(99)
        restore_random_state(load_state(path)["random"])
        return drawn, torch.rand(1).item()


def go_on(folder):
    with process_group("ddp"):
        restore_random_state(load_state(folder / "checkpoint-1")["random"])
        return torch.rand(1).item()


def test_every_process_goes_on_with_its_own_generators(tmp_path):
    kept = on_ranks(2, keep, tmp_path)
    assert all(before == after for before, after in kept)
    assert kept[0] != kept[1]
    (alone,) = on_ranks(1, go_on, tmp_path)
    assert alone == kept[0][0]
    three = on_ranks(3, go_on, tmp_path)
    assert three[:2] == [before for before, _ in kept]
    assert three[2] not in three[:2]


def test_a_process_by_itself_is_as_it_was(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    with process_group("none"):
        assert not shares_rows()
        assert not restarted()
        assert (rank(), world_size(), gather_objects("x")) == (0, 1, ["x"])
        part = torch.ones(2)
        assert gather_rows(part, 2) is part
        assert each_row_once(lambda rows: part[rows], 2)[0].tolist() == [1.0, 1.0]
        assert seed_of_rank(7) == 7
        assert sum_over_ranks(part) is part
    assert random_state().keys() == {"python", "numpy", "torch", "cuda"}


def test_a_stage_is_checked_before_processes_meet():
    met = []

    def check():
        met.append("distributed" in os.environ)
        raise UserError("--seed must be positive")

    stage = across_ranks(lambda config: met.append("stage"))
    with pytest.raises(UserError, match="--seed"):
        stage(SimpleNamespace(check=check, distributed="ddp", device="cpu"))
    assert met == [False]
