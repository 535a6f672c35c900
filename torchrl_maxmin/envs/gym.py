"""MO-Gymnasium environments, as TorchRL wraps them, with observations that a small network can read.

What does not work here, or only with care (MO-Gymnasium 1.3.2):

* ``breakable-bottles-v0`` observes a dictionary, ``minecart-rgb-v0`` and ``mo-supermario-v0`` pixels: refused
  with a message; bring a factory of your own (``module:function``).
* ``four-room-v0`` draws from Python's own ``random``, so its seed here does not decide it.
* ``water-reservoir-v0`` has actions without a bound, and random ones are infinite, with rewards that are no
  numbers: make it with ``normalized_action=True``.
* Unbounded observations (``water-reservoir-v0``, MuJoCo) are left as they are: add TorchRL's
  :class:`~torchrl.envs.transforms.VecNormV2` where a network needs them normalised.
* MuJoCo, Box2D, highway and mario environments need MO-Gymnasium's own extras.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, TensorSpec, Unbounded
from torchrl.envs import EnvBase, MOGymEnv, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.transforms import ObservationTransform
from torchrl.envs.transforms.utils import _set_missing_tolerance

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs.optional import require_mo_gymnasium

__all__ = ["FlatObservation", "make_gym_env"]

OBSERVATIONS = ("auto", "one_hot", "scale", "none")
ONE_HOT_LIMIT = 512  # columns up to which "auto" makes integers one-hot
INFINITE = 1e30  # gymnasium states "no bound" as infinity or as the largest float


class FlatObservation(ObservationTransform):
    """Write ``observation`` as one float32 row.

    Args:
        spec: of the observation that comes in.
        mode: ``one_hot`` makes every bounded integer one-hot, one after the other; ``scale`` maps every
            bounded number to [0, 1] and leaves the others; ``none`` casts alone; ``auto`` is ``one_hot`` for
            integers of at most 512 columns together, else ``scale``.

    Raises:
        UserError: on an unknown mode, or one-hot of what is no bounded integer.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> flat = FlatObservation(Bounded(0, 2, shape=(2,), dtype=torch.int32))
        >>> flat._apply_transform(torch.tensor([1, 0])).tolist()
        [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, spec: TensorSpec, mode: str = "auto") -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        if mode not in OBSERVATIONS:
            raise UserError(f"observation must be one of {', '.join(OBSERVATIONS)}, got '{mode}'")
        low, high = _bounds(spec)
        bounded = (low.abs() < INFINITE) & (high.abs() < INFINITE)
        integers = not spec.dtype.is_floating_point and bool(bounded.all())
        columns = int((high - low + 1).sum()) if integers else 0
        if mode == "auto":
            mode = "one_hot" if integers and columns <= ONE_HOT_LIMIT else "scale"
        if mode == "one_hot" and not integers:
            raise UserError("observation one_hot needs bounded integers; use scale or none here")
        self.mode, self.width, self._dims = mode, columns if mode == "one_hot" else len(low), len(spec.shape)
        if mode == "one_hot":
            sizes = (high - low + 1).long()
            self.register_buffer("_source", torch.arange(len(sizes)).repeat_interleave(sizes))
            values = [torch.arange(size) + start for size, start in zip(sizes, low.long(), strict=True)]
            self.register_buffer("_value", torch.cat(values))
        elif mode == "scale":
            span = high - low
            self.register_buffer("_low", torch.where(bounded, low, 0.0).float())
            self.register_buffer("_span", torch.where(bounded & (span > 0), span, 1.0).float())

    def _apply_transform(self, obs: Tensor) -> Tensor:
        flat = obs.flatten(-self._dims) if self._dims else obs.unsqueeze(-1)
        if self.mode == "one_hot":
            return (flat[..., self._source] == self._value).float()
        return (flat.float() - self._low) / self._span if self.mode == "scale" else flat.float()

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        with _set_missing_tolerance(self, True):
            return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """One row of float32."""
        given = observation_spec["observation"]
        batch = given.shape[: len(given.shape) - self._dims]
        observation_spec["observation"] = Unbounded(shape=(*batch, self.width), device=given.device)
        return observation_spec


def _bounds(spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Least and largest value of every flattened component, float64; infinite where there is none."""
    size = max(spec.shape.numel(), 1)
    if isinstance(spec, Bounded):
        return spec.space.low.flatten().double(), spec.space.high.flatten().double()
    sizes = getattr(spec, "nvec", None)
    if sizes is None and hasattr(spec.space, "n"):
        # a Binary spec counts its components in n, each of them 0 or 1
        sizes = torch.full((size,), 2 if type(spec).__name__ == "Binary" else spec.space.n)
    if sizes is None:
        return torch.full((size,), -torch.inf).double(), torch.full((size,), torch.inf).double()
    return torch.zeros(size).double(), torch.as_tensor(sizes).flatten().double() - 1


def _one(env_id: str, observation: str, device: str, options: dict[str, Any]) -> EnvBase:
    require_mo_gymnasium(env_id)  # here, in a worker's process too, it registers its environments
    env = MOGymEnv(env_id, categorical_action_encoding=True, device=device, **options)
    if list(env.observation_spec.keys(True, True)) != ["observation"]:
        keys = ", ".join(str(key) for key in env.observation_spec.keys(True, True))
        raise UserError(
            f"{env_id} observes {keys}; only environments with a single array of numbers work here. Write a "
            "factory f(num_envs, seed) that makes one, and name it module:function"
        )
    return TransformedEnv(env, FlatObservation(env.observation_spec["observation"], observation))


def make_gym_env(
    env_id: str,
    num_envs: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    observation: str = "auto",
    parallel: bool = False,
    **options: Any,
) -> EnvBase:
    """Copies of a MO-Gymnasium environment, one after the other or each in a process of its own.

    Args:
        env_id: a registered name.
        num_envs: copies N.
        seed: of the first copy; the others' follow from it.
        device: where tensors live.
        observation: see :class:`FlatObservation`.
        parallel: a process for every copy.
        **options: of ``mo_gymnasium.make``.

    Returns:
        An environment of batch size [N]: ``observation`` [N, D] float32, ``reward`` [N, K].

    Raises:
        UserError: if MO-Gymnasium or what the environment needs is missing, or the observation does not fit.

    Example:
        >>> from torchrl_maxmin.envs.gym import make_gym_env
        >>> env = make_gym_env("deep-sea-treasure-v0", 2)
        >>> env.rollout(3, break_when_any_done=False)["observation"].shape
        torch.Size([2, 3, 24])
    """
    make = partial(_one, env_id, observation, str(device), options)
    try:
        make().close()
    except UserError:
        raise
    except Exception as error:  # what gymnasium raises differs by version and environment
        raise UserError(f"MO-Gymnasium cannot make {env_id}: {error}") from error
    env = (ParallelEnv if parallel else SerialEnv)(num_envs, make)
    env.set_seed(seed)
    return env
