"""What do the slices cost on a CPU? CPU time of forward and backward against the frozen base, in one run.

    python benchmarks/step/cpu_layers.py [--dtype fp32] [--layers N]

SmolLM2-135M, 1024 tokens (4 × 256), r = 16 on all seven targets of each layer; the input embeddings require grad,
so that every Linear computes its input gradient. Three variants take turns, each round in another order:

    frozen   the base: forward and input gradient
    ours     `SliceLinear`: also the gradients of the slices
    lora     PEFT's LoRA with adapters in the base's dtype and no dropout

The figure is the CPU time of one thread, which is steadier than the clock where other processes share the cores. The
optimizer step of ours (Adam and update of the exact weights) takes its turn in every round, too, with one slice and
with eight. A ratio is taken within a round; told are the median of the rounds and their range.

--layers N takes the first N decoder layers and leaves the output head away: for CPUs without bf16 arithmetic, where
the whole model takes minutes. It is the stricter figure, because the head costs all three the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hdpissa.benchmarks.common import timing
from hdpissa.benchmarks.step import plain_engine
from hdpissa.engine.config.section import DEFAULT_TARGETS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
R = 16
BATCH, LENGTH = 4, 256
SLICES = (1, 8)  # of the optimizer steps
COLUMNS = ("variant", "median s", "least s", "/ frozen, median of rounds", "range of rounds")


def load(dtype: torch.dtype, layers: int | None) -> nn.Module:
    """The model, frozen; cut to its first layers and without head where `layers` says so."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(timing.demo_model(), dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    if layers is None:
        return model.train()
    model.model.layers = model.model.layers[:layers]
    return model.model.train()


def with_lora(model: nn.Module) -> nn.Module:
    """PEFT's LoRA on the same targets."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=R, target_modules=list(DEFAULT_TARGETS), lora_dropout=0.0)
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def forward_backward(model: nn.Module, embeds: Tensor, ids: Tensor) -> Callable[[], None]:
    """One micro-batch of a variant."""

    def run() -> None:
        x = embeds.clone().requires_grad_()
        output = model(inputs_embeds=x)
        if hasattr(output, "logits"):
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())
        else:
            loss = output.last_hidden_state.float().square().mean()
        loss.backward()
        assert x.grad is not None

    return run


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def optimizer_step(dtype: torch.dtype, layers: int | None, slices: int) -> Callable[[], None]:
    """An optimizer step of ours on a model of its own, with made-up gradients."""
    model = load(dtype, layers)
    optimizer = plain_engine.attach(model, r=R, slices=slices)
    optimizer.store.grads.normal_(std=1e-3)

    def step() -> None:
        assert not optimizer.vote(torch.zeros(2, dtype=torch.float64)).refusal
        optimizer.step()

    return step


def row(name: str, spent: list[float], base: list[float]) -> dict[str, object]:
    """A row of the table. Ratios are of the same round, because what else runs stretches CPU time, too."""
    ratios = [a / b for a, b in zip(spent, base, strict=True)]
    return {
        "variant": name,
        "median s": statistics.median(spent),
        "least s": min(spent),
        "/ frozen, median of rounds": statistics.median(ratios),
        "range of rounds": f"{min(ratios):.3g} … {max(ratios):.3g}",
        "samples": {"median s": spent, "/ frozen, median of rounds": ratios},
    }


def measure(dtype: torch.dtype, layers: int | None, rounds: int) -> list[dict[str, object]]:
    """The rows: forward and backward of the three variants, and the optimizer steps, all in rotation."""
    models = {name: load(dtype, layers) for name in ("frozen", "ours", "lora")}
    plain_engine.attach(models["ours"], r=R)
    models["lora"] = with_lora(models["lora"])
    embedding = models["frozen"].get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(0, embedding.num_embeddings, (BATCH, LENGTH))
    embeds = embedding(ids).detach()
    works = {name: forward_backward(model, embeds, ids) for name, model in models.items()}
    works |= {f"optimizer step of ours, S = {s}": optimizer_step(dtype, layers, s) for s in SLICES}
    seconds = timing.in_turns({name: partial(cpu_seconds, work) for name, work in works.items()}, rounds)
    return [row(name, spent, seconds["frozen"]) for name, spent in seconds.items()]


def main(argv: list[str] | None = None) -> None:
    parser = timing.Parser(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(DTYPES[args.dtype], args.layers, args.rounds)
    depth = "whole model" if args.layers is None else f"{args.layers} layers without head"
    native = "has" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "has no"
    note = (
        f"SmolLM2-135M ({depth}), {BATCH * LENGTH} tokens, r = {R} on all seven targets: CPU time of forward + "
        f"backward, rounds in rotating order, one thread of a CPU that {native} bf16 instructions. Limits: ours / "
        f"frozen at most 1.15, and less than lora / frozen."
    )
    ours, lora = (f"{row['/ frozen, median of rounds']:.2f} ({row['range of rounds']})" for row in rows[1:3])
    headline = f"forward + backward, frozen = 1: ours {ours}, LoRA {lora}; {args.dtype}"
    part = "" if args.layers is None else f"_{args.layers}_layers"
    timing.write(f"cpu_layers_{args.dtype}{part}", args, rows, COLUMNS, note, identity=("variant",), headline=headline)


if __name__ == "__main__":
    raise SystemExit(timing.run(main))
