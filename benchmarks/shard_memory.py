"""How many bytes does a rank keep, and is that what the design says? One answer per rank and in all.

    deepspeed --num_accelerators 2 benchmarks/shard_memory.py --ds_config ds_configs/zero3_cpu.json --model M

Expected per rank: 4 bytes per target weight (bf16 half and remainder, or fp32) and 2 per other weight (4 under
fp32 compute), divided by the ranks, plus factors and their state.
Measured after two real steps: every live tensor of the process on CPU, the allocator's count on a GPU.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from torch import Tensor


def live_tensor_bytes() -> int:
    """Bytes of every storage on this rank's device that a tensor of the process still refers to, each once."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(engine, batch: dict[str, Tensor], *, steps: int = 2) -> dict[str, int]:
    """Takes real steps on one batch and compares: bytes of this rank, `measured`, `expected` and its parts."""
    for _ in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(**batch).loss)
            engine.step()
    return {"measured": live_tensor_bytes(), **expected_bytes(engine)}


def expected_bytes(engine) -> dict[str, int]:
    """The formula above; counts parameters, looks at no tensor of weights or masters."""
    from hdpissa.engine.sharding import zero3

    world = engine.plan.world_size
    targets = sum(t.rows * t.cols for t in engine.targets)
    every = sum(zero3.full_numel(p) for p in engine.module.parameters())
    width = zero3.shard_view(engine.targets[0].param).element_size()
    held = engine.memory_bytes()
    parts = {
        "target weights": 4 * targets // world,
        "other weights": width * (every - targets) // world,
        "factors": held["factors"],
        "slice state": held["slice_state"],
    }
    return {**parts, "expected": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ds_config", required=True)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--bf16", action="store_true", help="where the JSON says auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()

    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.config import ds_config
    from hdpissa.engine.sharding import zero3

    config = ds_config.read_ds_config(args.ds_config)
    if args.bf16:
        config["bf16"] = {"enabled": True}
    engine = initialize(model=load_pretrained(args.model, config), config=config)
    ids = torch.randint(0, engine.module.config.vocab_size, (1, args.tokens), device=zero3.device())
    found = measure(engine, {"input_ids": ids, "labels": ids})
    rows: list = [None] * engine.plan.world_size
    dist.all_gather_object(rows, found)
    if engine.plan.rank == 0:
        for rank, row in enumerate(rows):
            parts = "  ".join(f"{name} {value / 2**20:.1f}" for name, value in row.items())
            print(f"rank {rank} MiB: {parts}  measured / expected {row['measured'] / row['expected']:.4f}")
    zero3.shut_down()


if __name__ == "__main__":
    main()
