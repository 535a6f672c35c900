"""What a trunk is, read off its behaviour where that can be, and off its config where not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.sequences import backbone_of, hidden_states

__all__ = [
    "answering",
    "max_positions",
    "require_positions",
    "states_width",
    "text_config",
    "undisturbed",
]


def text_config(model: Any) -> Any:
    """The config of what reads and writes text: nested in another one where a model also sees images.

    Args:
        model: a Hugging Face model, or a config.
    """
    return getattr(model, "config", model).get_text_config(decoder=True)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A trial of a model: no gradients, and the caller's random numbers stay where they are."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Whatever a model raises where it is given plain text, as one :class:`UserError`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = next(iter(str(error).strip().splitlines()), "no more is known")
        raise UserError(
            f"{name} fails on padded text ({type(error).__name__}: {words}); use another language model"
        ) from error


def states_width(backbone: nn.Module) -> int:
    """Width H of a trunk's hidden states, which need not be that of its embeddings or of its layers."""
    device = next(backbone.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with undisturbed(backbone):
        return hidden_states(backbone, token, torch.ones_like(token, dtype=torch.bool)).shape[-1]


def max_positions(model: Any) -> int | None:
    """Tokens that a model has positions for; None where nothing limits them.

    Args:
        model: a Hugging Face model, or its config, which knows of all tables but RoBERTa's.
    """
    config = text_config(model)
    # MPT's table of biases is as long as its config's longest sequence
    names = ("max_position_embeddings", "max_seq_len")
    limits = [getattr(config, name, None) or 0 for name in names]
    if isinstance(model, nn.Module):
        for name, module in backbone_of(model).named_modules():
            # RoBERTa and its kin count positions from the padding index on
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit > 0), default=None)


def require_positions(model: Any, longest_prompt: int, response_length: int) -> None:
    """Raise :class:`UserError` where prompts and responses are longer than a policy has positions for.

    Args:
        model: the policy's language model, or its config.
        longest_prompt: tokens of the longest prompt, after truncation.
        response_length: most tokens of a response.
    """
    positions = max_positions(model)
    if positions is not None and longest_prompt + response_length > positions:
        raise UserError(
            f"the longest prompt has {longest_prompt} tokens and a response up to {response_length}, more "
            f"than the model's {positions} positions together; lower --max_prompt_length or --response_length"
        )
