#!/bin/bash
# Train the vision encoder from a pack of films within some minutes, and write the results to small files.
#
#   training/gpu_encoder.sh PACK OUT [MINUTES] [CONFIG] [OPTIONS...]
#
# `python -m training.encoder CONFIG --iu-xray … --nih … --start … --pack PACK` writes PACK. The machine needs the
# folders training/ and cbedge/ (without cbedge/models), the pack, PyTorch, transformers, pydantic and scikit-learn, and
# no network. OUT gets log.jsonl, config.json and the best weights in half precision, in pieces of 15 MB; put them
# together with `cat OUT/best.safetensors.?? > best.safetensors`, and start another run from that file with --start.
# MINUTES (default 9) includes everything except the last half minute; the schedule is fitted to it. The same command
# runs on a CPU; use a few minutes for a dry run.
set -euo pipefail
pack=$1 out=$2 minutes=${3:-9} config=${4:-training/configs/encoder_gpu.yaml}
shift $(($# < 4 ? $# : 4))
run=${ENCODER_RUN:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python3 -m training.encoder "$config" --data "$pack" --output "$run" --minutes "$minutes" --fit "$@" |
  tee "$out/output.txt"
cp "$run/log.jsonl" "$run/config.json" "$out/"
python3 - "$run/best.safetensors" "$out/best.safetensors" <<'PYTHON'
import sys
from safetensors import safe_open
from safetensors.torch import save_file

with safe_open(sys.argv[1], "pt") as best:
    save_file({name: best.get_tensor(name).half() for name in best.keys()}, sys.argv[2], best.metadata())
PYTHON
split --bytes=15000000 --numeric-suffixes --suffix-length=2 "$out/best.safetensors" "$out/best.safetensors."
rm "$out/best.safetensors"
ls -l "$out"
