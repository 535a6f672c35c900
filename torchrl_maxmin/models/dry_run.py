"""Memory and time of a model's passes without its weights or any arithmetic: a dry run on fake tensors."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from maxmin_kernels.log_probs.chunked import block_rows, pick_chunk_size
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from torchrl_maxmin.models.sequences import backbone_of, text_config

__all__ = ["Footprint", "Rates", "Trace", "fake_copy", "measure_rates", "nbytes", "shallow_depths", "traced"]

_aten = torch.ops.aten
# attention on a CPU, which PyTorch's own table of formulas leaves out
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop_count,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop_count,
}


# -- what the machine can do ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a machine does a second, measured.

    Attributes:
        device: its name.
        flops: floating point operations of a large matrix product, by dtype.
        bandwidth: bytes that an elementwise operation reads and writes.
        op_seconds: seconds that an operation takes whatever its size.
    """

    device: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    op_seconds: float


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Rates:
    """Measure :class:`Rates` in about a second.

    Args:
        device: where.
        dtypes: of the matrix products.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    flops = {}
    for dtype in dtypes:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        flops[dtype] = 2 * size**3 / _seconds(matrix.mm, matrix, device=device)
    large = torch.ones(2**28 if cuda else 2**24, device=device)
    bandwidth = 2 * large.nbytes / _seconds(large.mul_, 1.0, device=device)
    small, repeats = torch.ones(8, device=device), 500

    def many() -> None:
        for _ in range(repeats):
            small.mul(1.0)

    overhead = _seconds(many, device=device) / repeats
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    return Rates(name, flops, bandwidth, overhead)


def _seconds(function: Callable[..., Any], *args: Any, device: torch.device) -> float:
    """The least of a few times of a call, after one that counts not."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


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

    Example:
        >>> with Footprint() as footprint:
        ...     x = torch.ones(256)
        ...     y = (x + 1) * 2
        >>> footprint.trace().peak, footprint.trace().kept
        (3072.0, 2048.0)
    """

    def __init__(self, device: str = "cpu", rates: Rates | None = None):
        super().__init__()
        self.device, self.rates = device, rates
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
        out = func(*args, **(kwargs or {}))
        made = [self.adopt(x) for x in tree_iter(out) if isinstance(x, Tensor)]
        logits = _logits_bytes(func, args, self.device) if func.namespace == "maxmin" else 0.0
        self.logits = max(self.logits, logits)
        self.timeline.append(self.live + logits)
        if self.rates is not None and made:
            self.seconds += self._time(func, args, kwargs or {}, out, any(made))
        return out

    def _time(self, func: Any, args: Any, kwargs: Any, out: Any, new: bool) -> float:
        """Seconds of an operation: the slower of its arithmetic and its reading, and its start."""
        assert self.rates is not None
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)
        if not new and not writes:  # a view
            return self.rates.op_seconds
        tensors = [x for x in tree_iter((args, kwargs, out)) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in tensors) / self.rates.bandwidth
        flops, dtype = _flops(func, args, kwargs, out), tensors[0].dtype
        arithmetic = flops / self.rates.flops.get(dtype, self.rates.flops[torch.float32])
        return max(moved, arithmetic) + self.rates.op_seconds


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
    entropy = args[6] is not None if backward else args[4]
    (rows, width), vocabulary = hidden.shape, head.shape[0]
    low = device == "cuda" and hidden.dtype == head.dtype and hidden.element_size() == 2
    chunk = min((args[8] if backward else args[5]) or pick_chunk_size(rows, vocabulary, device), rows)
    logits = 4.0 * chunk * vocabulary
    states = 4.0 * chunk * width
    block = 0.0 if low or head.element_size() > 2 else 4.0 * width * min(block_rows(head, device), vocabulary)
    both = logits * (2 if entropy else 1)
    held = states if hidden.element_size() == 2 and not low else 0.0
    if not backward:
        return max(logits + held + block, both)
    if args[9] and block:
        held += states  # the gradient of a chunk adds up in float32
    if args[10] and head.element_size() == 2:
        held += 4.0 * head.numel()  # and that of the output layer
    return both + held + block + (logits / 2 if low else 0.0)


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
