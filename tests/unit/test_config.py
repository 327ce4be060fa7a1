"""The config: what is accepted unchanged, and what is refused, by the name of its key.

`config.py` and `ds_config.py` are pure functions over dicts; neither imports torch or deepspeed.
"""

import copy
import json
import re
from dataclasses import fields, replace

import pytest

from hdpissa.engine.config import ds_config as dsc
from hdpissa.engine.config.section import DEFAULT_TARGETS, HDPissaConfig
from hdpissa.engine.errors import ConfigError

ZERO3 = {"zero_optimization": {"stage": 3}}
ARGS = dsc.TrainValues(2, 4, world_size=8, max_grad_norm=0.5, learning_rate=2e-5, bf16=True, hidden_size=100)
ALL_GIVEN = replace(ARGS, given=frozenset(field.name for field in fields(ARGS)))

# The keys of configs that these projects publish (facts, read in their repositories), as `config_of` reads
# them. axolotl's zero3_bf16.json writes the stage-3 sizes without the prefix stage3_.
BATCH = """gradient_accumulation_steps="auto" gradient_clipping="auto" train_batch_size="auto"
    train_micro_batch_size_per_gpu="auto" """
FP16 = """fp16.enabled="auto" fp16.loss_scale=0 fp16.loss_scale_window=1000 fp16.initial_scale_power=16
    fp16.hysteresis=2 fp16.min_loss_scale=1 bf16.enabled="auto" """
PUBLISHED = {
    "LLaMA-Factory ds_z3_config.json": f"""{BATCH} {FP16} zero_allow_untested_optimizer=true
        zero.overlap_comm=false zero.contiguous_gradients=true zero.reduce_bucket_size="auto"
        zero.stage3_prefetch_bucket_size="auto" zero.stage3_param_persistence_threshold="auto"
        zero.stage3_max_live_parameters=1e9 zero.stage3_max_reuse_distance=1e9 zero.sub_group_size=1e9
        zero.stage3_gather_16bit_weights_on_model_save=true monitor_config.enabled=true""",
    "axolotl zero3_bf16.json": f"""{BATCH} bf16.enabled=true wall_clock_breakdown=false
        zero.overlap_comm=true zero.contiguous_gradients=true zero.reduce_bucket_size="auto"
        zero.prefetch_bucket_size="auto" zero.param_persistence_threshold="auto" zero.sub_group_size=0
        zero.max_live_parameters=0 zero.max_reuse_distance=0 zero.gather_16bit_weights_on_model_save=true""",
    "axolotl zero3_bf16_cpuoffload_all.json": f"""{BATCH} bf16.enabled=true zero_force_ds_cpu_optimizer=false
        zero.offload_optimizer={{"device":"cpu","pin_memory":true}} zero.stage3_prefetch_bucket_size="auto"
        zero.offload_param={{"device":"cpu","pin_memory":true}} zero.overlap_comm=true""",
    "the Trainer's documentation, and an old amp": f"""{BATCH} {FP16} amp.enabled=false amp.opt_level="O1"
        optimizer.type="AdamW" optimizer.params.lr="auto" optimizer.params.betas="auto"
        optimizer.params.eps="auto" optimizer.params.weight_decay="auto" scheduler.type="WarmupLR"
        scheduler.params={{"warmup_min_lr":0,"warmup_max_lr":"auto","warmup_num_steps":"auto"}}
        zero.reduce_bucket_size="auto" steps_per_print=2000""",
}
# huggingface/trl examples/accelerate_configs/deepspeed_zero3.yaml
TRL = """\
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
mixed_precision: 'bf16'
"""


def config_of(settings):
    """A ZeRO-3 config with some `dotted.path=json` put in; `zero` is short for `zero_optimization`."""
    ds = copy.deepcopy(ZERO3)
    for setting in settings.split():
        path, value = setting.split("=", 1)
        *parents, last = path.replace("zero", "zero_optimization", path.split(".")[0] == "zero").split(".")
        node = ds
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = json.loads(value)
    return ds


