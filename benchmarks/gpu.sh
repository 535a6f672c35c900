#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, on a machine with no more than torch, triton and Python, in
# parts that end within ten minutes each:
#
#     bash benchmarks/gpu.sh env gate tests            # is every kernel right on this GPU?
#     bash benchmarks/gpu.sh bench [--budget 400]      # how fast is it, and against what?
#     bash benchmarks/gpu.sh main                      # does the whole job run on it, and a model of 135M in bf16?
#     bash benchmarks/gpu.sh profile                   # where does an iteration of PPO spend its time?
#     bash benchmarks/gpu.sh rehearse                  # all of it, small, on the CPU in Triton's interpreter
#
# Results go to $OUT, by default benchmarks/results: gpu.log (what all steps print), summary.txt (a line a step),
# DEVICE/ (kernels.csv, environment.json, kernels.png), demo.json, model.json and profile.json, each written as it
# comes; main is the steps demo and model. PYTHON names the interpreter, BUDGET what --budget does; a missing package can be given through PYTHONPATH (gpu_wheels.sh);
# where there is no git, COMMIT says which commit runs. Every step has a time limit of its own, after which it
# is interrupted and keeps what it has; one that fails does not stop the others.
# Exit status: 0 all well, 1 a step failed, 2 no GPU or no such step.
set -u

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
budget="${BUDGET:-400}"
parts=("env gate tests" "bench" "demo model" "profile")
declare -A limits=([device]=40 [env]=20 [gate]=220 [tests]=260 [bench]=520 [demo]=300 [model]=200 [profile]=300)
grace=10        # seconds from the interruption of a step to its end
part_limit=590  # seconds of a part
patience=1      # times as long as that may a step take
file_limit=8    # files of all parts together, at most two folders down

mode=gpu
steps=()
while [ $# -gt 0 ]; do
    case "$1" in
        env | gate | tests | bench | demo | model | profile) steps+=("$1") ;;
        main) steps+=(demo model) ;;
        rehearse) mode=rehearse ;;
        --budget)
            budget="${2:-}"
            shift
            ;;
        --budget=*) budget="${1#--budget=}" ;;
        *)
            echo "gpu.sh: no step $1; choose from env gate tests, bench, main, profile, or rehearse" >&2
            exit 2
            ;;
    esac
    shift
done
if ! [[ "$budget" =~ ^[0-9]+$ ]] || [ "$budget" -ge "${limits[bench]}" ]; then
    echo "gpu.sh: --budget is seconds, fewer than the ${limits[bench]} of the step bench, not '$budget'" >&2
    exit 2
fi
[ ${#steps[@]} -gt 0 ] || read -ra steps <<<"${parts[*]}"

export PYTHONPATH="$root/kernels:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ "$mode" = rehearse ]; then
    device=cpu
    patience=4  # one slow core, shared
    out="${OUT:-$(mktemp -d)}"
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
else
    device=cuda
    out="${OUT:-$root/benchmarks/results}"
    unset TRITON_INTERPRET
    # The first import of torch from a cold disk takes long.
    if ! timeout "${limits[device]}" "$python" -c \
        'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "gpu.sh: no CUDA device that torch of $python can use; run it on a machine with a GPU" >&2
        exit 2
    fi
fi
mkdir -p "$out"
log="$out/gpu.log"
failed=0
outcomes=()

# outcome LINE: say how a step ended, at once in the file too
outcome() {
    outcomes+=("$1")
    echo "$1" >>"$out/summary.txt"
}

# step NAME COMMAND...: run within the step's limit; an interruption lets pytest report what it has
step() {
    local name="$1" limit="$((patience * limits[$1]))" start="$SECONDS" status
    shift
    echo "== $name (at most $limit s)" | tee -a "$log"
    timeout --signal=INT --kill-after="$grace" "$limit" "$@" 2>&1 | tee -a "$log"
    status="${PIPESTATUS[0]}"
    case "$status" in
        0) outcome "$name: ok, $((SECONDS - start)) s" ;;
        124 | 137) outcome "$name: stopped after $limit s" ;;
        *) outcome "$name: FAILED with exit status $status, $((SECONDS - start)) s" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
}

