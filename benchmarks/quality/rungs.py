"""What is compared, on what, and in which order: arms, tasks, and the budget of their runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning.

    Attributes:
        method: "hd_pissa", ours; "lora" or "pissa", stock PEFT; "full", every target weight, stock AdamW.
        r, slices: S·r directions in all; an adapter has one slice.
        sigma_power: ours only: A and B carry σ to this power, ½ as published, 0 whitened.
    """

    name: str
    method: str
    r: int = 0
    slices: int = 1
    sigma_power: float = 0.5


@dataclass(frozen=True)
class Point:
    """An arm at a batch size: its rates are tuned, and the best one gets all seeds."""

    arm: Arm
    batch: int
    steps: int


@dataclass(frozen=True)
class Rung:
    """A model, a task and the points to measure, most important first.

    Attributes:
        model: "pretrained", the small one that `pretrain.py` makes; else a Hugging Face folder or hub name.
        rates: to begin with, ascending; the search goes beyond where the best one is at an end.
        micro: rows of a forward pass; short_steps: of the runs that rates are chosen by.
        whole_sequence: whether the question counts in the loss, as in PEFT's comparison.
    """

    name: str
    model: str
    points: tuple[Point, ...]
    rates: tuple[float, ...]
    seeds: int
    short_steps: int
    max_length: int
    test_rows: int
    micro: int
    dtype: str = "float32"
    whole_sequence: bool = False
    exact_match: int = 0  # rows whose answers are generated and compared, at the best rate's runs


def _fast() -> Rung:
    own, every = Arm("hd_own", "hd_pissa", r=4, slices=8), Arm("hd_all", "hd_pissa", r=32)
    lora, pissa = Arm("lora_32", "lora", r=32), Arm("pissa_32", "pissa", r=32)
    full = Arm("full", "full")
    small = [Arm("lora_4", "lora", r=4), Arm("pissa_4", "pissa", r=4)]
    whitened = [Arm("hd_all_p0", "hd_pissa", 32, 1, 0.0), Arm("hd_own_p0", "hd_pissa", 4, 8, 0.0)]
    between = Arm("hd_all_p25", "hd_pissa", 32, 1, 0.25)
    first = [Point(arm, 16, 100) for arm in (own, every, lora, pissa, full)]
    larger = [Point(arm, 64, 60) for arm in (own, every, lora)]
    rest = [Point(arm, 16, 100) for arm in (*whitened, *small, between)]
    largest = [Point(arm, 128, 60) for arm in (own, every, lora)]
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    return Rung("fast", "pretrained", (*first, *larger, *rest, *largest), rates, 5, 30, 128, 240, 16)


def _real() -> Rung:
    arms = [
        Arm("hd_own", "hd_pissa", r=16, slices=8), Arm("hd_all", "hd_pissa", r=128), Arm("lora_128", "lora", r=128),
        Arm("pissa_128", "pissa", r=128), Arm("full", "full"), Arm("lora_16", "lora", r=16),
    ]  # fmt: skip
    points = tuple(Point(arm, 16, 60) for arm in arms)
    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    return Rung("real", "demo", points, rates, 3, 15, 256, 256, 2, "bfloat16", exact_match=64)


def _peft() -> Rung:
    """PEFT's protocol (huggingface/peft, method_comparison/MetaMathQA): 5,000 steps of 4 rows, one rate, one seed."""
    arms = [Arm("hd_own", "hd_pissa", r=32, slices=4), Arm("hd_all", "hd_pissa", r=128), Arm("lora_32", "lora", r=32)]
    points = tuple(Point(arm, 4, 5000) for arm in arms)
    model = "meta-llama/Llama-3.2-3B"
    return Rung("peft", model, points, (1e-4,), 1, 0, 768, 1319, 1, "bfloat16", True, exact_match=1319)


RUNGS = {rung.name: rung for rung in (_fast(), _real(), _peft())}
