"""`modules_to_save`: parameters that DeepSpeed's AdamW trains in full, against torch's own AdamW."""

from __future__ import annotations

import json

import pytest
import torch
from modules_to_save_runs import refusal, train_modules
from oracle import Oracle
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import build, ds_settings, target_names, tiny_batch, tiny_llama

from hdpissa.engine import ConfigError
from hdpissa.engine.method.targets import Target
from hdpissa.engine.optim import modules_to_save
from hdpissa.launch import export as export_command

STEPS, LR, OWN_LR, CLIP = 4, 1e-3, 5e-3, 0.05
BIASES = {"attention_bias": True}
NAMES = ["norm", "lm_head", "input_layernorm", "layers.1.self_attn.q_proj.bias", "o_proj.bias"]


def settings(names=NAMES, *, bf16=False, accumulation=2, clip=CLIP, **section):
    section = {"slices": 2, "modules_to_save": names, "modules_to_save_learning_rate": OWN_LR, **section}
    return ds_settings(bf16=bf16, accumulation=accumulation, clip=clip, **section)


def oracle_run(model, wanted, *, slices=2, per_slice=2, skip=(), adam=None):
    """(losses, W, modules), float64: HD-PiSSA's oracle, and torch's AdamW on the mean of all gradients."""
    net = build(model, dtype=torch.float64)
    adam = adam or {"betas": (0.9, 0.999), "eps": 1e-8}
    oracle = Oracle(net, target_names(net), slices=slices, r=2, clip=CLIP, **adam)
    modules = modules_to_save.find(net, wanted, [])
    sums = {}
    for name, p in modules.items():
        p.requires_grad_(True)
        p.register_hook(lambda grad, name=name: sums.update({name: sums[name] + grad}))
    optimizer = torch.optim.AdamW(modules.values(), lr=OWN_LR, weight_decay=0.0, **adam)
    losses = []
    for step in range(STEPS):
        if step in skip:
            continue
        sums.update({name: torch.zeros_like(p) for name, p in modules.items()})
        losses.append(oracle.step([[tiny_batch(step, i, j) for j in range(per_slice)] for i in range(slices)], LR))
        for name, p in modules.items():
            p.grad = sums[name] / slices
        assert torch.nn.utils.clip_grad_norm_(modules.values(), CLIP) > CLIP
        optimizer.step()
    W = {n: oracle.parameters[n].detach() for n in oracle.weights}
    return losses, W, {name: p.detach() for name, p in modules.items()}


def assert_near(found, reference, tolerance):
    assert found.keys() == reference.keys()
    for name, W in reference.items():
        assert (found[name].double() - W).norm() / W.norm() < tolerance, name


