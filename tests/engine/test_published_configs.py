"""ZeRO-3 configs as TRL, LLaMA-Factory and axolotl publish them, unchanged, from the command line to a step.

What their files say is written down here as facts: which keys there are, and with which values. The sections that a
project's variants share stand once.
"""

from __future__ import annotations

import copy
import json

import pytest
import script_runs
import yaml
from family_runs import make_family
from launch_runs import flags, make_inputs, read_json, read_metrics, train_here
from ranks import run_ranks

from hdpissa.engine.config import ds_config
from hdpissa.engine.errors import ConfigError

AUTO_BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
SCALING = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
ON_CPU = {"device": "cpu", "pin_memory": True}

# LLaMA-Factory, examples/deepspeed/ds_z3_config.json and ds_z3_offload_config.json. Later revisions turn
# overlap_comm off and add the last two sections, neither of which DeepSpeed knows.
LLAMA_FACTORY = AUTO_BATCH | {
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "initial_scale_power": 16} | SCALING,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}},
}

# axolotl, deepspeed_configs/zero3.json and its variants; the bf16 ones leave the prefix stage3_ away.
AXOLOTL = AUTO_BATCH | {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "auto_cast": False, "initial_scale_power": 32} | SCALING,
    "wall_clock_breakdown": False,
}
AXOLOTL_BF16 = {key: value for key, value in AXOLOTL.items() if key != "fp16"} | {
    "bf16": {"enabled": True},
    "zero_optimization": {k.removeprefix("stage3_"): v for k, v in AXOLOTL["zero_optimization"].items()},
}
UNTESTED = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}

# TRL, examples/accelerate_configs/deepspeed_zero3.yaml: a file for `accelerate launch`, not for DeepSpeed.
TRL = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "deepspeed_config": {
        "deepspeed_multinode_launcher": "standard",
        "gradient_accumulation_steps": 1,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "zero_stage": 3,
    },
    "distributed_type": "DEEPSPEED",
    "downcast_bf16": "no",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 8,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}


def offloaded(config, *what):
    """A variant that keeps something in host memory."""
    return config | {"zero_optimization": config["zero_optimization"] | dict.fromkeys(what, ON_CPU)}


PUBLISHED = {
    "trl/deepspeed_zero3.yaml": TRL,
    "llamafactory/ds_z3_config.json": LLAMA_FACTORY,
    "llamafactory/ds_z3_offload_config.json": offloaded(LLAMA_FACTORY, "offload_optimizer", "offload_param"),
    "axolotl/zero3.json": AXOLOTL,
    "axolotl/zero3_cpuoffload.json": offloaded(AXOLOTL, "offload_optimizer", "offload_param"),
    "axolotl/zero3_bf16.json": AXOLOTL_BF16,
    "axolotl/zero3_bf16_cpuoffload_params.json": offloaded(AXOLOTL_BF16, "offload_param") | UNTESTED,
    "axolotl/zero3_bf16_cpuoffload_all.json": offloaded(AXOLOTL_BF16, "offload_optimizer", "offload_param") | UNTESTED,
}
BF16 = [name for name in PUBLISHED if "bf16" in name or name.startswith("trl")]


def write(folder, name, config):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config) if path.suffix == ".json" else yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs", train=16, evaluate=4)


@pytest.fixture(scope="module")
def results(folder, inputs):
    """Every config as it is, and with our section: read with a command line, then the engine and a step of it."""
    lines = {}
    for name, config in PUBLISHED.items():
        for added in ({}, {"hd_pissa": {"r": 4, "slices": 2}}):
            path = write(folder / ("plain" if not added else "ours"), name, copy.deepcopy(config) | added)
            arguments = inputs | {"ds_config": str(path), "output_dir": str(folder / "out"), "max_steps": 1}
            arguments |= {"gradient_accumulation_steps": 2} if added and not name.startswith("trl") else {}
            arguments |= {"max_length": 96, "prompt_template": "none"}
            if name.startswith("trl") and added:  # the accumulation is fixed there, and has to have both slices' share
                continue
            lines[name, bool(added)] = flags(arguments)
    return run_ranks(1, script_runs.steps, lines, str(folder / "cache"))[0]


@pytest.mark.parametrize("added", [False, True], ids=["unchanged", "with hd_pissa"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_runs(results, name, added):
    """Without a section of ours the slices are the paper's: rank 16, one slice per rank."""
    if added and name.startswith("trl"):
        pytest.skip("its accumulation of 1 is for one slice on a rank")
    found = results[name, added]
    assert found["applied"]
    assert (found["r"], found["slices"]) == ((4, 2) if added else (16, 1))
    assert found["dtype"] == ("torch.bfloat16" if name in BF16 else "torch.float32")
    assert found["param_device"] == ("cpu" if "offload" in name else None)


def test_trls_older_revision_is_refused_for_fp16(tmp_path):
    path = write(tmp_path, "zero3.yaml", TRL | {"mixed_precision": "fp16"})
    with pytest.raises(ConfigError, match=r"fp16\.enabled"):
        ds_config.check_ds_config(ds_config.read_ds_config(path))


@pytest.mark.parametrize("key", ["cp_size", "sp_size", "tp_size", "dp_replicate_size"])
def test_what_accelerate_would_split_otherwise_is_refused(tmp_path, key):
    """As in TRL's alst_ulysses_4gpu.yaml; a size of 1 says nothing."""
    sizes = {f"parallelism_config_{name}": 1 for name in ("cp_size", "sp_size", "tp_size", "dp_replicate_size")}
    path = write(tmp_path, "a.yaml", TRL | {"parallelism_config": sizes | {"parallelism_config_dp_shard_size": 4}})
    assert ds_config.read_ds_config(path)["zero_optimization"]["stage"] == 3
    path = write(tmp_path, "b.yaml", TRL | {"parallelism_config": sizes | {f"parallelism_config_{key}": 2}})
    with pytest.raises(ConfigError, match=f"parallelism_config_{key}"):
        ds_config.read_ds_config(path)


def test_trls_config_trains_phi3(folder, inputs, tmp_path):
    """launch/train.py with the file as published, on a model whose attention and MLP are fused, in bf16."""
    base = folder / "inputs" / "model"
    settings = read_json(base / "config.json")
    model = make_family("phi3", vocab_size=settings["vocab_size"], hidden_size=32, max_position_embeddings=128)
    fused = tmp_path / "phi3"
    fused.mkdir()
    for file in base.glob("token*"):
        (fused / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(fused)
    path = write(tmp_path, "deepspeed_zero3.yaml", TRL)
    wanted = inputs | {"ds_config": str(path), "model_name_or_path": str(fused), "output_dir": str(tmp_path / "out")}
    wanted |= {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "max_length": 96}
    wanted |= {"lr_scheduler_type": "constant", "prompt_template": "none"}
    (done,) = run_ranks(1, train_here, flags(wanted), str(tmp_path / "cache"))
    assert (done["code"], done["error"]) == (0, None), done["stderr"]
    steps, (before, after) = read_metrics(tmp_path / "out")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert after["eval_loss"] < before["eval_loss"]
    run = read_json(tmp_path / "out" / "run.json")
    assert (run["targets"], run["ds_config"]["bf16"]) == (8, {"enabled": True})