def refusal(function, *args):
    """The message of the ConfigError that the call raises; always one line."""
    with pytest.raises(ConfigError) as caught:
        function(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def all_steps(ds, args=ARGS):
    """What launch does: split, check, fill, finish."""
    rest, config = dsc.split_section(ds)
    dsc.check_ds_config(rest)
    filled, values = dsc.fill_auto(rest, args)
    return dsc.engine_ds_config(filled), config, values


def test_the_defaults_are_the_papers():
    config = HDPissaConfig.from_dict({})
    assert (config.r, config.slices, config.lora_alpha) == (16, "auto", None)
    assert config.target_modules == list(DEFAULT_TARGETS)
    assert (config.adam.betas, config.adam.eps, config.delta.second_order) == ((0.9, 0.999), 1e-8, True)
    delta, kernels = config.delta.model_dump(), config.kernels.model_dump()
    assert delta == {
        "exchange": "auto",
        "dtype": "fp32",
        "precision": "fp32",
        "second_order": True,
        "bucket_bytes": 2**28,
    }
    assert kernels == {"impl": "auto", "linear": "auto"}
    assert config.scale_for(16) == config.scale_for(4) == 1.0
    doubled = HDPissaConfig.from_dict({"lora_alpha": 32, "rank_pattern": {"k_proj": 8}})
    assert (doubled.scale_for(16), doubled.scale_for(8)) == (2.0, 4.0)


def test_the_config_is_frozen_and_owns_its_lists():
    section = {"target_modules": ["q_proj"]}
    config = HDPissaConfig.from_dict(section)
    section["target_modules"].append("x")
    assert config.target_modules == ["q_proj"]
    with pytest.raises(ValueError, match="frozen"):
        config.r = 8


BAD_SECTIONS = [  # section, the key that is named
    ({"method": "lora"}, "method"),
    ({"target_module": []}, "target_module"),
    ({"slice": "auto"}, "slice"),
    ({"alpha": 16}, "alpha"),
    ({"rank": 8}, "rank"),
    ({"betas": [0.9, 0.99]}, "betas"),
    ({"init": {"r": 8}}, "init.r"),
    ({"a\nb": 1}, "a b"),
    ({"r": -1}, "r"),
    ({"r": True}, "r"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"lora_alpha": float("inf")}, "lora_alpha"),
    ({"slices": True}, "slices"),
    ({"target_modules": ["q", 1]}, "target_modules"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern"),
    ({"init": {"method": "svd"}}, "init.method"),
    ({"delta": {"exchange": "thin"}}, "delta.exchange"),
    ({"delta": {"dtype": "fp16"}}, "delta.dtype"),
    ({"delta": {"precision": "bf16"}}, "delta.precision"),
    ({"kernels": {"impl": "cuda"}}, "kernels.impl"),
    ({"kernels": {"linear": True}}, "kernels.linear"),
    ({"impl": "triton"}, "impl"),
    ({"delta": {"second_order": 1}}, "delta.second_order"),
    ({"adam": {"betas": [0.9, 1]}}, "adam.betas.1"),
    ({"adam": {"betas": [0.9]}}, "adam.betas"),
    ({"master": {"format": "a\nb"}}, "master.format"),
]


@pytest.mark.parametrize(("section", "key"), BAD_SECTIONS)
def test_a_bad_section_names_its_key(section, key):
    assert re.match(rf"hd_pissa\.{re.escape(key)}\b", refusal(HDPissaConfig.from_dict, section))


@pytest.mark.parametrize(
    ("key", "meant"),
    [("target_module", "target_modules"), ("slice", "slices"), ("alpha", "lora_alpha"), ("rank", "r"),
     ("betas", "hd_pissa.adam"), ("impl", "hd_pissa.kernels")],
)  # fmt: skip
def test_a_misspelt_key_is_told_the_right_one(key, meant):
    assert re.search(rf"\b{re.escape(meant)}\b", refusal(HDPissaConfig.from_dict, {key: 1}).partition(key)[2])


def test_all_problems_of_the_section_stand_in_one_line():
    message = refusal(HDPissaConfig.from_dict, {"r": 0, "rr": 1, "adam": {"eps": -1}, "slices": []})
    assert all(f"hd_pissa.{path}" in message for path in ("r ", "rr", "adam.eps", "slices"))


def test_split_section():
    ds = {**ZERO3, "hd_pissa": {"r": 4}}
    assert dsc.split_section(ds) == (ZERO3, HDPissaConfig(r=4))
    assert ds == {**ZERO3, "hd_pissa": {"r": 4}}
    assert dsc.split_section(ZERO3)[1] == HDPissaConfig()
    for name in ("hdpissa", "hd-pissa", "HD_PiSSA"):  # DeepSpeed would ignore it in silence
        assert "hd_pissa" in refusal(dsc.split_section, {**ZERO3, name: {"r": 4}})


def test_adam_is_taken_over_from_the_optimizer_section():
    ds = config_of('optimizer.type="AdamW" optimizer.params.betas=[0.9,0.95] optimizer.params.eps=1e-6')
    assert dsc.split_section(ds)[1].adam.model_dump() == {"betas": (0.9, 0.95), "eps": 1e-6}
    ds["hd_pissa"] = {"r": 4, "adam": {"betas": [0.9, 0.95]}}
    config = dsc.split_section(ds)[1]
    assert (config.r, config.adam.eps) == (4, 1e-6)
    ds["hd_pissa"]["adam"]["eps"] = 1e-8
    message = refusal(dsc.split_section, ds)
    assert all(name in message for name in ("params.eps", "1e-06", "hd_pissa.adam.eps", "1e-08"))
    assert "optimizer.params.betas.1" in refusal(dsc.split_section, config_of("optimizer.params.betas=[0.9,2]"))


def test_reading(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO3))
    assert dsc.read_ds_config(path) == dsc.read_ds_config(str(path)) == ZERO3
    dsc.read_ds_config(ZERO3)["zero_optimization"]["stage"] = 2
    assert ZERO3["zero_optimization"]["stage"] == 3


