"""Families of models: each one, tiny, through the real engine, against the oracle, exported and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
from family_runs import (
    DENSE,
    FAMILIES,
    LR,
    PACKED,
    SLICES,
    STEPS,
    R,
    last_logits,
    make_family,
    plain_model,
    train_families,
)
from launch_runs import flags, make_inputs, read_json, read_metrics, train_here, write_ds_config
from oracle import Oracle
from ranks import run_ranks
from tiny import SEVEN, tiny_batch
from torch import nn

from hdpissa.engine.config import default_targets
from hdpissa.engine.config.section import HDPissaConfig
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.method import adapt
from hdpissa.engine.sharding.slicing import SlicePlan

ATTENTION = SEVEN[:4]
# The names that the default list has to find: all Linears of a decoder layer, as transformers calls them.
NAMES = dict.fromkeys(DENSE, SEVEN) | {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ATTENTION,
    "qwen2_moe": SEVEN,  # its shared expert is made of Linears
    "qwen3_moe": ATTENTION,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def runs(folder):
    return run_ranks(1, train_families, str(folder))[0]


def as_linears(model):
    """The same model with nn.Linear, weights transposed, in place of every Conv1D."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if adapt.is_conv1d(module):
                linear = nn.Linear(module.nx, module.nf, dtype=module.weight.dtype)
                linear.weight, linear.bias = nn.Parameter(module.weight.detach().t().contiguous()), module.bias
                setattr(parent, name, linear)
    return model


def oracle_run(base, weights):
    """(losses, {name: (W before, W after)}) of the same steps in float64."""
    net = as_linears(plain_model(base, torch.float64))
    oracle = Oracle(net, weights, slices=SLICES, r=R)
    before = {n: oracle.parameters[n].detach().clone() for n in weights}
    losses = [oracle.step([[tiny_batch(step, i, 0)] for i in range(SLICES)], LR) for step in range(STEPS)]
    return losses, {n: (before[n], oracle.parameters[n].detach()) for n in weights}


