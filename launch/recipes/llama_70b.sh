#!/usr/bin/env bash
# A 70B Llama on one node of 8 × 80 GB, bf16, gradient checkpointing; docs/large-models.md explains it.
#
#   launch/recipes/llama_70b.sh train.jsonl [more options of hdpissa train]
#
# MODEL and OUTPUT name another base and another folder, GPU the kind that the plan reckons with.
set -euo pipefail
data=${1:?a file, a folder, or a hub name} && shift
if [ -e "$data" ]; then data=$(realpath "$data"); fi
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-meta-llama/Llama-3.1-70B}
shape=(--ds_config zero3_70b_node --model_name_or_path "$MODEL" --max_length 2048
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --gradient_checkpointing)

hdpissa plan "${shape[@]}" --gpu "${GPU:-H100}" --gpus 8
exec hdpissa train --num_accelerators 8 "${shape[@]}" --dataset_name "$data" --output_dir "${OUTPUT:-outputs/llama_70b}" \
    --learning_rate 2e-5 --num_train_epochs 1 --save_steps 50 --save_total_limit 2 --resume_from_checkpoint auto "$@"
