#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build csrc in place, run the tests marked `gpu`, the memory and race checkers and all benchmarks, and write a dated
# report to benchmarks/results/. Takes the python3 it finds (torch 2.11 or newer with CUDA) and installs nothing; needs no network.
# Exit code 0: all stages that could run passed. 1: a stage failed. 2: no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
seconds=590  # of each stage, at most

if ! facts=$("$python" -c 'import torch; p = torch.cuda.get_device_properties(0); print(f"{p.name}|{p.major}{p.minor}|{p.major}.{p.minor}")' 2>/dev/null); then
  echo "error: no CUDA GPU that $python's torch can use was found; run this on a machine with one (PYTHON chooses another interpreter)" >&2
  exit 2
fi
IFS='|' read -r device capability arch <<< "$facts"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
unset TRITON_INTERPRET

mkdir -p benchmarks/results
report="benchmarks/results/gpu_acceptance_$(date -u +%Y-%m-%d_%H%M)_$(tr -cs 'A-Za-z0-9' '-' <<< "$device" | sed 's/-*$//').md"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0
summary="" details=""

note() {  # note NAME RESULT SECONDS
  summary+="| $1 | $2 | $3 |"$'\n'
  echo "== $1: $2 ($3 s)"
}

stage() {  # stage NAME COMMAND...
  local name=$1 log="$logs/log" start=$SECONDS code
  shift
  echo "== $name ..."
  timeout "$seconds" "$@" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) note "$name" passed $((SECONDS - start)) ;;
    124) note "$name" "FAILED: over $seconds s" $((SECONDS - start)); failed=1 ;;
    *) note "$name" "FAILED: exit code $code" $((SECONDS - start)); failed=1 ;;
  esac
  details+=$'\n'"## $name"$'\n\n'"    $*"$'\n\n'"$(tail -n 150 "$log" | cut -c1-2000 | sed 's/^/    /')"$'\n'
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

stage environment "$python" -c 'import platform, sys, torch, triton; from benchmarks import timing
print(timing.environment("cuda") | {"python": sys.version.split()[0], "platform": platform.platform(), "capability": torch.cuda.get_device_capability()})'
for extra in deepspeed nvidia.dali flash_attn apex torch_fidelity rich; do
  has "$extra" || note "extra $extra" "absent: what needs it is skipped" 0
done

if [ -f setup.py ]; then
  if has setuptools && has ninja; then
    stage "build csrc" "$python" setup.py build_ext --inplace
  else
    note "build csrc" "skipped: setuptools or ninja is not installed" 0
  fi
fi

case $capability in
  80 | 90 | 100) stage "kernel resources" "$python" benchmarks/kernel_resources.py --check --triton-only --arch "$capability" ;;
  *) note "kernel resources" "skipped: the table has no rows for compute capability $arch" 0 ;;
esac

if has pytest; then
  stage "gpu tests" "$python" -m pytest -m gpu -q -p no:cacheprovider tests
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      # Without PyTorch's caching allocator every tensor has bounds that the checker knows.
      stage "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$python" -m pytest -m gpu -q -p no:cacheprovider tests/ops/test_gpu.py -k "unit"
    done
  else
    note "memcheck and racecheck" "skipped: compute-sanitizer is not on PATH" 0
  fi
else
  note "gpu tests" "skipped: pytest is not installed" 0
  failed=1
fi

subjects=$("$python" -c 'from benchmarks.throughput import SUBJECTS; print(*SUBJECTS)')
for subject in $subjects; do
  stage "benchmark $subject" "$python" benchmarks/throughput.py --subject "$subject"
done
stage "benchmark sampling" "$python" benchmarks/sampling.py
if has deepspeed; then
  stage "benchmark training" "$python" benchmarks/training.py --profile
  stage "planned and measured memory" "$python" benchmarks/plan_check.py
else
  note "benchmark training" "skipped: deepspeed is not installed" 0
fi
if has nvidia.dali && has torchvision && has sklearn; then
  stage "benchmark loading" "$python" benchmarks/loading.py
else
  note "benchmark loading" "skipped: nvidia.dali, torchvision or scikit-learn is not installed" 0
fi

{
  echo "# GPU acceptance, $device, $(date -u +'%Y-%m-%d %H:%M') UTC"
  printf '\nMade by `scripts/gpu_acceptance.sh`.\n\n| stage | result | seconds |\n|---|---|--:|\n%s%s' "$summary" "$details"
} > "$report"
echo "report: $report"
exit "$failed"
