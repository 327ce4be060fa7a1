"""How much memory does a rank need to load a model of several GB, and how long does it take?

    deepspeed --num_accelerators 4 benchmarks/load_memory.py --gigabytes 3 --folder /tmp/big            own rows
    deepspeed --num_accelerators 4 benchmarks/load_memory.py --gigabytes 3 --folder /tmp/big --whole    rank 0 reads all

The model is a Llama of random bf16 weights in several safetensors files, written once into --folder. What is measured
is the peak of anonymous memory (pages of mapped files are the system's to drop), sampled every 5 ms. The bound is
the model's bytes over the ranks, the largest tensor, and 600 MB for the process itself.
"""

from __future__ import annotations

import argparse
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
VOCABULARY = 32_000
PROCESS_BYTES = 600e6


def write_model(folder: Path, gigabytes: float) -> None:
    """A random Llama of about that size, as transformers would save it; nothing is done where there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return
    per_layer = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 5632 * 2048)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * 2048) / per_layer))
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **LAYER)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def anonymous_bytes() -> int:
    """This process's anonymous memory now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak:
    """The largest `anonymous_bytes` while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", required=True, help="where the model is, or will be written")
    parser.add_argument("--whole", action="store_true", help="transformers' own path: rank 0 reads everything")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    from hdpissa.engine import sharded_load, zero3

    zero3.init_distributed()
    folder = Path(args.folder)
    if dist.get_rank() == 0:
        write_model(folder, args.gigabytes)
    dist.barrier()
    config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    start = time.perf_counter()
    with Peak() as peak, nullcontext() if args.whole else sharded_load.reading_own_rows():
        model = zero3.load_pretrained(str(folder), config, loader=AutoModelForCausalLM)
    seconds = time.perf_counter() - start
    sizes = [2 * zero3.full_numel(p) for p in model.parameters()]
    bound = sum(sizes) / dist.get_world_size() + max(sizes) + PROCESS_BYTES
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, (peak.bytes, seconds))
    if dist.get_rank() == 0:
        print(f"model {sum(sizes) / 1e6:.0f} MB, largest tensor {max(sizes) / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
        for rank, (measured, took) in enumerate(rows):
            print(f"rank {rank}: peak {measured / 1e6:.0f} MB anonymous, {took:.1f} s")
    zero3.shut_down()


if __name__ == "__main__":
    main()
