#!/usr/bin/env bash
# The paper's code run: 100,000 Python rows of CodeFeedback, Llama-2-7B, 8 GPUs. Judged on HumanEval and MBPP.
#
#   hf download fxmeng/pissa-dataset --repo-type dataset --local-dir data/pissa-dataset
#   launch/recipes/paper_code.sh [more options of hdpissa train]
#
# The rows are those that PiSSA's authors have picked out of m-a-p/CodeFeedback-Filtered-Instruction.
# MODEL, DATA and OUTPUT name another base and other folders, GPU the kind that the plan reckons with.
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}

hdpissa plan --model_name_or_path "$MODEL" --gpu "${GPU:-H100}" --gpus 8 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8
exec hdpissa train launch/recipes/paper.yaml --num_accelerators 8 --model_name_or_path "$MODEL" \
    --dataset_name "${DATA:-data/pissa-dataset}/python" --dataset_split "train[:100000]" \
    --prompt_field instruction --response_field output \
    --output_dir "${OUTPUT:-outputs/paper_code}" --save_total_limit 1 --resume_from_checkpoint auto "$@"
