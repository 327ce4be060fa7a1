"""Evaluation during a run: loss on held-out rows, right answers among them, and answers to look at.

All ranks take part in every forward, because each gathers weights; what is found goes to the recorder. `mean_loss`
also serves one process with a plain model (launch/evaluate.py).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from . import pulse, zero3
from .answers import extract, is_right
from .batches import EvalBatches, count_target_tokens
from .generation import Question, generate
from .progress import Progress, untold
from .recorder import Recorder

PROMPT_LINES, PROMPT_WIDTH = 3, 110  # of a sample's prompt on the terminal


@dataclass
class Evaluator:
    """One rank's part in every evaluation.

    Attributes:
        batches: held-out rows for the loss; None: no evaluation.
        graded: questions for the exact match; none: none.
        asked: prompts whose answers are kept in samples.jsonl.
        batch_size: of generation. max_new_tokens: of an answer.
    """

    batches: EvalBatches | None
    tokenizer: Any
    graded: Sequence[Question] = ()
    asked: Sequence[Question] = ()
    batch_size: int = 8
    max_new_tokens: int = 128
    _ranks: tuple[int, int] = field(default=(0, 1))

    def __post_init__(self) -> None:
        if dist.is_initialized():
            self._ranks = dist.get_rank(), dist.get_world_size()

    def evaluate(self, engine: Any, recorder: Recorder, *, step: int) -> dict[str, Any] | None:
        """Writes an evaluation row, and returns it, the same on all ranks; None where there are no rows."""
        if self.batches is None:
            return None
        engine.eval()
        loss, tokens = mean_loss(engine, self.batches, zero3.device(), recorder.work("evaluation batches"))
        row: dict[str, Any] = {"step": step, **loss_figures(loss, tokens)}
        if self.graded:
            answers = self._answer(engine, self.graded, recorder)
            row |= match_figures(answers, self.graded)
        engine.train()
        recorder.evaluation(row)
        recorder.resume_clock()
        return row

    def sample(self, engine: Any, recorder: Recorder, *, step: int, title: str = "") -> None:
        """Keeps the greedy answers to the sample prompts; all ranks generate them together.

        Args:
            title: "before training" or "after training", whose first answer is also a file of its own.
        """
        if not self.asked:
            return
        engine.eval()
        answers = self._answer(engine, self.asked, recorder)
        engine.train()
        rows: list[dict[str, Any]] = []
        for question, answer in zip(self.asked, answers, strict=True):
            known = {} if question.reference is None else {"reference": question.reference}
            when = {"when": title} if title else {}
            rows.append({"step": step, **when, "prompt": question.text, "answer": answer, **known})
        recorder.samples(rows)
        recorder.say(first_sample(rows, title or f"after step {step}"))
        if title and self.asked[0].reference is None:
            content = {"prompt": self.asked[0].text, "answer": answers[0]}
            recorder.save_json(f"sample_{title.replace(' ', '_')}.json", content)
        recorder.resume_clock()

    def _answer(self, engine: Any, asked: Sequence[Question], recorder: Recorder) -> list[str]:
        pulse.reach("eval.answers")
        rank, world_size = self._ranks
        prompts = [question.ids for question in asked]
        return generate(
            engine,
            self.tokenizer,
            prompts,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            device=zero3.device(),
            rank=rank,
            world_size=world_size,
            progress=recorder.work("answers"),
        )


def first_sample(rows: Sequence[dict[str, Any]], when: str) -> str:
    """For the terminal: the end of the first prompt and its answer, and how many more there are."""
    asked = [line for line in rows[0]["prompt"].splitlines() if line.strip()][-PROMPT_LINES:]
    lines = [f"    > {textwrap.shorten(line, PROMPT_WIDTH, placeholder=' …')}" for line in asked]
    lines += [f"    {line}" for line in rows[0]["answer"].strip().splitlines()]
    more = f" (1 of {len(rows)}; all are in samples.jsonl)" if len(rows) > 1 else ""
    return "\n".join([f"answer {when}{more}:", *lines])


def loss_figures(loss: float, tokens: int) -> dict[str, Any]:
    """What an evaluation row says of the loss."""
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "eval_tokens": tokens}


def match_figures(answers: Sequence[str], asked: Sequence[Question]) -> dict[str, Any]:
    """What an evaluation row says of answers: the share that is right, of how many."""
    right = [is_right(answer, question.reference or "") for answer, question in zip(answers, asked, strict=True)]
    return {"eval_exact_match": sum(right) / len(right), "eval_samples": len(right)}


def graded_rows(answers: Sequence[str], asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Every question with its answer, its reference, the result that was read from it, and whether that is right."""
    return [
        {
            "prompt": q.text,
            "reference": q.reference,
            "answer": a,
            "result": extract(a),
            "right": is_right(a, q.reference or ""),
        }
        for a, q in zip(answers, asked, strict=True)
    ]


def mean_loss(model: Any, batches: EvalBatches, device: torch.device, progress: Progress = untold) -> tuple[float, int]:
    """(loss per target token over all ranks' batches, number of target tokens); collective where there are several.

    Args:
        model: in eval mode; an engine, or a plain model in one process.
        progress: called with how many of this rank's batches are done, and of how many.
    """
    progress(0, len(batches))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for done, (batch, real) in enumerate(batches, 1):
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            tokens = count_target_tokens(batch["labels"])
            if real and tokens:
                total += torch.stack([loss.double() * tokens, torch.full_like(loss, tokens, dtype=torch.float64)])
            progress(done, len(batches))
    if dist.is_initialized():
        dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return loss_sum / max(tokens, 1), int(tokens)
