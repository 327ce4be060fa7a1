"""The plan against the engine: memory, bytes of a step and ZeRO-3's gathers, planned and measured on real ranks."""

from __future__ import annotations

import json

import pytest
from launch_runs import save_model
from plan_runs import measure, measure_dpo, memory_of_pretrained
from ranks import run_ranks
from tiny import ds_settings, tiny_llama
from trainer_runs import pairs, trl_data

from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.planning import memory as plan_memory
from hdpissa.launch.planning import step as plan_step

TINY = {"hidden": 48, "layers": 3, "intermediate_size": 96}
LENGTH = 16
LAYERS = {"leaf_module": {"classes": "auto"}}
SHARED = {"zero_hpz_partition_size": 2}
# A part of a layer is there before the rest: the order of waiting, which decides what is held, is that of a Python set
# in DeepSpeed. Planned is the order that holds most.
PARTS_AHEAD = ds_settings(bf16=True, zero={**LAYERS, "stage3_prefetch_bucket_size": 6000})
ENGINE_CASES = [
    (ds_settings(), False),
    (ds_settings(bf16=True, slices=1, delta={"dtype": "bf16"}), False),
    (ds_settings(bf16=True, accumulation=2, slices=4, master={"format": "fp32"}, delta={"exchange": "dense"}), False),
    (ds_settings(r=10, zero={"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 6000}), False),
    (ds_settings(zero={"stage3_max_reuse_distance": 30000, "stage3_param_persistence_threshold": 3000}), True),
    (ds_settings(bf16=True, zero={"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 60000}), True),
    (ds_settings(zero={**LAYERS, "stage3_param_persistence_threshold": 0}), False),
    (PARTS_AHEAD, False),
    (ds_settings(zero={**LAYERS, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}), True),
]
# On four ranks: two pairs, each with a second copy of W; then one such group of all.
COPY_CASES = [
    (ds_settings(zero=SHARED), False),
    (ds_settings(bf16=True, accumulation=2, zero={**SHARED, "stage3_max_reuse_distance": 0}), False),
    (ds_settings(bf16=True, zero={**SHARED, "stage3_prefetch_bucket_size": 6000}), True),
    (ds_settings(bf16=True, accumulation=3, zero={**SHARED, "stage3_param_persistence_threshold": 3000}), False),
    (ds_settings(bf16=True, zero={"zero_hpz_partition_size": 8, "stage3_max_reuse_distance": 0}), False),
]
CASES = [(*case, 2) for case in ENGINE_CASES] + [(*case, 4) for case in COPY_CASES]


@pytest.fixture(scope="module")
def measured():
    """What two or four real ranks did, per case; rank 0's figures."""
    return run_ranks(2, measure, ENGINE_CASES, TINY, LENGTH)[0] + run_ranks(4, measure, COPY_CASES, TINY, LENGTH)[0]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plans of the same runs."""
    path = tmp_path_factory.mktemp("tiny")
    settings = {"hidden": TINY["hidden"], "layers": TINY["layers"], "intermediate_size": TINY["intermediate_size"]}
    tiny_llama(**settings).config.save_pretrained(path)
    runs = []
    for number, (config, checkpointing, ranks) in enumerate(CASES):
        file = path / f"{number}.json"
        file.write_text(json.dumps(config))
        words = ["--model", str(path), "--gpus", str(ranks), "--max_length", str(LENGTH), "--ds_config", str(file)]
        words += ["--gradient_checkpointing"] if checkpointing else []
        runs.append(plan_arguments.resolve(*plan_arguments.parse(words)))
    return runs


@pytest.mark.parametrize("case", range(len(CASES)))
def test_memory_and_bytes_are_the_engines(planned, measured, case):
    """Persistent bytes and bytes of a step, to the byte."""
    run, found = planned[case], measured[case]
    memory, theirs = plan_memory.memory(run), dict(found["memory"])
    assert memory.updating["exchange buffers"] == theirs.pop("buffers")
    held = memory.persistent
    assert held.get(plan_memory.SECOND_COPY, 0) == found["copies"]
    assert {name: sum(held.get(part, 0) for part in parts) for name, parts in ENGINE_NAMES.items()} == theirs
    wire = plan_step.step(run).wire
    assert sum(n for kind, n in wire.items() if kind not in NOT_THE_ENGINES) == found["bytes_sent"]


GATHERS = (plan_step.GATHERS, plan_step.COPY_GATHERS)
NOT_THE_ENGINES = (*GATHERS, plan_step.AGAIN, plan_step.NORM)
ENGINE_NAMES = {
    "weights": ("bf16 shards", "fp32 shards", "other weights"),
    "master": ("fp32 remainder", "fp32 master"),
    "factors": ("A of all slices", "B rows of all slices", "own B"),
    "slice_state": ("slice state",),
}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_gathers_are_deepspeeds(planned, measured, case):
    """Elements gathered in a step, of them by all ranks, and held at a time, copies and buffers included."""
    run, found = planned[case], measured[case]
    tolerance = 0.05 if run.batch.checkpointing else 0  # where a recomputed block stops is not modelled
    assert run.gathers.peak == pytest.approx(found["peak"], rel=tolerance or 0.1 * (CASES[case][0] is PARTS_AHEAD))
    assert run.gathers.peak >= found["peak"] or run.batch.checkpointing
    assert run.batch.accumulation * run.gathers.gathered == pytest.approx(found["gathered"], rel=tolerance)
    wire, width = plan_step.step(run).wire, run.placement.width
    ranks = {plan_step.GATHERS: run.plan.world_size, plan_step.COPY_GATHERS: run.copy_ranks}
    elements = {plan_step.GATHERS: found["first"], plan_step.COPY_GATHERS: found["gathered"] - found["first"]}
    for kind in GATHERS if run.copy_ranks else GATHERS[:1]:
        sent = width * elements[kind] * (ranks[kind] - 1) // ranks[kind]
        assert wire[kind] == pytest.approx(sent, rel=tolerance)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_stays_gathered_is_gathered_anew_after_an_update(planned, measured, case):
    """Elements, and of them those of second copies."""
    run, found = planned[case], measured[case]
    assert run.gathers.again == found["again"]
    of_copies = run.gathers.again - run.gathers.again_first if run.copy_ranks else 0
    assert of_copies == found["again_of_copies"]
    step, width, ranks = plan_step.step(run), run.placement.width, run.plan.world_size
    if not run.copy_ranks:
        assert step.wire.get(plan_step.AGAIN, 0) == width * run.gathers.again * (ranks - 1) // ranks
    assert (step.again > 0) == (run.gathers.again > 0)


def test_dpo_and_its_reference(tmp_path):
    """Its shards, and what both models gather, planned and counted on two ranks; precomputing leaves one model."""
    model, zero = tmp_path / "model", {"stage3_prefetch_bucket_size": 3000, "stage3_max_reuse_distance": 0}
    zero |= {"stage": 3, "stage3_param_persistence_threshold": 100}
    save_model(model, [text for row in pairs() for text in row.values()])
    trl_data("dpo").to_json(tmp_path / "pairs.jsonl")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero, "hd_pissa": {"r": 2}}))
    words = ["--model", str(model), "--gpus", "2", "--ds_config", str(file), "--trainer", "dpo", "--max_length", "16"]
    for more in ({}, {"precompute_ref_log_probs": True}):
        run = plan_arguments.resolve(*plan_arguments.parse(words + [f"--{name}" for name in more]))
        memory = plan_memory.memory(run)
        planned = {"shards": memory.persistent.get(plan_memory.REFERENCE, 0)}
        if not more:
            planned["reference"] = (run.reference_gathers.peak, run.reference_gathers.gathered)
        planned["policy"] = (run.gathers.peak, run.gathers.gathered)
        assert run_ranks(2, measure_dpo, str(model), str(tmp_path), zero, **more) == [planned] * 2
        assert (memory.persistent.keys() | memory.computing.keys() >= REFERENCE_PARTS) == (not more)


REFERENCE_PARTS = {plan_memory.REFERENCE, plan_memory.REFERENCE_GATHERED}


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
