"""How far ahead ZeRO-3 gathers: DeepSpeed's own coordinator, walked over the modules of large models without memory."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_runs import shape_config
from ranks import run_ranks
from tiny import tiny_llama

from hdpissa.engine.config import leaf_modules
from hdpissa.launch.common import shipped_configs
from hdpissa.launch.planning import arguments as plan_arguments
from hdpissa.launch.planning import gathers as plan_gathers
from hdpissa.launch.planning import trace as plan_trace


def resolve(folder: str, name: str, config: str):
    path = Path(folder, f"{name}.json")
    path.write_text(json.dumps(shape_config(name)))
    words = ["--model", str(path), "--gpus", "8", "--ds_config", config, "--max_length", "8"]
    return plan_arguments.resolve(*plan_arguments.parse(words))


def prepare(model: Any, zero: dict) -> list[int]:
    """Gives modules and parameters what the coordinator asks of them; returns a list of what each collective gathers.

    Nothing is gathered: what is asked for is on its way until somebody waits for it.
    """
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

    gathered: list[int] = []
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)

    def gather(params, **kwargs):
        flying = list(params)
        gathered.append(sum(p.numel() for p in flying))
        for p in flying:
            p.ds_status = ZeroParamStatus.INFLIGHT

        def wait(**kwargs) -> None:  # for one of them is for all
            while flying:
                flying.pop().ds_status = ZeroParamStatus.AVAILABLE

        return SimpleNamespace(wait=wait)

    for number, p in enumerate(model.parameters()):
        p.requires_grad_(False)
        p.ds_id, p.ds_numel, p.ds_persist = number, p.numel(), p.numel() <= threshold
        p.ds_status = ZeroParamStatus.AVAILABLE if p.ds_persist else ZeroParamStatus.NOT_AVAILABLE
        p.ds_tensor, p.ds_secondary_tensor, p.nvme_swapper = SimpleNamespace(final_location=None), None, None
        p.ds_shape, p.ds_active_sub_modules, p.is_external_param = p.shape, set(), False
        p.partition_numel, p.all_gather_coalesced = p.numel, gather
        p.partition = lambda p=p, **kwargs: setattr(p, "ds_status", ZeroParamStatus.NOT_AVAILABLE)
    apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig(**zero["leaf_module"]))
    for number, module in enumerate(model.modules()):
        module.ds_id, module.ds_recompute_parameters, module.ds_external_parameters = number, set(), tuple
    return gathered


def walk(folder: str, name: str, config: str, changes: dict) -> dict[str, Any]:
    """The fourth micro-batch: DeepSpeed knows the order from the second, what stays gathered is there from the third.

    Returns: of each layer, in the order in which they run, the elements of the next one that had not been asked for
    before it computed; what each collective gathered; and the plan's (elements gathered, collectives).
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        InflightParamRegistry,
        PartitionedParameterCoordinator,
    )

    from hdpissa.engine.sharding import zero3

    zero3.init_distributed()
    run = resolve(folder, name, config)
    model, zero = run.model.module, run.zero | changes
    trace = plan_trace.gathered_whole(run.trace, model, leaf_modules.find(model, zero))
    policy = plan_gathers.Policy.of(zero)
    gathered = prepare(model, zero)
    sizes = policy.prefetch_bucket_size, policy.max_reuse_distance, policy.max_live_parameters
    coordinator = PartitionedParameterCoordinator(*sizes, None, InflightParamRegistry())
    modules, layers, away = list(model.modules()), list(model.model.layers), []
    after = {False: dict(pairwise(layers)), True: dict(pairwise(layers[::-1]))}
    events = list(plan_gathers._events(trace.visits, trace.params, checkpointing=False))
    for _ in range(4):
        away.clear()
        gathered.clear()
        for event in events:
            module = modules[event.module]
            if not event.fetches:
                coordinator.release_sub_module(module, forward=not event.backward)
                continue
            coordinator.trace_prologue(module)
            if coordinator.is_record_trace():
                coordinator.record_module(module)
            coordinator.fetch_sub_module(module, forward=not event.backward)
            following = after[event.backward].get(module)
            if following is not None:
                missing = [p for p in following.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
                away.append(sum(p.numel() for p in missing))
        coordinator.release_backward_leftovers()
        coordinator.reset_step()
    assert coordinator.is_complete_trace()
    planned = plan_gathers.simulate(trace, policy, checkpointing=False)
    return {"away": away, "gathered": gathered, "planned": (planned.gathered, planned.calls)}


NAMES = {"Llama-2-7B": (31, 202_383_360), "Llama-3-70B": (79, 855_654_400)}
SHIPPED = [("Llama-2-7B", config) for config in shipped_configs.names()] + [("Llama-3-70B", "zero3_70b_node")]
THEIRS = {"DeepSpeed's default": 50_000_000, "the Trainer's auto": int(0.9 * 4096**2)}


@pytest.mark.parametrize(("name", "config"), SHIPPED)
def test_the_next_layer_is_asked_for_before_a_layer_computes(tmp_path, name, config):
    """With every shipped config, in both directions; what is gathered in all is what the plan says, to the element."""
    [found] = run_ranks(1, walk, str(tmp_path), name, config, {})
    assert found["away"] == [0] * 2 * NAMES[name][0]
    assert (sum(found["gathered"]), len(found["gathered"])) == found["planned"]


@pytest.mark.parametrize("theirs", THEIRS)
def test_other_sizes_leave_most_of_it(tmp_path, theirs):
    layers, numel = NAMES["Llama-2-7B"]
    changes = {"stage3_prefetch_bucket_size": THEIRS[theirs]}
    [found] = run_ranks(1, walk, str(tmp_path), "Llama-2-7B", "zero3", changes)
    assert sum(missing > 0.7 * numel for missing in found["away"]) > 0.9 * 2 * layers
    assert (sum(found["gathered"]), len(found["gathered"])) == found["planned"]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(400_000_000, device="meta"))


def test_numbers_of_the_config_stay():
    """The others follow from the largest layer, gathered whole or not; for a small model DeepSpeed's own are enough."""
    model = torch.nn.Sequential(Layer(), Layer())
    model._no_split_modules = ["Layer"]
    ours = {"stage3_prefetch_bucket_size": 400_000_000, "stage3_max_live_parameters": 1_200_000_000}
    for said in ({}, {"stage3_prefetch_bucket_size": 7}, {"prefetch_bucket_size": 7, "stage3_max_live_parameters": 8}):
        filled = leaf_modules.fill({"zero_optimization": dict(said)}, model)["zero_optimization"]
        kept = {f"stage3_{key.removeprefix('stage3_')}" for key in said}
        assert filled == said | {key: value for key, value in ours.items() if key not in kept}
    assert leaf_modules.fill({"zero_optimization": {}}, tiny_llama()) == {"zero_optimization": {}}
