"""gpu.sh: parts within ten minutes, few files that are written as they come, and its rehearsal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU_SH = ROOT / "benchmarks" / "gpu.sh"
GPU_WHEELS = ROOT / "benchmarks" / "gpu_wheels.sh"
PARTS = (("env", "gate", "tests"), ("bench",), ("demo", "model"), ("profile",))
PART_SECONDS, FILES, DEPTH = 590, 8, 2

# A Python with a GPU: every step succeeds, says what it was called with, and leaves what the real one leaves.
STUB = """#!/usr/bin/env bash
case "$*" in
    *find_spec*) echo "$LACKING" ;;
    *cuda.is_available*) exit "${NO_GPU:-0}" ;;
    *"import xdist"*) exit 0 ;;
    *--gate-only*) echo "stub gate $*"; exit "${GATE:-0}" ;;
    *--budget*) mkdir -p "$OUT/nvidia-fake"
        for file in kernels.csv environment.json kernels.png; do echo x >"$OUT/nvidia-fake/$file"; done
        echo "stub bench $*" ;;
    *--output_dir*) folder="${@: -1}"
        mkdir -p "$folder/seed-0/maxmin/deep"
        for i in $(seq 70); do echo x >"$folder/seed-0/maxmin/deep/$i"; done
        echo "{}" >"$folder/summary.json"
        echo "stub demo $*"; [ -z "$SLOW" ] || sleep 60 ;;
    *gpu_ppo.py*--profile*) echo "{}" >"$OUT/profile.json"; echo "stub profile $*" ;;
    *gpu_ppo.py*) echo "{}" >"$OUT/model.json"; echo "stub model $*" ;;
    *) echo "stub $*" ;;
