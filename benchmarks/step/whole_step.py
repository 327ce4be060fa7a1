"""How long does a whole optimizer step of a 7B model take on one GPU, compared with a frozen base and PEFT's LoRA?

    python benchmarks/step/whole_step.py [--tiny]

A Llama-2-7B of random weights, bf16 compute, eight micro-batches of one row one after another, of 2,048 and of 8,192
tokens, on the same device in the same run; phase `step` of `make gpu`:

    frozen      forward and input gradient of the base model, plain torch: the floor
    ours        the engine as it ships for one GPU: ds_configs/zero3_one_gpu.json, r = 16, S = 8
    lora        PEFT's LoRA r = 16 on the same Linears, adapters in bf16, with torch's fused AdamW
    frozen (2)  the first again: how far the device has drifted

In all of them the input embeddings require grad, so that every Linear computes its input gradient. Slices are random:
decomposing 224 matrices takes minutes and changes no time of a step. In the dry form, and with --tiny, everything runs
on a model of two tiny layers, on the CPU where there is no GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.step import method_models, plain_engine
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.sharding import zero3
from hdpissa.launch.common import shipped_configs
from hdpissa.launch.common.metrics import peak_flops

CONFIG = "zero3_one_gpu"
IDENTITY = ("variant", "tokens of a micro-batch")
COLUMNS = (*IDENTITY, "step s", "/ frozen", "tokens/s", "MFU(4N)", "peak GB", "building GB", "failed")

Step = Callable[[int], None]  # takes an optimizer step of micro-batches of so many tokens


@dataclass(frozen=True)
class Work:
    """What is measured: a Llama, and how much it gets per step.

    Attributes:
        lengths: tokens of a micro-batch, and how many steps are measured with it.
        slices: and as many micro-batches of one sequence.
    """

    sizes: method_models.Sizes = method_models.SHAPES["llama-2-7b"]
    lengths: tuple[tuple[int, int], ...] = ((2048, 5), (8192, 2))
    slices: int = 8
    r: int = 16
    warmup: int = 1

    def flops(self, length: int) -> float:
        """Forward and input gradient of a step: Linears with head (4 per weight and token), causal attention.

        Attention: two products forward and four backward, of 2 · length² · hidden each, halved by the mask.
        """
        hidden, intermediate, layers, _, _, vocabulary, _ = self.sizes
        linears = layers * (4 * hidden**2 + 3 * hidden * intermediate) + vocabulary * hidden
        return self.slices * (4 * length * linears + layers * 6 * length**2 * hidden)


TINY = Work((64, 96, 2, 4, 4, 128, False), ((32, 1), (64, 1)), slices=2, r=4, warmup=0)


def place(tiny: bool) -> tuple[Work, torch.device]:
    """What is measured, and where."""
    if tiny or gpu_rows.is_dry():
        return TINY, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Work(), timing.need_gpu()


def llama(work: Work, device: torch.device) -> nn.Module:
    model = method_models.random_model(method_models.llama_config(work.sizes), torch.bfloat16, device)
    model.requires_grad_(False)
    model.enable_input_require_grads()  # type: ignore[operator]
    return model.train()


def micro_batches(work: Work, length: int, device: torch.device) -> Iterator[Tensor]:
    """A step's batches, always the same."""
    torch.manual_seed(1)
    yield from torch.randint(0, work.sizes[5], (work.slices, 1, length), device=device)


# --- the variants: each is built once, and takes steps of any length ------------------------------------------------


def frozen(work: Work, device: torch.device) -> Step:
    model = llama(work, device)

    def step(length: int) -> None:
        for ids in micro_batches(work, length, device):
            model(input_ids=ids, labels=ids).loss.backward()

    return step


def lora(work: Work, device: torch.device) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=work.r, lora_alpha=work.r, target_modules=list(DEFAULT_TARGETS), lora_dropout=0.0)
    model = get_peft_model(llama(work, device), config, autocast_adapter_dtype=False).train()  # type: ignore[arg-type]
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=2e-5, fused=True)

    def step(length: int) -> None:
        for ids in micro_batches(work, length, device):
            (model(input_ids=ids, labels=ids).loss / work.slices).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_engine(work: Work, device: torch.device) -> Any:
    """The engine with the config for one GPU; "auto" batch sizes filled as the command line would."""
    from hdpissa.engine import initialize

    config = shipped_configs.read(shipped_configs.locate(CONFIG))
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": work.slices}
    config["hd_pissa"] = {**config["hd_pissa"], "r": work.r, "slices": work.slices}
    with plain_engine.random_slices():
        return initialize(model=llama(work, device), config=config)


def ours(work: Work, device: torch.device) -> Step:
    engine = make_engine(work, device)

    def step(length: int) -> None:
        for ids in micro_batches(work, length, device):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            result = engine.step()
        assert result is not None
        assert result.applied, result.refusal

    return step


VARIANTS: dict[str, Callable[[Work, torch.device], Step]] = {
    "frozen": frozen, "ours": ours, "lora": lora, "frozen (2)": frozen,
}  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Memory:
    """GB of the device above what was allocated before: DeepSpeed's globals keep an engine that is no longer used."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.gpu else 0
        self.peak("")

    def peak(self, name: str) -> dict[str, float]:
        """A column with the most since the last call; none on the CPU."""
        if not self.gpu:
            return {}
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return {name: (most - self.before) / 1e9}


def measure(step: Step, work: Work, length: int, steps: int, device: torch.device, memory: Memory) -> dict[str, Any]:
    seconds = []
    for number in range(work.warmup + steps):
        wait(device)
        start = time.perf_counter()
        step(length)
        wait(device)
        if number >= work.warmup:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    rate = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    row = {"step s": median, "tokens/s": round(work.slices * length / median), **memory.peak("peak GB")}
    return row | ({"MFU(4N)": work.flops(length) / median / rate} if rate else {}) | {"samples": {"step s": seconds}}


def rows(work: Work, device: torch.device) -> Iterator[dict[str, Any]]:
    """One variant after another; one that fails has its reason, and the others still come."""
    base: dict[int, float] = {}
    for variant, build in VARIANTS.items():
        memory = Memory(device)
        try:
            step = build(work, device)
        except Exception as error:  # out of memory, most likely
            yield gpu_rows.failure({"variant": variant}, error)
            continue
        building = memory.peak("building GB")
        for length, steps in work.lengths[: 1 if variant == "frozen (2)" else None]:
            identity = dict(zip(IDENTITY, (variant, length), strict=True))
            row = gpu_rows.attempt(identity, partial(measure, step, work, length, steps, device, memory))
            if "step s" in row:
                base |= {length: row["step s"]} if variant == "frozen" else {}
                row |= {"/ frozen": row["step s"] / base[length]} if length in base else {}
            yield row | building
        del step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    parser = timing.Parser(__doc__)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    work, device = place(args.tiny)
    found = [gpu_rows.record(row) for row in rows(work, device)]
    note = (
        f"{work.slices} micro-batches of one row per step, one process; ours: {CONFIG}.json, random slices. MFU(4N) = "
        f"(4 per weight and token, head included, + causal attention) / time / the data sheet's dense bf16 rate. "
        f"Limits: ours / frozen 1.06, ours / lora 0.85."
    )
    name = "whole_step_tiny" if work == TINY else "whole_step"
    timing.write(name, args, found, COLUMNS, note, identity=IDENTITY, **asdict(work), **timing.ONE_RUN)
    zero3.shut_down()
    return 1 if any("failed" in row for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
