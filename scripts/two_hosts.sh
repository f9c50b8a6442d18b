#!/usr/bin/env bash
# Runs the cluster lines of README.md as they stand, but for smaller numbers, on two "hosts": network namespaces with
# names, addresses, sshd and slurmd of their own, joined by a virtual cable. Two ranks on each, on the CPU, with gloo.
# All must train the same: four ranks, equal losses.
#
#     sudo scripts/two_hosts.sh [deepspeed] [torchrun] [slurm]      all where none is named
#     scripts/two_hosts.sh --lines                       only shows what would be run
#
# Needs root, and Debian's iproute2, openssh-server, pdsh, munge, slurmctld, slurmd, slurm-client. No host can reach the
# world; no key, daemon or setting of the machine is used or changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(realpath -s "${PYTHON:-.venv/bin/python}")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT # until there is more to end
small="--preset tiny --model.width 32 --model.blocks 2 --method.projector-width 24 --train.images-per-step 8 \
--train.precision bf16 --train.zero-stage 2 --train.max-steps 12 --train.tensorboard False"

line_of() { # START: README's command that begins so, its continued lines included
  awk -v start="$1" 'index($0, start) == 1 { on = 1 } on { print } on && !/\\$/ { exit }' README.md
}
smaller() { # TEXT NAME [FROM TO]...: TEXT with what is smaller here; what is to be replaced must be there
  local text=$1 name=$2
  set -- "${@:3}" "--preset XL" "$small" data/imagenet "$work/codes" runs/XL "$work/$name"
  while [ $# -gt 0 ]; do
    case $text in *"$1"*) ;; *) echo "error: $name: the line has no '$1'" >&2; return 1 ;; esac
    text=${text//"$1"/$2}
    shift 2
  done
  printf '%s\n' "$text"
}
lines() { # NAME: what is run for it
  case $1 in
    deepspeed) smaller "$(line_of 'deepspeed --hostfile')" "$1" " hosts " " $work/hosts " ;;
    torchrun) smaller "$(line_of 'torchrun --nnodes')" "$1" "--nproc-per-node 8" "--nproc-per-node 2" ;;
    slurm) smaller "$(line_of 'sbatch --nodes')" "$1" "--nodes 2" \
      "--nodes 2 --ntasks-per-node 2 --gpus-per-node 2 --cpus-per-task 1 --wait --output $work/slurm-job.log" ;;
    *) echo "error: expected deepspeed, torchrun or slurm, got $1" >&2; return 2 ;;
  esac
}
[ $# -gt 0 ] || set -- deepspeed torchrun slurm
if [ "$1" = --lines ]; then
  for name in deepspeed torchrun slurm; do lines "$name"; done
  exit
fi
for name in "$@"; do lines "$name" >"$work/$name.sh"; done
export PATH="$work/bin:$(dirname "$python"):$PATH:/usr/sbin:/sbin" PYTHONPATH="$PWD" OMP_NUM_THREADS=1 TQDM_DISABLE=1
for tool in ip nsenter unshare sshd pdsh munged slurmctld slurmd sbatch; do
  command -v $tool >/dev/null || { echo "error: $tool is not installed: see the head of $0" >&2; exit 2; }
done

# Two hosts.
hosts="node1 node2"
end() {
  for signal in TERM KILL; do
    for host in $hosts; do kill -$signal $(ip netns pids sf_$host 2>/dev/null) 2>/dev/null || true; done
    sleep 1
  done
  for host in $hosts; do ip netns del sf_$host 2>/dev/null || true; done
  rm -rf "$work"
}
trap end EXIT
trap 'exit 143' TERM INT
on() { # HOST COMMAND...: run on one host, with its name, its network and its /etc/hosts
  nsenter --net=/run/netns/sf_$1 unshare --uts --mount bash -c \
    'hostname "$1"; mount --bind "$2" /etc/hosts; exec "${@:3}"' - "$1" "$work/etc_hosts" "${@:2}"
}
printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$work/etc_hosts"
ip link add sf_v1 type veth peer name sf_v2
for number in 1 2; do
  ip netns add sf_node$number
  ip link set sf_v$number netns sf_node$number
  ip -n sf_node$number addr add 10.77.0.$number/24 dev sf_v$number
  ip -n sf_node$number link set sf_v$number up
  ip -n sf_node$number link set lo up
  echo "node$number slots=2" >>"$work/hosts"
done

# ssh with a key of this run, for pdsh.
mkdir -p "$work/bin" /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$work/key"
printf '#!/bin/sh\nexec %s -F %s "$@"\n' "$(command -v ssh)" "$work/ssh_config" >"$work/bin/ssh"
chmod +x "$work/bin/ssh"
cat >"$work/ssh_config" <<END
IdentityFile $work/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
END
cat >"$work/sshd_config" <<END
HostKey $work/key
AuthorizedKeysFile $work/key.pub
StrictModes no
UsePAM no
PidFile none
END

# Slurm: one controller, a slurmd on each host.
cat >"$work/slurm.conf" <<END
ClusterName=two_hosts
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
StateSaveLocation=$work
SlurmdSpoolDir=$work/slurmd-%h
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%h.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
GresTypes=gpu
NodeName=node1 NodeAddr=10.77.0.1 CPUs=4 Gres=gpu:2
NodeName=node2 NodeAddr=10.77.0.2 CPUs=4 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
END
printf 'Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n' >"$work/gres.conf" # in place of GPUs: any device file
export SLURM_CONF="$work/slurm.conf"
daemon() { # NAME HOST COMMAND...: in the background, with a log
  on "${@:2}" >"$work/$1.log" 2>&1 &
}
for host in $hosts; do daemon sshd-$host $host "$(command -v sshd)" -D -e -f "$work/sshd_config"; done
case " $* " in *" slurm "*)
  head -c 256 /dev/urandom >"$work/munge.key"
  chmod 600 "$work/munge.key"
  daemon munged node1 munged --foreground --force --socket="$work/munge.socket" --key-file="$work/munge.key" \
    --pid-file="$work/munge.pid" --seed-file="$work/munge.seed" --log-file="$work/munge.log"
  until [ -S "$work/munge.socket" ]; do sleep 0.2; done
  daemon slurmctld node1 slurmctld -D
  for host in $hosts; do daemon slurmd-$host $host slurmd -D; done
  for _ in $(seq 60); do [ "$(on node1 sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && break; sleep 0.5; done
  [ "$(on node1 sinfo -h -t idle -o %D)" = 2 ] || { tail -n 15 "$work"/slurm*.log; exit 1; } ;;
esac

# A shared file system, as a cluster has, is the one that both see.
"$python" -c "from pathlib import Path; from tests.training.store import write_store; write_store(Path('$work/codes'))"
told=()
for name in "$@"; do
  started=$SECONDS
  if [ $name = torchrun ]; then on node2 bash "$work/$name.sh" >"$work/$name-2.log" 2>&1 & fi # the same line there, too
  if ! on node1 bash "$work/$name.sh" >"$work/$name-1.log" 2>&1 || [ ! -f "$work/$name/model/model.safetensors" ]; then
    echo "$name failed"
    tail -n 25 "$work/$name"-*.log
    exit 1
  fi
  ranks=$(grep -ho '[0-9]* x cpu' "$work/$name"-*.log)
  loss=$(grep -o '"loss": [0-9.]*' "$work/$name/metrics.jsonl" | tail -n 1)
  echo "$name: ranks $ranks; $(grep -ho 'Finished after [^;]*' "$work/$name"-*.log), $loss; $((SECONDS - started)) s"
  told+=("$ranks, $loss")
done
for one in "${told[@]}"; do
  [ "$one" = "4 x cpu, ${told[0]#*, }" ] || { echo "not one run of four ranks: $one, ${told[0]}"; exit 1; }
done
