"""Float32 adapters that compute in the precision of the trunk that they are on, and in few passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.models.loading import import_peft

__all__ = ["add_low_rank", "compute_as_the_trunk"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_low_rank(result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Add the product of two thin matrices to a layer's output: ``result + scale * x a^T b^T``.

    Both matrices are rounded to the input's dtype, as autocast would do; sums are float32 within a product.
    In float32 nothing is rounded. The addition is part of the second product: on a CPU a tenth of the reads
    and writes of peft's own steps on a bfloat16 trunk, which go by float32 copies of input and output, and a
    quarter of those on a float32 one.

    Args:
        result: what the layer without adapter gives [..., out]; holds the sum where no gradient is taken.
        x: its input [..., in].
        a: [r, in].
        b: [out, r].
        scale: of the update.

    Example:
        >>> x, a, b = torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> add_low_rank(torch.zeros(1, 2), x, a, b, 2.0)
        tensor([[6., 6.]])
    """
    narrow = nn.functional.linear(x, a.to(x.dtype)).flatten(0, -2)
    add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
    wide = add(result.flatten(0, -2), narrow.to(result.dtype), (scale * b).to(result.dtype).mT)
    return wide.view(result.shape)


@cache
def _variant() -> Any:
    """What peft calls in place of its own steps."""
    from peft.tuners.lora.layer import LoraVariant

    class FusedLora(LoraVariant):  # type: ignore[misc]
        """A plain LoRA adapter by :func:`add_low_rank`."""

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **unused: Any) -> Tensor:
            """Compute a layer's output with an adapter, from the one without."""
            a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
            x = module.lora_dropout[active_adapter](x)
            return add_low_rank(result, x, a, b, module.scaling[active_adapter])

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            """Return a layer's weight with an adapter in it."""
            return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
            """Put an adapter into a layer's weight."""
            orig_weight.data += module.get_delta_weight(active_adapter)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            """Return a layer's weight without the adapter that is in it."""
            return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    return FusedLora()


def compute_as_the_trunk(model: nn.Module) -> None:
    """Let every plain LoRA layer of a model compute in the trunk's precision, by :func:`add_low_rank`.

    Adapters with a bias, on quantized weights, and variants such as DoRA, stay peft's. An adapter that comes
    to a layer later needs a call of its own.

    Args:
        model: a peft model; changed in place.
    """
    lora = import_peft().tuners.lora.Linear
    for layer in model.modules():
        if isinstance(layer, lora) and layer.get_base_layer().weight.dtype in _DTYPES:
            for name, b in layer.lora_B.items():
                if b.bias is None:
                    layer.lora_variant.setdefault(name, _variant())
            ours = (layer.lora_variant.get(name) is _variant() for name in layer.lora_B)
            layer.cast_input_dtype_enabled = not all(ours)
