"""What the kernels should reach, as data, and whether a run's rows reach it.

A miss is reported and changes no exit status: timings are no tests. A bar whose measurement is missing (an
absent library, a size that did not fit) is reported as not measured.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .host import HOST_OPS
from .measure import Row, best_time, ratio_of


class Bar(NamedTuple):
    """A quantity and its limit.

    Attributes:
        text: What is compared, in words.
        value: The quantity from all rows, None if it was not measured.
        relation: ``>=`` or ``<=``.
        limit: What the quantity should be at least or at most.
    """

    text: str
    value: Callable[["Rows"], float | None]
    relation: str
    limit: float


class Verdict(NamedTuple):
    """A bar with what was measured: ``pass``, ``miss`` or ``not measured``."""

    text: str
    value: float | None
    relation: str
    limit: float
    outcome: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a run, by what they measure."""

    rows: Sequence[Row]

    def all(self, op: str, direction: str, implementation: str = "ours", **wanted: Any) -> list[Row]:
        """Return the measured rows; ``wanted`` are sizes and ``dtype``, ``skew`` being 0 if not given."""
        wanted = {"skew": 0.0} | wanted
        found = []
        for row in self.rows:
            facts = {"skew": 0.0, "dtype": row.dtype, **row.sizes()}
            same = (row.op, row.direction, row.implementation) == (op, direction, implementation)
            if same and row.wall_us is not None and all(facts.get(k) == v for k, v in wanted.items()):
                found.append(row)
        return found

    def one(self, *args: str, **wanted: Any) -> Row | None:
        """Return the row of the largest size, because a workload may have been scaled down to fit."""
        found = self.all(*args, **wanted)
        return max(found, key=lambda row: row.floor_bytes or 0, default=None)

    def speedup(
        self, op: str, direction: str, baseline: str, wall: bool = False, **wanted: Any
    ) -> float | None:
        """Return the baseline's time over ours."""
        ours, theirs = (self.one(op, direction, name, **wanted) for name in ("ours", baseline))
        if ours is None or theirs is None or ours.size != theirs.size:
            return None
        if wall:
            ours, theirs = (dataclasses.replace(row, device_us=None) for row in (ours, theirs))
        return ratio_of(theirs, ours)

    def cost(self, op: str, direction: str, baseline: str, **wanted: Any) -> float | None:
        """Return our time over the baseline's."""
        speedup = self.speedup(op, direction, baseline, **wanted)
        return None if speedup is None else 1 / speedup

    def over_compiled(self, op: str, direction: str, **wanted: Any) -> float | None:
        """Return the fastest compiled baseline's time over ours."""
        names = {row.implementation for row in self.rows if row.implementation.startswith("torch.compile")}
        speedups = [self.speedup(op, direction, name, **wanted) for name in names]
        return min((s for s in speedups if s is not None), default=None)

    def share(self, op: str, direction: str, **wanted: Any) -> float | None:
        """Return our share of the copy bandwidth."""
        row = self.one(op, direction, **wanted)
        return None if row is None else row.share_of_copy

    def time(self, op: str, direction: str, **wanted: Any) -> float | None:
        """Return our time in microseconds."""
        row = self.one(op, direction, **wanted)
        return None if row is None else best_time(row)

    def extra_memory(self, op: str, direction: str, **wanted: Any) -> float | None:
        """Return our peak over the floor bytes, which are the inputs' and the outputs'."""
        row = self.one(op, direction, **wanted)
        if row is None or row.peak_bytes is None or row.floor_bytes is None:
            return None
        return row.peak_bytes / row.floor_bytes

    def skew(self) -> float | None:
        """Return the E-step's time with one large user over that without."""
        skewed = self.one("em", "forward", skew=0.1)
        if skewed is None:
            return None
        size = skewed.sizes()
        even = self.one("em", "forward", dtype=skewed.dtype, K=size["K"], P=size["P"])
        return None if even is None else ratio_of(skewed, even)

    def memory(self, direction: str, beyond: Callable[[Row], int], **wanted: Any) -> float | None:
        """Return our peak of the log-probabilities over eager's, without what ``beyond`` says."""
        ours, eager = (self.one("log_probs", direction, name, **wanted) for name in ("ours", "eager"))
        if ours is None or eager is None or ours.size != eager.size:
            return None
        if ours.peak_bytes is None or eager.peak_bytes is None:
            return None
        return (ours.peak_bytes - beyond(ours)) / (eager.peak_bytes - beyond(eager))


