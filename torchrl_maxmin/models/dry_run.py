"""Memory and time of a model's passes without its weights or any arithmetic: a dry run on fake tensors."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from maxmin_kernels.log_probs.chunked import block_rows, kept_rows, pick_chunk_size, pick_tile
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from torchrl_maxmin.core.allocator import USUAL
from torchrl_maxmin.models.rates import Rates
from torchrl_maxmin.models.sequences import backbone_of, text_config

__all__ = ["Footprint", "Trace", "fake_copy", "nbytes", "shallow_depths", "traced"]

_aten = torch.ops.aten
# read of their first argument no more than what they give
_GATHERS = (_aten.embedding, _aten.index_select, _aten.index, _aten.gather)
# how often an operation on a chunk of logits reads or writes them, forward and backward
_LOGIT_PASSES = {"maxmin::token_log_probs": 9, "maxmin::token_log_probs_backward": 13}
# attention on a CPU, which PyTorch's own table of formulas leaves out
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop_count,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop_count,
}


# -- what a pass holds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """What a pass holds and takes.

    Attributes:
        peaks: most bytes held at once in each of its stretches, beyond what was there before.
        kept: bytes that are held at the end.
        logits: most bytes of logits at once in :func:`maxmin_kernels.token_log_probs`.
        seconds: time at the rates that were given; 0 without.
    """

    peaks: tuple[float, ...] = (0.0,)
    kept: float = 0.0
    logits: float = 0.0
    seconds: float = 0.0

    @property
    def peak(self) -> float:
        """Most bytes held at once."""
        return max(self.peaks)

    def beyond(self, other: Trace, layers: float) -> Trace:
        """This trace of a shallow model, and as often what it has more than ``other`` as ``layers`` says.

        The peak need not be in the same stretch at every depth, so each has its own line.
        """

        def line(a: float, b: float) -> float:
            return a + layers * (a - b)

        return Trace(
            tuple(map(line, self.peaks, other.peaks)),
            line(self.kept, other.kept),
            max(self.logits, other.logits),
            line(self.seconds, other.seconds),
        )


class Footprint(TorchDispatchMode):
    """Counts the bytes of all storages that the operations within it make, for as long as they live.

    Args:
        device: for which the sizes of chunks are picked: ``"cpu"`` or ``"cuda"``.
        rates: for the time; None leaves it 0.

    Attributes:
        mapped: bytes from which a block comes fresh from the system.

    Example:
        >>> with Footprint() as footprint:
        ...     x = torch.ones(256)
        ...     y = (x + 1) * 2
        >>> footprint.trace().peak, footprint.trace().kept
        (3072.0, 2048.0)
    """

    def __init__(self, device: str = "cpu", rates: Rates | None = None):
        super().__init__()
        self.device, self.rates, self.mapped = device, rates, USUAL
        self.live = self.logits = self.seconds = 0.0
        self.timeline: list[float] = []
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def trace(self, *ends: int) -> Trace:
        """What was counted so far.

        Args:
            *ends: after how many operations a stretch ends.
        """
        cuts = [0, *ends, len(self.timeline)]
        peaks = tuple(max(self.timeline[a:b], default=0.0) for a, b in pairwise(cuts))
        return Trace(peaks, self.live, self.logits, self.seconds)

    def adopt(self, tensor: Tensor) -> bool:
        """Count a tensor that was made outside; returns whether it is new."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known[storage] = True
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        return True

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_iter((args, kwargs)):
            if isinstance(x, Tensor):  # made outside: what shares its storage is nothing new
                self._known.setdefault(x.untyped_storage(), True)
        if func._schema.name == "maxmin::token_log_probs" and self.device != "cpu":
            args = (*args[:-1], False)  # a GPU keeps no probabilities for the backward pass
        out = func(*args, **(kwargs or {}))
        made = [self.adopt(x) for x in tree_iter(out) if isinstance(x, Tensor)]
        logits = _logits_bytes(func, args, self.device) if func.namespace == "maxmin" else 0.0
        self.logits = max(self.logits, logits)
        self.timeline.append(self.live + logits)
        if self.rates is not None and made:
            self.seconds += self._time(func, args, kwargs or {}, out, any(made))
        return out

    def _time(self, func: Any, args: Any, kwargs: Any, out: Any, new: bool) -> float:
        """Seconds of an operation: its start, its arithmetic or reading, and pages that it touches first."""
        rates = self.rates
        assert rates is not None
        backward = torch._C._current_graph_task_id() != -1
        start = rates.backward_op_seconds if backward else rates.op_seconds
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)
        if not new and not writes:  # a view
            return start
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        read = sum(x.numel() * x.element_size() for x in given)
        written = sum(x.numel() * x.element_size() for x in made)
        packet, flops = func._overloadpacket, _flops(func, args, kwargs, out)
        if packet in _GATHERS:
            read += written - given[0].numel() * given[0].element_size()
        if packet is _aten.multinomial:
            seconds = given[0].numel() * rates.draw_seconds
        elif not flops:
            seconds = rates.copy_seconds(read + written, self.live)
        elif "attention" in func._schema.name:
            heads = given[0].shape[0] * given[0].shape[1] * rates.head_seconds
            arithmetic = heads + flops / rates.attention_flops
            seconds = max(rates.copy_seconds(read + written, self.live), arithmetic)
        else:
            if passes := _LOGIT_PASSES.get(func._schema.name):
                written += passes * 4.0 * given[0].shape[0] * given[1].shape[0]
            seconds = rates.product_seconds(flops, read, given[0].dtype)
            seconds += rates.copy_seconds(written, self.live)
        fresh = sum(x.nbytes for x in made if x.nbytes >= self.mapped) if new else 0.0
        return start + seconds + fresh * rates.page_seconds


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if func.namespace == "maxmin":
        hidden, head, *rest = args
        if func._schema.name == "maxmin::token_log_probs":
            return 2.0 * hidden.shape[0] * head.numel()
        if func._schema.name == "maxmin::token_log_probs_backward":
            return 2.0 * hidden.shape[0] * head.numel() * (1 + rest[7] + rest[8])
        return 0.0
    packet = func._overloadpacket
    formula = flop_counter.flop_registry.get(packet) or _CPU_ATTENTION.get(packet)
    if formula is None:
        return 0.0
    if packet in _CPU_ATTENTION:
        shapes = [x.shape for x in args if isinstance(x, Tensor)]
        return float(formula(*shapes[: 3 if formula is flop_counter.sdpa_flop_count else 4]))
    return float(formula(*args, **kwargs, out_val=out))


