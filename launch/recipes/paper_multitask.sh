#!/usr/bin/env bash
# The paper's multi-task run: mathematics, code and common sense in one model, Llama-2-7B, 8 GPUs.
#
#   hf download fxmeng/pissa-dataset --repo-type dataset --local-dir data/pissa-dataset
#   launch/recipes/paper_multitask.sh [more options of hdpissa train]
#
# The authors' code does not say which rows are mixed. This is a reading of the paper's twelve benchmarks: GSM8K and
# MATH, HumanEval and MBPP, and eight of common sense, each with the training rows that PiSSA's authors keep for it.
# paper_multitask.yaml names the three sets. MODEL and OUTPUT name another base and another folder, GPU the kind that
# the plan reckons with.
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}

hdpissa plan --model_name_or_path "$MODEL" --gpu "${GPU:-H100}" --gpus 8 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
exec hdpissa train launch/recipes/paper_multitask.yaml --num_accelerators 8 --model_name_or_path "$MODEL" \
    --prompt_field instruction --response_field output \
    --output_dir "${OUTPUT:-outputs/paper_multitask}" --save_total_limit 1 --resume_from_checkpoint auto "$@"
