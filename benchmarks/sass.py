"""What a compiled kernel is made of, read from the binary with the tools that ship inside Triton's wheel."""

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Facts about one compiled kernel.

    Attributes:
        registers: per thread.
        spills: local loads and stores (LDL + STL); AMD: spilled vector registers.
        loads: how many global loads have which width in bits, over the whole kernel.
        narrow_bulk_loads: global loads of less than 16 bytes inside the hot loop.
        instructions_per_exp: instructions of the hot loop over its exponentials, None without either.
    """

    registers: int
    spills: int
    loads: str = ""
    narrow_bulk_loads: int = 0
    instructions_per_exp: float | None = None


def parse_sass(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the opcodes in order, and the loops as ranges ``(first, last)`` of opcode indices.

    A loop is what lies between a label and a branch back to it.

    Raises:
        RuntimeError: If there are no instructions, that is, the disassembler's output has changed.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(opcodes)
            continue
        found = re.match(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if not found:
            continue
        target = re.search(r"\(?(\.L_x_\d+)\)?", found.group(2))
        if found.group(1).startswith("BRA") and target and target.group(1) in labels:
            loops.append((labels[target.group(1)], len(opcodes)))
        opcodes.append(found.group(1))
    if not opcodes:
        raise RuntimeError("nvdisasm gave no instructions: its output has changed.")
    return opcodes, loops


def hot_loop(opcodes: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """Return the opcodes of the longest innermost loop; a branch to itself (the end of a kernel) is none."""
    real = [loop for loop in loops if loop[0] < loop[1]]
    inner = [a for a in real if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in real)]
    if not inner:
        return []
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return opcodes[first : last + 1]


def load_widths(opcodes: list[str]) -> collections.Counter[str]:
    """Return how many global loads there are of each width in bits; asynchronous copies are named so."""
    widths: collections.Counter[str] = collections.Counter()
    for opcode in opcodes:
        name, *suffixes = opcode.split(".")
        if name in ("LDG", "LDGSTS"):
            width = next((s for s in suffixes if s in ("128", "64", "U16", "U8", "S8", "S16")), "32")
            widths[f"{'async ' if name == 'LDGSTS' else ''}{width}"] += 1
    return widths


def inspect_cubin(cubin: bytes) -> Inspection:
    """Read a compiled NVIDIA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command: str) -> str:
            program = [str(NVIDIA_BIN / command[0]), *command[1:], file.name]
            return subprocess.run(program, check=True, capture_output=True, text=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        opcodes, loops = parse_sass(tool("nvdisasm", "-c"))
    loop = hot_loop(opcodes, loops)
    exps = sum(opcode.startswith("MUFU.EX2") for opcode in loop)
    registers = re.search(r"REG:(\d+)", usage)
    return Inspection(
        registers=int(registers.group(1)) if registers else -1,
        spills=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        loads=", ".join(f"{count}x{width}" for width, count in sorted(load_widths(opcodes).items())),
        narrow_bulk_loads=sum(n for width, n in load_widths(loop).items() if "128" not in width),
        instructions_per_exp=len(loop) / exps if exps else None,
    )


def inspect_amdgcn(text: str) -> Inspection:
    """Read what the AMD assembler reports."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else -1

    return Inspection(registers=number("vgpr_count"), spills=number("vgpr_spill_count"))
