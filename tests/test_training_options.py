"""Options of the sections "method" and "training": each is seen to act, and what is wrong is told in one line."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from launch_runs import flags, make_inputs, parsed, read_json, read_metrics, small_run, train_ranks, write_ds_config
from tiny import tiny_batch, tiny_llama

from hdpissa.engine import ConfigError
from hdpissa.launch import train_arguments, train_checks, train_model

LR = 3e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


def arguments(inputs, output, **changes):
    chosen = {"max_steps": 8, "learning_rate": LR, "warmup_steps": 2, "gradient_accumulation_steps": 2}
    return small_run(inputs, output, **chosen | changes)


# --- mistakes that need the model, before any weight is read ---------------------------------------

BAD = {
    "rank of nothing": ({"r": 0}, "--r is 0: must be at least 1"),
    "alpha of 0": ({"lora_alpha": 0}, "--lora_alpha is 0.0: must be greater than 0"),
    "slices in words": ({"slices": "two"}, "--slices is two: must be a number of at least 1, or auto"),
    "a pattern that is no object": ({"rank_pattern": "[1]"}, r"--rank_pattern \[1\]: must be a JSON object"),
    "a rank in quotes": ({"rank_pattern": '{"q_proj": "2"}'}, 'rank_pattern.q_proj is "2": must be an integer'),
    "targets that are not there": ({"target_modules": "query"}, "matches no module of LlamaForCausalLM"),
    "a regular expression that is none": ({"target_modules": "(q_proj"}, "is not a valid regular expression"),
    "everything excluded": ({"exclude_modules": ".*_proj"}, "matches no module of LlamaForCausalLM"),
    "an exclusion of nothing": ({"exclude_modules": "w_proj"}, 'exclude_modules: "w_proj" matches no module'),
    "beta of 1": ({"adam_beta1": 1.0}, "hd_pissa.adam.betas.0 is 1.0: must be less than 1"),
    "beta of -1": ({"adam_beta2": -1.0}, "hd_pissa.adam.betas.1 is -1.0: must be at least 0"),
    "eps of 0": ({"adam_epsilon": 0}, "hd_pissa.adam.eps is 0.0: must be greater than 0"),
    "noise of 0": ({"neftune_noise_alpha": 0}, "--neftune_noise_alpha is 0.0: must be greater than 0"),
    "modules to save that are not there": ({"modules_to_save": "norn"}, '"norn" matches no parameter'),
    "modules to save that are targets": ({"modules_to_save": "q_proj"}, "which the slices of .*q_proj train"),
    "a rate for nothing": ({"modules_to_save_learning_rate": 1e-3}, "of which there are none"),
    "modules to save in an adapter": (
        {"modules_to_save": "norm", "export_format": "both"},
        r"an adapter cannot hold hd_pissa.modules_to_save \(norm\)",
    ),
    "Liger, which is not there": ({"use_liger_kernel": True}, "liger-kernel is not installed; pip install"),
    "torch.compile": ({"torch_compile": True}, "cut every layer into small pieces: the same numbers, slower"),
    "a callback without class": ({"callbacks": "os"}, "must be package.module:Class"),
    "a callback that is not there": ({"callbacks": "os:Missing"}, "cannot be imported .AttributeError"),
    "a module that is not there": ({"callbacks": "no_such_module:C"}, "cannot be imported .ModuleNotFoundError"),
    "a callback that is none": ({"callbacks": "pathlib:Path"}, "must be a subclass of transformers.TrainerCallback"),
    "a callback that needs arguments": (
        {"callbacks": "transformers.trainer_callback:CallbackHandler"},
        r"CallbackHandler\(\) fails .TypeError.*; give a class that needs no arguments",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_are_told_before_weights_are_read(mistake, inputs, folder):
    """`check` reads no weights. A value that HfArgumentParser refuses is told by it."""
    changes, words = BAD[mistake]
    ds = write_ds_config(folder / "open.json", hd_pissa={"r": "auto"})
    with pytest.raises(ConfigError, match=words) as error:
        train_checks.check(*train_arguments.parse(flags(arguments(inputs, folder / "out", ds_config=ds, **changes))))
    assert "\n" not in str(error.value)


# --- one run with many options ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(folder, inputs):
    """One process with options of both sections; once more with activation offloading, and with noise."""
    ds = write_ds_config(folder / "few.json", hd_pissa={"target_modules": "auto"})
    section = {"ds_config": ds, "r": 2, "lora_alpha": 4, "slices": 2, "target_modules": "q_proj,up_proj"}
    section |= {"exclude_modules": "model.layers.0.self_attn.q_proj", "rank_pattern": '{"up_proj": 3}'}
    section |= {"modules_to_save": "norm,lm_head", "modules_to_save_learning_rate": 1e-3, "save_strategy": "no"}
    section |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.5}'}
    section |= {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "gradient_checkpointing": True}
    runs = {"plain": {}, "offloaded": {"activation_offload": True}, "noisy": {"neftune_noise_alpha": 5}}
    for name, more in runs.items():
        train_ranks(1, arguments(inputs, folder / name, **section, **more), folder / "cache")
    return {name: folder / name for name in runs}


def test_the_section_is_as_given(launched):
    run = read_json(launched["plain"] / "run.json")
    section = run["ds_config"]["hd_pissa"]
    assert (section["r"], section["lora_alpha"], section["slices"]) == (2, 4.0, 2)
    assert section["adam"] == {"betas": [0.8, 0.9], "eps": 1e-6}
    assert section["target_modules"] == ["q_proj", "up_proj"]
    assert section["exclude_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert (section["rank_pattern"], section["modules_to_save_learning_rate"]) == ({"up_proj": 3}, 1e-3)
    assert (run["targets"], run["slices"]) == (3, 2)  # two up_proj, one q_proj
    assert list(run["modules_to_save"]) == ["model.norm.weight", "lm_head.weight"]
    steps, (before, after) = read_metrics(launched["plain"])
    assert steps[-1]["learning_rate"] == pytest.approx(LR * (0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 5 / 6))))
    assert after["eval_loss"] < before["eval_loss"] - 0.05


def test_offloading_activations_changes_no_bit(launched):
    plain, offloaded = (read_metrics(launched[name]) for name in ("plain", "offloaded"))
    for ours, theirs in zip(plain, offloaded, strict=True):
        assert [(r.get("loss"), r.get("eval_loss")) for r in ours] == [
            (r.get("loss"), r.get("eval_loss")) for r in theirs
        ]
    assert read_json(launched["offloaded"] / "run.json")["arguments"]["activation_offloading"] is True


def test_offloaded_activations_are_in_host_memory():
    """The hook sees what backward needs; with checkpointing it is little: the inputs of the layers."""
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    for checkpointing in (False, True):
        model, made = tiny_llama(), []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        original = torch.autograd.graph.save_on_cpu
        torch.autograd.graph.save_on_cpu = lambda pin_memory, made=made: hooks(
            lambda t: (made.append(t.numel()), t)[1], lambda t: t
        )
        try:
            train_model.offload_activations(model)
            model(**tiny_batch(0, 0, 0)).loss.backward()
            made_training = len(made)
            model.eval()(**tiny_batch(0, 0, 0))
        finally:
            torch.autograd.graph.save_on_cpu = original
        assert len(made) == made_training > 0
        packed.append(sum(made))
    assert packed[1] < packed[0] / 2


def test_noise_is_added_in_training_only(launched):
    """Evaluation before the first step has none of it; what is learned differs."""
    (plain, plain_evals), (noisy, noisy_evals) = (read_metrics(launched[name]) for name in ("plain", "noisy"))
    assert noisy_evals[0]["eval_loss"] == plain_evals[0]["eval_loss"]
    assert noisy[0]["loss"] != plain[0]["loss"]
    assert noisy[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.2)


def test_liger_is_applied_where_it_is_installed(monkeypatch):
    """A stand-in for the package, which tests do not install: what counts is that transformers' function is called."""
    import sys

    import transformers.integrations.liger
    import transformers.utils

    import hdpissa.engine

    model, applied = tiny_llama(), []
    table = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)
    monkeypatch.setattr(transformers.utils, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(transformers.integrations.liger, "apply_liger_kernel", lambda net, how: applied.append(net))
    monkeypatch.setattr(hdpissa.engine, "load_pretrained", lambda name, ds, **options: model, raising=False)
    for wanted in (False, True):
        args = parsed(use_liger_kernel=wanted)
        train_model.check_model(args, model)
        assert train_model.load_model(args, {}) is model
        assert applied == [model] * wanted
    table.MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(ConfigError, match="Liger has no kernels for model type llama"):
        train_model.check_model(args, model)
