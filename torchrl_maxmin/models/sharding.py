"""Networks of which every process holds a part, by torch's FSDP2 (``fully_shard``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchrl_maxmin.core.distributed import device_mesh
from torchrl_maxmin.models.checkpointing import layers_of

__all__ = ["gather_while_sampling", "gathered_state", "shard", "shard_policy", "whole_weights"]


def shard(module: nn.Module, *methods: str, whole: Iterable[nn.Parameter] = ()) -> None:
    """Leave each process its part of the parameters; a layer's are gathered while it is at work.

    Gradients are summed over the processes, not averaged: losses are shares of the whole batch's. LoRA
    adapters, which are small and may be of another precision than the trunk, every process keeps whole.

    Args:
        module: holds layers of transformers; copy it before, not after.
        *methods: what runs it beside ``forward``; none of them calls another.
        whole: further parameters that every process keeps whole.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = device_mesh()
    kept = {*whole, *(p for name, p in module.named_parameters() if ".lora_" in name)}
    for part in (*layers_of(module), module):
        # a root that stayed whole would not see the optimizer's step
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    for name in methods:
        register_fsdp_forward_method(module, name)


def shard_policy(policy: nn.Module) -> None:
    """Shard a :class:`~torchrl_maxmin.models.language.TokenPolicy`; while it samples, its weights are whole.

    It is the root, since its scoring reads the output embeddings' weights, which may be the input's, too.
    """
    shard(policy, "log_prob_and_entropy", "take_states")
    gather_while_sampling(policy)


def gather_while_sampling(policy: nn.Module) -> None:
    """Let a sharded policy's weights be whole while it samples, and those of its copies that share them."""
    whole: list[Any] = []

    def gather(module: nn.Module, *_: Any) -> None:
        whole.append(whole_weights(module))
        whole[-1].__enter__()

    def part(*_: Any) -> None:
        whole.pop().__exit__(None, None, None)

    policy.register_forward_pre_hook(gather, prepend=True)  # a layer at a time would be gathered every token
    policy.register_forward_hook(part)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Gather a sharded module's parameters for as long; any other module is as it is."""
    shards = list(_shards(module))
    for one in shards:
        one.set_reshard_after_forward(False, recurse=False)
        one.unshard()
    yield
    for one in shards:
        one.set_reshard_after_forward(True, recurse=False)
        one.reshard()


def gathered_state(module: nn.Module) -> dict[str, Any]:
    """What ``save_pretrained`` needs beside the folder: the whole state of a sharded module, on the CPU.

    All processes call it; the main one gets the state.

    Args:
        module: the module, or a part of it.
    """
    if not any(_shards(module)):
        return {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    first: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):  # tied ones are saved once
        if name in state:
            state[name] = state[first.setdefault(parameter, name)]
    return {"state_dict": state}


def _shards(module: nn.Module) -> Iterator[Any]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (part for part in module.modules() if isinstance(part, FSDPModule))
