#!/usr/bin/env bash
# Everything that is owed on a GPU, most important first: studies/gpu.sh OUT [MINUTES, 10 unless given]
#
# Writes OUT/report.txt, one file to send: machine, versions, checks, tables, and what did not fit
# into the time. Beside it lie the runs and JSON files. DETECTION_DATA may name a folder with bccd/
# and coco_tiny/; without, bccd is left out and the kernels' boxes are made up. SMALL=1 rehearses it
# with small networks and images on DEVICE (cpu unless given), without hurry.
set -u
out=${1:?usage: studies/gpu.sh OUT [MINUTES]}
minutes=${2:-10}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
report=$out/report.txt
data=${DETECTION_DATA:-}
python=${PYTHON:-python}
size=() short=() nccl=() steps=200 repeat=10 workers=4 tests="" slower=1
if [ "${SMALL:-}" ]; then
  device=(--device "${DEVICE:-cpu}")
  size=(--preset tiny "${device[@]}" --image-size 64 --scales 64 --test-scales 64 --max-size 64)
  short=(--seconds 0.01 "${device[@]}" --only "1000 x 7x7 float32")
  nccl=(--device cpu) # a pretended GPU has no NCCL
  steps=3 repeat=1 workers=0 tests="-k hand" slower=60
fi
end=$((SECONDS + 60 * minutes * slower))

say() { echo "$@" | tee -a "$report"; }

part() { # NAME SECONDS COMMAND...: at most so long, and not past the end
  local name=$1 most=$(($2 * slower)) left=$((end - SECONDS)) start=$SECONDS code=0
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 5 ]; then
    say "== $name: no time left"
    return
  fi
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || code=$?
  say "== $name: exit $code, $((SECONDS - start)) s"
  tail -n 100 "$out/$name.log" >>"$report"
}

: >"$report"
say "$(date -u +%F) $(uname -sm) $(git rev-parse --short HEAD 2>/dev/null)"
say "$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi")"
say "$("$python" -c "import torch, torchvision as v, triton; print('torch', torch.__version__, 'torchvision', v.__version__, 'triton', triton.__version__, 'cuda', torch.version.cuda, torch.cuda.device_count(), 'GPU')" 2>&1 | tail -n 1)"
# The limits of all but the last part are 600 seconds together.
# Are the kernels right, run natively? (most of the time goes into compiling them)
part kernel_tests 150 "$python" -m pytest -p no:cacheprovider -n $workers $tests \
  tests/test_roi_align.py tests/test_nms.py tests/test_nms_triton.py tests/test_dense_decode.py \
  tests/test_focal_loss.py tests/test_operators.py
# How fast are they, beside torchvision's and a plain copy? RoIAlign, which takes most, comes first
part kernels 120 "$python" -m kernels.bench --lines "$out/kernels.jsonl" "${short[@]}"
# Steps and predictions beside torchvision's, with their memory and how often the host waits
for method in d2det iou_aware_retinanet cpm_rcnn double_head dc_loss_clnms; do
  part "bench_$method" 30 "$python" -m studies.bench $method --repeat $repeat --out "$out/$method" \
    "${size[@]}"
done
# Does the paper's preset learn from the first step on real images? From scratch: no download
if [ -d "$data/bccd" ]; then
  part bccd 70 "$python" d2det.py --train --preset paper --data "$data/bccd" \
    --backbone-weights none --steps $steps --log-every 5 --out "$out/bccd" "${size[@]}"
fi
# One process under torchrun: DDP's way of starting, over NCCL
part ddp 30 "$python" -m torch.distributed.run --standalone --nproc_per_node 1 d2det.py --train \
  --preset tiny --steps $steps --out "$out/ddp" "${size[@]}" "${nccl[@]}"
# The same through torch.compile, whose first step takes long; D2Det has the time that is left
part compiled_iou_aware_retinanet 80 "$python" -m studies.bench iou_aware_retinanet --compile \
  --repeat $repeat --out "$out/compiled_iou_aware_retinanet" "${size[@]}"
part compiled_d2det 300 "$python" -m studies.bench d2det --compile --repeat $repeat \
  --out "$out/compiled_d2det" "${size[@]}"
echo "to send: $report"
