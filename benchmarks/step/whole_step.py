"""How long does a whole optimizer step take, beside a frozen base, PEFT's LoRA and the published algorithm?

    python benchmarks/step/whole_step.py [--reference]

A Llama-2-7B of random weights on one GPU, bf16 compute, eight micro-batches of one row one after another, of 2,048 and
of 8,192 tokens, on the same device in the same run:

    frozen      forward and input gradient of the base model, plain torch: the floor
    ours        the engine as it ships for one GPU: ds_configs/zero3_one_gpu.json, r = 16, S = 8
    lora        PEFT's LoRA r = 16 on the same Linears, adapters in bf16, with torch's fused AdamW
    frozen (2)  the first again: how far the device has drifted

With --reference, ours and the published algorithm in fp32 (reference_step.py), S = 8, at 2,048 tokens. 7B in fp32 with
its dense side path does not fit: it is measured on few layers, and extended linearly to all of them.

In all of them the input embeddings require grad, so that every Linear computes its input gradient. Slices are random:
decomposing 224 matrices takes minutes and changes no time of a step. In gpu.py's dry form, and with --tiny, everything
runs on a model of two tiny layers, on the CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.step import plain_engine, reference_step
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.sharding import zero3
from hdpissa.launch.common import shipped_configs
from hdpissa.launch.common.metrics import peak_flops

CONFIG = "zero3_one_gpu"
IDENTITY = ("variant", "tokens of a micro-batch")
COLUMNS = (*IDENTITY, "step s", "/ frozen", "/ ours", "tokens/s", "MFU(4N)", "peak GB", "building GB", "remark")

Step = Callable[[int], None]  # takes an optimizer step of micro-batches of so many tokens


@dataclass(frozen=True)
class Work:
    """What is measured: a Llama, and how much it gets per step."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000
    length: int = 2048
    slices: int = 8  # and as many micro-batches of one sequence
    r: int = 16
    warmup: int = 1
    steps: int = 5
    reference_layers: tuple[int, int] = (1, 3)
    longer: int = 8192  # measured too, in fewer steps
    longer_steps: int = 2

    @property
    def lengths(self) -> tuple[int, int]:
        return self.length, self.longer

    def flops(self, length: int) -> float:
        """Forward and input gradient of a step: Linears with head (4 per weight and token), causal attention.

        Attention: two products forward and four backward, of 2 · length² · hidden each, halved by the mask.
        """
        linears = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
        attention = self.layers * 6 * length**2 * self.hidden
        return self.slices * (4 * length * (linears + self.vocabulary * self.hidden) + attention)


TINY = Work(64, 96, 2, 4, 128, 32, 2, r=4, warmup=0, steps=1, reference_layers=(1, 2), longer=64, longer_steps=1)


def llama(work: Work, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, made where they are needed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        vocab_size=work.vocabulary,
        max_position_embeddings=max(work.lengths),
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


def micro_batches(work: Work, length: int, device: torch.device) -> Iterator[Tensor]:
    """A step's batches, always the same."""
    torch.manual_seed(1)
    yield from torch.randint(0, work.vocabulary, (work.slices, 1, length), device=device)


# --- the variants: each is built once, and takes steps of any length ------------------------------------------------


def frozen(work: Work, device: torch.device) -> Step:
    model = llama(work, device, torch.bfloat16)

    def step(length: int) -> None:
        for ids in micro_batches(work, length, device):
            model(input_ids=ids, labels=ids).loss.backward()

    return step


def lora(work: Work, device: torch.device) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=work.r, lora_alpha=work.r, target_modules=list(DEFAULT_TARGETS), lora_dropout=0.0)
    model = get_peft_model(llama(work, device, torch.bfloat16), config, autocast_adapter_dtype=False).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=2e-5, fused=True)

    def step(length: int) -> None:
        for ids in micro_batches(work, length, device):
            (model(input_ids=ids, labels=ids).loss / work.slices).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reference(work: Work, device: torch.device) -> Step:
    model = llama(work, device, torch.float32)
    layers = reference_step.install(model, DEFAULT_TARGETS, reference_step.random_factors(work.r, work.slices))
    taken = 0

    def step(length: int) -> None:
        nonlocal taken
        taken += 1
        for slice_id, ids in enumerate(micro_batches(work, length, device)):
            reference_step.activate(layers, slice_id)
            model(input_ids=ids, labels=ids).loss.backward()
        reference_step.step(layers, number=taken)

    return step


def shipped_config(work: Work) -> dict[str, Any]:
    """The config for one GPU from its file; "auto" batch sizes filled as the command line would."""
    config = shipped_configs.read(shipped_configs.locate(CONFIG))
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": work.slices}
    config["hd_pissa"] = {**config["hd_pissa"], "r": work.r, "slices": work.slices}
    return config


def make_engine(work: Work, device: torch.device) -> Any:
    from hdpissa.engine import initialize
    from hdpissa.engine.directions import decompose

    decompose.compute_slices = plain_engine.random_slices  # type: ignore[assignment]
    return initialize(model=llama(work, device, torch.bfloat16), config=shipped_config(work))


def ours(work: Work, device: torch.device) -> Step:
    engine = make_engine(work, device)

    def step(length: int) -> None:
        for ids in micro_batches(work, length, device):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            result = engine.step()
        assert result is not None
        assert result.applied, result.refusal

    return step


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Seconds of each step, and the most GB that were allocated in one."""

    samples: list[float]
    peak: float = 0.0

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Memory:
    """GB of the device beside what was allocated before: DeepSpeed's globals keep an engine that is no longer used."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.gpu else 0
        self.peak()

    def peak(self) -> float:
        """The most since the last call; 0 on the CPU."""
        if not self.gpu:
            return 0.0
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return (most - self.before) / 1e9


