"""Actor and critic for environments: multilayer perceptrons that fit the environment's specs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor, OneHotCategorical, ProbabilisticActor, TanhNormal

from torchrl_maxmin.core.errors import UserError

__all__ = ["make_actor", "make_critic"]


def _network(inputs: int, outputs: int, hidden_sizes: Sequence[int], gain: float) -> MLP:
    """Tanh layers, orthogonal; the last one small for a policy that starts near uniform."""
    network = MLP(
        in_features=inputs, out_features=outputs, num_cells=list(hidden_sizes), activation_class=nn.Tanh
    )
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return network


def _observation_size(env: EnvBase) -> int:
    spec = env.observation_spec.get("observation", None)
    if spec is None:
        names = ", ".join(map(str, env.observation_spec.keys(True, True)))
        raise UserError(f"the environment gives {names}; the policy reads one entry named observation")
    if len(spec.shape) != len(env.batch_size) + 1 or not spec.dtype.is_floating_point:
        raise UserError(
            f"the observation is {spec.dtype} of shape {tuple(spec.shape)}; the policy reads floats of shape "
            f"{tuple(env.batch_size)} and one dimension more"
        )
    return spec.shape[-1]


def make_actor(env: EnvBase, hidden_sizes: Sequence[int] = (64, 64)) -> ProbabilisticActor:
    """A stochastic policy for the environment's actions.

    Args:
        env: with an ``observation`` [*B, D] of floats, and actions that are categorical (numbers or
            one-hot) or bounded and continuous.
        hidden_sizes: units of the hidden layers.

    Returns:
        A module that reads ``observation`` and writes ``action`` and ``sample_log_prob`` [*B].

    Raises:
        UserError: for observations or actions that it cannot read or give.

    Example:
        >>> from torchrl_maxmin.envs import TabularEnv, VectorMDP
        >>> env = TabularEnv(VectorMDP.random(4, 3, 2), num_envs=5)
        >>> env.rollout(6, make_actor(env))["action"].shape
        torch.Size([5, 6])
    """
    size, spec = _observation_size(env), env.action_spec
    single, kind = _action_kind(spec, len(env.batch_size))
    if kind is TanhNormal:
        # its parameters are two entries; a wide start is a standard deviation of about one
        network: nn.Module = nn.Sequential(
            _network(size, 2 * single.shape[-1], hidden_sizes, 0.01), NormalParamExtractor()
        )
        in_keys, settings = ["loc", "scale"], {"low": single.low, "high": single.high}
    else:
        network = _network(
            size, single.shape[-1] if kind is OneHotCategorical else single.n, hidden_sizes, 0.01
        )
        in_keys, settings = ["logits"], {}
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=in_keys),
        in_keys=in_keys,
        spec=spec,
        distribution_class=kind,
        distribution_kwargs=settings,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )


def _action_kind(spec: TensorSpec, batch_dims: int) -> tuple[TensorSpec, type]:
    """The spec of one copy's action, and the distribution that gives it."""
    single = spec[(0,) * batch_dims] if batch_dims else spec
    if isinstance(single, OneHot):
        return single, OneHotCategorical
    if isinstance(single, Categorical) and not single.shape:
        return single, torch.distributions.Categorical
    if isinstance(single, Bounded) and single.dtype.is_floating_point and len(single.shape) == 1:
        return single, TanhNormal
    raise UserError(
        f"actions of {type(spec).__name__} {tuple(spec.shape)} are none that the policy can give: they must "
        "be categorical, one-hot, or a bounded vector of floats"
    )


def make_critic(env: EnvBase, num_columns: int, hidden_sizes: Sequence[int] = (64, 64)) -> TensorDictModule:
    """A value for every group in one pass: reads ``observation``, writes ``state_value`` [*B, K].

    Args:
        env: with an ``observation`` [*B, D] of floats.
        num_columns: K.
        hidden_sizes: units of the hidden layers.

    Raises:
        UserError: for observations that it cannot read.
    """
    network = _network(_observation_size(env), num_columns, hidden_sizes, 1.0)
    return TensorDictModule(network, in_keys=["observation"], out_keys=["state_value"])