# --- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "tie"), [(1, False), (2, False), (2, True)])
def test_against_torch(world_size, tie):
    """Both kinds of weights and the loss, each clipped by its own norm, with a learning rate of their own.

    Tied embeddings are one weight that gets both gradients, under whichever name it is asked for.

    Seven products in a row of at most 61 terms lead to a gradient, whose roundings add up like roots: 7 √61 eps =
    6.5e-6. Adam keeps that only where eps is not small beside the gradients (rms 1e-4 to 5e-3): else an element whose
    gradient has cancelled to nearly nothing takes as long a step as the others, in a direction that is mostly rounding.
    """
    model = {**BIASES, "tie": tie}
    adam = {"betas": (0.8, 0.99), "eps": 1e-3}
    losses, W, modules = oracle_run(model, NAMES, adam=adam)
    config = settings(accumulation=4 // world_size, adam={"betas": [0.8, 0.99], "eps": 1e-3})
    runs = run_ranks(world_size, train_modules, config, stop=STEPS, lr=LR, model=model, checks=True)
    for run in runs:
        assert run["losses"] == pytest.approx(losses, rel=1e-5)
        assert set(run["collectives"]) == {run["predicted"]}
        assert_near(run["modules"], modules, 1e-5)
        assert run["lrs"] == [LR, OWN_LR]
        assert run["memory"]["modules_to_save"] == sum(v.nbytes for v in run["own"].values())
    assert_near(runs[0]["weights"], W, 1e-6)
    assert ("model.embed_tokens.weight" in modules) == tie
    before = dict(tiny_llama(**model).named_parameters())
    assert all((before[name] - w).abs().max() > 1e-3 for name, w in modules.items())


@pytest.mark.parametrize("where", ["loss", "model.norm.weight"])
def test_a_refused_step_changes_neither(where):
    """A nan of one rank, in the loss or only in a gradient of what DeepSpeed trains: both kinds leave the step out."""
    _, W, modules = oracle_run(BIASES, NAMES, skip=(2,))
    runs = run_ranks(2, train_modules, settings(), stop=STEPS, lr=LR, model=BIASES, poison=(where, 2))
    for run in runs:
        assert [bool(text) for text in run["refusals"]] == [False, False, True, False]
        assert_near(run["modules"], modules, 1e-5)
    assert_near(runs[0]["weights"], W, 1e-6)
    if where != "loss":
        assert "a gradient of modules_to_save is not finite" in runs[0]["refusals"][2]
        assert "the averaged gradient of model.norm.weight" in runs[0]["refusals"][2]


# --- checkpoints and export ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**BIASES).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Two ranks under bf16, four steps at once; and two. Both are saved, the first is exported as well."""
    folder = tmp_path_factory.mktemp("trained")
    config, common = settings(bf16=True), {"lr": LR, "source": base}
    kept = {"export_to": str(folder / "model"), "save_to": str(folder / "end")}
    whole = run_ranks(2, train_modules, config, stop=STEPS, **kept, **common)
    run_ranks(2, train_modules, config, stop=2, save_to=str(folder / "half"), **common)
    return folder, config, common, whole


def test_resuming_is_exact(trained):
    """fp32 weights and moments, bit for bit; the bf16 weights that the model computes with are their rounding."""
    folder, config, common, whole = trained
    resumed = run_ranks(2, train_modules, config, stop=STEPS, start_from=str(folder / "half"), **common)
    for now, before in zip(resumed, whole, strict=True):
        assert now["losses"] == before["losses"][2:]
        assert now["own"].keys() == before["own"].keys()
        assert all(torch.equal(now["own"][key], before["own"][key]) for key in now["own"])
        assert all(v.any() for v in now["own"].values() if v.numel())
        assert all(torch.equal(w, now["own"][name, "weight"].bfloat16()) for name, w in now["compute"].items())
        assert any(not torch.equal(w.float(), now["own"][name, "weight"]) for name, w in now["compute"].items())
    assert all(torch.equal(W, whole[0]["weights"][name]) for name, W in resumed[0]["weights"].items())


def test_resuming_on_another_number_of_ranks(trained):
    """The state comes to the same elements; the sums of gradients are rounded otherwise."""
    folder, config, common, whole = trained
    config = {**config, "gradient_accumulation_steps": 4}
    (alone,) = run_ranks(1, train_modules, config, stop=STEPS, start_from=str(folder / "half"), **common)
    assert alone["losses"] == pytest.approx(whole[0]["losses"][2:], rel=1e-3)
    assert_near(alone["modules"], {n: w.double() for n, w in whole[0]["modules"].items()}, 2e-3)


def test_small_checkpoints_hold_them(tmp_path):
    """Weights of targets are computed from sums there; these are stored."""
    common = {"stop": 1, "lr": LR, "model": BIASES}
    config = settings(accumulation=4, delta={"second_order": False})
    (saved,) = run_ranks(1, train_modules, config, save_to=str(tmp_path), kind="small", **common)
    (found,) = run_ranks(1, train_modules, config, start_from=str(tmp_path), **common)
    assert found["losses"] == []
    assert all(torch.equal(found["own"][key], values) for key, values in saved["own"].items())


def test_exports_hold_them(trained, base):
    """From the running engine in fp32 exactly, and from a checkpoint's files the same bits."""
    folder, _, _, whole = trained
    exported = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], w) for name, w in whole[0]["modules"].items())
    arguments = ["--checkpoint", str(folder / "end"), "--output_dir", str(folder / "again"), "--dtype", "fp32"]
    export_command.main([*arguments, "--format", "hf"])
    again = load_file(folder / "again" / "model.safetensors")
    assert again.keys() == exported.keys()
    trained_names = [*whole[0]["modules"], *whole[0]["weights"]]  # the rest is the base's, in the run rounded to bf16
    assert all(torch.equal(again[name], exported[name]) for name in trained_names)
    with pytest.raises(ConfigError, match="modules_to_save"):
        export_command.main([*arguments, "--format", "peft"])


