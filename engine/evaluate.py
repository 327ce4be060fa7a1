"""Evaluation during a run: loss on held-out rows, and one generated answer.

All ranks take part in every forward, because each gathers weights; what is found goes to the recorder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import zero3
from .batches import EvalBatches, count_target_tokens
from .metrics import Recorder


@dataclass
class Evaluator:
    """Loss on held-out rows, weighted by target tokens, and one generated answer."""

    batches: EvalBatches | None
    tokenizer: Any
    prompt: str | None
    max_new_tokens: int

    def evaluate(self, engine: Any, recorder: Recorder, *, step: int) -> dict[str, Any] | None:
        """Writes an evaluation row, and returns it; all ranks take part in every forward."""
        if self.batches is None:
            return None
        loss, tokens = mean_loss(engine, self.batches)
        perplexity = math.exp(min(loss, 700.0))
        row = {"step": step, "eval_loss": loss, "perplexity": perplexity, "eval_tokens": tokens}
        recorder.evaluation(row)
        recorder.resume_clock()
        return row

    def sample(self, engine: Any, recorder: Recorder, *, title: str) -> None:
        """Prints the greedy answer to the sample prompt; all ranks generate it together."""
        if self.prompt is None:
            return
        engine.eval()
        inputs = zero3.to_device(dict(self.tokenizer(self.prompt, return_tensors="pt")))
        ids = engine.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        engine.train()
        answer = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        recorder.say(f"answer {title}:\n" + "\n".join(f"    {line}" for line in answer.strip().splitlines()))
        recorder.save_json(f"sample_{title.replace(' ', '_')}.json", {"prompt": self.prompt, "answer": answer})
        recorder.resume_clock()


def mean_loss(engine: Any, batches: EvalBatches) -> tuple[float, int]:
    """(loss per target token over all ranks' batches, number of target tokens); collective."""
    total = torch.zeros(2, dtype=torch.float64, device=zero3.device())
    engine.eval()
    with torch.no_grad():
        for batch, real in batches:
            loss = engine(**zero3.to_device(batch)).loss
            tokens = count_target_tokens(batch["labels"])
            if real and tokens:
                total += torch.stack([loss.double() * tokens, torch.full_like(loss, tokens, dtype=torch.float64)])
    engine.train()
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return loss_sum / max(tokens, 1), int(tokens)
