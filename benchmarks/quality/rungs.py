"""What is compared, on what, and in which order: arms, tasks, and the budget of their runs."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning.

    Attributes:
        method: "hd_pissa", ours; "lora" or "pissa", stock PEFT; "full", every target weight, stock AdamW.
        r, slices: S·r directions in all; an adapter has one slice.
        sigma_power: ours only: A and B carry σ to this power, ½ as published, 0 whitened.
        lora_alpha: PEFT's; the update is multiplied by lora_alpha / r. None: by 1.
        target_modules: the linear layers of each block that are adapted; all seven unless named.
    """

    name: str
    method: str
    r: int = 0
    slices: int = 1
    sigma_power: float = 0.5
    lora_alpha: int | None = None
    target_modules: tuple[str, ...] = TARGETS


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
        whole_sequence: whether the question counts in the loss.
        prompt: what stands before an answer. max_characters: of question and answer; longer rows are left out.
        clip: the largest norm of the gradient. weight_decay: of the stock arms; ours has none.
        warmup: share of the steps in which the rate rises.
        exact_match: rows whose answers are generated and compared, of runs at the full budget; new_tokens: of each.
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
    exact_match: int = 0
    new_tokens: int = 256
    prompt: str = "{question}\n"
    max_characters: int | None = None
    clip: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.06


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
    """PEFT's protocol (huggingface/peft, method_comparison/MetaMathQA): 5,000 steps of 4 rows, one rate, one seed.

    Its LoRA of rank 32 adapts q_proj and v_proj and has weight decay; `lora_32` is that arm, `lora_all_32` is beside
    ours what differs in the method alone, but for weight decay, which our optimizer does not have.
    """
    arms = [
        Arm("hd_own", "hd_pissa", r=32, slices=4), Arm("hd_all", "hd_pissa", r=128),
        Arm("lora_32", "lora", r=32, lora_alpha=64, target_modules=("q_proj", "v_proj")),
        Arm("lora_all_32", "lora", r=32, lora_alpha=64),
    ]  # fmt: skip
    return Rung(
        "peft", "meta-llama/Llama-3.2-3B", tuple(Point(arm, 4, 5000) for arm in arms), rates=(1e-4,), seeds=1,
        short_steps=0, max_length=768, test_rows=1319, micro=1, dtype="bfloat16", whole_sequence=True, exact_match=1319,
        new_tokens=512, prompt="Question: {question} Think step by step.\nAnswer:", max_characters=1300, clip=1.0,
        weight_decay=0.1, warmup=0.1,
    )  # fmt: skip


RUNGS = {rung.name: rung for rung in (_fast(), _real(), _peft())}
