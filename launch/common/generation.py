"""Greedy answers to prompts of token ids: in batches, by one process or by all ranks together.

Under ZeRO-3 every generated token is a collective on all ranks, so all of them generate equally many batches (a rank
that has run out of prompts repeats one), and a rank whose answers have ended goes on until the others' have
(`synced_gpus`). Prompts of a like length share a batch, and are padded on the left, so that all answers begin at the
same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdpissa.engine import consensus


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> list[str]:
    """Greedy answers in the order of the prompts, on every rank; collective where there are several.

    Args:
        model: in eval mode; has `generate` and `generation_config`, or a `module` that has the latter.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine, longest_share = order[rank::world_size], -(-len(order) // world_size)
    stops = _stop_tokens(model, tokenizer)
    answers: dict[int, str] = {}
    for start in range(0, longest_share, batch_size):
        chosen = mine[start : start + batch_size]
        inputs = _pad_left([prompts[i] for i in chosen or order[:1]], tokenizer.pad_token_id)
        ids = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        if chosen:
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers |= dict(zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
    if world_size > 1:
        answers = {number: text for part in consensus.gather(answers) for number, text in part.items()}
    return [answers[i] for i in range(len(prompts))]


def add_stops(model: Any, tokenizer: Any, stops: Sequence[int]) -> list[int]:
    """Has a model's answers end at these tokens, too, and its export say so; returns those that were no ends before.

    A chat's end of turn need not be the tokenizer's EOS: a base model's is the end of a document.
    """
    own = _own_stops(model) or [tokenizer.eos_token_id]
    new = [token for token in stops if token not in own]
    if new:
        model.generation_config.eos_token_id = [*own, *new]
    return new


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The end that was trained, and those that the model had before."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *_own_stops(model)]))


def _own_stops(model: Any) -> list[int]:
    config = getattr(getattr(model, "module", model), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    return [own] if isinstance(own, int) else list(own or [])


def _pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, (prompts, longest)."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
