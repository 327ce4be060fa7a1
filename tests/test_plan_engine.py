"""The plan against the engine: memory, bytes of a step and ZeRO-3's gathers, planned and measured on real ranks."""

from __future__ import annotations

import json

import pytest
from plan_runs import measure, memory_of_pretrained
from ranks import run_ranks
from tiny import ds_settings, tiny_llama

from hdpissa.launch import plan_arguments, plan_memory, plan_step

TINY = {"hidden": 48, "layers": 3, "intermediate_size": 96}
LENGTH = 16
ENGINE_CASES = [
    (ds_settings(), False),
    (ds_settings(bf16=True, slices=1, delta={"dtype": "bf16"}), False),
    (ds_settings(bf16=True, accumulation=2, slices=4, master={"format": "fp32"}, delta={"exchange": "dense"}), False),
    (ds_settings(r=10, zero={"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 6000}), False),
    (ds_settings(zero={"stage3_max_reuse_distance": 30000, "stage3_param_persistence_threshold": 3000}), True),
    (ds_settings(bf16=True, zero={"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 60000}), True),
]


@pytest.fixture(scope="module")
def measured():
    """What two real ranks did, per case; rank 0's figures."""
    return run_ranks(2, measure, ENGINE_CASES, TINY, LENGTH)[0]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plans of the same runs."""
    path = tmp_path_factory.mktemp("tiny")
    settings = {"hidden": TINY["hidden"], "layers": TINY["layers"], "intermediate_size": TINY["intermediate_size"]}
    tiny_llama(**settings).config.save_pretrained(path)
    runs = []
    for number, (config, checkpointing) in enumerate(ENGINE_CASES):
        file = path / f"{number}.json"
        file.write_text(json.dumps(config))
        words = ["--model", str(path), "--gpus", "2", "--max_length", str(LENGTH), "--ds_config", str(file)]
        words += ["--gradient_checkpointing"] if checkpointing else []
        runs.append(plan_arguments.resolve(*plan_arguments.parse(words)))
    return runs


@pytest.mark.parametrize("case", range(len(ENGINE_CASES)))
def test_memory_and_bytes_are_the_engines(planned, measured, case):
    """Persistent bytes and bytes of a step, to the byte."""
    run, found = planned[case], measured[case]
    memory, theirs = plan_memory.memory(run), dict(found["memory"])
    assert memory.updating["exchange buffers"] == theirs.pop("buffers")
    held = memory.persistent
    assert {name: sum(held.get(part, 0) for part in parts) for name, parts in ENGINE_NAMES.items()} == theirs
    wire = plan_step.step(run).wire
    assert sum(n for kind, n in wire.items() if kind != "ZeRO-3 gathers") == found["bytes_sent"]


ENGINE_NAMES = {
    "weights": ("bf16 shards", "fp32 shards", "other weights"),
    "master": ("fp32 remainder", "fp32 master"),
    "factors": ("A of all slices", "B rows of all slices", "own B"),
    "gradients_and_moments": ("gradients and moments",),
}


@pytest.mark.parametrize("case", range(len(ENGINE_CASES)))
def test_gathers_are_deepspeeds(planned, measured, case):
    """Elements gathered in a micro-batch, and held at a time, copies and buffers included."""
    run, found = planned[case], measured[case]
    tolerance = 0.03 if run.batch.checkpointing else 0  # where a recomputed block stops is not modelled
    assert run.gathers.peak == pytest.approx(found["peak"], rel=tolerance)
    assert run.gathers.gathered == pytest.approx(found["gathered"], rel=tolerance)


def test_memory_of_a_real_model(tmp_path):
    """SmolLM2-135M on two ranks: planned from its config.json alone, held by the engine."""
    from hdpissa.launch.demo_model import ensure_demo_model

    model, settings = ensure_demo_model(), ds_settings(bf16=True, r=16)
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = ["--model", model, "--gpus", "2", "--ds_config", str(tmp_path / "ds.json")]
    run = plan_arguments.resolve(*plan_arguments.parse(words))
    held = plan_memory.memory(run).persistent
    for rank in run_ranks(2, memory_of_pretrained, model, settings):
        assert sum(held.values()) == pytest.approx(sum(rank.values()) - rank["buffers"], rel=1e-5)
