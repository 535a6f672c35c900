"""Time and peak memory of one EM iteration on cached features, beside vectorised eager PyTorch.

    python benchmarks/em_iteration.py            # a million pairs: 3 GB of features
    python benchmarks/em_iteration.py --quick    # seconds; says whether the two agree

An iteration is the E-step over all users and the gradient of the M-step that follows. Memory is the peak of
the process above what it held with the features in place. Both must give the same; at full size ours must
not be slower and must need at most half the memory, or the exit status is 1.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.em import Expectation

MEMORY_BAR = 0.5


def problem(pairs: int, users: int, features: int, groups: int) -> tuple[PairChoices, Tensor, Tensor]:
    """Random features, users with 1 pair and more, heads whose margins are of size one."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(pairs - 1, generator=generator)[: users - 1].sort().values + 1
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([pairs])])
    x = torch.empty(pairs, features).normal_(generator=generator)
    weight = torch.randn(groups, features, generator=generator) * features**-0.5
    log_prior = torch.rand(groups, generator=generator).log_softmax(-1)
    return PairChoices(x, offsets), weight, log_prior


def ours(choices: PairChoices, weight: Tensor, log_prior: Tensor) -> Expectation:
    return choices.expectation(weight, log_prior, gradient=True)


def eager(choices: PairChoices, weight: Tensor, log_prior: Tensor) -> Expectation:
    """The same in whole tensors, the gradient by autograd."""
    offsets = choices.user_offsets
    row_users = torch.repeat_interleave(offsets.diff())
    weight = weight.clone().requires_grad_()
    log_choice = F.logsigmoid(choices.differences @ weight.T)
    by_user = torch.zeros(len(offsets) - 1, len(weight)).index_add_(0, row_users, log_choice.detach())
    joint = by_user + log_prior
    responsibilities = joint.softmax(-1)
    (responsibilities[row_users] * log_choice).sum().backward()
    return Expectation(responsibilities, joint.logsumexp(-1), weight.grad)


def memory(field: str) -> float:
    """A figure of this process in MiB: ``VmRSS`` (now) or ``VmHWM`` (its peak)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def peak_above_now(run: Callable[[], Expectation]) -> float:
    """MiB that ``run`` holds at its peak above what is held before it."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what is needed
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # forget the peak so far
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def disagreement(first: Expectation, second: Expectation) -> float:
    """Largest relative difference of likelihood and gradient, absolute of responsibilities."""
    relative = [((a - b).norm() / b.norm()).item() for a, b in zip(first[1:], second[1:], strict=True)]
    return max(*relative, (first.responsibilities - second.responsibilities).abs().max().item())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small problem, checked and not judged")
    given = parser.parse_args()
    if given.quick:
        given.pairs, given.users, given.features, given.repeats = 20_000, 1_000, 64, 1
    torch.set_num_threads(given.threads)
    data = problem(given.pairs, given.users, given.features, given.groups)
    runs = {"ours": lambda: ours(*data), "eager": lambda: eager(*data)}
    difference = disagreement(runs["ours"](), runs["eager"]())
    peaks = {name: peak_above_now(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(
        f"P={given.pairs} U={given.users} D={given.features} K={given.groups}, {given.threads} threads, "
        f"median of {given.repeats}"
    )
    for name in runs:
        low, high = min(seconds[name]), max(seconds[name])
        middle = statistics.median(seconds[name])
        print(f"{name:6} {middle:8.3f} s [{low:.3f}, {high:.3f}] {peaks[name]:9.1f} MiB beyond the features")
    print(f"largest difference {difference:.1e}")
    if difference > 1e-3:
        print("the two disagree")
        return 1
    if given.quick:
        return 0
    slower = statistics.median(seconds["ours"]) > statistics.median(seconds["eager"])
    if slower or peaks["ours"] > MEMORY_BAR * peaks["eager"]:
        print("bar missed: ours is slower, or needs more than half the memory")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
