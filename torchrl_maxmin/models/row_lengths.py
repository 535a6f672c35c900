"""What the host knows of the masks of a batch of responses, so that no update waits for the device."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_maxmin.masks import ROW_LENGTHS

__all__ = ["RowLengths", "row_lengths", "takes_whole_mask", "to_device"]


class RowLengths:
    """How many real tokens each row has, on the CPU.

    Args:
        prompt: of the prompts int64 [B], padded left.
        response: of the responses int64 [B], padded right.

    Example:
        >>> lengths = RowLengths(torch.tensor([2, 3]), torch.tensor([1, 4]))
        >>> lengths.longest, lengths[:1].longest, lengths.num_tokens
        (4, 1, 5)
        >>> lengths.token_index(4).tolist()
        [0, 4, 5, 6, 7]
    """

    def __init__(self, prompt: Tensor, response: Tensor):
        self.prompt, self.response = prompt, response

    @classmethod
    def of(cls, rows: TensorDictBase) -> RowLengths:
        """Those of ``prompt_mask`` [B, P] and ``action_mask`` [B, R]: one wait for the device."""
        return cls(*torch.stack([rows[key].sum(-1) for key in ("prompt_mask", "action_mask")]).cpu())

    @classmethod
    def full(cls, rows: TensorDictBase) -> RowLengths:
        """As many as the masks have columns: no wait, and shapes that are always the same."""
        return cls(
            *(torch.full(rows[key].shape[:1], rows[key].shape[1]) for key in ("prompt_mask", "action_mask"))
        )

    def __getitem__(self, index: Any) -> RowLengths:
        """Those of some of the rows."""
        return RowLengths(self.prompt[index], self.response[index])

    @property
    def longest(self) -> int:
        """The longest response, at least 1."""
        return max(int(self.response.max()), 1)

    @property
    def shortest_prompt(self) -> int:
        """The shortest prompt."""
        return int(self.prompt.min())

    @property
    def num_tokens(self) -> int:
        """All tokens of the responses."""
        return int(self.response.sum())

    def token_index(self, width: int) -> Tensor:
        """Places [num_tokens] of the responses' tokens among ``width`` columns, rows one after the other."""
        real = torch.arange(width) < self.response.unsqueeze(-1)
        return real.flatten().nonzero().squeeze(-1)


def row_lengths(tensordict: TensorDictBase) -> RowLengths:
    """The lengths that came with the rows, or else those of their masks."""
    found = tensordict.get_non_tensor(ROW_LENGTHS, None)
    return RowLengths.of(tensordict) if found is None else found


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for what the device has still to do."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def takes_whole_mask(backbone: nn.Module) -> bool:
    """Whether a trunk takes a mask [B, 1, T, T] as it is, and so reads none to learn if it can do without.

    So do models of transformers that make their mask by its common function, for PyTorch's
    ``scaled_dot_product_attention``; not where layers have windows, and masks of their own.
    """
    config = getattr(backbone, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in kinds)
    common = hasattr(sys.modules[type(backbone).__module__], "create_causal_mask")
    return getattr(config, "_attn_implementation", None) == "sdpa" and common and not windowed
