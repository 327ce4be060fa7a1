"""What a trainer asks of a batch beside one pass, forward and backward, of its rows.

TRL's preference trainers run a chosen and a rejected sequence of each row together; DPO, KTO and GRPO with beta > 0
compare with a second, frozen model that ZeRO-3 shards as the first; GRPO generates what it learns from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Trainer = Literal["sft", "dpo", "grpo", "kto", "reward"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
PAIRED = ("dpo", "reward")
PRECOMPUTED = ("dpo", "kto")  # whose reference can be asked before training
# Trainer: forward passes without gradient per micro-batch, (of the model itself, of the reference). KTO has a second
# batch of mismatched pairs, whose KL it estimates.
PASSES = {"dpo": (0, 1), "grpo": (0, 1), "kto": (1, 2)}


@dataclass(frozen=True)
class Objective:
    """What is minimised, as far as memory and time depend on it.

    Attributes:
        chunked: TRL's head, which projects in tiles; else all logits are there at once.
        reference: a frozen copy of the first model is held.
        gathers_to_generate: the whole model is gathered while GRPO generates (`ds3_gather_for_generation`).
    """

    trainer: Trainer = "sft"
    chunked: bool = False
    reference: bool = False
    gathers_to_generate: bool = True

    @classmethod
    def of(
        cls, trainer: Trainer, cross_entropy: str | None, *, precomputed: bool, beta: float, gather: bool
    ) -> Objective:
        """The trainer's own defaults; `cross_entropy` is SFT's to choose, `beta` GRPO's."""
        chunked = cross_entropy == "chunked" if trainer == "sft" else trainer != "reward"
        reference = (trainer in PRECOMPUTED and not precomputed) or (trainer == "grpo" and beta > 0)
        return cls(trainer, chunked, reference, gather)

    @property
    def sequences(self) -> int:
        """Sequences that a row becomes."""
        return 2 if self.trainer in PAIRED else 1

    @property
    def generates(self) -> bool:
        return self.trainer == "grpo"

    @property
    def policy_passes(self) -> int:
        """Forward passes without gradient of the trained model, per micro-batch."""
        return PASSES.get(self.trainer, (0, 0))[0]

    @property
    def reference_passes(self) -> int:
        return PASSES[self.trainer][1] if self.reference else 0
