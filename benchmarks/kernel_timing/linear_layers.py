"""Forward + backward of the layers of two Llamas on a GPU: frozen `nn.Linear`, ours, PEFT's LoRA.

    python benchmarks/kernel_timing/linear_layers.py

8192 tokens, bf16, r = 16 and 64; phase `linear` of `make gpu`.
Linears that share an input (q, k, v; gate, up) are called together as a decoder
layer calls them, and each distinct shape also alone. Every variant computes the gradient of its input; ours adds the
gradients of A and B in fp32, LoRA (adapters in bf16, no dropout) has those of its adapters. One row of a model adds
up a decoder layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.gpu import gpu_rows
from hdpissa.benchmarks.kernel_timing import shapes
from hdpissa.benchmarks.kernel_timing.shapes import Group
from hdpissa.benchmarks.step import plain_engine

TOKENS = 8192
TINY = shapes.groups("tiny", 128, 192, 64)
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


def measure(group: Group, r: int, *, tokens: int, device: torch.device) -> dict[str, Any]:
    """A row: the three variants one after another on the same x and dy, and the first again; the faster one counts."""
    x = torch.randn(1, tokens, group.members[0].cols, device=device, dtype=torch.bfloat16, requires_grad=True)
    dys = [torch.randn(1, tokens, s.rows, device=device, dtype=torch.bfloat16) for s in group.members]
    frozen, ours = Layers(group, device), Layers(group, device)
    optimizer = plain_engine.attach(ours, r=r, target_modules=[name for name, _ in ours.named_children()])
    works = {
        "frozen": forward_backward(frozen, x, dys),
        "ours": forward_backward(ours, x, dys, optimizer.store.end_of_backward),
        "lora": forward_backward(with_lora(Layers(group, device), r), x, dys),
    }
    samples = {name: timing.samples_ms(work) for name, work in works.items()}
    samples["frozen"] = min(samples["frozen"], timing.samples_ms(works["frozen"]), key=statistics.median)
    found = row(group.name, r, {name: statistics.median(times) for name, times in samples.items()})
    return found | {"samples": {f"{name} ms": times for name, times in samples.items()}}


def row(name: str, r: int, ms: dict[str, float]) -> dict[str, Any]:
    """A row of the table."""
    times = {f"{variant} ms": value for variant, value in ms.items()}
    ratios = {f"{variant} / frozen": ms[variant] / ms["frozen"] for variant in ("ours", "lora")}
    return {"layer": name, "r": r, **times, **ratios, "limit": LIMITS[r]}


def rows(groups: Sequence[Group], **how: Any) -> Iterator[dict[str, Any]]:
    """Groups as a decoder layer calls them with their sum, then every distinct shape that is in a group alone."""
    for r in LIMITS:
        grouped = []
        for group in groups:
            grouped.append(measure(group, r, **how))
            yield grouped[-1]
        total = {variant: sum(g[f"{variant} ms"] for g in grouped) for variant in ("frozen", "ours", "lora")}
        yield row(f"{groups[0].name.split(' ')[0]} decoder layer", r, total)
        shared = tuple(g for g in groups if len(g.members) > 1)
        yield from (measure(Group(f"{s.name} alone", (s,)), r, **how) for s in shapes.distinct(shared))


def main(argv: list[str] | None = None) -> int:
    args = timing.Parser(__doc__).parse_args(argv)
    device = timing.need_gpu()
    models, tokens = ((TINY,), 16) if gpu_rows.is_dry() else ((shapes.LLAMA_2_7B, shapes.LLAMA_3_70B), TOKENS)
    found = [gpu_rows.record(row) for groups in models for row in rows(groups, tokens=tokens, device=device)]
    over = [f"{r['layer']} r{r['r']}" for r in found if r["ours / frozen"] > r["limit"]]
    note = (
        f"Forward + backward, bf16; copy bandwidth {timing.copy_bandwidth() / 1e12:.2f} TB/s, bf16 product "
        f"{timing.matmul_rate() / 1e12:.0f} TFLOP/s in the same run. Over the limit: {', '.join(over) or 'none'}."
    )
    timing.write("linear_layers", args, found, COLUMNS, note, identity=("layer", "r"), tokens=tokens, **timing.ONE_RUN)
    return 0


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
