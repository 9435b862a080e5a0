#!/usr/bin/env bash
# Install SLURM and MUNGE from Debian's packages, if they are not there. Needs root.
set -euo pipefail
if command -v slurmctld slurmd sbatch munged >/dev/null; then
    exit
fi
if ! command -v apt-get >/dev/null || ((EUID != 0)); then
    echo "slurm: not installed, and only root on Debian can install it here" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The packages start their services on some machines: ours run under a configuration of their own.
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
