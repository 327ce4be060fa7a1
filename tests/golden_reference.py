"""The recorded run of golden.py with the benchmarks' transcription of the published algorithm in place of the engine.

What our own step is timed against must be the published algorithm: on the same rows in the same order and with the
same schedule it has to give the recorded losses and changes of W. Writes what golden.py compares: losses in
metrics.jsonl, and the trained weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import golden_train
import torch.distributed as dist
from datasets import load_dataset
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from hdpissa.benchmarks.step.methods import Setting, build
from hdpissa.engine.sharding import zero3
from hdpissa.engine.sharding.slicing import SlicePlan
from hdpissa.launch.common.prompts import resolve_template
from hdpissa.launch.trainers.sampler import SliceOrder, SliceSampler
from hdpissa.launch.training.alpaca import AlpacaEncoder

R, MICRO, PER_SLICE, LR, SEED = 16, 2, 2, 2e-4, 42


def read(model: str, data: str, plan: SlicePlan, accumulation: int) -> DataLoader:
    """The recording's micro-batches: of a step every rank's first one, then every rank's second one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AlpacaEncoder(tokenizer, resolve_template("alpaca"), "question", "answer")
    rows = load_dataset("json", data_files=data, split="train[:80]").map(
        lambda batch: {name: [row[:256] for row in column] for name, column in encoder(batch).items()},
        batched=True,
        remove_columns=["question", "answer"],
    )
    sampler = SliceSampler(len(rows), SliceOrder(plan, accumulation, MICRO), SEED)
    return DataLoader(rows, MICRO, sampler=sampler, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=0)
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    if args.lanes:
        golden_train.install(args.lanes)
    zero3.init_distributed()
    accumulation = args.slices * PER_SLICE // dist.get_world_size()
    method = build(
        "reference", Setting(args.model, r=R, slices=args.slices, micro_batch=MICRO, accumulation=accumulation)
    )
    data = read(args.model, args.data, method.plan, accumulation)
    own = itertools.islice(data, dist.get_rank(), None, dist.get_world_size())
    losses, steps = [], len(data) // (args.slices * PER_SLICE)
    for step in range(steps):
        total = sum(method.micro_step(batch) for batch in itertools.islice(own, accumulation))
        dist.all_reduce(total)
        losses.append(total.item() / (args.slices * PER_SLICE))
        method.step(lr=0.5 * LR * (1 + math.cos(math.pi * step / steps)))
        if dist.get_rank() == 0:
            print(f"step {step}  loss {losses[-1]:.7f}", flush=True)
    if dist.get_rank() == 0:
        (args.output_dir / "model").mkdir(parents=True)
        rows = [json.dumps({"step": step + 1, "loss": loss}) for step, loss in enumerate(losses)]
        (args.output_dir / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        save_file(dict(method.weights()), args.output_dir / "model" / "model.safetensors")
    zero3.wait_for_all_ranks()
    zero3.shut_down()


if __name__ == "__main__":
    sys.exit(main())
