#!/usr/bin/env bash
# The paper's mathematics run on one GPU of 80 GB: S = 8, each slice with the rows that it would have on a GPU of its own.
#
#   launch/recipes/one_gpu.sh [more options of hdpissa train]
#
# Eight times the accumulation steps make the same global batch; up to the order of sums it is the same run. Gradient
# checkpointing changes no result: it leaves the memory of activations to the weights, which one GPU has all of.
# MODEL and OUTPUT name another base and another folder, GPU the kind that the plan reckons with.
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}

hdpissa plan --ds_config zero3_one_gpu --model_name_or_path "$MODEL" --gpu "${GPU:-H100}" --gpus 1 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 64 --gradient_checkpointing
exec hdpissa train launch/recipes/paper.yaml --num_accelerators 1 --ds_config zero3_one_gpu \
    --gradient_accumulation_steps 64 --gradient_checkpointing --model_name_or_path "$MODEL" \
    --dataset_name meta-math/MetaMathQA --dataset_split "train[:100000]" \
    --prompt_field query --response_field response \
    --output_dir "${OUTPUT:-outputs/one_gpu}" --save_total_limit 1 --resume_from_checkpoint auto "$@"
