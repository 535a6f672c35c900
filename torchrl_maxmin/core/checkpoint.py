"""Everything a policy run needs to go on as if it had never stopped, written whole or not at all."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.core.distributed import (
    device_mesh,
    gather_objects,
    is_main_process,
    of_main_process,
    rank,
    restarted,
    shares_rows,
    wait_for_all,
)
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import prepare_output_dir, replace_folder

__all__ = ["find_checkpoint", "random_state", "restore_random_state", "save_checkpoint", "saved_state"]

_FILE, _SHARDS = "state.pt", "shards"


@dataclass(frozen=True)
class Shards:
    """Stands in a checkpoint for a tensor of which every process wrote its part.

    Attributes:
        name: of the tensor among these.
    """

    name: str


def random_state() -> dict[str, Any]:
    """State of all global random generators; of processes that work as one, of each."""
    own = _random_state()
    return {**own, "ranks": gather_objects(own)} if shares_rows() else own


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - libraries draw from it
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all global random generators to what :func:`random_state` gave; more processes begin new ones."""
    ranks = state.get("ranks", [state])
    if rank() >= len(ranks):
        torch.manual_seed(torch.initial_seed() + rank())
        return
    state = ranks[rank()]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any]) -> Path:
    """Write ``checkpoint-N``; a crash on the way leaves older checkpoints as they were.

    All processes that work as one call it. The main one writes, and each its parts of sharded tensors, by
    ``torch.distributed.checkpoint``.
    """
    partial = folder / f".checkpoint-{iteration}.partial"
    final = folder / f"checkpoint-{iteration}"
    shards: dict[str, Any] = {}
    if shares_rows():
        state = _map_leaves(state, lambda name, value: _set_aside(name, value, shards))
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)  # with shards of other processes
        partial.mkdir(parents=True)
        torch.save(state, partial / _FILE)
    wait_for_all()
    if shards:
        from torch.distributed.checkpoint import save

        save(shards, checkpoint_id=partial / _SHARDS)
    if is_main_process():
        replace_folder(partial, final)
    wait_for_all()
    return final


def _set_aside(name: str, value: Any, shards: dict[str, Any]) -> Any:
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    shards[name] = value
    return Shards(name)


def _map_leaves(value: Any, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """Apply a function to the name and value of all that is no dict, list or tuple."""
    if isinstance(value, dict):
        return {key: _map_leaves(part, function, f"{name}.{key}") for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_leaves(part, function, f"{name}.{i}") for i, part in enumerate(value))
    return function(name, value)


def _load_shards(folder: Path) -> dict[str, Any]:
    """The tensors in a folder of shards, dealt anew to the processes that there are.

    Raises:
        UserError: for a process by itself.
    """
    if not shares_rows():
        raise UserError(
            f"{folder.parent} was written by --distributed fsdp2; resume with it, under torchrun, with any "
            "number of processes"
        )
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.tensor import Shard, empty

    reader, mesh = FileSystemReader(folder), device_mesh()
    shards = {
        name: empty(of.size, dtype=of.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, of in reader.read_metadata().state_dict_metadata.items()
    }
    load(shards, storage_reader=reader)
    return shards


def find_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """Load a checkpoint by its folder, or the ``last`` one of ``folder``.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    chosen = Path(name)
    if name == "last":
        steps = {
            int(m[1]): p
            for p in folder.glob("checkpoint-*")
            if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
        }
        if not steps:
            raise UserError(f"no checkpoint in {folder}; start the run without --resume_from_checkpoint")
        chosen = steps[max(steps)]
    elif not chosen.exists() and (folder / name).exists():
        chosen = folder / name
    if not (chosen / _FILE).is_file():
        raise UserError(f"no checkpoint at {chosen}; give a folder that holds {_FILE}")
    try:
        # our own file, and it holds the states of Python's and numpy's generators
        state = torch.load(chosen / _FILE, weights_only=False)
        if not (chosen / _SHARDS).is_dir():
            return state
        shards = _load_shards(chosen / _SHARDS)
        return _map_leaves(state, lambda _, value: shards[value.name] if isinstance(value, Shards) else value)
    except UserError:
        raise
    except Exception as error:  # half a pickle may end in any
        raise UserError(f"{chosen / _FILE} is damaged and cannot be read; resume from another one") from error


def saved_state(config: Any) -> dict[str, Any] | None:
    """The checkpoint that a stage goes on from; None, with its output folder made, where it begins.

    A run that torchrun started again goes on from its last checkpoint, whatever it was told at first.

    Args:
        config: with ``output_dir`` and ``resume_from_checkpoint``.

    Raises:
        UserError: where there is no such checkpoint, or the folder is in use.
    """
    folder, name = Path(config.output_dir), config.resume_from_checkpoint
    if restarted() and of_main_process(lambda: bool([*folder.glob("checkpoint-*")])):
        name = "last"
    if name:
        return find_checkpoint(folder, name)
    prepare_output_dir(folder)
    return None