def nothing(row: Row) -> int:
    """All of the peak counts: without gradients there is no result that both must hold."""
    return 0


def lm_head_gradient(row: Row) -> int:
    """Return the bytes of the gradient of lm_head, which any implementation returns."""
    size = row.sizes()
    return int(size["V"] * size["H"]) * (4 if row.dtype == "float32" else 2)


def at_least(limit: float, text: str, quantity: Callable[..., float | None], *args: Any, **sizes: Any) -> Bar:
    """Return a bar for a method of :class:`Rows` with these arguments."""
    return Bar(text, lambda rows: quantity(rows, *args, **sizes), ">=", limit)


def at_most(limit: float, text: str, quantity: Callable[..., float | None], *args: Any, **sizes: Any) -> Bar:
    """Return a bar for a method of :class:`Rows` with these arguments."""
    return Bar(text, lambda rows: quantity(rows, *args, **sizes), "<=", limit)


def cpu_bars() -> list[Bar]:
    """Return the bars of a CPU with two threads."""
    em, gae, log_probs = (("em", "forward"), ("gae", "forward"), "log_probs")
    vec, loop = "torchrl vec", "torchrl loop"
    short, long = {"B": 64, "T": 512, "K": 4}, {"B": 512, "T": 1024, "K": 1}
    gpt2, heads = {"V": 50257}, {"N": 8192, "K": 8}
    memory = "log-probs: peak beyond inputs and lm_head's gradient, ours / eager"
    return [
        at_least(2.0, "E-step 1e6 pairs: eager / ours", Rows.speedup, *em, "eager", P=1e6),
        at_least(1.0, "E-step 1e7 pairs: eager / ours", Rows.speedup, *em, "eager", P=1e7),
        at_least(
            1.0, "E-step 1e6 pairs, backward: eager / ours", Rows.speedup, "em", "backward", "eager", P=1e6
        ),
        at_least(
            1.0, "heads N=8192 K=8: stacked eager / ours", Rows.speedup, "heads", "forward", "eager", **heads
        ),
        at_least(5.0, "GAE [64, 512, 4]: TorchRL vectorised / ours", Rows.speedup, *gae, vec, **short),
        at_least(1.0, "GAE [64, 512, 4]: TorchRL loop / ours", Rows.speedup, *gae, loop, **short),
        at_least(1.0, "GAE [512, 1024, 1]: TorchRL loop / ours", Rows.speedup, *gae, loop, **long),
        at_most(0.45, memory, Rows.memory, "both", lm_head_gradient, **gpt2),
        at_most(1.2, "log-probs forward: ours / eager", Rows.cost, log_probs, "forward", "eager", **gpt2),
        at_most(1.15, "log-probs both: ours / eager", Rows.cost, log_probs, "both", "eager", **gpt2),
    ]


def em_bars(groups: int) -> list[Bar]:
    """Return the bars of the E-step on a GPU, at the largest number of pairs that was timed."""
    em, name = ("em", "forward"), f"E-step K={groups}"
    fp32, bf16 = ({"K": groups, "dtype": dtype} for dtype in ("float32", "bfloat16"))
    return [
        at_least(0.80, f"{name} float32: share of copy bandwidth", Rows.share, *em, **fp32),
        at_least(3.0, f"{name} float32: eager / ours", Rows.speedup, *em, "eager", **fp32),
        at_least(6.0, f"{name} bfloat16: eager / ours", Rows.speedup, *em, "eager", **bf16),
        at_least(1.2, f"{name} float32: fastest torch.compile / ours", Rows.over_compiled, *em, **fp32),
    ]


