"""Environments by name: ours, MO-Gymnasium's, or a factory of the user's."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torchrl.envs import EnvBase

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.importing import import_named
from torchrl_maxmin.envs.fishwood import FishwoodEnv
from torchrl_maxmin.envs.fruit_tree import FruitTreeEnv
from torchrl_maxmin.envs.gridworld import GridworldEnv
from torchrl_maxmin.envs.optional import require_mo_gymnasium

__all__ = ["BATCHED", "make_env"]

BATCHED: dict[str, Any] = {
    "fishwood-v0": FishwoodEnv,
    "fruit-tree-v0": FruitTreeEnv,
    "gridworld": GridworldEnv,
}
BACKENDS = ("auto", "batched", "gym")


def make_env(
    env_id: str,
    num_envs: int = 1,
    *,
    seed: int = 0,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    observation: str = "auto",
    parallel: bool = False,
    **options: Any,
) -> EnvBase:
    """N copies of an environment with a vector reward.

    Args:
        env_id: ``fishwood-v0``, ``fruit-tree-v0`` or ``gridworld`` (batched here), a MO-Gymnasium name, or
            ``module:function``, a factory of your own, called with ``num_envs``, ``seed`` and the options.
        num_envs: copies N.
        seed: of the environment; MO-Gymnasium's copies get seeds that follow from it.
        backend: ``batched`` moves all copies in one tensor step, ``gym`` steps MO-Gymnasium's own
            environments, ``auto`` is batched where there is one.
        device: where tensors live.
        observation: what to make of MO-Gymnasium's observations, see
            :class:`~torchrl_maxmin.envs.gym.FlatObservation`.
        parallel: give every MO-Gymnasium copy a process of its own.
        **options: of the environment.

    Returns:
        An environment of batch size [N] with ``observation`` [N, D] float32 and ``reward`` [N, K].

    Raises:
        UserError: on an unknown name, backend or option, or an environment that cannot be made or used.

    Example:
        >>> from torchrl_maxmin.envs import make_env
        >>> make_env("gridworld", 32, horizon=6).rollout(6)["next", "reward"].shape
        torch.Size([32, 6, 2])
    """
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got '{backend}'")
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}")
    if ":" in env_id:
        env = _call(env_id, _factory(env_id), {"num_envs": num_envs, "seed": seed, **options})
        if not isinstance(env, EnvBase):
            raise UserError(f"{env_id} must return a TorchRL environment, got {type(env).__name__}")
        env = env.to(device)
    elif env_id in BATCHED and backend != "gym":
        given = {"num_envs": num_envs, "seed": seed, "device": device, **options}
        try:
            env = _call(env_id, BATCHED[env_id], given)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"{env_id} cannot be made with {options}: {error}") from error
    elif backend == "batched":
        raise UserError(f"there is no batched form of {env_id}; there is one of {', '.join(BATCHED)}")
    else:
        _require_known(env_id, backend)
        from torchrl_maxmin.envs.gym import make_gym_env

        env = make_gym_env(
            env_id,
            num_envs,
            seed=seed,
            device=device,
            observation=observation,
            parallel=parallel,
            **options,
        )
    _require_fit(env_id, env, num_envs)
    return env


def _factory(path: str) -> Any:
    try:
        return import_named(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import the environment factory {path}: {error}") from error


def _call(env_id: str, make: Any, options: dict[str, Any]) -> Any:
    """Call a maker, with an option that it does not know or lacks named before it runs."""
    # a class by its __init__: TorchRL's metaclass hides the signature
    called = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    parameters = inspect.signature(called).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    unknown = [] if open_ended else [name for name in options if name not in parameters]
    if unknown:
        known = [name for name in parameters if name not in ("self", "num_envs", "seed", "device")]
        raise UserError(
            f"{env_id} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
            + (" (MO-Gymnasium's own options go with backend gym)" if env_id in BATCHED else "")
        )
    missing = [
        name
        for name, one in parameters.items()
        if one.default is one.empty and not one.kind.name.startswith("VAR") and name not in {"self", *options}
    ]
    if missing:
        raise UserError(f"{env_id} needs the option {', '.join(missing)}, which was not given")
    return make(**options)


def _require_known(env_id: str, backend: str) -> None:
    ours = ", ".join(BATCHED)
    asked = f" with backend {backend}" if env_id in BATCHED else f", none of what is batched here ({ours}),"
    require_mo_gymnasium(f"'{env_id}'{asked}")
    import gymnasium

    theirs = [
        name for name, spec in gymnasium.registry.items() if str(spec.entry_point).startswith("mo_gymnasium")
    ]
    if env_id in gymnasium.registry:
        return
    if env_id in BATCHED:
        raise UserError(f"{env_id} is no environment of MO-Gymnasium: leave backend at auto, or batched")
    close = difflib.get_close_matches(env_id, sorted({*BATCHED, *theirs}), n=4, cutoff=0.5)
    raise UserError(
        f"unknown environment '{env_id}'; batched here: {ours}; "
        + (f"close names: {', '.join(close)}; " if close else f"{len(theirs)} more from MO-Gymnasium; ")
        + "or module:function for a factory of your own"
    )


def _require_fit(env_id: str, env: EnvBase, num_envs: int) -> None:
    """The shapes that policies and statistics rely on."""
    looks = env.observation_spec.get("observation", None)
    problem = None
    if tuple(env.batch_size) != (num_envs,):
        problem = f"batch size {list(env.batch_size)} instead of [{num_envs}]"
    elif looks is None or looks.ndim != 2 or looks.dtype is not torch.float32:
        found = "none" if looks is None else f"shape {list(looks.shape)}, {looks.dtype}"
        problem = f"no 'observation' [{num_envs}, D] of float32 (found: {found})"
    elif list(env.reward_keys) != ["reward"] or env.full_reward_spec["reward"].ndim != 2:
        problem = f"no 'reward' [{num_envs}, K]"
    if problem:
        env.close(raise_if_closed=False)
        raise UserError(f"{env_id} makes an environment with {problem}; policies here cannot use it")
