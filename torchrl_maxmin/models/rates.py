"""What a machine does a second, measured: products, bytes, operations, steps of ``generate``."""

from __future__ import annotations

import math
import statistics
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
        head_seconds: seconds that attention takes for a head of a row whatever its length.
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
    head_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures as json has them."""
        return {
            "device": self.device,
            "flops": {_name(dtype): value for dtype, value in self.flops.items()},
            "product_bytes_per_second": {_name(dtype): v for dtype, v in self.product_bandwidth.items()},
            "attention_flops": self.attention_flops,
            "seconds_per_head": self.head_seconds,
            "bytes_per_second": self.bandwidth,
            "bytes_per_second_within": {str(region): value for region, value in self.near.items()},
            "seconds_per_operation": self.op_seconds,
            "seconds_per_backward_operation": self.backward_op_seconds,
            "seconds_per_token": self.token_seconds,
            "seconds_per_draw": self.draw_seconds,
            "seconds_per_fresh_byte": self.page_seconds,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Rates:
        """The figures that :meth:`to_dict` gave."""
        return cls(
            state["device"],
            {getattr(torch, name): value for name, value in state["flops"].items()},
            state["bytes_per_second"],
            state["seconds_per_operation"],
            state["seconds_per_backward_operation"],
            {getattr(torch, name): value for name, value in state["product_bytes_per_second"].items()},
            state["attention_flops"],
            state["seconds_per_draw"],
            state["seconds_per_fresh_byte"],
            state["seconds_per_token"],
            {int(region): value for region, value in state["bytes_per_second_within"].items()},
            state["seconds_per_head"],
        )

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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    attention_flops, head_seconds = _measure_attention(device)
    threads = torch.get_num_threads()
    return Rates(
        torch.cuda.get_device_name(device) if cuda else f"CPU, {threads} thread(s)",
        {dtype: flops for dtype, (flops, _) in products.items()},
        bandwidth,
        pass_seconds,
        backward_seconds,
        {dtype: read for dtype, (_, read) in products.items()},
        attention_flops,
        _seconds(torch.multinomial, chances, 1, device=device) / chances.numel(),
        0.0 if cuda else max(_seconds(torch.ones, _LARGE // 4, device=device) / _LARGE - 1 / bandwidth, 0.0),
        token_seconds,
        near,
        head_seconds,
    )


def _seconds(function: Callable[..., Any], *args: Any, device: torch.device, repeats: int = 1) -> float:
    """The median of some times of a call, after one that counts not: a plan is held against usual times."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(repeats):
            function(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])


def _measure_copies(region: int, device: torch.device) -> float:
    """Bytes a second that are read and written, going through a region of so many bytes again and again."""
    source, target = torch.ones(2, region // 8, device=device)
    return region / _seconds(lambda: torch.mul(source, 1.0, out=target), device=device)


def _measure_product(device: torch.device, dtype: torch.dtype, bandwidth: float) -> tuple[float, float]:
    """Floating point operations a second of a square product, and bytes that a thin one reads beside them.

    The matrix lies as that of a linear layer does; results are written at a bandwidth that is known.
    """
    size = 8192 if device.type == "cuda" else 1024
    square = torch.ones(size, size, device=device, dtype=dtype)
    flops = 2 * size**3 / _seconds(square.mm, square.mT, device=device)
    matrix = torch.ones(_LARGE // size // dtype.itemsize, size, device=device, dtype=dtype)
    rows = torch.ones(_THIN, size, device=device, dtype=dtype)
    known = 2 * _THIN * matrix.numel() / flops + _THIN * len(matrix) * dtype.itemsize / bandwidth
    reading = _seconds(rows.mm, matrix.mT, device=device) - known
    # where it is no slower than its arithmetic, it reads as all else does
    return flops, matrix.nbytes / reading if reading > 0 else bandwidth


def _measure_attention(device: torch.device) -> tuple[float, float]:
    """Floating point operations a second of attention, and seconds of a head of a row whatever its length.

    States lie as a layer's product leaves them, and a mask picks tokens.
    """
    batch, heads, tokens, width = (64, 16, 512, 64) if device.type == "cuda" else (8, 4, 64, 64)
    states = torch.ones(batch, tokens, 3, heads, width, device=device).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in states)
    mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=device)

    def seconds(rows: int) -> float:
        return _seconds(
            lambda: scaled_dot_product_attention(query[:, :, :rows], key, value, attn_mask=mask[:, :, :rows]),
            device=device,
        )

    one, every = seconds(1), seconds(tokens)
    flops = 4.0 * batch * heads * tokens * width * (tokens - 1) / max(every - one, 1e-9)
    return flops, one / batch / heads


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
    """Seconds of an operation, forward and backward, and those that a step of ``generate`` adds."""
    transformers = import_transformers()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**_TINY, bos_token_id=0, eos_token_id=None, pad_token_id=0)
        )
    model = model.to(device).eval()
    tokens = mask = torch.ones(1, _TOKENS, dtype=torch.int64, device=device)

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
            model(input_ids=tokens[:, :1], past_key_values=cache)
        few, many = (_seconds(sampled(new), device=device) for new in (2, 2 + _TOKENS))
    op_seconds = alone / of_pass.count
    step = (many - few) / _TOKENS - (of_step.count - before) * op_seconds
    return op_seconds, max(both - kept, 0.0) / of_backward.count, max(step, 0.0)
