#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, on a machine with no more than torch, triton and Python:
#
#     bash benchmarks/gpu.sh                  # all steps, about ten minutes at most
#     bash benchmarks/gpu.sh env gate bench   # some of them: env gate tests bench demo
#
# Results go to $OUT, by default benchmarks/results, what the steps print to its folder logs. PYTHON names the
# interpreter. A missing package can be given through PYTHONPATH; where there is no git, COMMIT says which commit
# runs. Every step has a time limit of its own; one that fails does not stop the others.
# Exit status: 0 all well, 1 a step failed, 2 no GPU or no such step.
set -u

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${OUT:-$root/benchmarks/results}"
export PYTHONPATH="$root/kernels:$root${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

[ $# -gt 0 ] || set -- env gate tests bench demo
for name in "$@"; do
    case "$name" in
        env | gate | tests | bench | demo) ;;
        *)
            echo "gpu.sh: no step $name; choose from env gate tests bench demo" >&2
            exit 2
            ;;
    esac
done
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: no CUDA device that torch of $python can use; run it on a machine with a GPU" >&2
    exit 2
fi
mkdir -p "$out/logs"
summary=()
failed=0

# step NAME SECONDS COMMAND...: run with a time limit, keep the output beside the results
step() {
    local name="$1" limit="$2" start="$SECONDS" status
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/logs/$name.log"
    status="${PIPESTATUS[0]}"
    case "$status" in
        0) summary+=("$name: ok, $((SECONDS - start)) s") ;;
        124 | 137) summary+=("$name: stopped after $limit s") ;;
        *) summary+=("$name: FAILED with exit status $status, $((SECONDS - start)) s") ;;
    esac
    [ "$status" -eq 0 ] || failed=1
}

# missing PACKAGE...: print those that cannot be imported
missing() {
    "$python" - "$@" <<'END'
import importlib.util
import sys

print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
END
}

run_env() {
    step env 30 "$python" - <<'END'
import platform

import torch
import triton

properties = torch.cuda.get_device_properties(0)
print(f"device {properties.name}, {properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB")
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, cuda {torch.version.cuda}")
END
}

run_gate() {
    step gate 170 "$python" "$root/benchmarks/kernels.py" --device cuda --gate-only --output "$out"
}

run_tests() {
    local lacking
    lacking="$(missing pytest hypothesis)"
    if [ -n "$lacking" ]; then
        summary+=("tests: skipped, not installed: $lacking")
        return
    fi
    step tests 60 "$python" -m pytest "$root/tests/kernels" -m gpu -q -p no:cacheprovider
}

run_bench() {
    step bench 230 "$python" "$root/benchmarks/kernels.py" --device cuda --budget 130 --output "$out"
}

run_demo() {
    local lacking
    lacking="$(missing torchrl tensordict transformers datasets scipy jsonargparse docstring_parser yaml rich)"
    if [ -n "$lacking" ]; then
        summary+=("demo: skipped, not installed: $lacking")
        echo "== demo: needs $lacking. Where there is a network: pip download --no-deps --dest wheels PACKAGES;"
        echo "   here: pip install --no-index --no-deps --target site wheels/*.whl, and PYTHONPATH=site"
        return
    fi
    rm -rf "$out/demo"
    step demo 100 "$python" -m torchrl_maxmin.cli.main demo --device cuda --policies maxmin --output_dir "$out/demo"
}

for name in "$@"; do
    "run_$name"
done

echo "== summary, results in $out"
printf '%s\n' "${summary[@]}"
exit "$failed"
