#!/usr/bin/env bash
# Many hosts without ssh: run this on every host, with the host's line in the hostfile (from 0) as NODE_RANK.
#
#   NODE_RANK=1 MASTER_ADDR=node1 launch/nodes/deepspeed_no_ssh.sh --ds_config … --output_dir O
#
# MASTER_ADDR is the host of rank 0, the first in the hostfile, by a name or address that all others can reach.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec deepspeed --no_ssh --hostfile "${HOSTFILE:-launch/nodes/hostfile}" --node_rank "${NODE_RANK:?}" \
    --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:-29500}" launch/train.py "$@"
