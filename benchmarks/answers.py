"""Greedy answers of a plain transformers model, and whether they are right.

The result of an answer is what stands after its first `####`, to the end of the line, as GSM8K writes it; where there
is none, the whole answer. Commas, a leading dollar sign and a final full stop do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

MARK = "####"


def extract(answer: str) -> str:
    """The result of an answer; empty when nothing follows the mark."""
    _, found, after = answer.partition(MARK)
    text = after.strip().split("\n")[0] if found else answer
    return text.strip().replace(",", "").removeprefix("$").removesuffix(".").strip()


def is_right(answer: str, reference: str) -> bool:
    """Whether both have the same result, letter by letter, or as numbers."""
    one, other = extract(answer), extract(reference)
    if MARK in reference and MARK not in answer:
        return False  # the task asks for the mark
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, batch: int, max_new_tokens: int
) -> Iterator[str]:
    """Greedy answers in the order of the prompts.

    Rows are padded on the left, so that all answers of a batch begin at the same position; prompts of a like length
    share a batch.
    """
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        inputs = {name: inputs[name].to(next(model.parameters()).device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ids = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers |= dict(zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
    tokenizer.padding_side = side
    yield from (answers[i] for i in range(len(prompts)))
