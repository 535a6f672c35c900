"""What a language model does between its trunk's hidden states and its logits, read off its behaviour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UnservedModelError, UserError
from torchrl_maxmin.models.sequences import answering, backbone_of, hidden_states, max_positions, undisturbed

__all__ = ["OutputHead", "read_in_one_piece"]


@dataclass(frozen=True)
class OutputHead:
    """From hidden states h to logits: ``softcap * tanh(z / softcap)`` of ``z = logit_scale * h W^T + b``.

    W and ``b / bias_scale`` are those of the model's output embeddings. What is scaled or capped
    (Granite, Cohere, MiniCPM3, Gemma2 ...) is found by :meth:`read` with a trial of the model itself,
    so that no list of config names has to be kept.

    Attributes:
        logit_scale: factor of the product with W; 1.0 for most models.
        bias_scale: factor of the output embeddings' bias, where they have one.
        softcap: bound of the logits; None for most models.
    """

    logit_scale: float = 1.0
    bias_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def read(cls, model: Any) -> OutputHead:
        """Find what a causal language model does to its logits, by two passes of a few tokens.

        Its output embeddings are watched, and in the second pass answer with a probe instead: the
        logits are then that function of the probe which the model applies behind them.

        Raises:
            UserError: where the logits are no such function of the trunk's hidden states.
        """
        trial = _Trial(model)
        states, inputs, outputs, _ = trial.run()
        if not all(bool(x.isfinite().all()) for x in (states, inputs, outputs)):
            raise UserError(
                f"{type(model).__name__} gives NaN or infinity for ordinary tokens: its weights are damaged, "
                f"or overflow in {str(outputs.dtype).removeprefix('torch.')}; save or download them again"
            )
        head = model.get_output_embeddings()
        product = nn.functional.linear(inputs, head.weight.to(inputs.dtype), _bias(head, inputs.dtype))
        if not _close(outputs, product):
            raise _refusal(model, "has output embeddings that are no linear layer")
        hidden_scale = _factor(inputs, states)
        if hidden_scale is None:
            raise _refusal(model, "changes its hidden states before the output embeddings")
        probe = _probe(outputs)
        form = _scale_and_softcap(probe, trial.run(probe)[3])
        if form is None:
            raise _refusal(model, "changes its logits by more than a scale and a soft cap")
        scale, softcap = form
        return cls(scale * hidden_scale, scale, softcap)


def read_in_one_piece(head: nn.Module) -> None:
    """Make frozen output embeddings lay out in one piece what they read.

    ``generate`` gives them a slice of a prompt's states, which PyTorch does not fold into one matrix product:
    a frozen weight is multiplied row by row, several times slower, and in bfloat16 on a CPU with a copy of it
    for every row (7 GB for 128 prompts of SmolLM2-135M).

    Args:
        head: the output embeddings; changed in place.
    """
    head.register_forward_pre_hook(_in_one_piece)


def _in_one_piece(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *others = arguments
    return (states.contiguous(), *others)


class _Trial:
    """Passes of a model over a few tokens, with its trunk and its output embeddings watched."""

    def __init__(self, model: Any):
        self.model = model
        self.head, self.trunk = model.get_output_embeddings(), backbone_of(model)
        if not isinstance(getattr(self.head, "weight", None), Tensor) or self.trunk is model:
            raise _refusal(model, "has no trunk and output embeddings of its own")

    def run(self, probe: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The trunk's states, the output embeddings' input and output, and the logits; all [2, 3, ...]."""
        seen: dict[str, Tensor] = {}

        def watch_trunk(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(getattr(output, "last_hidden_state", None), Tensor):
                seen["states"] = output.last_hidden_state

        def watch_head(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if arguments:
                seen["inputs"], seen["outputs"] = arguments[0], output
            return probe

        hooks = [
            self.trunk.register_forward_hook(watch_trunk),
            self.head.register_forward_hook(watch_head),
        ]
        vocabulary = self.model.get_input_embeddings().num_embeddings
        tokens = (torch.arange(6, device=self.head.weight.device) % vocabulary).reshape(2, 3)
        tokens = tokens[:, : max_positions(self.model)]
        mask = torch.ones_like(tokens)
        with undisturbed(self.model), answering(type(self.model).__name__):
            try:
                logits = self.model(input_ids=tokens, attention_mask=mask).logits
            finally:
                for hook in hooks:
                    hook.remove()
            if "states" not in seen:  # OPT calls the decoder within its trunk
                seen["states"] = hidden_states(self.trunk, tokens, mask.bool())
        if "inputs" not in seen:
            raise _refusal(self.model, "does not call its output embeddings as a module")
        return seen["states"], seen["inputs"], seen["outputs"], logits


def _refusal(model: Any, fault: str) -> UserError:
    return UnservedModelError(
        f"{type(model).__name__} {fault}, so that its log-probabilities cannot be had from its hidden "
        "states; use a language model whose logits are a linear layer of them, scaled or soft-capped at most"
    )


def _bias(head: Any, dtype: torch.dtype) -> Tensor | None:
    bias = getattr(head, "bias", None)
    return None if bias is None else bias.to(dtype)


def _rounding(*tensors: Tensor) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of a sum of products."""
    if found.shape != expected.shape:
        return False
    bound = 64 * _rounding(found, expected) * (expected.abs().max() + 1e-6)
    return bool((found.double() - expected.double()).abs().max() <= bound)


def _factor(found: Tensor, given: Tensor) -> float | None:
    """The number c with ``found = c * given``, up to rounding; None where there is none."""
    if found.shape != given.shape:
        return None
    if torch.equal(found, given):
        return 1.0
    wide, base = found.double(), given.double()
    factor = float((wide * base).sum() / (base * base).sum().clamp_min(torch.finfo(torch.float64).tiny))
    return _snap(factor, _rounding(found, given)) if _close(wide.to(found.dtype), factor * base) else None


def _snap(factor: float, eps: float) -> float:
    """A plain model keeps the operator's plain path: what is 1 up to rounding is 1."""
    return 1.0 if abs(factor - 1.0) <= 8 * eps else factor


def _probe(outputs: Tensor) -> Tensor:
    """Values of both signs between 2^-40 and 2^60, in float32 at least, in the shape of the logits."""
    size = outputs.numel()
    exponents = torch.linspace(-40, 16, max(size - 2, 2), dtype=torch.float64)
    values = torch.cat([exponents, torch.tensor([60.0, 60.0], dtype=torch.float64)]).exp2()[-size:]
    signs = torch.where(torch.arange(len(values)) % 2 == 0, 1.0, -1.0)
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return (signs * values).to(outputs.device, dtype).reshape(outputs.shape)


def _scale_and_softcap(probe: Tensor, logits: Tensor) -> tuple[float, float | None] | None:
    """Scale s and bound c of ``logits = c * tanh(s z / c)``, c None for ``s z``; None where neither fits."""
    if logits.shape != probe.shape:
        return None
    eps = _rounding(probe, logits)
    z, logits = probe.double().flatten(), logits.double().flatten()
    smallest = z.abs().argsort()[: max(len(z) // 20, 1)]
    scale = _snap(float((logits[smallest] / z[smallest]).median()), eps)
    if not math.isfinite(scale) or scale == 0.0:
        return None
    for softcap in (None, float(logits.abs().max())):
        fit = scale * z if softcap is None else softcap * (scale * z / softcap).tanh()
        if bool(((logits - fit).abs() <= 16 * eps * fit.abs()).all()):
            return scale, softcap
    return None
