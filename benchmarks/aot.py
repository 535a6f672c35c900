"""Build every kernel configuration ahead of time, without a GPU, and look for register spills.

    python benchmarks/aot.py [--targets sm_80 sm_90 sm_100 gfx942] [--csv FILE]

For NVIDIA targets the table gives registers, shared memory, the number of local loads and stores (LDL + STL:
a spill), how many global loads have which width, and the instructions of the hot loop per exponential (the
E-step has one exponential per pair and group). AMD targets are built and reported. The exit status is 1 if a
build fails, a kernel spills, or the spill detector misses the spill that is provoked to test it; an aim that
is missed is only reported.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("Unset TRITON_INTERPRET: interpreted kernels cannot be compiled.")

import sass
import triton
from maxmin_kernels.em import triton_kernels as em
from maxmin_kernels.gae import triton_kernels as gae
from maxmin_kernels.heads import triton_kernels as heads
from maxmin_kernels.log_probs import triton_kernels as log_probs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Aim(NamedTuple):
    """The most that a fact of the kernels whose name matches should be."""

    kernels: str
    fact: str
    most: float


AIMS = [
    Aim(r"em_forward \w+ K=[1-8] ", "registers", 112),
    Aim(r"em_forward fp32 K=[48] ", "instructions_per_exp", 16),
    Aim(r"em_forward (bf16|fp16) K=[48] ", "instructions_per_exp", 19),
    Aim(r"em_forward fp32 K=(4|8|16|32) ", "narrow_bulk_loads", 0),
    Aim(r"em_forward bf16 K=8 ", "narrow_bulk_loads", 0),
    # The default tiles; more heads, or masks and sums, take more.
    Aim(r"heads_forward \S+ N=\d+ H=\d+ K=[1-8]$", "registers", 64),
    Aim(r"heads_forward", "narrow_bulk_loads", 0),
]


@dataclasses.dataclass
class Case:
    """One kernel with the types, constants and options that its launcher would give it."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        options = {k: v for k, v in self.constants.items() if k in ("num_warps", "num_stages", "maxnreg")}
        constants = {k: v for k, v in self.constants.items() if k not in options}
        names = self.kernel.arg_names
        signature = {n: "constexpr" if n in constants else self.types[n] for n in names}
        aligned = [n for n in names if signature[n].startswith("*") or n in self.divisible]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes), options


def _without(*names: str) -> dict[str, None]:
    """Make the constants of pointers that are not given."""
    return {f"p_{name}": None for name in names}


def heads_cases() -> list[Case]:
    outputs = {"p_rewards": "*fp32", "p_min": "*fp32", "p_arg": "*i64", "p_soft": "*fp32", "p_sums": "*fp32"}
    masks = {"p_head_mask": "*u8", "p_row_mask": "*u8"}
    plain = _without("head_mask", "row_mask", "sums")
    scalars = {
        "temperature": "fp32",
        "N": "i32",
        "stride_hidden": "i32",
        "stride_weight": "i32",
    }
    cases = []
    for rows, width, k, dtype, weight in [
        (512, 4096, 4, "bf16", "bf16"),
        (8192, 4096, 8, "bf16", "bf16"),
        (131072, 4096, 4, "bf16", "bf16"),
        (131072, 4096, 32, "bf16", "bf16"),
        (131072, 4096, 64, "bf16", "bf16"),
        (131072, 4096, 8, "fp16", "fp16"),
        (512, 768, 2, "fp32", "fp32"),
        (8192, 768, 8, "fp32", "fp32"),
        (131072, 4096, 8, "fp32", "fp32"),
        (131072, 4096, 64, "fp32", "fp32"),
        (131072, 4096, 4, "bf16", "fp32"),
        (131072, 4000, 5, "bf16", "bf16"),
        (512, 72, 3, "fp32", "fp32"),
    ]:
        vectors = {"p_bias": f"*{weight}", "p_shift": "*fp32", "p_scale": "*fp32"}
        constants = {
            "H": width,
            "K": k,
            "UPCAST": dtype != weight,
            **heads.heads_config(rows, k, max(SIZES[dtype], SIZES[weight])),
        }
        strides = ("stride_hidden", "stride_weight") if width % 16 == 0 else ()
        types = {"p_hidden": f"*{dtype}", "p_weight": f"*{weight}", **vectors, **outputs, **masks, **scalars}
        name = f"heads_forward {dtype}/{weight} N={rows} H={width} K={k}"
        kernel = heads.heads_forward_kernel
        cases.append(Case(name, kernel, types, constants | plain, strides))
        cases.append(Case(f"{name} masks sums", kernel, types, constants, strides))
    gradients = {f"p_grad{s}": "*fp32" for s in ("_rewards", "_min", "_soft", "_sums", "")}
    for k in (2, 4, 8, 17):
        types = {**outputs, **masks, **scalars, **gradients}
        config = {"K": k, **heads.row_config(k)}
        less = _without("head_mask", "row_mask", "grad_sums")
        for suffix, sums, grads in (("", plain, less), (" masks sums", {}, {})):
            forward, backward = heads.min_forward_kernel, heads.min_backward_kernel
            cases.append(Case(f"min_forward fp32 K={k}{suffix}", forward, types, config | sums))
            cases.append(Case(f"min_backward fp32 K={k}{suffix}", backward, types, config | grads))
    return cases


