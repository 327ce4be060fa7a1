"""Rung 3 of the ladder: the whole engine with its Triton kernels, on a GPU or, without one, in Triton's interpreter.

Real DeepSpeed, real ranks, the kernels' own arithmetic. On a GPU all ranks share it.
"""

from __future__ import annotations

import pytest
import torch
from engine_runs import groups_of, train_tiny
from ranks import run_ranks
from test_engine import LR, oracle_run, relative
from tiny import ds_settings, tiny_llama

TRITON = {"impl": "triton"}
WHERE = {"one_gpu": torch.cuda.is_available()}


@pytest.mark.parametrize(("exchange", "linear", "tolerance"), [("factor", "separate", 1e-6), ("dense", "fused", 1e-6)])
def test_against_the_oracle(exchange, linear, tolerance):
    """Two steps at S = 4 on 2 ranks: W as the float64 oracle has it, to the same 1e-6 as with the torch kernels."""
    settings = ds_settings(slices=4, accumulation=2, delta={"exchange": exchange}, kernels={**TRITON, "linear": linear})
    ranks = run_ranks(2, train_tiny, settings, steps=2, lr=LR, after=groups_of, **WHERE)
    losses, weights, _, _ = oracle_run(4, 1, steps=2)
    assert relative(ranks[0]["weights"], weights) < tolerance
    assert ranks[0]["losses"] == pytest.approx(losses, rel=1e-6)
    for layer in range(2):
        name = f"model.layers.{layer}"
        for rank in ranks:
            assert rank["after"][f"{name}.self_attn.q_proj"] == [f"{name}.self_attn.{k}_proj" for k in "kv"]
            assert rank["after"][f"{name}.mlp.gate_proj"] == [f"{name}.mlp.up_proj"]


@pytest.mark.slow
def test_bf16_with_checkpointing():
    """bf16 compute, split master, recomputation: as near to the torch kernels' run as one bf16 run is to another."""
    settings, how = {"bf16": True, "slices": 2}, {"steps": 2, "lr": LR, **WHERE}
    torch_run, triton_run = (
        run_ranks(2, train_tiny, ds_settings(**settings, kernels={"impl": impl}), **how, checkpointing=True)[0]
        for impl in ("torch", "triton")
    )
    plain = run_ranks(2, train_tiny, ds_settings(slices=2), **how)[0]
    start = tiny_llama()
    for name, w in plain["weights"].items():
        change = w - start.get_parameter(name).detach()
        off = {key: (run["weights"][name] - w).norm() for key, run in (("torch", torch_run), ("triton", triton_run))}
        assert off["triton"] <= 1.25 * off["torch"], name
        assert off["torch"] < 0.5 * change.norm(), "or the comparison says nothing"
