"""engine/health/slice_figures.py: norms of every slice, what moves in bf16, and slices that are silent."""

from __future__ import annotations

import math

import pytest
from ranks import run_ranks
from slice_runs import look
from tiny import ds_settings

from hdpissa.engine.health.slice_figures import SilentSlices
from hdpissa.engine.sharding.slicing import SlicePlan


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"bf16": True, "slices": 2, "accumulation": 2}),
        (2, {"bf16": True, "master": {"format": "fp32"}, "delta": {"exchange": "dense"}}),
        (4, {"slices": 2}),
    ],
    ids=["1 rank", "2 ranks, dense", "4 ranks share 2 slices, fp32"],
)
def test_a_look_at_every_second_step(ranks, settings):
    """All figures against what the buffers and shards themselves say; slice 1 has no loss, and is told."""
    results = run_ranks(ranks, look, ds_settings(**settings))
    rows, lines, _ = results[0]
    assert [row["step"] for row in rows] == [2, 4]
    for at, row in enumerate(rows):
        told = [expected[at] for _, _, expected in results]
        for name, kind in (("slice_grad_norms", 0), ("slice_delta_norms", 1)):
            wanted = {slice_id: norm for rank in told for slice_id, norm in rank[kind].items()}
            assert row[name] == pytest.approx([wanted[0], wanted[1]], rel=1e-4), name
            assert row[name][0] > 0 == row[name][1], name
        moved, looked_at = (sum(rank[2][i] for rank in told) for i in (0, 1))
        assert row["bf16_moved"] == pytest.approx(moved / looked_at, rel=1e-12)
        assert 0 < row["bf16_moved"] < 1
        assert math.hypot(*row["slice_grad_norms"]) == pytest.approx(told[0][3], rel=1e-6)
        assert all(others[at] | {"seconds": 0} == row | {"seconds": 0} for others, *_ in results)
    (line,) = lines
    rank = 2 if ranks == 4 else ranks - 1
    assert line.startswith(f"warning: step 4: slice 1 (rank {rank})")
    assert "gradient" in line


@pytest.mark.parametrize(
    ("looks", "warned"),
    [
        ([(1, 1, 1), (1, 1, 1), (1, 1, 1)], []),
        ([(0, 0, 1)] * 5, [6]),
        ([(1, 0, 1)] * 5, [6]),  # a gradient, and no update
        ([(1, 0, 0)] * 5, []),  # a learning rate of 0
        ([(0, 0, 1), (0, 0, 1), (1, 1, 1), (0, 0, 1), (0, 0, 1)], []),
        ([(0, 0, 1)] * 4 + [(1, 1, 1)] + [(0, 0, 1)] * 4, [6, 16]),
    ],
)
def test_silence(looks, warned):
    """A look at every second step: (gradient, update, learning rate); silent for six steps is too long."""
    silence = SilentSlices(SlicePlan(2, world_size=1, rank=0), every=2, patience=6)
    told = []
    for number, (grad, update, lr) in enumerate(looks, 1):
        step = 2 * number
        lines = silence.see(step, [1.0, float(grad)], [1.0, float(update)], float(lr))
        told += [step for line in lines if f"step {step}: slice 1 " in line]
        assert len(lines) <= 1
    assert told == warned
