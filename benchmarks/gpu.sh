#!/usr/bin/env bash
# Measure latency on a GPU, and compare with peers: a model of InstructBLIP-Vicuna-7B's shape with random weights, and the
# embedded model. Run from a clone with the development set and onnxruntime-gpu instead of onnxruntime:
#
#   benchmarks/gpu.sh benchmarks/results/gpu
#
# The large bundle takes twelve minutes and 16 GB of memory to export on two cores (export.layers), and 40 GB of disk.
# To save time on the GPU machine, export it elsewhere and copy only its graphs, 4 MB:
#
#   python -m benchmarks.shape shape
#   python -m export.layers --checkpoint shape --out bundle --variant q4f16 --eight-bits ''
#   python -m benchmarks.hollow empty bundle hollow
#   HOLLOW=hollow benchmarks/gpu.sh benchmarks/results/gpu
#
# LAYERS=8 keeps 8 of the language model's 32 layers. SHAPE_ONLY=1 skips the embedded model. DEVICE=cpu SHAPE=tiny
# TOKENS=6 ROUNDS=1 runs the same steps on a CPU. TMPDIR=/dev/shm uses memory instead of the disk.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:?give a prefix for the records, such as benchmarks/results/gpu}
device=${DEVICE:-cuda} shape=${SHAPE:-vicuna-7b} layers=${LAYERS:-} tokens=${TOKENS:-100} rounds=${ROUNDS:-5}
work=$(mktemp -d -p "${TMPDIR:-/tmp}")
trap 'rm -rf "$work"' EXIT
image=examples/chest_pa.png
mkdir -p "$(dirname "$results")"

measure() { # NAME CHECKPOINT VARIANTS
  python -m benchmarks.passes --bundle "$work/$1-bundle" --variant "${3%%,*}" --device "$device" \
    | tee "$results-$1-passes.json"
  cbedge bench --image "$image" --model "$work/$1-bundle" --variants "$3" --device "$device" --tokens "$tokens" \
    --repeat "$rounds" --format json --output "$results-$1-bench.json"
  python -m benchmarks.peers --bundle "$work/$1-bundle" --checkpoint "$2" --device "$device" --tokens "$tokens" \
    --rounds "$rounds" --output "$results-$1-peers" "${@:4}"
  rm -rf "$work/$1-bundle" "$2"
}

if [ "$device" = cuda ]; then
  python - <<'PYTHON'
import torch
from time import perf_counter

x = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_().view(torch.int32)
best = 0.0
for _ in range(10):
    torch.cuda.synchronize()
    start = perf_counter()
    x.max()
    torch.cuda.synchronize()
    best = max(best, 2**32 / (perf_counter() - start))
print(f"{torch.cuda.get_device_name()}: reads {best / 1e9:.0f} GB/s")
PYTHON
fi
python -m benchmarks.shape "$work/shape" --shape "$shape" ${layers:+--layers "$layers"}
if [ -n "${HOLLOW:-}" ]; then
  cp -r "$HOLLOW" "$work/$shape-bundle"
  python -m benchmarks.hollow fill "$work/$shape-bundle"
else
  python -m export.layers --checkpoint "$work/shape" --out "$work/$shape-bundle" --variant q4f16 --eight-bits '' \
    --name "$shape"
fi
measure "$shape" "$work/shape" q4f16 --only "cbedge q4f16, one token a pass" --only "transformers bf16" --only "bitsandbytes NF4"
if [ -z "${SHAPE_ONLY:-}" ]; then
  python -m export.restore cbedge/models/default --out "$work/mini"
  python -m export --checkpoint "$work/mini" --out "$work/mini-bundle" --variant q4f16 --variant fp16 --name mini
  measure mini "$work/mini" q4f16,fp16
  cbedge bench --image "$image" --device "$device" --repeat 10 --format json --output "$results-default-bench.json"
fi
