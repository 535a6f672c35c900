"""What a machine does a second, measured: products, bytes, operations, steps of ``generate``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from torchrl_maxmin.models.loading import import_transformers

__all__ = ["Rates", "measure_rates"]

#: rows of a product that is all reading of its matrix
_THIN = 8
#: bytes of the matrix it reads, and of the block that comes fresh from the system, beyond any cache
_LARGE = 2**26
#: bytes that a copy goes through, from what caches hold to what they do not
_REGIONS = {"cpu": (2**24, 2**25, 2**26, 2**27), "cuda": (2**31,)}
#: a transformer that computes next to nothing, and its tokens: what is left are operations
_TINY = {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 4, "n_head": 2}
_TOKENS = 8


@dataclass(frozen=True)
class Rates:
    """What a machine does a second, measured. What is left out costs nothing.

    Attributes:
        device: its name.
        flops: floating point operations of a large matrix product beside its reading, by dtype.
        bandwidth: bytes that an elementwise operation reads and writes, far from any cache.
        op_seconds: seconds that an operation takes whatever its size, with the Python around it.
        backward_op_seconds: those of an operation of a backward pass.
        product_bandwidth: bytes of its factors that a product reads, by dtype.
        attention_flops: floating point operations of attention.
        draw_seconds: seconds to draw from the probability of one outcome.
        page_seconds: seconds for a byte of a block that comes fresh from the system.
        token_seconds: seconds of a step of ``generate`` beside the model's pass and the drawing.
        near: as ``bandwidth``, by the bytes that are gone through again and again.
    """

    device: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    op_seconds: float
    backward_op_seconds: float = 0.0
    product_bandwidth: dict[torch.dtype, float] = field(default_factory=dict)
    attention_flops: float = math.inf
    draw_seconds: float = 0.0
    page_seconds: float = 0.0
    token_seconds: float = 0.0
    near: dict[int, float] = field(default_factory=dict)

    def copy_seconds(self, moved: float, held: float) -> float:
        """Seconds of reading and writing, the slower the more is held: what was written last is in a cache.

        Args:
            moved: bytes.
            held: bytes that are alive meanwhile.

        Example:
            >>> rates = Rates("none", {}, 1e9, 0.0, near={2**20: 4e9})
            >>> rates.copy_seconds(4e9, 2**20), rates.copy_seconds(4e9, 2**21)
            (1.0, 4.0)
        """
        fitting = [region for region in self.near if region >= held]
        return moved / (self.near[min(fitting)] if fitting else self.bandwidth)

    def product_seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Seconds of a matrix product: its arithmetic, and before it the reading of what it multiplies.

        Args:
            flops: floating point operations.
            moved: bytes of its factors.
            dtype: of its factors; one that was not measured counts as float32.

        Example:
            >>> rates = Rates("none", {torch.float32: 1e9}, 1e9, 0.0, product_bandwidth={torch.float32: 1e8})
            >>> rates.product_seconds(2e9, 1e8, torch.float32)
            3.0
        """
        known = dtype if dtype in self.flops else torch.float32
        return flops / self.flops[known] + moved / self.product_bandwidth.get(known, math.inf)


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Rates:
    """Measure :class:`Rates` in two seconds or so.

    Args:
        device: where.
        dtypes: of the matrix products.
    """
    cuda = device.type == "cuda"
    near = {region: _measure_copies(region, device) for region in _REGIONS[device.type]}
    bandwidth = near.pop(max(near))
    products = {dtype: _measure_product(device, dtype, bandwidth) for dtype in dtypes}
    chances = torch.ones(_THIN, 2**13, device=device)
    pass_seconds, backward_seconds, token_seconds = _measure_operations(device)
    threads = torch.get_num_threads()
    return Rates(
        torch.cuda.get_device_name(device) if cuda else f"CPU, {threads} thread(s)",
        {dtype: flops for dtype, (flops, _) in products.items()},
        bandwidth,
        pass_seconds,
        backward_seconds,
        {dtype: read for dtype, (_, read) in products.items()},
        _measure_attention(device),
        _seconds(torch.multinomial, chances, 1, device=device) / chances.numel(),
        0.0 if cuda else max(_seconds(torch.ones, _LARGE // 4, device=device) / _LARGE - 1 / bandwidth, 0.0),
        token_seconds,
        near,
    )


def _seconds(function: Callable[..., Any], *args: Any, device: torch.device, repeats: int = 1) -> float:
    """The least of a few times of a call, after one that counts not."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(repeats):
            function(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return min(times[1:])


def _measure_copies(region: int, device: torch.device) -> float:
    """Bytes a second that are read and written, going through a region of so many bytes again and again."""
    source, target = torch.ones(2, region // 8, device=device)
    return region / _seconds(lambda: torch.mul(source, 1.0, out=target), device=device)


def _measure_product(device: torch.device, dtype: torch.dtype, bandwidth: float) -> tuple[float, float]:
    """Floating point operations and bytes a second of products, from one that is square and one that is thin.

    The matrix lies as that of a linear layer does; results are written at a bandwidth that is known.
    """
    size = 8192 if device.type == "cuda" else 1024
    square = torch.ones(size, size, device=device, dtype=dtype)
    matrix = torch.ones(_LARGE // size // dtype.itemsize, size, device=device, dtype=dtype)
    rows = torch.ones(_THIN, size, device=device, dtype=dtype)
    whole = _seconds(square.mm, square.mT, device=device) - square.nbytes / bandwidth
    thin = _seconds(rows.mm, matrix.mT, device=device) - _THIN * len(matrix) * dtype.itemsize / bandwidth
    work, bytes_whole = 2.0 * size**3, 2.0 * square.nbytes
    thin_work, thin_bytes = 2.0 * _THIN * matrix.numel(), float(matrix.nbytes + rows.nbytes)
    # two times, two unknowns; where the thin one is no slower for its size, all is arithmetic
    determinant = work * thin_bytes - thin_work * bytes_whole
    per_flop = (whole * thin_bytes - thin * bytes_whole) / determinant
    per_byte = (work * thin - thin_work * whole) / determinant
    if per_flop <= 0 or per_byte <= 0:
        return work / whole, math.inf
    return 1 / per_flop, 1 / per_byte


def _measure_attention(device: torch.device) -> float:
    """Floating point operations a second of attention over tokens that a mask picks."""
    batch, heads, tokens, width = (64, 16, 512, 64) if device.type == "cuda" else (8, 4, 32, 64)
    states = torch.ones(batch, heads, tokens, width, device=device)
    mask = torch.zeros(batch, 1, tokens, tokens, device=device)
    seconds = _seconds(
        lambda: scaled_dot_product_attention(states, states, states, attn_mask=mask), device=device
    )
    return 4.0 * batch * heads * tokens * tokens * width / seconds


class _Counter(TorchDispatchMode):
    """Counts the operations that make tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += any(isinstance(x, Tensor) for x in tree_iter(out))
        return out


def _measure_operations(device: torch.device) -> tuple[float, float, float]:
    """Seconds of an operation of a forward pass, of a backward pass, and of a step of ``generate`` in rest."""
    transformers = import_transformers()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**_TINY, bos_token_id=0, eos_token_id=None, pad_token_id=0)
        )
    model = model.to(device).eval()
    tokens = torch.ones(1, _TOKENS, dtype=torch.int64, device=device)
    mask = torch.ones_like(tokens)

    def read() -> Tensor:
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.sum()

    def taught() -> None:
        read().backward()
        model.zero_grad()

    def sampled(new: int) -> Callable[[], Any]:
        return lambda: model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )

    with _Counter() as of_pass:
        loss = read()
    with _Counter() as of_backward:
        loss.backward()
    model.zero_grad()
    kept = _seconds(read, device=device, repeats=5)
    both = _seconds(taught, device=device, repeats=5)
    with torch.no_grad():
        alone = _seconds(read, device=device, repeats=5)
        with _Counter() as of_step:
            cache = model(input_ids=tokens, attention_mask=mask, use_cache=True).past_key_values
            before = of_step.count
            model(input_ids=tokens[:, :1], attention_mask=torch.ones_like(tokens[:, :1]), past_key_values=cache)
        few, many = (_seconds(sampled(new), device=device) for new in (2, 2 + _TOKENS))
    op_seconds = alone / of_pass.count
    step = (many - few) / _TOKENS - (of_step.count - before) * op_seconds
    return op_seconds, max(both - kept, 0.0) / of_backward.count, max(step, 0.0)
