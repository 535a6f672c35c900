"""What a model does to the product of hidden states and output embedding before the softmax."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """``softcap * tanh((logit_scale * h W^T + bias) / softcap)``; by default the logits as they are."""

    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def check(self, vocabulary: int) -> None:
        """Raise unless bias, scale and cap can be applied to a vocabulary of this size.

        Raises:
            ValueError: If the bias is not floating point or not ``[V]``, the scale is 0 or not finite, or the
                cap is not positive and finite.
        """
        if self.bias is not None and not self.bias.is_floating_point():
            raise ValueError(f"bias must be floating point, got {self.bias.dtype}; convert it with .float().")
        if self.bias is not None and self.bias.shape != (vocabulary,):
            raise ValueError(f"bias must be [V] = [{vocabulary}], got {tuple(self.bias.shape)}.")
        if not 0 < abs(self.logit_scale) < math.inf:
            raise ValueError(f"logit_scale must be finite and not 0, got {self.logit_scale}.")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None for no cap, got {self.softcap}.")

    def to(self, dtype: torch.dtype) -> "LogitTransform":
        """Return the same with a contiguous bias of this dtype, without its gradient."""
        bias = None if self.bias is None else self.bias.detach().to(dtype).contiguous()
        return self._replace(bias=bias)

    def of_block(self, block: slice) -> "LogitTransform":
        """Return that of some tokens of the vocabulary."""
        return self if self.bias is None else self._replace(bias=self.bias[block])

    def uncapped_(self, product: Tensor) -> Tensor:
        """Scale ``h W^T`` and add the bias, in place."""
        if self.logit_scale != 1.0:
            product.mul_(self.logit_scale)
        return product if self.bias is None else product.add_(self.bias)

    def capped_(self, logits: Tensor) -> Tensor:
        """Cap the logits, in place."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, uncapped: Tensor) -> Tensor | None:
        """Return the cap's derivative, or None without a cap.

        ``1 / cosh^2``: in ``1 - tanh^2`` a saturated logit loses all its digits.
        """
        return None if self.softcap is None else (uncapped / self.softcap).cosh_().square_().reciprocal_()


PLAIN = LogitTransform()
