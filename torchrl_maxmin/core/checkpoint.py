"""Everything a policy run needs to go on as if it had never stopped, written whole or not at all."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import replace_folder

__all__ = ["find_checkpoint", "random_state", "restore_random_state", "save_checkpoint"]

_FILE = "state.pt"


def random_state() -> dict[str, Any]:
    """State of all global random generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - libraries draw from it
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all global random generators to what :func:`random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any]) -> Path:
    """Write ``checkpoint-N``; a crash on the way leaves older checkpoints as they were."""
    partial = folder / f".checkpoint-{iteration}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    torch.save(state, partial / _FILE)
    final = folder / f"checkpoint-{iteration}"
    replace_folder(partial, final)
    return final


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
        return torch.load(chosen / _FILE, weights_only=False)
    except Exception as error:  # half a pickle may end in any
        raise UserError(f"{chosen / _FILE} is damaged and cannot be read; resume from another one") from error
