#!/usr/bin/env bash
# Many hosts from one: the deepspeed launcher reaches all hosts of the hostfile by pdsh and ssh without a password.
#
#   launch/nodes/deepspeed.sh --ds_config ds_configs/zero3.json --model_name_or_path M … --output_dir O
#
# The project, its environment and the data have to be at the same paths on every host. ssh passes on few variables:
# put others (HF_HOME=…, NCCL_SOCKET_IFNAME=…) into a file .deepspeed_env here, KEY=VALUE a line, without empty lines.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec deepspeed --hostfile "${HOSTFILE:-launch/nodes/hostfile}" --master_port "${MASTER_PORT:-29500}" \
    launch/train.py "$@"