BAD_FILES = [  # what the message has to point to
    ("a.json", '{\n"a": 1,\n}', "a.json, line 3"),
    ("a.json", "[1]", "a.json"),
    ("a.json", '{"a": 1, "a": 2}', '"a"'),
    ("a.yaml", "a:\n- [1", "a.yaml"),
    ("a.yaml", "a: 1", "deepspeed_config"),
    ("a.yaml", "deepspeed_config: {deepspeed_config_file: no.json}", "no.json"),
]


@pytest.mark.parametrize(("name", "text", "expected"), BAD_FILES)
def test_a_bad_file_names_the_place(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert expected in refusal(dsc.read_ds_config, tmp_path / name)
    assert str(tmp_path) in refusal(dsc.read_ds_config, tmp_path)


REFUSED = """
    zero_optimization=null zero.stage=2 zero.stage=null zero.zero_quantized_weights=true
    zero.zero_quantized_nontrainable_weights=true zero.zero_quantized_gradients=true
    zero.mics_shard_size=4 zero.zenflow={"topk_ratio":0.1}
    zero.zeropp_loco_param={"err_beta":0.8} zero.offload_param.device="nvme" fp8.enabled=true
    zero.offload_optimizer.super_offload=true fp16.enabled=true fp16.enabled="true" bf16=true
    torch_autocast.enabled=true hybrid_engine.enabled=true pipeline.stages=2 amp.enabled=true
    tensor_parallel.autotp_size=4 expert_parallel.enabled=true sequence_parallel_size=2
    sequence_parallel.enabled=true compile.deepcompile=true checkpoint.load_universal=true
    elasticity.enabled=true compression_training.weight_quantization={} weight_quantization.num_bits=8
    optimizer.type="Lamb" optimizer.params.weight_decay=0.1 optimizer.params.max_grad_norm=1.0
    scheduler.params.warmup_num_steps=10 steps_per_print="auto"
"""
SWITCHED_OFF = """
    fp16.enabled=false fp16.enabled="auto" fp16.loss_scale=0 torch_autocast.enabled="auto"
    tensor_parallel.autotp_size=1 sequence_parallel_size=1 zero.zero_hpz_partition_size=1
    zero.mics_shard_size=-1 zero.zenflow=null sparse_gradients=false elasticity.enabled=false
    zero.offload_param={"device":"none","nvme_path":null} optimizer.params.bias_correction=true
    amp.enabled="auto" optimizer.type="Adam" optimizer.params={"lr":1e-4,"weight_decay":0.0}
    scheduler.type="WarmupLR" steps_per_print=10
"""


@pytest.mark.parametrize("setting", REFUSED.split())
def test_each_refusal_names_the_key(setting):
    ds = config_of(setting)
    message = refusal(dsc.check_ds_config, ds)
    path = setting.split("=")[0].replace("zero.", "zero_optimization.")
    assert f"DeepSpeed config: {path.split('.')[0]}" in message
    assert ds == config_of(setting)


@pytest.mark.parametrize("setting", SWITCHED_OFF.split())
def test_switched_off_is_no_problem(setting):
    ds = config_of(setting)
    dsc.check_ds_config(ds)
    engine = dsc.engine_ds_config(ds)
    assert not {"scheduler", "elasticity", "amp", "sparse_gradients", "torch_autocast"} & set(engine)
    assert "mics_shard_size" not in engine["zero_optimization"]


def test_all_refusals_stand_in_one_line():
    message = refusal(dsc.check_ds_config, {"fp16": {"enabled": True}, "optimizer": {"type": "Muon"}})
    assert all(part in message for part in ("stage", "fp16.enabled", '"Muon"'))


def test_the_json_wins_over_our_defaults():
    batch = "train_micro_batch_size_per_gpu=1 gradient_accumulation_steps=16 gradient_clipping=1.0"
    ds = config_of(f'{batch} bf16.enabled="false" optimizer.params.lr=1e-4')
    filled, values = dsc.fill_auto(ds, ARGS)
    assert values == dsc.TrainValues(1, 16, 8, 1.0, 1e-4, False, 100)
    assert filled["train_batch_size"] == 128
    assert dsc.fill_auto(filled, values) == (filled, values)
    agreed = replace(values, given=ALL_GIVEN.given)
    assert dsc.fill_auto(filled, agreed) == (filled, agreed)


def test_all_mismatches_stand_in_one_line():
    batch = "train_micro_batch_size_per_gpu=1 train_batch_size=100 gradient_clipping=1.0"
    ds = config_of(f"{batch} bf16.enabled=false optimizer.params.lr=1e-4")
    message = refusal(dsc.fill_auto, ds, ALL_GIVEN)
    differing = {
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size", "gradient_clipping": "--max_grad_norm",
        "optimizer.params.lr": "--learning_rate", "bf16.enabled": "--bf16", "train_batch_size": "32",
    }  # fmt: skip
    assert all(key in message and option in message for key, option in differing.items())


def test_accumulation_follows_from_a_concrete_batch_size():
    filled, values = dsc.fill_auto(config_of("train_batch_size=128"), ARGS)
    assert (filled["gradient_accumulation_steps"], values.gradient_accumulation_steps) == (8, 8)
    fixed = "train_batch_size=128 gradient_accumulation_steps=4"
    for settings, args in (
        (fixed, ARGS),
        ("train_batch_size=128", ALL_GIVEN),
        ("train_batch_size=100", ARGS),
    ):
        assert "train_batch_size" in refusal(dsc.fill_auto, config_of(settings), args)


INVALID = (
    'train_micro_batch_size_per_gpu="2"',
    "gradient_accumulation_steps=true",
    "gradient_clipping=-1",
    'bf16.enabled="maybe"',
)


@pytest.mark.parametrize("setting", INVALID)
def test_invalid_values_on_either_side(setting):
    message = refusal(dsc.fill_auto, config_of(setting), replace(ARGS, learning_rate=float("nan")))
    assert setting.split("=")[0] in message
    assert "--learning_rate" in message


def test_sizes_follow_the_hidden_size():
    ds = config_of(next(iter(PUBLISHED.values())))
    zero = dsc.fill_auto(ds, ARGS)[0]["zero_optimization"]
    assert [zero["reduce_bucket_size"], zero["stage3_param_persistence_threshold"]] == [10_000, 1_000]
    assert "stage3_prefetch_bucket_size" not in dsc.engine_ds_config({"zero_optimization": zero})["zero_optimization"]
    filled, _ = dsc.fill_auto(ds, replace(ARGS, hidden_size=None))
    assert "auto" in filled["zero_optimization"].values()
    assert "auto" not in dsc.engine_ds_config(filled)["zero_optimization"].values()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_work_unchanged(name):
    ds = config_of(PUBLISHED[name])
    engine, config, values = all_steps(ds)
    assert ds == config_of(PUBLISHED[name])
    assert (config, values) == (HDPissaConfig(), ARGS)
    assert dsc.compute_dtype(engine) == "bf16"
    assert '"auto"' not in json.dumps(engine)
    assert (engine["train_batch_size"], engine["gradient_clipping"]) == (64, 0.5)
    assert engine["optimizer"]["params"] == {"torch_adam": True, "lr": 2e-5, "weight_decay": 0.0}
    dropped = "offload_optimizer"  # DeepSpeed optimises one element; initialize() says so
    kept = {k: v for k, v in ds["zero_optimization"].items() if v != "auto" and k != dropped}
    assert dropped not in engine["zero_optimization"]
    kept |= {"contiguous_gradients": False, "reduce_bucket_size": 10_000}
    assert engine["zero_optimization"] == engine["zero_optimization"] | kept
    assert engine["managed_gradient_accumulation"] is False
    assert dsc.engine_ds_config(engine) == engine
    assert all_steps(dict(engine, hd_pissa={}))[0] == engine


def test_trls_accelerate_yaml_works_unchanged(tmp_path):
    path = tmp_path / "deepspeed_zero3.yaml"
    path.write_text(TRL)
    engine, _, values = all_steps(dsc.read_ds_config(path))
    assert (values.gradient_accumulation_steps, engine["bf16"]) == (1, {"enabled": True})
    assert engine["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    path.write_text(TRL.replace("bf16", "fp16"))  # an older revision of the file
    assert "fp16.enabled" in refusal(dsc.check_ds_config, dsc.read_ds_config(path))


def test_compute_dtype():
    bf16 = """bf16.enabled=true;bf16.enabled="true";bfloat16.enabled=true;bf16=null bfloat16.enabled=true"""
    fp32 = ";bf16.enabled=false;bf16.enabled=false bfloat16.enabled=true"  # DeepSpeed reads bf16 first
    for dtype, cases in (("bf16", bf16), ("fp32", fp32)):
        for ds in map(config_of, cases.split(";")):
            assert dsc.compute_dtype(ds) == dtype
            assert dsc.compute_dtype(dsc.fill_auto(ds, replace(ARGS, bf16=False))[0]) == dtype
