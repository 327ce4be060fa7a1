"""Layers that ZeRO-3 gathers whole: which ones, and that training does not notice."""

from __future__ import annotations

import pytest
import torch
from engine_runs import train_tiny
from ranks import run_ranks
from tiny import ds_settings, tiny_llama

from hdpissa.engine.config import ds_config, leaf_modules

LAYERS = {"leaf_module": {"classes": "auto"}}
LAYER = "LlamaDecoderLayer"


def leaves(engine) -> list[str]:
    from deepspeed.utils import get_z3_leaf_modules

    return [type(module).__name__ for module in get_z3_leaf_modules(engine.module)]


VARIANTS = {
    "plain": {"zero": {"leaf_module": {"classes": []}}},
    "layers": {},
    "checkpointing": {"checkpointing": True},
    "persistent": {"zero": {"stage3_param_persistence_threshold": 100_000}},
    "forgotten": {"zero": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1000}},
    "second copy": {"zero": {"zero_hpz_partition_size": 2}},
    "norms beside": {"modules_to_save": ["norm"], "modules_to_save_learning_rate": 1e-12},
}


def train_all() -> dict[str, dict]:
    """Every variant in one pair of processes."""
    from deepspeed.utils import groups

    found = {}
    for name, how in VARIANTS.items():
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of "second copy", which DeepSpeed keeps for good
        how = dict(how)
        checkpointing, zero = how.pop("checkpointing", False), {**LAYERS, **how.pop("zero", {})}
        settings = ds_settings(slices=2, zero=zero, **how)
        found[name] = train_tiny(settings, checkpointing=checkpointing, eval_between=True, after=leaves)
    return found


@pytest.fixture(scope="module")
def trained():
    return run_ranks(2, train_all)[0]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_the_run_without_it(trained, variant):
    """But for the order in which gradients of a layer's input are added up."""
    plain, found = trained["plain"], trained[variant]
    assert (plain["after"], found["after"]) == ([], [LAYER, LAYER])
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert found["eval"] == pytest.approx(plain["eval"], rel=1e-6)
    assert len(set(found["eval"])) == 4, "nothing was learned, so nothing could go stale"
    for name, W in plain["weights"].items():
        torch.testing.assert_close(found["weights"][name], W, rtol=1e-5, atol=1e-6)


def test_both_spellings():
    """What the JSON says reaches DeepSpeed's section in a form that its schema takes."""
    for said in ("auto", {"classes": "auto"}, {"classes": ["auto"]}):
        ds = ds_config.engine_ds_config({"zero_optimization": {"stage": 3, "leaf_module": said}})
        assert leaf_modules.fill(ds, tiny_llama())["zero_optimization"]["leaf_module"] == {"classes": [LAYER]}


def test_what_is_said_otherwise_stays():
    for zero in ({}, {"leaf_module": {"classes": ["LlamaMLP"]}}, {"leaf_module": {"names": ["model.norm"]}}):
        ds = {"zero_optimization": zero}
        assert leaf_modules.fill(ds, tiny_llama()) == ds


def test_a_model_that_names_no_layers():
    assert leaf_modules.fill({"zero_optimization": dict(LAYERS)}, torch.nn.Linear(2, 2)) == {"zero_optimization": {}}


SECTIONS = [
    {},
    {"classes": LAYER},
    {"classes": ["LlamaMLP", "transformers.models.llama.modeling_llama.LlamaAttention"]},
    {"names": ["model.layers.1"], "classes": []},
    {"name_suffixes": "self_attn"},
    {"names": "model.norm", "name_suffixes": ["mlp", "0"]},
]


def tiny_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 11}
    return MixtralForCausalLM(MixtralConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_found_as_deepspeed_finds_them(build, section):
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils import get_z3_leaf_modules
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

    model = build()
    found = leaf_modules.find(model, {"leaf_module": section})
    apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig(**section))
    assert found == get_z3_leaf_modules(model)
    if build is tiny_llama:
        assert bool(found) == bool(section)  # its layers are no leaves unless somebody says so


def test_default_classes_are_deepspeeds():
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES

    assert list(leaf_modules.DEFAULT_CLASSES) == DEFAULT_LEAF_MODULE_CLASSES