def measure(step: Step, work: Work, length: int, device: torch.device, memory: Memory) -> Figure:
    seconds = []
    memory.peak()
    for number in range(work.warmup + (work.steps if length == work.length else work.longer_steps)):
        wait(device)
        start = time.perf_counter()
        step(length)
        wait(device)
        if number >= work.warmup:
            seconds.append(time.perf_counter() - start)
    return Figure(seconds, memory.peak())


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_reference(work: Work, device: torch.device) -> tuple[Figure, str]:
    """The reference on two depths, extended linearly to the model's; the shortest length."""
    few, more = work.reference_layers
    figures = []
    for layers in (few, more):
        memory = Memory(device)
        step = reference(replace(work, layers=layers), device)
        figures.append(measure(step, work, work.length, device, memory))
        del step
        release(device)
    at_few, at_more = figures

    def extend(low: float, high: float) -> float:
        return low + (high - low) * (work.layers - few) / (more - few)

    samples = [extend(*pair) for pair in zip(at_few.samples, at_more.samples, strict=True)]
    figure = Figure(samples, extend(at_few.peak, at_more.peak))
    return figure, f"extended from {few} and {more} layers ({at_few.seconds:.3g} and {at_more.seconds:.3g} s)"


VARIANTS: dict[str, Callable[[Work, torch.device], Step]] = {"frozen": frozen, "ours": ours, "lora": lora}
REMARKS = {"ours": f"{CONFIG}.json, random slices", "lora": "adapters in bf16"}


class Rows:
    """The rows of the variants, one after another; one that fails has its reason, and the others still come."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.rate = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self.seconds: dict[tuple[str, int], float] = {}  # of a variant at a length

    def row(self, variant: str, length: int, figure: Figure, **more: Any) -> dict[str, Any]:
        """The columns of what was measured; beside the frozen base and ours where they were measured before."""
        self.seconds[variant, length] = figure.seconds
        ratios = {
            f"/ {other}": figure.seconds / self.seconds[other, length]
            for other in ("frozen", "ours")
            if (other, length) in self.seconds and other != variant
        }
        rate = {"MFU(4N)": self.work.flops(length) / figure.seconds / self.rate} if self.rate else {}
        tokens = round(self.work.slices * length / figure.seconds)
        memory = {"peak GB": figure.peak} if figure.peak else {}
        row = {"step s": figure.seconds, **ratios, "tokens/s": tokens, **rate, **memory}
        return {**row, "remark": REMARKS.get(variant, ""), **more, "samples": {"step s": figure.samples}}

    def measured(self, name: str, step: Step, length: int, memory: Memory, more: dict[str, Any]) -> dict[str, Any]:
        return self.row(name, length, measure(step, self.work, length, self.device, memory), **more)

    def of(self, variant: str, lengths: tuple[int, ...], name: str = "") -> Iterator[dict[str, Any]]:
        """A variant's rows, one for each length."""
        name = name or variant
        memory = Memory(self.device)
        try:
            step = VARIANTS[variant](self.work, self.device)
        except Exception as error:  # out of memory, most likely
            yield gpu_rows.failure({"variant": name}, error)
            return
        building = memory.peak()
        for length in lengths:
            identity = dict(zip(IDENTITY, (name, length), strict=True))
            more = {"building GB": building} if building else {}
            yield gpu_rows.attempt(identity, partial(self.measured, name, step, length, memory, more))
        del step
        release(self.device)

    def all(self) -> Iterator[dict[str, Any]]:
        for variant in VARIANTS:
            yield from self.of(variant, self.work.lengths)
        yield from self.of("frozen", (self.work.length,), "frozen (2)")

    def with_reference(self) -> Iterator[dict[str, Any]]:
        shortest = self.work.length
        yield from self.of("ours", (shortest,))

        def measured() -> dict[str, Any]:
            figure, remark = measure_reference(self.work, self.device)
            return self.row("reference", shortest, figure, remark=remark)

        yield gpu_rows.attempt(dict(zip(IDENTITY, ("reference", shortest), strict=True)), measured)


def place(tiny: bool) -> tuple[Work, torch.device]:
    """What is measured, and where."""
    if tiny or gpu_rows.is_dry():
        return TINY, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Work(), timing.need_gpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, default=timing.RESULTS, help="where the results go")
    args = parser.parse_args()
    work, device = place(args.tiny)
    rows = Rows(work, device)
    measured = [gpu_rows.record(row) for row in (rows.with_reference() if args.reference else rows.all())]
    note = (
        f"Llama with {work.layers} layers of width {work.hidden}, {work.slices} micro-batches of one row per step, "
        f"r = {work.r}, S = {work.slices}, one process. MFU(4N) = (4 per weight and token, head included, + causal "
        f"attention) / time / the data sheet's dense bf16 rate. Limits: ours / frozen 1.06, ours / lora 0.85, "
        f"reference / ours at least 20."
    )
    kept: dict[str, Any] = {"identity": IDENTITY, "configuration": {**asdict(work), **timing.ONE_RUN}}
    name = f"whole_step{'_reference' if args.reference else ''}{'_tiny' if work == TINY else ''}"
    timing.write(name, measured, COLUMNS, note, folder=args.folder, **kept)
    zero3.shut_down()
    return 1 if any("failed" in row for row in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
