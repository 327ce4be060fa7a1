#!/bin/sh
# The demo behind `make demo`: a real pretrained model learns to work out arithmetic word problems, on CPU.
set -eu
output=${OUTPUT:-outputs/demo}
model=$(python launch/demo_model.py | tail -n 1)
python launch/demo_data.py --output_dir "$output/data" --train 80 --eval 32
deepspeed --quiet --num_accelerators 2 --master_port "${MASTER_PORT:-29541}" launch/train.py \
    --ds_config ds_configs/zero3_cpu.json \
    --model_name_or_path "$model" \
    --dataset_name "$output/data/train.jsonl" \
    --eval_dataset_name "$output/data/eval.jsonl" \
    --output_dir "$output/run" --overwrite_output_dir --save_strategy no \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 \
    --learning_rate 4e-4 --num_train_epochs 1 --max_length 256 --max_new_tokens 32 \
    --sample_prompt "Tom has 14 apples. He buys 3 bags with 6 apples each and gives away 5. How many apples does Tom have?"
python launch/demo_report.py "$output/run"
