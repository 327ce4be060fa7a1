"""The section `hd_pissa` on the command line: the same names, filled into the JSON, and one word where both speak."""

from __future__ import annotations

import pytest
import yaml

from hdpissa.engine import ConfigError, ds_config, overrides
from hdpissa.launch import options_method, train_arguments

WORDS = [
    (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    (["q_proj,v_proj"], ["q_proj", "v_proj"]),
    (["q_proj"], ["q_proj"]),
    (["all-linear"], "all-linear"),
    ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
]


@pytest.mark.parametrize(("given", "meant"), WORDS)
def test_target_modules_as_peft_spells_them(given, meant):
    assert options_method.modules(given) == meant


def merged(section=None, *, adam=None, optimizer=None, **given):
    """(the section's model, what differs)."""
    ds = {"zero_optimization": {"stage": 3}} | ({} if section is None else {"hd_pissa": section})
    ds |= {} if optimizer is None else {"optimizer": {"params": optimizer}}
    out, differ = overrides.merge(ds, given, adam or {})
    return ds_config.split_section(out)[1], differ


GIVEN = {
    "r": 8,
    "lora_alpha": 4.0,
    "slices": 2,
    "target_modules": ["up_proj"],
    "exclude_modules": "model.layers.0.*",
    "rank_pattern": {"up_proj": 2},
    "modules_to_save": ["norm"],
    "modules_to_save_learning_rate": 1e-5,
}


@pytest.mark.parametrize("section", [None, {}, dict.fromkeys(GIVEN, "auto"), GIVEN])
def test_the_command_line_fills_what_the_json_leaves_open(section):
    """No section, nothing in it, all of it "auto", or the same values."""
    hd, differ = merged(section, **GIVEN)
    assert {name: getattr(hd, name) for name in GIVEN} == GIVEN
    assert not differ


def test_where_both_speak_they_must_agree():
    _, differ = merged({"r": 16, "target_modules": ["v_proj", "q_proj"]}, r=8, target_modules=["q_proj", "v_proj"])
    assert differ == ["hd_pissa.r is 16 but --r is 8"]
    values = ds_config.TrainValues(1, 1, 1, 1.0, 1e-4, False, given=frozenset({"max_grad_norm"}))
    with pytest.raises(ConfigError, match=r"hd_pissa.r is 16 but --r is 8, gradient_clipping .*; set these config val"):
        ds_config.fill_auto({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}, values, differ)


ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}


def test_adam():
    for optimizer in (None, {"betas": "auto", "eps": "auto"}, {"betas": [0.8, 0.99], "eps": 1e-6}):
        hd, differ = merged({"adam": {"betas": [0.8, 0.99]}} if optimizer else {}, optimizer=optimizer, adam=ADAM)
        assert (hd.adam.betas, hd.adam.eps, differ) == ((0.8, 0.99), 1e-6, [])
    assert merged(adam={"adam_beta2": 0.95})[0].adam.betas == (0.9, 0.95)
    _, differ = merged({"adam": {"eps": 1e-8}}, optimizer={"betas": [0.9, 0.99]}, adam=ADAM)
    assert differ == [
        "optimizer.params.betas is [0.9, 0.99] but --adam_beta1 is 0.8",
        "hd_pissa.adam.eps is 1e-08 but --adam_epsilon is 1e-06",
    ]


def test_yaml_has_lists_and_objects(tmp_path):
    required = {"ds_config": "a", "model_name_or_path": "b", "dataset_name": "c", "output_dir": "d"}
    given = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": "lm_head", "rank_pattern": {"q_proj": 2}}
    given |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(required | given))
    args, _ = train_arguments.parse(["--config", str(tmp_path / "run.yaml")])
    section = options_method.section_options(args)
    assert section == {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["lm_head"],
        "rank_pattern": {"q_proj": 2},
    }
    assert args.lr_scheduler_kwargs == '{"min_lr_rate": 0.1}'
