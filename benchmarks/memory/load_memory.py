"""How much memory does a rank need to load a model of several GB, and how long does it take?

    python benchmarks/memory/load_memory.py [--gigabytes 3] [--ranks 2 4] [--model_folder KEPT]

The model is a Llama of random bf16 weights in several safetensors files. It is loaded under ZeRO-3 in two ways: each
rank reads the rows of its own shards, as this project does, or rank 0 reads everything and broadcasts, which is
transformers' own path. What is measured is the peak of anonymous memory, sampled every 5 ms. The bound is the model's
bytes over the ranks, the largest tensor, and 600 MB for the process itself.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks.common import ranks, timing
from hdpissa.benchmarks.memory.peak import Peak

LAYER: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
VOCABULARY = 32_000
PROCESS_BYTES = 600e6
COLUMNS = ("ranks", "path", "model MB", "largest tensor MB", "peak MB", "bound MB", "seconds")
OWN, WHOLE = "own rows", "rank 0 reads all"


def write_model(folder: Path, gigabytes: float) -> None:
    """A random Llama of about that size, as transformers would save it; nothing is done where there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return
    per_layer = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 5632 * 2048)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * 2048) / per_layer))
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **LAYER)
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="500MB")


def load(folder: str, path: str) -> dict[str, Any]:
    """A rank's part: the row, on all ranks."""
    from transformers import AutoModelForCausalLM

    from hdpissa.engine.sharding import sharded_load, zero3

    count = dist.get_world_size()
    config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    dist.barrier()
    start = time.perf_counter()
    with Peak() as peak, sharded_load.reading_own_rows() if path == OWN else nullcontext():
        model = zero3.load_pretrained(folder, config, loader=AutoModelForCausalLM)
    took = time.perf_counter() - start
    sizes = [2 * zero3.full_numel(p) for p in model.parameters()]
    return {
        "ranks": count,
        "path": path,
        "model MB": sum(sizes) / 1e6,
        "largest tensor MB": max(sizes) / 1e6,
        "peak MB": peak.bytes / 1e6,
        "bound MB": (sum(sizes) / count + max(sizes) + PROCESS_BYTES) / 1e6,
        "seconds": took,
    }


def largest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all ranks': the most memory, the longest time."""
    most = {column: max(row[column] for row in found) for column in ("peak MB", "seconds")}
    return found[0] | most | {"peak of each rank MB": [row["peak MB"] for row in found]}


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--model_folder", help="where the model is kept; default: written anew, and removed")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as own:
        folder = args.model_folder or own
        write_model(Path(folder), args.gigabytes)
        ways = [(count, path) for count in args.ranks for path in (OWN, WHOLE)]
        rows = [largest(ranks.launch(load, count, folder=folder, path=path)) for count, path in ways]
    within = all(row["peak MB"] <= row["bound MB"] for row in rows if row["path"] == OWN)
    headline = (
        f"{rows[0]['model MB'] / 1e3:.1f} GB on {rows[0]['ranks']} ranks: {rows[0]['peak MB']:.0f} MB and "
        f"{rows[0]['seconds']:.1f} s by own rows, {rows[1]['peak MB']:.0f} MB and {rows[1]['seconds']:.1f} s by rank 0"
    )
    note = f"Peak of the rank that needs most. By own rows it is {'within' if within else 'ABOVE'} the bound."
    timing.write("load_memory", args, rows, COLUMNS, note, identity=("ranks", "path"), headline=headline)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
