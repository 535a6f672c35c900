"""Float32 adapters on a half-precision trunk, without float32 copies of what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.models.loading import import_peft

__all__ = ["WideningLinear", "keep_narrow_inputs"]


class _WidenedProduct(torch.autograd.Function):
    """``x.to(weight) @ weight.T``, of which ``x`` is kept as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product, in the weight's dtype."""
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        """Gradients, each in the dtype of what it is of."""
        x, weight = ctx.saved_tensors
        of_x = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = grad.flatten(0, -2).mT @ x.flatten(0, -2).to(weight.dtype)
        return of_x, of_weight


class WideningLinear(nn.Linear):
    """A linear layer without bias that computes in its weight's dtype and keeps its input in the input's own.

    The values are those of ``linear(x.to(weight.dtype))``. The input of a trunk's layer is in memory anyway,
    once for all the layers that read it; a float32 copy for each is most of what bfloat16 would save.

    Example:
        >>> layer = WideningLinear.of(nn.Linear(4, 2, bias=False))
        >>> layer(torch.ones(3, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> WideningLinear:
        """One with the parameter of another layer."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = linear.weight
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Compute the product ``[..., out]`` of ``x [..., in]``."""
        if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x.to(self.weight.dtype))
        return _WidenedProduct.apply(x, self.weight)


def keep_narrow_inputs(model: nn.Module) -> None:
    """Let every LoRA layer of a model read its input in the trunk's precision, in place of a float32 copy.

    Layers with dropout on their input are left as they are: what dropout makes is a copy anyway. An adapter
    that comes to a layer later is read as those that are there.

    Args:
        model: a peft model; changed in place.
    """
    lora = import_peft().tuners.lora.Linear
    for layer in model.modules():
        if not isinstance(layer, lora):
            continue
        if layer.cast_input_dtype_enabled:
            plain = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
            layer.cast_input_dtype_enabled = not plain
        if not layer.cast_input_dtype_enabled:
            for name, linear in layer.lora_A.items():
                layer.lora_A[name] = WideningLinear.of(linear)
