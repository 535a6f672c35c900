"""Versions: bounds that hold what is tested, pairs that belong together, and environments for both ends."""

import ast
import importlib
import re
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import torchrl_maxmin
from torchrl_maxmin.core import versions
from torchrl_maxmin.core.versions import TESTED, untested

ROOT = Path(torchrl_maxmin.__file__).resolve().parents[1]
GOOD = {"torch": "2.13.0+cpu", "triton": "3.7.1", "torchrl": "0.14.1", "tensordict": "0.14.3"}


def constraints():
    """The exact versions of constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements():
    """Everything that a user installs, with its bounds."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id not in ("VLLM", "LINT")
    }
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [Requirement(text) for text in [*core, *(text for texts in lists.values() for text in texts)]]


def test_bounds_hold_what_is_tested_and_end():
    known = {re.sub("[-_]", "-", name).lower(): version for name, version in constraints().items()}
    for needed in requirements():
        name = re.sub("[-_]", "-", needed.name).lower()
        assert known[name] in needed.specifier, needed
        assert {one.operator for one in needed.specifier} == {">=", "<"}, needed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"triton": "3.9.0"}, ["torch 2.13.0+cpu goes with triton 3.7, and 3.9.0 is installed: pip install"]),
        ({"torch": "2.11.0"}, ["torch 2.11.0 goes with triton 3.6, and 3.7.1 is installed"]),
        ({"torch": "2.11.0", "triton": "3.6.0"}, []),
        ({"torch": "9.9"}, []),  # nothing is known of it
        ({"tensordict": "0.13.0"}, ["torchrl 0.14.1 goes with tensordict 0.14, and 0.13.0 is installed"]),
    ],
)
def test_pairs(change, told):
    found = versions.mismatches(GOOD | change)
    assert len(found) == len(told)
    for line, start in zip(found, told, strict=True):
        assert line.startswith(start)
        assert re.search(r'pip install "(triton|tensordict)==\d\.\d+\.\*"$', line)
    for name in GOOD:
        alone = {name: GOOD[name]}
        assert versions.mismatches(alone) == []


def test_an_import_warns_in_a_line(monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: (GOOD | {"triton": "3.9.0"})[name])
    with pytest.warns(RuntimeWarning, match=r"^torchrl-maxmin: torch .* goes with triton 3\.7") as seen:
        versions.warn_of_mismatches()
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


def test_what_is_installed_here_belongs_together():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(versions).warn_of_mismatches()


def test_both_ends_of_the_matrix_are_pairs():
    """What make would run, without running it."""
    command = ["make", "--dry-run", "--always-make", "test-matrix"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ends = re.findall(r"torch==(\S+) triton==(\S+)", plan)
    assert [end[0] for end in ends] == ["2.11.0", constraints()["torch"]]
    bounds = {needed.name: needed.specifier for needed in requirements()}
    for torch, triton in ends:
        assert versions.mismatches({"torch": torch, "triton": triton}) == []
        assert torch in bounds["torch"]
        assert triton in bounds["triton"]
    assert plan.count("-m pytest") == 2
    assert plan.count("--constraint build/matrix/") == 2


def test_what_is_called_tested_is_what_the_tests_install():
    """The newest is that of constraints.txt; the oldest is named by the Makefile."""
    oldest = re.search(r"^oldest := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for package, (*earlier, newest) in TESTED.items():
        assert newest == constraints()[package]
        assert all(f"{package}=={version}" in oldest[1].split() for version in earlier)


@pytest.mark.parametrize(
    ("version", "words"), [("2.13.0+cu128", ""), ("2.12.1", "untested: tests ran on 2.11.0 and 2.13.0")]
)
def test_an_untested_version_is_named(version, words):
    assert untested("torch", version) == words
    assert untested("a package nobody names", version) == ""