def _logits_bytes(func: Any, args: Any, device: str) -> float:
    """Bytes of logits, and of what is widened, that the chunked operator holds for a while."""
    if not func._schema.name.startswith("maxmin::token_log_probs"):
        return 0.0
    backward = func._schema.name.endswith("backward")
    hidden, head = args[:2]
    entropy = args[7] is not None if backward else args[4]
    (rows, width), vocabulary = hidden.shape, head.shape[0]
    low = device == "cuda" and hidden.dtype == head.dtype and hidden.element_size() == 2
    narrow_states = hidden.element_size() == 2 and not low
    widened = head.element_size() == 2 and not low
    copies = 2 if entropy else 1
    if not backward:
        chunk = min(args[5] or pick_chunk_size(rows, vocabulary, device), rows)
        logits = 4.0 * chunk * vocabulary
        held = 4.0 * chunk * width if narrow_states else 0.0
        held += 4.0 * width * min(block_rows(width, device), vocabulary) if widened else 0.0
        # a result, which lies among them
        kept = kept_rows(rows, vocabulary, device, args[5]) if args[9] else 0
        return max(logits + held, logits * copies) - 4.0 * kept * vocabulary
    tile = pick_tile(rows, width, vocabulary, device, args[9], widened)
    logits = 4.0 * min(tile.rows, rows) * tile.columns
    states, block = 4.0 * min(tile.rows, rows) * width, 4.0 * tile.columns * width
    held = (states if narrow_states else 0.0) + (block if widened else 0.0) + (logits / 2 if low else 0.0)
    if args[10] and hidden.element_size() == 2:
        held += states * (1 if low else 2)  # the sum over blocks, and a product that cannot be added in place
    if args[11] and tile.rows < rows:
        held += 4.0 * head.numel()  # the sum over parts of the rows
    elif args[11] and widened:
        held += block
    return logits * copies + held


def fake_copy(model: nn.Module) -> nn.Module:
    """Move a model from the meta device to fake memory, in place; to be called within ``FakeTensorMode``.

    The fake device is the CPU's, whose attention keeps what a GPU's does where a mask is given; that of the
    meta device keeps all scores.
    """
    moved: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            moved[id(tensor)] = (
                nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            )
        return moved[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: None if x is None else of(x) for name, x in tensors.items()})
        for name, value in vars(module).items():  # tables that are no buffers
            if isinstance(value, Tensor):
                setattr(module, name, of(value))
    return model


# -- all layers from a few -------------------------------------------------------------------------------


def nbytes(module: nn.Module | list[Tensor]) -> int:
    """Bytes of a module's parameters and buffers, or of tensors, each storage once."""
    tensors = module if isinstance(module, list) else [*module.parameters(), *module.buffers()]
    sizes = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}
    return sum(sizes.values())


def shallow_depths(model: nn.Module) -> tuple[int, int] | None:
    """Two depths whose difference repeats up to the model's own; None where no such two are fewer layers.

    Args:
        model: the whole model, on the meta device will do.

    Layers count as equal where their parameters have the same shapes and the config calls them the same.
    """
    config = text_config(model)
    depth = config.num_hidden_layers
    trunk = backbone_of(model)
    stacks = [m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        return None
    types = getattr(config, "layer_types", None) or [""] * depth
    kinds = [
        (kind, tuple((name, p.shape) for name, p in layer.named_parameters()))
        for kind, layer in zip(types, stacks[0], strict=True)
    ]
    for deeper in range(3, depth):
        for period in range(1, (deeper - 1) // 2 + 1):
            first = deeper - 2 * period  # the first layer of all is another: embeddings live beside it
            whole = (depth - deeper) % period == 0
            if whole and all(kinds[i] == kinds[i + period] for i in range(first, depth - period)):
                return deeper - period, deeper
    return None


def with_depth(config: Any, depth: int) -> Any:
    """A copy of a config with its first ``depth`` layers alone."""
    config = copy.deepcopy(config)
    text = text_config(config)
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # a setting a layer
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


def traced(config: Any, depths: tuple[int, int] | None, run: Callable[[Any], Trace]) -> Trace:
    """The trace of a model with all its layers, from runs of one or two of few layers.

    Args:
        config: of the whole model.
        depths: what :func:`shallow_depths` says of it.
        run: makes a model of a config and traces a pass of it.
    """
    if depths is None:
        return run(config)
    shallow, deeper = (run(with_depth(config, depth)) for depth in depths)
    layers = (text_config(config).num_hidden_layers - depths[1]) / (depths[1] - depths[0])
    return deeper.beyond(shallow, layers)