esac
"""


@pytest.fixture
def gpu_sh(tmp_path):
    """Run the script with the stub in place of Python."""
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments, script=GPU_SH, **variables):
        settings = {"PYTHON": str(stub), "OUT": str(out), "LACKING": "", "SLOW": ""} | variables
        command = ["bash", str(script), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | settings, timeout=60, check=False
        )

    run.out = out
    return run


def outcomes(result):
    lines = result.stdout.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("== summary"))
    return [line.split(",")[0] for line in lines[at + 1 :]]


def files(folder):
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def test_without_a_gpu(gpu_sh):
    result = gpu_sh(NO_GPU="1")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "no CUDA device" in result.stderr
    assert not gpu_sh.out.exists()


@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_every_part_ends_within_ten_minutes(gpu_sh, part):
    result = gpu_sh(*part)
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcomes(result) == [f"{name}: ok" for name in part]
    limits = dict(re.findall(r"^== (\w+) \(at most (\d+) s\)", result.stdout, flags=re.MULTILINE))
    assert tuple(limits) == part
    script = GPU_SH.read_text()
    first_import = int(re.search(r"\[device\]=(\d+)", script)[1])
    grace = int(re.search(r"^grace=(\d+)", script, flags=re.MULTILINE)[1])
    assert first_import >= 30
    assert first_import + sum(int(limit) + grace for limit in limits.values()) <= PART_SECONDS


def test_all_parts_leave_few_files_not_deep(gpu_sh):
    result = gpu_sh()
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcomes(result) == [f"{name}: ok" for part in PARTS for name in part]
    left = files(gpu_sh.out)
    assert len(left) <= FILES
    assert all(len(path.parts) <= DEPTH + 1 and re.fullmatch(r"[\w./-]+", str(path)) for path in left)
    assert {path.name for path in left} == {
        "gpu.log",
        "summary.txt",
        "demo.json",
        "model.json",
        "profile.json",
        "kernels.csv",
        "environment.json",
        "kernels.png",
    }
    log = (gpu_sh.out / "gpu.log").read_text()
    assert re.findall(r"^== (\w+)", log, flags=re.MULTILINE) == [name for part in PARTS for name in part]
    assert "--device cuda" in log
    assert "-n 8" in log


def test_main_is_the_demo_and_a_model_of_a_real_size(gpu_sh):
    assert outcomes(gpu_sh("main")) == ["demo: ok", "model: ok"]


def test_a_failed_step_stops_no_other(gpu_sh):
    result = gpu_sh(GATE="3", LACKING="pytest torchrl")
    assert result.returncode == 1
    assert outcomes(result) == [
        "env: ok",
        "gate: FAILED with exit status 3",
        "tests: skipped",
        "bench: ok",
        "demo: skipped",
        "model: skipped",
        "profile: skipped",
    ]
    assert "not installed: pytest torchrl" in result.stdout


def test_a_step_that_is_stopped_leaves_what_it_had(gpu_sh, tmp_path):
    # The same script with a shorter limit, where the paths that it makes from its own place still hold.
    script = tmp_path / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    script.write_text(re.sub(r"\[demo\]=\d+", "[demo]=2", GPU_SH.read_text()))
    result = gpu_sh("env", "demo", script=script, SLOW="1")
    assert result.returncode == 1
    assert outcomes(result) == ["env: ok", "demo: stopped after 2 s"]
    assert (gpu_sh.out / "summary.txt").read_text().splitlines()[1] == "demo: stopped after 2 s"
    assert "stub demo" in (gpu_sh.out / "gpu.log").read_text()
    assert (gpu_sh.out / "demo.json").exists()
    assert len(files(gpu_sh.out)) == 3


def test_an_interrupted_pytest_reports_its_failures(tmp_path):
    """What the step tests does at its limit: the signal, and what pytest makes of it."""
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_a():\n    assert 1 == 2\ndef test_b():\n    time.sleep(60)\n"
    )
    command = ["timeout", "--signal=INT", "--kill-after=10", "5", sys.executable, "-m", "pytest", "-q"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 124
    assert "assert 1 == 2" in result.stdout
    assert "1 failed" in result.stdout
    assert "timeout --signal=INT" in GPU_SH.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["bnech"], "no step bnech"), (["bench", "--budget", "x"], "--budget"), (["--budget=600"], "--budget")],
    ids=" ".join,
)
def test_mistakes_are_one_line(gpu_sh, arguments, message):
    result = gpu_sh(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_the_budget_of_the_benchmarks(gpu_sh):
    assert "--budget 400" in gpu_sh("bench").stdout
    assert "--budget 90" in gpu_sh("bench", "--budget", "90").stdout
    assert "--budget 80" in gpu_sh("bench", BUDGET="80").stdout


def test_kernel_tests_collect_without_torchrl(tmp_path):
    for name in ("torchrl", "tensordict", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "kernels"),
    ]
    selection = ["-k", "torchrl_column or (heads and argmin)"]
    path = os.pathsep.join([str(tmp_path), str(ROOT / "kernels"), str(ROOT)])
    result = subprocess.run(
        [*command, *selection],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"1 passed, 3 skipped", result.stdout), result.stdout


@pytest.mark.parametrize(("megabytes", "status"), [(1, 0), (9, 1)], ids=["small", "large"])
def test_wheels_are_few_enough_to_carry(tmp_path, megabytes, status):
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/usr/bin/env bash
echo "$@" >{tmp_path}/arguments
while [ "$1" != --dest ]; do shift; done
for i in 1 2 3 4; do head -c {megabytes}000000 /dev/zero >"$2/$i.whl"; done
"""
    )
    stub.chmod(0o755)
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "old.whl").write_text("of another version")
    result = subprocess.run(
        ["bash", str(GPU_WHEELS), str(folder), "scipy"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(stub)},
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert f"4 wheels, {4 * megabytes} MB" in result.stdout
    assert len(result.stderr.splitlines()) == status
    assert ("PYTHONPATH" in result.stdout) == (status == 0)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "manylinux_2_28_x86_64", "3.12", "scipy"} <= set(arguments)
    # What the steps ask for and a bare machine has not.
    assert {"pytest", "hypothesis", "torchrl", "tensordict", "datasets", "jsonargparse"} <= set(arguments)


@pytest.mark.slow  # minutes; `make test-image` runs it too, on the image's versions
def test_rehearsal(tmp_path):
    """The same script, parts and steps on the CPU; it checks the limits and the files itself."""
    pytest.importorskip("triton")
    out = tmp_path / "out"
    settings = {"PYTHON": sys.executable, "OUT": str(out)}
    result = subprocess.run(
        ["bash", str(GPU_SH), "rehearse"],
        capture_output=True,
        text=True,
        env=os.environ | settings,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert outcomes(result) == [f"{name}: ok" for part in PARTS for name in part]
    assert len(files(out)) <= FILES
    log = (out / "gpu.log").read_text()
    assert re.search(r"gate: all \d+ checks hold", log)
    assert re.search(r"\d\d passed", log)
    assert (out / "demo.json").stat().st_size > 1000
