#!/usr/bin/env bash
# Fetch the wheels that a machine with a GPU, PyTorch and no network lacks for the steps tests and demo of gpu.sh:
#
#     bash benchmarks/gpu_wheels.sh [FOLDER] [PACKAGE...]
#
# FOLDER is build/wheels by default; packages that another image lacks too (scipy, say) can be named after it.
# What Hugging Face's stack brings (transformers, numpy, pandas, pyarrow, yaml, rich, scipy) is taken to be there.
# PYTHON names an interpreter with pip, PYTHON_VERSION that of the GPU machine, PLATFORMS its wheels' tags.
# Exit status: 0 all well, 1 a wheel is missing or together they are too large to carry.
set -eu

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
folder="${1:-$root/build/wheels}"
[ $# -eq 0 ] || shift
most_megabytes=32

tests=(pytest pytest-xdist hypothesis execnet iniconfig pluggy packaging pygments sortedcontainers)
demo=(torchrl tensordict hoptorch pyvers orjson cloudpickle importlib_metadata zipp lazy_importer datasets multiprocess dill
    jsonargparse docstring_parser)
baselines=(liger_kernel)

platforms=()
for tag in ${PLATFORMS:-manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64}; do
    platforms+=(--platform "$tag")
done
mkdir -p "$folder"
rm -f "$folder"/*.whl
"$python" -m pip download --quiet --no-deps --only-binary=:all: --constraint "$root/constraints.txt" \
    --implementation cp --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$folder" \
    "${tests[@]}" "${demo[@]}" "${baselines[@]}" "$@"

count="$(find "$folder" -name '*.whl' | wc -l)"
bytes="$(find "$folder" -name '*.whl' -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')"
echo "$count wheels, $((bytes / 1000000)) MB, in $folder"
if [ "$bytes" -gt $((most_megabytes * 1000000)) ]; then
    echo "gpu_wheels.sh: more than $most_megabytes MB; name fewer packages" >&2
    exit 1
fi
cat <<END
On the GPU machine, with that folder beside the repository's files:
    python3 -m pip install --no-index --no-deps --target site $(basename "$folder")/*.whl
    PYTHONPATH=\$PWD/site bash benchmarks/gpu.sh env gate tests
END
