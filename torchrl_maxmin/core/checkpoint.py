"""Everything a run needs to go on as if it had never stopped, written whole or not at all, without pickle."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
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
from torchrl_maxmin.core.manifest import MANIFEST, DamagedError, require_whole, write_manifest
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import replace_folder
from torchrl_maxmin.core.run_folder import continued, no_run
from torchrl_maxmin.core.serial import STRUCTURE, Elsewhere, load_state, save_state, sync_folder

__all__ = [
    "find_checkpoint",
    "random_state",
    "require_same_batch",
    "restore_random_state",
    "save_checkpoint",
    "saved_state",
]

_SHARDS = "shards"


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


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write ``checkpoint-N``; a crash on the way leaves older checkpoints as they were.

    All processes that work as one call it. The main one writes, and each its parts of sharded tensors, by
    ``torch.distributed.checkpoint``; every file is safetensors or JSON, and ``manifest.json`` holds their
    checksums.

    Args:
        folder: of the run.
        iteration: N.
        state: what :func:`~torchrl_maxmin.core.serial.save_state` takes.
        keep: how many checkpoints stay, the latest ones; all, if None.
    """
    partial = folder / f".checkpoint-{iteration}.partial"
    final = folder / f"checkpoint-{iteration}"
    shards: dict[str, Any] = {}
    if shares_rows():
        state = _map_leaves(state, lambda name, value: _set_aside(name, value, shards))
        names = of_main_process(lambda: _first_names(shards))  # it has rows of every tensor
        state = _map_leaves(state, lambda _, v: Elsewhere(names[v.name]) if isinstance(v, Elsewhere) else v)
        shards = {name: shard for name, shard in shards.items() if names[name] == name}
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)  # with shards of other processes
        partial.mkdir(parents=True)
        save_state(partial, state)
    wait_for_all()
    if shards:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        save(shards, storage_writer=HuggingFaceStorageWriter(str(partial / _SHARDS), save_distributed=True))
    if is_main_process():
        write_manifest(partial, [path for path in partial.rglob("*") if path.is_file()])
        sync_folder(partial)
        replace_folder(partial, final)
        sync_folder(folder)
        if keep is not None:
            places = _checkpoints(folder)
            for other in sorted(places)[:-keep]:
                if other != iteration:
                    shutil.rmtree(places[other])
    wait_for_all()
    return final


def _set_aside(name: str, value: Any, shards: dict[str, Any]) -> Any:
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    shards[name] = value
    return Elsewhere(name)


def _first_names(shards: dict[str, Any]) -> dict[str, str]:
    """The name that each tensor is written under: weights that are tied have one, as safetensors has it."""
    places: dict[Any, str] = {}
    names = {}
    for name, shard in shards.items():
        part = shard.to_local()
        memory = (part.data_ptr(), part.shape, part.stride(), part.dtype) if part.numel() else name
        names[name] = places.setdefault(memory, name)
    return names


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
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.tensor import Shard, empty

    reader, mesh = HuggingFaceStorageReader(str(folder)), device_mesh()
    shards = {
        name: empty(of.size, dtype=of.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, of in reader.read_metadata().state_dict_metadata.items()
    }
    load(shards, storage_reader=reader)
    return shards


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by iteration."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}


def find_checkpoint(folder: Path, name: str) -> dict[str, Any] | None:
    """Load a checkpoint by its folder, or the ``last`` one of ``folder`` that is whole.

    Returns:
        The state; None for ``last`` where there is no checkpoint yet, or none that is whole.

    Raises:
        UserError: if the one that is named is not there, or damaged.
    """
    if name != "last":
        chosen = folder / name if not Path(name).exists() and (folder / name).exists() else Path(name)
        if not (chosen / STRUCTURE).is_file():
            raise UserError(f"no checkpoint at {chosen}; give a folder that holds {STRUCTURE}, or last")
        return _load(chosen)
    places = _checkpoints(folder)
    for iteration in sorted(places, reverse=True):
        try:
            return _load(places[iteration])
        except DamagedError as error:
            before = [f"checkpoint-{other}" for other in sorted(places) if other < iteration]
            instead = f"going on from {before[-1]}" if before else "the run begins anew"
            console.print(f"! {error}; {instead}", markup=False, soft_wrap=True)
    return None


def saved_state(config: Any) -> dict[str, Any] | None:
    """The checkpoint that a stage goes on from; None, with its output folder made, where it begins.

    A run that torchrun started again goes on from its last checkpoint, whatever it was given at first.

    Args:
        config: with ``output_dir`` and ``resume_from_checkpoint``.

    Raises:
        UserError: where there is no run, or the checkpoint that is named is not there, or damaged.
    """
    folder = Path(config.output_dir)
    name = "last" if restarted() else config.resume_from_checkpoint
    if name == "last" and not restarted() and not (continued(folder) or _checkpoints(folder)):
        raise no_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return find_checkpoint(folder, name) if name else None


def require_same_batch(before: int, now: int) -> None:
    """Raise :class:`UserError` where an optimizer step would have other rows than those of a checkpoint."""
    if before != now:
        raise UserError(
            f"an optimizer step of the checkpoint has {before} rows, and these settings give {now}: keep "
            "--per_device_train_batch_size times --gradient_accumulation_steps times the processes"
        )


def _load(chosen: Path) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        DamagedError: for one that is not whole.
    """
    if not (chosen / MANIFEST).is_file():
        raise DamagedError(f"{chosen / MANIFEST} is missing")
    require_whole(chosen)
    try:
        state = load_state(chosen)
        if not (chosen / _SHARDS).is_dir():
            return state
        shards = _load_shards(chosen / _SHARDS)
    except UserError:
        raise
    except Exception as error:  # the manifest itself may be of another folder
        raise DamagedError(f"{chosen} cannot be read ({type(error).__name__}: {error})") from error
    return _map_leaves(state, lambda _, value: shards[value.name] if isinstance(value, Elsewhere) else value)