def em_cases() -> list[Case]:
    cases = []
    plan = {f"p_{n}": "*i64" for n in ("segment_offsets", "segment_user", "segment_slot")}
    plan |= {"p_split_user": "*i64", "p_split_offsets": "*i64", "S": "i32"}
    floats = {f"p_{n}": "*fp32" for n in ("log_prior", "partial", "resp", "like", "grad")}
    for dtype, k, mean in [
        ("fp32", 1, 100),
        ("fp32", 2, 100),
        ("fp32", 4, 100),
        ("fp32", 4, 8),
        ("fp32", 5, 100),
        ("fp32", 8, 100),
        ("fp32", 16, 100),
        ("fp32", 32, 100),
        ("bf16", 2, 100),
        ("bf16", 4, 100),
        ("bf16", 8, 100),
        ("bf16", 8, 8),
        ("fp16", 4, 100),
    ]:
        types = {f"p_{n}": f"*{dtype}" for n in ("chosen", "rejected", "grad_chosen", "grad_rejected")}
        constants = {"K": k, "STRIDE_CHOSEN": k, "STRIDE_REJECTED": k}
        configs = {
            em.em_forward_kernel: em.forward_config(k),
            em.em_backward_kernel: em.backward_config(mean * 1000, 1000, k),
        }
        for kernel, config in configs.items():
            name = f"{kernel.__name__.removesuffix('_kernel')} {dtype} K={k} mean={mean}"
            cases.append(Case(name, kernel, types | plan | floats, constants | config))
    for k in (2, 8, 16):
        cases.append(
            Case(f"em_finish K={k}", em.em_finish_kernel, plan | floats, {"K": k, **em.finish_config(k)})
        )
    return cases


def gae_cases() -> list[Case]:
    cases = []
    flags = {f"p_{n}": "*u8" for n in ("done", "terminated", "mask")}
    outputs = {f"p_{n}": "*fp32" for n in ("weights", "advantage", "target", "weighted")}
    scalars = {"gamma": "fp32", "forget": "fp32", "kl_coef": "fp32", "T": "i32"}
    no_tokens = {**_without("log_prob", "ref_log_prob"), "TOKENS": False}
    no_steps = {**_without("next_value", "done", "terminated"), "TOKENS": True}
    for dtype, steps, k, mask, extras in [
        ("fp32", 64, 2, True, False),
        ("fp32", 1024, 1, False, False),
        ("fp32", 1024, 2, True, False),
        ("fp32", 1024, 4, False, False),
        ("fp32", 1024, 4, True, True),
        ("fp32", 1024, 5, True, False),
        ("fp32", 4096, 8, True, True),
        ("bf16", 1024, 8, True, False),
        ("fp32", 1024, 32, False, False),
        ("fp32", 1024, 100, False, True),
    ]:
        inputs = ("reward", "value", "next_value", "log_prob", "ref_log_prob")
        types = {f"p_{n}": f"*{dtype}" for n in inputs} | flags | outputs | scalars | {"p_partial": "*fp64"}
        config = {"K": k, **gae.gae_config(steps, k)}
        missing = _without(*([] if mask else ["mask"]), *([] if extras else ["weights", "partial"]))
        name = f"{dtype} T={steps} K={k} mask={mask} weights={extras}"
        cases.append(Case(f"gae {name}", gae.gae_kernel, types, config | no_tokens | missing, ("T",)))
        if mask:
            for kl in (False, True):
                log_probs = {} if kl else _without("log_prob", "ref_log_prob")
                given = config | no_steps | missing | log_probs
                cases.append(Case(f"gae tokens {name} kl={kl}", gae.gae_kernel, types, given, ("T",)))
    moments = {"p_partial": "*fp64", "p_moments": "*fp32", "B": "i32"}
    for batch in (64, 4096):
        config = gae.moments_config(batch)
        cases.append(Case(f"gae moments B={batch}", gae.moments_kernel, moments, config))
    return cases


