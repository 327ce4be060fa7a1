"""Rung 3 of the ladder: the trainers against the bare loop, bit for bit."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from trainer_runs import bare_run, trainer_run


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one, "no weights were compared"
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("world", "slices", "accumulation", "more"),
    [
        (1, 1, 1, {}),
        (2, 2, 2, {}),
        (2, 4, 4, {"gradient_checkpointing": True}),
        (2, 1, 1, {"bf16": True}),
        (4, 2, 1, {}),
        (1, 2, 4, {"stream": True}),
    ],
)
def test_trainer_equals_the_bare_loop(world, slices, accumulation, more, tmp_path):
    """S = K, 2K, K/2; accumulation; checkpointing; bf16 with fp32 masters; streams."""
    section = {"slices": slices}
    found = run_ranks(world, trainer_run, str(tmp_path), section, gradient_accumulation_steps=accumulation, **more)
    wanted = run_ranks(world, bare_run, section, accumulation=accumulation, **more)
    assert_equal(found[0]["weights"], wanted[0]["weights"])
    assert found[0]["losses"] == wanted[0]["losses"]
    assert [rank["steps"] for rank in found] == [4] * world