def cuda_bars() -> list[Bar]:
    """Return the bars of a data-centre GPU; times on the device where a graph could be recorded."""
    heads, name = ("heads", "forward"), "heads N=131072 K=8"
    large = {"N": 131072, "H": 4096, "K": 8}
    gae, short = ("gae", "forward"), {"B": 512, "T": 1024, "K": 1}
    wide, wider = {"B": 512, "T": 1024, "K": 4}, {"B": 4096, "T": 2048, "K": 4}
    vec = {"baseline": "torchrl vec", "wall": True}
    beyond = "peak beyond lm_head's gradient, ours / eager"
    calls = "microseconds a call on tiny inputs"
    middle = {"N": 8192, "H": 4096, "K": 8}
    log_probs, both = ("log_probs", "forward"), ("log_probs", "both")
    liger = {"baseline": "liger", "wall": True}
    return [
        *em_bars(4),
        *em_bars(8),
        at_most(
            0.02,
            "E-step K=4 float32: peak over the bytes of inputs and outputs",
            Rows.extra_memory,
            "em",
            "forward",
            K=4,
            dtype="float32",
        ),
        at_most(1.15, "E-step, one user with a tenth of the pairs / none", Rows.skew),
        at_least(0.75, f"{name} forward: share of copy bandwidth", Rows.share, *heads, **large),
        at_least(0.65, f"{name} backward: share of copy bandwidth", Rows.share, "heads", "backward", **large),
        at_least(0.95, f"{name}: stacked eager / ours", Rows.speedup, *heads, "eager", **large),
        at_least(1.3, "heads N=8192 K=8: stacked eager / ours", Rows.speedup, *heads, "eager", **middle),
        at_least(5.0, f"{name}: K linears / ours", Rows.speedup, *heads, "eager, K linears", **large),
        at_most(8.0, "GAE [512, 1024, 1]: microseconds on the device", Rows.time, *gae, **short),
        at_least(
            10.0, "GAE [512, 1024, 1]: TorchRL vectorised / ours, wall", Rows.speedup, *gae, **vec, **short
        ),
        at_least(0.25, "GAE [512, 1024, 4]: share of copy bandwidth", Rows.share, *gae, **wide),
        at_least(0.4, "GAE [4096, 2048, 4]: share of copy bandwidth", Rows.share, *gae, **wider),
        at_most(
            0.15, "log-probs N=8192 forward: peak, ours / eager", Rows.memory, "forward", nothing, N=8192
        ),
        at_most(0.15, f"log-probs N=8192 both: {beyond}", Rows.memory, "both", lm_head_gradient, N=8192),
        at_most(
            0.15, "log-probs N=32768 forward: peak, ours / eager", Rows.memory, "forward", nothing, N=32768
        ),
        at_most(0.15, f"log-probs N=32768 both: {beyond}", Rows.memory, "both", lm_head_gradient, N=32768),
        at_least(1.2, "log-probs N=8192 forward: eager / ours", Rows.speedup, *log_probs, "eager", N=8192),
        at_least(1.0, "log-probs N=8192 both: Liger / ours, wall", Rows.speedup, *both, **liger, N=8192),
        # What a busy host takes, and no PPO step would notice.
        *(at_most(250.0, f"{op}: {calls}", Rows.time, op, "host") for op in HOST_OPS),
    ]


def judge(kind: str, rows: Sequence[Row]) -> list[Verdict]:
    """Hold the rows of a run on a ``cpu`` or on ``cuda`` against the bars of that kind."""
    found = Rows(rows)
    verdicts = []
    for bar in cuda_bars() if kind == "cuda" else cpu_bars():
        value = bar.value(found)
        holds = {">=": operator.ge, "<=": operator.le}[bar.relation]
        outcome = "not measured" if value is None else "pass" if holds(value, bar.limit) else "miss"
        verdicts.append(Verdict(bar.text, value, bar.relation, bar.limit, outcome))
    return verdicts
