"""What every method of a throughput run works on: the same rows of random tokens, and the FLOP that they are worth.

Rows have lengths between a quarter of `max_length` and all of it and are padded to the longest of their batch, so real
tokens and padded ones are two numbers. A rank's micro-batches are the same in every step: then a step's time
varies with the machine alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hdpissa.benchmarks.step import method_models
from hdpissa.benchmarks.step.methods import Setting
from hdpissa.launch.planning import model as plan_model

FLOP_RULE = (
    "Useful FLOP of a real token in a row of L: 4 per weight of the Linears, the output head among them (2 forward, 2 "
    "for the input gradient; weights that are frozen need no more), 6 for `full` (2 more for the weight gradient), and "
    "6 · L · heads' width · layers for causal attention (2 forward, 4 backward). What a method computes on top "
    "(slices, adapters, dense side paths, recomputation, padding) is not useful in this sense and not counted"
)


@dataclass(frozen=True)
class Work:
    """A rank's micro-batches of a step.

    Attributes:
        real, padded: tokens, without and with padding.
        lengths: of every row.
    """

    batches: list[dict[str, Tensor]]
    lengths: list[int]

    @property
    def real(self) -> int:
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)


def work(setting: Setting, *, max_length: int, vocabulary: int, rank: int) -> Work:
    """The rows of a rank: other tokens on each, but of the same lengths, or scaling would measure the longest rows."""
    draw = torch.Generator().manual_seed(1_000_003 * setting.seed + rank)
    lengths_draw = torch.Generator().manual_seed(setting.seed)
    shortest = max(2, max_length // 4)
    batches, lengths = [], []
    for _ in range(setting.accumulation):
        sizes = torch.randint(shortest, max_length + 1, (setting.micro_batch,), generator=lengths_draw).tolist()
        ids = [torch.randint(0, vocabulary, (size,), generator=draw) for size in sizes]
        labels = pad_sequence(ids, batch_first=True, padding_value=-100)
        attention_mask = (labels >= 0).long()
        batches.append({"input_ids": labels * attention_mask, "attention_mask": attention_mask, "labels": labels})
        lengths += sizes
    return Work(batches, lengths)


def model_work(model: str, layers: int | None) -> plan_model.Work:
    """What one token costs in a row of one token, as the plan has it; attention grows with the row."""
    config: Any = method_models.config_of(model, layers)
    built = plan_model.build(config, model, trust_remote_code=False, bf16=True)
    return plan_model.work_per_token(built, [], 1)


def useful_flops(cost: plan_model.Work, method: str, lengths: list[int]) -> float:
    """FLOP of one forward and backward pass over rows of these lengths; see `FLOP_RULE`."""
    per_weight = 3 if method == "full" else 2  # forwards' worth
    linears = per_weight * (cost.forward + cost.head) * sum(lengths)
    return linears + 3 * cost.attention * sum(n * n for n in lengths)
