"""Versions that are installed together and do not belong together, found from their metadata alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import metadata

__all__ = ["TESTED", "mismatches", "untested", "warn_of_mismatches"]

#: Triton that each torch asks for in its own wheel; one built for CPUs asks for none, and hides a wrong one
TRITON_OF_TORCH = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}
#: versions that the whole test suite ran on: those of constraints.txt, and the oldest of make test-matrix
TESTED: dict[str, tuple[str, ...]] = {
    "torch": ("2.11.0", "2.13.0"),
    "triton": ("3.6.0", "3.7.1"),
    "torchrl": ("0.14.1",),
    "tensordict": ("0.14.3",),
    "transformers": ("5.23.0",),
    "datasets": ("5.2.0",),
    "peft": ("0.21.2",),
    "numpy": ("2.3.5", "2.4.6"),
    "scipy": ("1.17.1",),
}


def untested(package: str, version: str) -> str:
    """Say of an installed version that no test ran on it, and on which they did; empty where they did.

    Args:
        package: its name.
        version: what is installed.

    Example:
        >>> untested("torch", "2.13.0+cpu"), untested("torch", "2.14.0")
        ('', 'untested: tests ran on 2.11.0 and 2.13.0')
    """
    tested = TESTED.get(package, ())
    if not tested or version.split("+")[0] in tested:
        return ""
    return f"untested: tests ran on {' and '.join(tested)}"


def mismatches(installed: Mapping[str, str]) -> list[str]:
    """Say in a line each which packages do not belong together, and what to install.

    Args:
        installed: versions by package; what is missing is not judged.

    Example:
        >>> mismatches({"torch": "2.13.0+cpu", "triton": "3.9.0"})
        ['torch 2.13.0+cpu goes with triton 3.7, and 3.9.0 is installed: pip install "triton==3.7.*"']
        >>> mismatches({"torch": "2.13.0", "triton": "3.7.1", "torchrl": "0.14.1", "tensordict": "0.14.3"})
        []
    """
    wanted = {
        ("torch", "triton"): TRITON_OF_TORCH.get(_minor(installed.get("torch", ""))),
        ("torchrl", "tensordict"): _minor(installed.get("torchrl", "")),
    }
    return [
        f"{one} {installed[one]} goes with {other} {minor}, and {installed[other]} is installed: "
        f'pip install "{other}=={minor}.*"'
        for (one, other), minor in wanted.items()
        if minor and other in installed and _minor(installed[other]) != minor
    ]


def warn_of_mismatches() -> None:
    """Warn of packages that are installed and do not belong together; imports none of them."""
    installed = {}
    for name in ("torch", "triton", "torchrl", "tensordict"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for line in mismatches(installed):
        warnings.warn(f"torchrl-maxmin: {line}", RuntimeWarning, stacklevel=3)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
