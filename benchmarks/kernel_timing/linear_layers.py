"""Forward + backward of the layers of two Llamas on a GPU: frozen `nn.Linear`, ours, PEFT's LoRA.

    python benchmarks/kernel_timing/linear_layers.py

8192 tokens, bf16, r = 16 and 64. Linears that share an input (q, k, v; gate, up) are called together as a decoder
layer calls them, and each distinct shape also alone. Every variant computes the gradient of its input; ours adds the
gradients of A and B in fp32, LoRA (adapters in bf16, no dropout) has those of its adapters. One row of a model adds
up a decoder layer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.kernel_timing import shapes
from hdpissa.benchmarks.kernel_timing.shapes import Group
from hdpissa.benchmarks.step import plain_engine

TOKENS = 8192
LIMITS = {16: 1.05, 64: 1.10}  # ours / frozen
COLUMNS = ("layer", "r", "frozen ms", "ours ms", "lora ms", "ours / frozen", "limit", "lora / frozen")


class Layers(nn.Module):
    """Linears that read one x."""

    def __init__(self, group: Group, device: torch.device) -> None:
        super().__init__()
        for shape in group.members:
            linear = nn.Linear(shape.cols, shape.rows, bias=False, device=device, dtype=torch.bfloat16)
            self.add_module(f"{shape.name.rsplit(' ', 1)[-1]}_proj", linear.requires_grad_(False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in self.children()]


def with_lora(model: Layers, r: int) -> nn.Module:
    """PEFT's LoRA on every Linear."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name, _ in model.named_children()]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    return model.to(torch.bfloat16).train()


def forward_backward(
    model: nn.Module, x: Tensor, dys: Sequence[Tensor], end: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """One micro-batch; gradients of parameters add up as in an accumulation."""

    def run() -> None:
        x.grad = None
        torch.autograd.backward(model(x), dys)
        end()

    return run


def measure(
    group: Group, r: int, *, tokens: int, device: torch.device, time: Callable[[Callable[[], None]], list[float]]
) -> dict[str, Any]:
    """A row: the three variants one after another on the same x and dy, and the first again; the faster one counts.

    Args:
        time: the times of several calls, in milliseconds.
    """
    x = torch.randn(1, tokens, group.members[0].cols, device=device, dtype=torch.bfloat16, requires_grad=True)
    dys = [torch.randn(1, tokens, s.rows, device=device, dtype=torch.bfloat16) for s in group.members]
    frozen = Layers(group, device)
    ours = Layers(group, device)
    optimizer = plain_engine.attach(ours, r=r, target_modules=[name for name, _ in ours.named_children()])
    works = {
        "frozen": forward_backward(frozen, x, dys),
        "ours": forward_backward(ours, x, dys, optimizer.store.end_of_backward),
        "lora": forward_backward(with_lora(Layers(group, device), r), x, dys),
    }
    samples = {name: time(work) for name, work in works.items()}
    samples["frozen"] = min(samples["frozen"], time(works["frozen"]), key=statistics.median)
    found = row(group.name, r, {name: statistics.median(times) for name, times in samples.items()})
    return found | {"samples": {f"{name} ms": times for name, times in samples.items()}}


def row(name: str, r: int, ms: dict[str, float]) -> dict[str, Any]:
    """A row of the table."""
    times = {f"{variant} ms": value for variant, value in ms.items()}
    ratios = {f"{variant} / frozen": ms[variant] / ms["frozen"] for variant in ("ours", "lora")}
    return {"layer": name, "r": r, **times, **ratios, "limit": LIMITS[r]}


def measure_model(groups: Sequence[Group], **how: Any) -> Iterator[dict[str, Any]]:
    """Groups as a decoder layer calls them with their sum, then every distinct shape that is in a group alone."""
    for r in LIMITS:
        grouped = []
        for group in groups:
            grouped.append(measure(group, r, **how))
            yield grouped[-1]
        total = {variant: sum(g[f"{variant} ms"] for g in grouped) for variant in ("frozen", "ours", "lora")}
        yield row(f"{groups[0].name.split(' ')[0]} decoder layer", r, total)
        shared = [g for g in groups if len(g.members) > 1]
        alone = [Group(f"{s.name} alone", (s,)) for s in shapes.distinct(shared)]
        yield from (measure(group, r, **how) for group in alone)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = timing.need_gpu()
    rows: list[dict[str, Any]] = []
    for groups in (shapes.LLAMA_2_7B_GROUPS, shapes.LLAMA_3_70B_GROUPS):
        rows += measure_model(groups, tokens=TOKENS, device=device, time=timing.samples_ms)
    over = [f"{r['layer']} r{r['r']}" for r in rows if r["ours / frozen"] > r["limit"]]
    note = (
        f"Forward + backward at {TOKENS} tokens, bf16; copy bandwidth {timing.copy_bandwidth() / 1e12:.2f} TB/s, "
        f"bf16 product {timing.matmul_rate() / 1e12:.0f} TFLOP/s in the same run. "
        f"Over the limit: {', '.join(over) or 'none'}."
    )
    configuration = {"tokens": TOKENS, "dtype": "bf16", **timing.ONE_RUN}
    timing.write("linear_layers", rows, COLUMNS, note, identity=("layer", "r"), configuration=configuration)


if __name__ == "__main__":
    main()
