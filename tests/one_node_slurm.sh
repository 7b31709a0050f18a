#!/usr/bin/env bash
# one_node_slurm.sh COMMAND...: runs a command beside a Slurm cluster of this machine alone, and stops the cluster after it.
# As root on Debian, whose packages it installs if they are missing. What it writes is gone when it ends.
# The node claims CPUs, memory and two GPUs that the machine need not have: so jobs can ask for them and wait for each other.
set -euo pipefail

if ! command -v slurmctld slurmd munged > /dev/null; then
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends slurm-wlm munge > /dev/null
fi

# The only place where all of Slurm's commands look: Snakemake's plugin takes SLURM_CONF from the environment of its jobs.
settings=/etc/slurm
if [ -e $settings/slurm.conf ]; then
    echo "This machine has a Slurm of its own: $settings/slurm.conf exists." >&2
    exit 1
fi
folder=$(mktemp --directory)
started=()
trap 'kill "${started[@]}"; wait; rm -rf "$folder" $settings/slurm.conf $settings/gres.conf' EXIT
mkdir "$folder/state" "$folder/spool"
host=$(hostname --short)
cat > $settings/slurm.conf << END
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MailProg=/bin/true
MpiDefault=none
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=32 RealMemory=128000 Gres=gpu:2
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE
END
printf "Name=gpu File=%s\n" /dev/null /dev/zero > $settings/gres.conf # devices that every machine has

head --bytes 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --foreground --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" --seed-file "$folder/munge.seed" > "$folder/munged.log" 2>&1 &
started+=($!)
slurmctld -D > "$folder/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D > "$folder/slurmd.log" 2>&1 &
started+=($!)
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format %T 2> /dev/null)" = idle ] && break
    sleep 0.5
done
if [ "$(sinfo --noheader --format %T)" != idle ]; then
    tail "$folder"/*.log >&2
    exit 1
fi
"$@"
