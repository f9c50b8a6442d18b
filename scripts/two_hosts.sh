#!/usr/bin/env bash
# Train on two "hosts" (network namespaces with addresses of their own, joined by a virtual cable), two ranks on each,
# by every launcher of docs/launch.md.
#
#     sudo scripts/two_hosts.sh [CODES]        CODES: a code store; without it a small one is made
#
# Needs root and `ip`. A shared file system, as a cluster has, is the one that both namespaces see. What pdsh or mpirun
# would start on each machine for `deepspeed --hostfile` is started here directly (deepspeed.launcher.launch), what srun
# would start is given srun's variables.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
work="$(mktemp -d)"
codes="${1:-$work/codes}"
clean_up() {
  kill $(jobs -p) 2>/dev/null || true
  for host in a b; do ip netns del sf_$host 2>/dev/null || true; done
  rm -rf "$work"
}
trap clean_up EXIT
[ $# -gt 0 ] || "$python" -c "import sys; from pathlib import Path; from tests.training.store import write_store
write_store(Path(sys.argv[1]))" "$codes"

for host in a b; do
  ip netns del sf_$host 2>/dev/null || true
  ip netns add sf_$host
  ip -n sf_$host link set lo up
done
ip link add sf_va type veth peer name sf_vb
for host in a b; do ip link set sf_v$host netns sf_$host; done
ip -n sf_a addr add 10.77.0.1/24 dev sf_va
ip -n sf_b addr add 10.77.0.2/24 dev sf_vb
for host in a b; do ip -n sf_$host link set sf_v$host up; done

export OMP_NUM_THREADS=1 TQDM_DISABLE=1
settings=(--preset tiny --model.width 32 --model.blocks 2 --method.projector-width 24 --train.images-per-step 8
          --train.tensorboard False --train.precision bf16 --train.zero-stage 2 --train.max-steps 12
          --data.codes "$codes")

on() { # HOST COMMAND...: run on one host
  local host=$1; shift
  ip netns exec sf_$host env GLOO_SOCKET_IFNAME=sf_v$host "$@"
}
both() { # NAME FUNCTION: run FUNCTION HOST NODE on both, and look at what is left
  "$2" a 0 >"$work/$1-a.log" 2>&1 & local a=$!
  "$2" b 1 >"$work/$1-b.log" 2>&1 & local b=$!
  if wait $a && wait $b && [ -f "$work/$1/model/model.safetensors" ]; then
    echo "$1: $(grep -h '^Finished' "$work/$1"-?.log), $("$python" -c "import json, sys
losses = [json.loads(line)['loss'] for line in open(sys.argv[1]) if '\"loss\"' in line]
print('loss', round(losses[-1], 4))" "$work/$1/metrics.jsonl")"
  else
    echo "$1 failed"; tail -n 15 "$work/$1"-?.log; exit 1
  fi
}
torchrun() {
  on "$1" "$python" -m torch.distributed.run --nnodes 2 --node-rank "$2" --nproc-per-node 2 \
    --master-addr 10.77.0.1 --master-port 29400 -- star_fast/train.py "${settings[@]}" --run "$work/torchrun"
}
deepspeed() {
  local world; world=$(printf '{"10.77.0.1": [0, 1], "10.77.0.2": [0, 1]}' | base64 -w 0 | tr '+/' '-_')
  on "$1" "$python" -m deepspeed.launcher.launch --world_info="$world" --node_rank="$2" \
    --master_addr=10.77.0.1 --master_port=29500 star_fast/train.py "${settings[@]}" --run "$work/deepspeed"
}
srun() { # what srun does on one node: its variables, and one process a task
  local pids=()
  for local_id in 0 1; do
    on "$1" env SLURM_PROCID=$((2 * $2 + local_id)) SLURM_LOCALID=$local_id SLURM_NTASKS=4 \
      MASTER_ADDR=10.77.0.1 MASTER_PORT=29501 \
      bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' - \
      "$python" star_fast/train.py "${settings[@]}" --run "$work/srun" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
}
both torchrun torchrun
both deepspeed deepspeed
both srun srun
