"""A user's script: TRL's classes, our trainer, nothing else. Prints the last loss and the world size on rank 0.

LAUNCHER user_script.py MODEL DATA DS_CONFIG OUTPUT
"""

import sys

from datasets import load_dataset
from trl import SFTConfig

from hdpissa.launch.trainers import HDPissaSFTTrainer

model, data, ds, output = sys.argv[-4:]
where = {} if ds == "launched" else {"deepspeed": ds}  # `accelerate launch` is told of the JSON itself
steps = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
args = SFTConfig(output, bf16=False, report_to="none", save_strategy="no", **steps, **where)
dataset = load_dataset("json", data_files=data, split="train")
trainer = HDPissaSFTTrainer(model=model, args=args, train_dataset=dataset)
loss = trainer.train().training_loss
if trainer.is_world_process_zero():
    print(f"RESULT {loss:.6f} {args.world_size} {trainer.engine.plan.world_size}", flush=True)