# lacks STEP PACKAGE...: whether one cannot be imported; say which
lacks() {
    local name="$1" lacking
    shift
    lacking="$("$python" -c \
        'import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))' "$@")"
    [ -n "$lacking" ] || return 1
    echo "== $name: not installed: $lacking. gpu_wheels.sh fetches them where there is a network" | tee -a "$log"
    outcome "$name: skipped, not installed: $lacking"
}

run_env() {
    step env "$python" "$root/benchmarks/gpu_environment.py"
}

run_gate() {
    local small=()
    [ "$mode" = gpu ] || small=(--quick --threads 1)
    step gate "$python" "$root/benchmarks/kernels.py" --device "$device" --gate-only "${small[@]}" --output "$out"
}

run_tests() {
    local selection=() workers=()
    lacks tests pytest hypothesis && return
    if [ "$mode" = rehearse ]; then
        # A case of every operator, values and gradients, and the switch itself.
        selection=(-k "float32 and (one or 33-24-2 or 3-16-2 or 1.0-23-16) or test_tensors_lie")
    elif "$python" -c 'import xdist' 2>/dev/null; then
        # Most of the time goes into compilation, on the CPU.
        workers=(-n 8)
    fi
    step tests "$python" -m pytest "$root/tests/kernels" --device "$device" -q -p no:cacheprovider \
        "${workers[@]}" "${selection[@]}"
}

run_bench() {
    local small=()
    # Not in the interpreter, whose time says nothing.
    [ "$mode" = gpu ] || small=(--quick --threads 1 --only heads)
    step bench env -u TRITON_INTERPRET "$python" "$root/benchmarks/kernels.py" --device "$device" --budget "$budget" "${small[@]}" \
        --output "$out"
}

run_demo() {
    local small=() elsewhere
    lacks demo torchrl tensordict transformers accelerate datasets scipy jsonargparse docstring_parser yaml rich && return
    [ "$mode" = gpu ] || small=(--recipe "$root/benchmarks/gpu_rehearsal.yaml" --num_users 24 --pairs_per_user 6
        --num_groups 2 --num_workers 1)
    # Its many files stay out of the results, but for the summary.
    elsewhere="$(mktemp -d)"
    step demo env -u TRITON_INTERPRET "$python" -m torchrl_maxmin.cli.main demo --device "$device" \
        --policies maxmin "${small[@]}" --output_dir "$elsewhere/demo"
    [ ! -f "$elsewhere/demo/summary.json" ] || cp "$elsewhere/demo/summary.json" "$out/demo.json"
    rm -rf "$elsewhere"
}

# run_ppo NAME FLAGS...: PPO of a language model of a real size, random and in bfloat16
run_ppo() {
    local name="$1" small=()
    shift
    lacks "$name" torchrl tensordict transformers peft jsonargparse docstring_parser yaml rich && return
    [ "$mode" = gpu ] || small=(--small)
    step "$name" env -u TRITON_INTERPRET "$python" "$root/benchmarks/contestants/gpu_ppo.py" --device "$device" \
        --output "$out" "${small[@]}" "$@"
}

run_model() {
    run_ppo model
}

run_profile() {
    run_ppo profile --profile
}

# check_promises: what the rehearsal holds: every part's limits in sum, and number, depth and names of the files
check_promises() {
    local part name sum files deep odd
    for part in "${parts[@]}"; do
        sum=$((limits[device]))
        for name in $part; do
            sum=$((sum + limits[$name] + grace))
        done
        echo "part '$part': at most $sum s of $part_limit"
        [ "$sum" -le "$part_limit" ] || failed=1
    done
    files="$(find "$out" -type f | wc -l)"
    deep="$(find "$out" -mindepth 4 | wc -l)"
    odd="$(find "$out" -mindepth 1 -printf '%f\n' | grep -cv '^[A-Za-z0-9._-]*$')"
    echo "files: $files of at most $file_limit, $deep more than two folders down, $odd with an odd name"
    [ "$files" -le "$file_limit" ] && [ "$deep" -eq 0 ] && [ "$odd" -eq 0 ] || failed=1
}

for name in "${steps[@]}"; do
    "run_$name"
done
if [ "$mode" = rehearse ]; then
    check_promises
fi
echo "== summary, results in $out"
printf '%s\n' "${outcomes[@]}"
exit "$failed"
