#!/usr/bin/env bash
# Many hosts with torchrun: run this on every host, from NODE_RANK=0 up to NODES - 1.
#
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node1 launch/nodes/torchrun.sh --ds_config … --output_dir O
#
# PROCESSES is how many a host runs, one per GPU; MASTER_ADDR is the host of NODE_RANK=0.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec torchrun --nnodes "${NODES:?}" --node_rank "${NODE_RANK:?}" --nproc_per_node "${PROCESSES:-8}" \
    --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" launch/train.py "$@"
