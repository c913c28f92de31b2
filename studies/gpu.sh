#!/usr/bin/env bash
# Everything that is owed on a GPU, most important first: studies/gpu.sh OUT [MINUTES, 10 unless given]
#
# Writes a log and JSON files into OUT; what did not fit into the time is named in OUT/summary.txt.
# Wants DETECTION_DATA to name a folder with bccd/ and coco_tiny/; parts that need one are skipped
# without. SMALL=1 rehearses it on a CPU, with networks and images as small as they go.
set -u
out=${1:?usage: studies/gpu.sh OUT [MINUTES]}
end=$((SECONDS + 60 * ${2:-10}))
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
data=${DETECTION_DATA:-}
python=${PYTHON:-python}
size=() short=() steps=200 repeat=10 tests=""
if [ "${SMALL:-}" ]; then
  size=(--preset tiny --device cpu --image-size 64 --scales 64 --test-scales 64 --max-size 64)
  short=(--seconds 0.01 --device cpu --only "1000 x 7x7 float32")
  steps=3 repeat=1 tests="-k hand"
fi

part() { # NAME SECONDS COMMAND...: at most so long, and not past the end
  local name=$1 most=$2 left=$((end - SECONDS))
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 5 ]; then
    echo "$name: no time left" | tee -a "$out/summary.txt"
    return
  fi
  local start=$SECONDS code=0
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: exit $code, $((SECONDS - start)) s, last line: $(tail -n 1 "$out/$name.log")" |
    tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
"$python" -c "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())" |
  tee -a "$out/summary.txt"
# Are the kernels right, run natively?
part kernel_tests 150 "$python" -m pytest -p no:cacheprovider $tests tests/test_roi_align.py tests/test_nms.py \
  tests/test_nms_triton.py tests/test_dense_decode.py tests/test_focal_loss.py tests/test_operators.py
# How fast are they, beside torchvision's and a plain copy?
part kernels 120 "$python" -m kernels.bench --json "$out/kernels.json" "${short[@]}"
# Does the paper's preset learn from the first step on real images? (log.jsonl has every loss)
if [ -d "$data/bccd" ]; then
  part bccd 120 "$python" d2det.py --train --preset paper --data "$data/bccd" --backbone-weights none \
    --steps $steps --log-every 1 --out "$out/bccd" "${size[@]}"
fi
# Steps and predictions beside torchvision's, with the number of times that the host waits
for method in d2det double_head cpm_rcnn iou_aware_retinanet dc_loss_clnms; do
  part "bench_$method" 60 "$python" -m studies.bench $method --repeat $repeat --out "$out/$method" \
    --backbone-weights none "${size[@]}"
done
# One process under torchrun: DDP's way of starting, over NCCL
part ddp 60 "$python" -m torch.distributed.run --standalone --nproc_per_node 1 d2det.py --train \
  --preset tiny --steps $steps --out "$out/ddp" "${size[@]}"
# The same through torch.compile: the first step takes minutes
for method in d2det iou_aware_retinanet; do
  part "compiled_$method" 150 "$python" -m studies.bench $method --compile --repeat $repeat \
    --out "$out/compiled_$method" --backbone-weights none "${size[@]}"
done
echo "log and JSON files: $out"
