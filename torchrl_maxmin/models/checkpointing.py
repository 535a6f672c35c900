"""Activation checkpointing of a transformer's layers (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchrl_maxmin.core.allocator import map_large_blocks
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import import_transformers

__all__ = ["checkpoint_layers", "layers_of"]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of transformers in a model; none in an architecture that has not been divided so."""
    kind = import_transformers().modeling_layers.GradientCheckpointingLayer
    return [module for module in model.modules() if isinstance(module, kind)]


def checkpoint_layers(
    model: nn.Module, snapshot: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Compute every layer of a model again at backward, so that only the inputs of layers are kept.

    The models here stay in evaluation mode, in which Hugging Face's own switch does nothing.

    Args:
        model: holds layers of transformers; copy it before, not after.
        snapshot: called at forward; the layer is computed again within what it returns, such as the adapter
            that was active.

    Raises:
        UserError: for an architecture whose layers cannot be checkpointed.
    """
    layers = layers_of(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers to compute again: leave --gradient_checkpointing out"
        )
    memory = map_large_blocks(model)
    for layer in layers:
        layer.forward = _checkpointed(layer.forward, snapshot, memory)


def _checkpointed(
    forward: Callable[..., Any],
    snapshot: Callable[[], AbstractContextManager[None]],
    memory: AbstractContextManager[None],
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        contexts = memory, _both(snapshot(), memory)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

    return run


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield
