"""Phase `smoke` of gpu.py: a tiny model's whole life on the device, every run a process of launch/train.py.

    whole     decomposition, four steps in bf16, checkpoints in the background, both exports; these loaded back
    resumed   the same, ended by SIGKILL when its first checkpoint is there, and resumed: the same bits as `whole`
    offload   the same with the exact weights' other half in host memory
    two       the same on two ranks that share the device, exported afterwards; NCCL refuses that, they use gloo

The four go side by side; each has its row as soon as it is over. Inputs are made here, without network.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.common.ranks import free_port
from hdpissa.benchmarks.gpu import gpu_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # its tiny model, tokenizer and data

from launch_runs import flags, make_inputs, read_metrics, small_run, write_ds_config  # noqa: E402

KILL = {"HDPISSA_FAULT": "save.after_latest:0:*:KILL"}  # rank 0, once its first checkpoint is the latest
MEASURED = {"step_time_s", "tokens_per_second", "peak_memory_bytes"}  # of a row of metrics: differs between equal runs
# Of the change of W, that of a run that adds up in another order: bf16 rounds some weights to their other neighbour.
ANOTHER_ORDER = 0.05
# Of the change of the logits: an adapter leaves out the sum of ΔB ΔA, which is of second order in the learning rate.
ADAPTER = 0.03
RUN_S = 600 if gpu_rows.is_dry() else 110


class Life:
    """The runs of one folder, and what they are compared by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inputs = make_inputs(folder / "inputs")
        inputs.pop("eval_dataset_name")
        # eager: attention kernels that add up with atomics would not give the same bits twice
        shared = {"bf16": True, "slices": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 3e-3,
                  "attn_implementation": "eager", "export_format": "both", "export_dtype": "fp32"}  # fmt: skip
        self.arguments = small_run(inputs, folder, async_save=True, **shared)

    def start(self, name: str, *, ranks: int = 1, env: dict[str, str] | None = None, **changes: Any) -> list[int]:
        """Trains in processes of their own, with output in `name`; their exit codes."""
        arguments = {**self.arguments, "output_dir": str(self.folder / name), **changes}
        arguments["gradient_accumulation_steps"] = 2 // ranks
        program = ROOT / "launch" / "train.py" if ranks == 1 else Path(__file__)
        command = [sys.executable, str(program), *flags(arguments)]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        own = {**where, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks), "HF_HUB_OFFLINE": "1", **(env or {})}
        own |= {"HF_HOME": str(self.folder / f"{name}.home")}
        with (self.folder / f"{name}.log").open("ab") as log:
            started = [
                subprocess.Popen(command, env=os.environ | own | {"RANK": str(rank)}, stdout=log, stderr=log)
                for rank in range(ranks)
            ]
            try:
                return [process.wait(RUN_S) for process in started]
            finally:
                for process in started:
                    process.kill()

    def must(self, name: str, codes: list[int], wanted: int = 0) -> None:
        """Raises RuntimeError, with the log's end, for other exit codes."""
        if set(codes) != {wanted}:
            text = (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{name}: exit codes {codes}, wanted {wanted}: {text}")

    def weights(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / name / "model" / "model.safetensors")

    def export(self, name: str) -> None:
        """The model of a run that has only checkpoints, where a run would have written it; by launch/export.py."""
        into = {"checkpoint": self.folder / f"{name}.run", "output_dir": self.folder / name / "model", "dtype": "fp32"}
        (self.folder / name).rename(self.folder / f"{name}.run")
        subprocess.run([sys.executable, str(ROOT / "launch" / "export.py"), *flags(into)], check=True, timeout=RUN_S)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        rows, _ = read_metrics(self.folder / name)
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]

    def difference(self, name: str, other: str) -> float:
        """‖W − W'‖ / ‖W' − W at the start‖ over the trained weights; others are the base's, or rounded to bf16."""
        from safetensors.torch import load_file

        start = load_file(Path(self.arguments["model_name_or_path"]) / "model.safetensors")
        found, wanted = self.weights(name), self.weights(other)
        trained = [key for key in wanted if "_proj." in key]
        off = sum(float((found[key].double() - wanted[key].double()).square().sum()) for key in trained)
        moved = sum(float((start[key].double() - wanted[key].double()).square().sum()) for key in trained)
        return math.sqrt(off / moved)


def at_most(value: float, limit: float) -> dict[str, Any]:
    """A figure with its limit; a failure beyond it."""
    over = {} if value <= limit else {"failed": f"{value:.3g} is over {limit:g}"}
    return {"value": value, "limit": limit, **over}


# --- the four -------------------------------------------------------------------------------------------------------


def whole(life: Life) -> dict[str, Any]:
    life.must("whole", life.start("whole"))
    rows = life.metrics("whole")
    losses = [row["loss"] for row in rows]
    checkpoints = sorted(path.name for path in (life.folder / "whole").glob("checkpoint-*"))
    if len(losses) != 4 or checkpoints != ["checkpoint-2", "checkpoint-4"]:
        raise RuntimeError(f"{len(losses)} steps, {checkpoints}")
    return {"what": "loss of the first and the last step", "value": f"{losses[0]:.4f}, {losses[-1]:.4f}"}


def exports(life: Life) -> dict[str, Any]:
    """The exported model's logits against those of base and adapter, on the device and in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = timing.need_gpu()

    def load(folder: Path | str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return model.eval().to(device)

    base = load(life.arguments["model_name_or_path"])
    ids = torch.arange(3, 35, device=device)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits.double()
        merged = load(life.folder / "whole" / "model")(input_ids=ids).logits.double()
        adapter = PeftModel.from_pretrained(base, str(life.folder / "whole" / "adapter")).eval()
        applied = adapter(input_ids=ids).logits.double()
    off = ((merged - applied).norm() / (merged - before).norm()).item()
    return {"what": "adapter against model, of the change of the logits", **at_most(off, ADAPTER)}


def resumed(life: Life) -> dict[str, Any]:
    life.must("resumed", life.start("resumed", env=KILL), -signal.SIGKILL)
    there = sorted(path.name for path in (life.folder / "resumed").glob("checkpoint-*"))
    if there != ["checkpoint-2"]:
        raise RuntimeError(f"the killed run left {there}")
    life.must("resumed", life.start("resumed", resume_from_checkpoint="auto"))
    return {"what": "killed at checkpoint-2, resumed to step 4"}


def same_bits(life: Life) -> dict[str, Any]:
    found, wanted = life.weights("resumed"), life.weights("whole")
    other = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    text = f"{len(other)} of {len(wanted)} tensors differ, by {life.difference('resumed', 'whole'):.3g} of the change"
    metrics = life.metrics("resumed") == life.metrics("whole")
    failed = {"failed": f"{text}; metrics {'agree' if metrics else 'differ'}"} if other or not metrics else {}
    return {"what": "tensors that differ from the unbroken run's", "value": len(other), "limit": 0, **failed}


def offload(life: Life) -> dict[str, Any]:
    section = {"r": 4, "master": {"format": "split", "device": "cpu"}}
    config = write_ds_config(life.folder / "offload.json", hd_pissa=section)
    life.must("offload", life.start("offload", ds_config=str(config)))
    return {"what": "exact weights in host memory"}


def two(life: Life) -> dict[str, Any]:
    # gloo sends no tensors of a device from rank to rank, as an export in the run would
    life.must("two", life.start("two", ranks=2, export_format="none"))
    life.export("two")
    return {"what": "two ranks on one device, gloo"}


def close(name: str) -> Callable[[Life], dict[str, Any]]:
    def compare(life: Life) -> dict[str, Any]:
        value = life.difference(name, "whole")
        return {"what": "difference from `whole`, of the change of W", **at_most(value, ANOTHER_ORDER)}

    return compare


RUNS = {"whole": whole, "resumed": resumed, "offload": offload, "two": two}
THEN = {"exports": exports, "resumed, bits": same_bits, "offload, W": close("offload"), "two, W": close("two")}


def timed(name: str, what: Callable[[Life], dict[str, Any]], life: Life) -> dict[str, Any]:
    start = time.monotonic()
    row = gpu_rows.attempt({"name": name}, lambda: what(life))
    return {**row, "seconds": time.monotonic() - start}


def rows() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder))
        with ThreadPoolExecutor(len(RUNS)) as pool:
            for future in as_completed([pool.submit(timed, *run, life) for run in RUNS.items()]):
                yield future.result()
        for name, what in THEN.items():
            yield timed(name, what, life)


def rank(argv: list[str]) -> int:
    """One of two ranks on one device: launch/train.py in a process group that is there already, which it takes."""
    import torch.distributed as dist

    from hdpissa.launch import train

    dist.init_process_group("gloo")
    return train.run(argv)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(rank(sys.argv[1:]))
    timing.need_gpu()
    raise SystemExit(gpu_rows.record_all(rows()))