OTHERS = [
    ({"names": ["norm"]}, "hd_pissa.modules_to_save are 7 in the checkpoint, 1 here (first other: "),
    ({"names": [], "modules_to_save_learning_rate": None}, "are 7 in the checkpoint, 0 here"),
]


@pytest.mark.parametrize(("changes", "words"), OTHERS)
def test_a_checkpoint_of_other_modules_is_refused(trained, changes, words):
    folder, _, common, _ = trained
    config = settings(bf16=True, **changes)
    assert words in run_ranks(2, refusal, config, start_from=str(folder / "half"), source=common["source"])[0]


def test_the_manifest_tells(trained):
    folder, *_ = trained
    (manifest,) = (folder / "half").glob("*/checkpoint.json")
    content = json.loads(manifest.read_text())["content"]
    assert content["modules_to_save"]["learning_rate"] == OWN_LR
    assert content["modules_to_save"]["numels"]["model.norm.weight"] == 20
    assert {"modules_to_save-00000-of-00002.safetensors", "modules_to_save-00001-of-00002.safetensors"} <= content[
        "files"
    ].keys()


# --- which parameters ------------------------------------------------------------------------------

FOUND = [
    (["norm"], ["model.norm.weight"]),
    (["lm_head"], ["lm_head.weight"]),
    (["layers.1.input_layernorm"], ["model.layers.1.input_layernorm.weight"]),
    (["k_proj.bias"], [f"model.layers.{i}.self_attn.k_proj.bias" for i in (0, 1)]),
    (["model.embed_tokens.weight", "norm"], ["model.embed_tokens.weight", "model.norm.weight"]),
]


def targets_of(model):
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    return [Target(n, m.weight, [m], *m.weight.shape, 2, 1.0, []) for n, m in modules]


@pytest.mark.parametrize(("wanted", "names"), FOUND)
def test_names_and_parts_of_names(wanted, names):
    model = tiny_llama(**BIASES)
    assert list(modules_to_save.find(model, wanted, targets_of(model))) == names


def test_a_tied_weight_is_found_under_both_names():
    model = tiny_llama(tie=True)
    for name in ("lm_head", "embed_tokens"):
        assert list(modules_to_save.find(model, [name], [])) == ["model.embed_tokens.weight"]


BAD = [
    (["norn"], '"norn" matches no parameter of LlamaForCausalLM: correct or remove it .*embed_tokens.*lm_head'),
    (["norm", "q_proj"], r"q_proj.weight, which the slices of model.layers.0.self_attn.q_proj train: .*q_proj.bias"),
    (["layers.0"], "which the slices of"),
]


@pytest.mark.parametrize(("wanted", "words"), BAD)
def test_what_cannot_be(wanted, words):
    model = tiny_llama(**BIASES)
    with pytest.raises(ConfigError, match=words):
        modules_to_save.find(model, wanted, targets_of(model))


def test_a_parameter_without_gradient_is_an_error():
    told = run_ranks(1, refusal, ds_settings(modules_to_save=["lm_head"]), detach=True)[0]
    assert "1 of 15" in told
    assert "lm_head.weight" in told
