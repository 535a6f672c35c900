"""What is timed: the sizes of a CPU run and of a CUDA run."""

import torch

from .workloads import AUTOTUNED, GAE, EStep, Heads, LogProbs, TokenGAE, Workload


def cpu_workloads(quick: bool) -> list[Workload]:
    """Return the sizes of a CPU run; the quick ones only show that everything runs."""
    if quick:
        return [
            EStep(20_000, 4, compile_modes=AUTOTUNED),
            GAE(8, 64, 4),
            TokenGAE(8, 64, 2),
            Heads(256, 64, 8, compile_modes=AUTOTUNED),
            LogProbs(64, 32, 1000, compile_modes=AUTOTUNED),
        ]
    return [
        EStep(10**6, 4, compile_modes=AUTOTUNED),
        EStep(10**7, 4, compile_modes=AUTOTUNED),
        GAE(64, 512, 4),
        GAE(512, 1024, 1),
        TokenGAE(64, 512, 2),
        Heads(8192, 768, 8, compile_modes=AUTOTUNED),
        LogProbs(512, 768, 50257, compile_modes=AUTOTUNED),
    ]


def cuda_workloads(quick: bool) -> list[Workload]:
    """Return the sizes of a CUDA run, the small ones first."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [EStep(10**6, 4), EStep(10**6, 4, skew=0.1), GAE(512, 1024, 1), Heads(8192, 4096, 8, bf16)]
    heads = [Heads(n, 4096, k, bf16, compile_modes=()) for n in (512, 8192) for k in (4, 8)]
    pairs = 10**8
    return [
        GAE(512, 1024, 1),
        GAE(512, 1024, 4),
        GAE(4096, 2048, 4),
        TokenGAE(512, 1024, 2),
        *heads,
        Heads(131072, 4096, 4, bf16, compile_modes=()),
        Heads(131072, 4096, 8, bf16, compile_modes=AUTOTUNED),
        EStep(pairs, 4, fp32, compile_modes=AUTOTUNED),
        EStep(pairs, 8, fp32),
        EStep(pairs, 4, bf16),
        EStep(pairs, 8, bf16),
        EStep(pairs, 4, fp32, skew=0.1, compile_modes=()),
        LogProbs(8192, 4096, 128256, bf16, compile_modes=AUTOTUNED),
        LogProbs(32768, 4096, 128256, bf16, compile_modes=()),
    ]