def trained_names(run):
    """{last part of the module's name} of the trained weights."""
    return {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in run["weights"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_oracle(runs, folder, name, one_thread):
    """Losses, and the change of every weight; GPT-2's Conv1D as the Linear that it is when transposed.

    1e-3 of the change: W moves by 1e-3 of itself in these steps, and fp32 keeps it to 6e-8.
    """
    run = runs[name]
    assert trained_names(run) == set(NAMES[name])
    losses, expected = oracle_run(folder / name / "base", list(run["weights"]))
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    for weight, (before, after) in expected.items():
        found = run["weights"][weight].double()
        change = (found.t() if name == "gpt2" else found) - before
        assert (change - (after - before)).norm() < 1e-3 * (after - before).norm(), weight


@pytest.mark.parametrize("name", FAMILIES)
def test_the_export_loads_as_the_trained_model(runs, folder, name, one_thread):
    model = plain_model(folder / name / "model").eval()
    assert torch.allclose(last_logits(model), runs[name]["logits"], rtol=1e-5, atol=1e-5)
    for weight, W in runs[name]["weights"].items():
        assert torch.equal(model.get_parameter(weight).detach(), W)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_at_the_start(runs, name):
    """A family with names of its own is told which; a mixture of experts, what is left out; others nothing."""
    remarks = [line for line in runs[name]["said"] if "target_modules" in line or "experts" in line]
    if name in default_targets.BY_MODEL_TYPE:
        (line,) = remarks
        assert line.endswith(", ".join(NAMES[name]))
    elif name in PACKED:
        assert any("packed experts (first: model.layers.0.mlp.experts." in line for line in remarks)
    else:
        assert not remarks


@pytest.mark.parametrize("name", PACKED)
def test_experts_stay_as_they_were(runs, folder, name, one_thread):
    before, after = plain_model(folder / name / "base"), plain_model(folder / name / "model")
    for weight, W in before.named_parameters():
        assert torch.equal(W, after.get_parameter(weight)) == (weight not in runs[name]["weights"]), weight


def test_gpt2_as_an_adapter(runs, folder, one_thread):
    """PEFT's pair of a Conv1D is a Linear's; it gives the trained model, from the run and from its checkpoint alike."""
    from peft import PeftModel
    from safetensors.torch import load_file

    from hdpissa.engine.export.from_checkpoint import export_checkpoint
    from hdpissa.launch.export import open_checkpoint

    where = folder / "gpt2"
    config = json.loads((where / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    report = json.loads((where / "adapter" / "hdpissa_export.json").read_text())
    assert report["residual"]["overall"] < 1e-2  # second-order terms, and the rounding of W
    adapted = PeftModel.from_pretrained(plain_model(where / "base"), where / "adapter").eval()
    assert torch.allclose(last_logits(adapted), runs["gpt2"]["logits"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(last_logits(plain_model(where / "base")), runs["gpt2"]["logits"], rtol=1e-2, atol=1e-2)
    export_checkpoint(open_checkpoint(str(where / "checkpoint-2")), where / "adapter2", format="peft")
    tensors, again = (load_file(where / f / "adapter_model.safetensors") for f in ("adapter", "adapter2"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    export_checkpoint(open_checkpoint(str(where / "small")), where / "model2", format="hf")
    assert torch.allclose(last_logits(plain_model(where / "model2")), runs["gpt2"]["logits"], rtol=1e-3, atol=1e-3)


# --- what is found, and refused, without weights ---------------------------------------------------


def on_meta(model_type, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


def find(model, r=2, **hd_pissa):
    config, plan = HDPissaConfig.from_dict({"r": r, **hd_pissa}), SlicePlan(1, 1, 0)
    targets = adapt.find_targets(model, config, plan)
    return targets, adapt.remarks(model, targets, config, plan)


# One layer each; GPT-NeoX, Falcon and their like differ in what they call the number of layers.
LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1)
SMALL = {
    "gpt_neo": {"attention_types": [[["global"], 1]]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("model_type", default_targets.BY_MODEL_TYPE)
def test_a_familys_names_are_all_linears_of_its_layers(model_type):
    """Nothing that "all-linear" would find in a decoder layer is left out, and every name of the table is right."""
    model = on_meta(model_type, **LAYERS | SMALL.get(model_type, {}))
    targets, remarks = find(model)
    everything, _ = find(model, target_modules="all-linear")
    assert {t.name for t in targets} == {t.name for t in everything} - {"model.decoder.project_in"}
    assert not [line for line in remarks if "leaves out" in line]
    assert remarks[0].endswith(", ".join(default_targets.BY_MODEL_TYPE[model_type]))


def test_a_weight_that_is_an_embedding_too_is_refused():
    """Its gradient there would be lost; untied, or as one of modules_to_save, it is trained."""
    names = ["q_proj", "lm_head"]
    with pytest.raises(ConfigError, match=r"lm_head.*embed_tokens"):
        find(make_family("llama", tie_word_embeddings=True), target_modules=names)
    targets, _ = find(make_family("llama", tie_word_embeddings=False), target_modules=names)
    assert targets[-1].name == "lm_head"


def test_the_table_holds_only_families_that_need_it():
    assert not [
        kind for kind, names in default_targets.BY_MODEL_TYPE.items() if tuple(names) == default_targets.DEFAULT_TARGETS
    ]


def test_a_familys_names_stand_for_the_default_list_only():
    model = make_family("phi3")
    assert {t.name.rsplit(".", 1)[-1] for t in find(model, target_modules=["o_proj"])[0]} == {"o_proj"}
    found = find(model, target_modules=SEVEN)[0]  # the default list, written out
    assert {t.name.rsplit(".", 1)[-1] for t in found} == set(NAMES["phi3"])
    rest = find(model, exclude_modules=["qkv_proj"])[0]
    assert [t.name for t in rest] == [t.name for t in found if "qkv" not in t.name]


def test_what_the_default_list_leaves_out_is_told():
    """A model that is not in the table, only some of whose Linears have the usual names."""
    model = make_family("llama")
    for layer in model.model.layers:
        layer.mlp.extra = nn.Linear(20, 20)
    (line,) = find(model)[1]
    assert "leaves out extra;" in line
    assert "all-linear" in line
    assert not find(model, target_modules="all-linear")[1]
    assert not find(model, exclude_modules=["extra"])[1]


def test_a_vision_tower_is_no_part_of_the_default():
    """It gets no gradient from text."""
    text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model = on_meta("gemma3", text_config=text, vision_config=vision)
    targets, remarks = find(model)
    assert {t.name.rsplit(".", 1)[-1] for t in targets} == set(SEVEN)
    assert not [t.name for t in targets if "vision" in t.name]
    assert not remarks


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["gate_up_proj"], "4 experts packed into one parameter (4 x 56 x 20)"),
        (["q_proj", "down_proj"], "4 experts packed into one parameter (4 x 20 x 28)"),
        (["experts"], "a MixtralExperts, which packs its experts into gate_up_proj"),
        (r".*\.experts", "which packs its experts into gate_up_proj"),
        (["gate"], "a MixtralTopKRouter: only torch.nn.Linear"),
    ],
)
def test_packed_experts_are_refused_in_words(targets, words):
    with pytest.raises(ConfigError) as caught:
        find(make_family("mixtral"), target_modules=targets)
    assert words in str(caught.value)
    assert "; " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_linear_finds_conv1d_but_not_the_head():
    found, _ = find(make_family("gpt2"), target_modules="all-linear")
    assert {t.name.rsplit(".", 1)[-1] for t in found} == set(NAMES["gpt2"])
    assert all(t.transposed for t in found)


# --- the command -----------------------------------------------------------------------------------


def test_gpt2_by_the_command(tmp_path):
    """launch/train.py on GPT-2, without target_modules: a falling loss, an export in its own layout."""
    inputs = make_inputs(tmp_path / "inputs", train=32, evaluate=4)
    base = tmp_path / "inputs" / "model"
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    make_family("gpt2", vocab_size=vocabulary, max_position_embeddings=128).save_pretrained(base)
    ds = write_ds_config(tmp_path / "ds.json", hd_pissa={"r": 4, "slices": 2})
    wanted = inputs | {"ds_config": str(ds), "output_dir": str(tmp_path / "out"), "max_steps": 3, "max_length": 96}
    wanted |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 3e-3}
    wanted |= {"lr_scheduler_type": "constant", "prompt_template": "none"}
    (done,) = run_ranks(1, train_here, flags(wanted), str(tmp_path / "cache"))
    assert (done["code"], done["error"]) == (0, None), done["stderr"]
    assert "the default of a gpt2 model is c_attn, c_proj, c_fc" in done["stderr"]
    steps, (before, after) = read_metrics(tmp_path / "out")
    assert after["eval_loss"] < before["eval_loss"]
    run = read_json(tmp_path / "out" / "run.json")
    assert (run["targets"], run["target_modules"]) == (8, ["c_attn", "c_fc", "c_proj"])
    model = plain_model(tmp_path / "out" / "model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert len(steps) == 3
