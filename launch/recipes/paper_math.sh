#!/usr/bin/env bash
# The paper's mathematics run: 100,000 rows of MetaMathQA, Llama-2-7B, 8 GPUs. Judged on GSM8K and MATH.
#
#   launch/recipes/paper_math.sh [more options of hdpissa train]
#
# MODEL and OUTPUT name another base and another folder, GPU the kind that the plan reckons with.
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}

hdpissa plan --model_name_or_path "$MODEL" --gpu "${GPU:-H100}" --gpus 8 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
exec hdpissa train launch/recipes/paper.yaml --num_accelerators 8 --model_name_or_path "$MODEL" \
    --dataset_name meta-math/MetaMathQA --dataset_split "train[:100000]" \
    --prompt_field query --response_field response \
    --output_dir "${OUTPUT:-outputs/paper_math}" --save_total_limit 1 --resume_from_checkpoint auto "$@"