def log_probs_cases() -> list[Case]:
    cases = []
    names = ("logits", "log_probs", "logsumexp", "entropy", "grad_log_probs", "grad_entropy")
    for vocabulary in (203, 50257, 151936, 256000):
        for entropy in (False, True):
            types = {f"p_{n}": "*fp32" for n in names} | {"p_targets": "*i64", "p_bias": "*fp32"}
            types |= {"temperature": "fp32", "logit_scale": "fp32", "softcap": "fp32", "stride": "i32"}
            constants = {"V": vocabulary, **log_probs.row_config(vocabulary)}
            # Gemma's vocabulary with all that a model may do to its logits, the others with nothing.
            if vocabulary != 256000:
                constants |= {"p_bias": None, "logit_scale": None, "softcap": None}
            divisible = ("stride",) if vocabulary % 16 == 0 else ()
            missing = {} if entropy else _without("entropy")
            name = f"V={vocabulary} entropy={entropy}"
            cases.append(
                Case(
                    f"log_probs_forward {name}",
                    log_probs.log_probs_forward_kernel,
                    types,
                    constants | missing,
                    divisible,
                )
            )
            missing = {} if entropy else _without("entropy", "grad_entropy")
            # Rows are aligned, and so are all blocks of the vocabulary but the last.
            missing |= {name: value for name, value in constants.items() if name != "V"}
            divisible = ("stride", "grad_stride", *(["V"] if vocabulary % 16 == 0 else []))
            for out in ("fp32", "bf16"):
                cases.append(
                    Case(
                        f"log_probs_backward {out} {name}",
                        log_probs.log_probs_backward_kernel,
                        types | {"p_grad": f"*{out}", "grad_stride": "i32", "V": "i32"},
                        missing,
                        divisible,
                    )
                )
    return cases


def build(case: Case, target: str) -> dict[str, Any]:
    source, options = case.source()
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "cuda":
        facts = sass.inspect_cubin(compiled.asm["cubin"])
    else:
        facts = sass.inspect_amdgcn(compiled.asm["amdgcn"])
    return {"target": target, "kernel": case.name, "shared": compiled.metadata.shared, **vars(facts)}


def all_cases() -> list[Case]:
    return heads_cases() + em_cases() + gae_cases() + log_probs_cases()


def build_row(job: tuple[str, int]) -> dict[str, Any]:
    """Build the case of this number for this target; whatever the compiler raises is a failed build."""
    target, number = job
    case = all_cases()[number]
    try:
        return build(case, target)
    except Exception as error:
        return {"target": target, "kernel": case.name, "error": f"{type(error).__name__}: {error}"}


def spill_is_detected(target: str) -> bool:
    """Positive control: a kernel held to 32 registers must be reported as spilling."""
    case = next(c for c in em_cases() if c.name.startswith("em_forward fp32 K=4"))
    starved = dataclasses.replace(case, constants=case.constants | {"num_warps": 1, "maxnreg": 32})
    return build(starved, target)["spills"] > 0


def missed_aims(row: dict[str, Any]) -> list[str]:
    """Return in words which aim the kernel misses on an NVIDIA target."""
    missed = []
    for aim in AIMS:
        if not re.match(aim.kernels, row["kernel"]) or TARGETS[row["target"]].backend != "cuda":
            continue
        value = row[aim.fact]
        if value is not None and value > aim.most:
            missed.append(f"{row['target']} {row['kernel']}: {aim.fact} {value:.4g}, aim {aim.most}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--csv", type=Path, help="write the table to this file too")
    parser.add_argument("--only", default="", help="build only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers side by side")
    args = parser.parse_args()
    numbers = [i for i, case in enumerate(all_cases()) if args.only in case.name]
    print(f"triton {triton.__version__}, {len(numbers)} configurations")
    print(f"{'kernel':58} {'target':7} {'regs':>4} {'shared':>7} {'spills':>6} {'instr/exp':>9}  loads")
    nvidia = [name for name in args.targets if TARGETS[name].backend == "cuda"]
    failures = [
        f"{name}: the spill detector misses a provoked spill"
        for name in nvidia
        if not spill_is_detected(name)
    ]
    rows, missed = [], []
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(build_row, [(name, i) for name in args.targets for i in numbers]):
            if "error" in row:
                failures.append(f"{row['target']} {row['kernel']}: {row['error']}")
                continue
            rows.append(row)
            exps = row["instructions_per_exp"]
            print(
                f"{row['kernel']:58} {row['target']:7} {row['registers']:4} {row['shared']:7} "
                f"{row['spills']:6} {'' if exps is None else f'{exps:.1f}':>9}  {row['loads']}",
                flush=True,
            )
            if row["spills"] and row["target"] in nvidia:
                failures.append(f"{row['target']} {row['kernel']}: {row['spills']} local loads and stores")
            missed += missed_aims(row)
    if args.csv and rows:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for line in missed:
        print(f"aim missed: {line}")
    print(f"{len(rows)} built, {len(failures)} failures, {len(missed)} aims missed (reported only)")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
