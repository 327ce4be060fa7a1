"""Rung 3 of the ladder: the trainers against the bare loop, bit for bit."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from launch_runs import save_model
from ranks import RankError, run_ranks
from safetensors.torch import load_file, save_file
from trainer_runs import (
    bare_run,
    best_run,
    config,
    load_incomplete,
    pairs,
    recorded_run,
    refusals,
    resumed_run,
    rows,
    synced_weights,
    trainer_run,
    trl_data,
    trl_run,
    trl_script,
)
from transformers import LlamaForCausalLM


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one, "no weights were compared"
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("world", "slices", "accumulation", "more"),
    [
        (1, 1, 1, {}),
        (2, 2, 2, {}),
        (2, 4, 4, {"gradient_checkpointing": True}),
        (2, 1, 1, {"bf16": True}),
        (4, 2, 1, {}),
        (1, 2, 4, {"stream": True}),
        (2, 2, 2, {"modules_to_save": ["embed_tokens", "norm"]}),
    ],
)
def test_trainer_equals_the_bare_loop(world, slices, accumulation, more, tmp_path):
    """S = K, 2K, K/2; accumulation; checkpointing; bf16 with fp32 masters; streams; whole parameters beside slices."""
    more = dict(more)
    section = {"slices": slices, "modules_to_save": more.pop("modules_to_save", [])}
    found = run_ranks(world, trainer_run, str(tmp_path), section, gradient_accumulation_steps=accumulation, **more)
    wanted = run_ranks(world, bare_run, section, accumulation=accumulation, **more)
    assert_equal(found[0]["weights"], wanted[0]["weights"])
    assert found[0]["losses"] == wanted[0]["losses"]
    assert [rank["steps"] for rank in found] == [4] * world


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_preempted_run_resumes_bit_equal(world, tmp_path):
    """SIGTERM to one of two ranks in mid-epoch: all save after the step; resumed on 1, 2 and 4 ranks."""
    accumulation = {1: 8, 2: 4, 4: 2}
    section = {"slices": 4}
    told = run_ranks(2, resumed_run, str(tmp_path), section, stop_at=2, gradient_accumulation_steps=accumulation[2])
    assert [(step, preempted) for step, preempted, _ in told] == [(2, True)] * 2
    assert "trainer_state.json" in told[0][2]
    assert [name for name in told[0][2] if not name.endswith((".json", ".safetensors"))] == []
    again = {"gradient_accumulation_steps": accumulation[world], "resume": True}
    found = run_ranks(world, trainer_run, str(tmp_path), section, **again)
    wanted = run_ranks(world, bare_run, section, accumulation=accumulation[world])
    unbroken = run_ranks(2, bare_run, section, accumulation=accumulation[2])
    assert found[0]["losses"][-2:] == pytest.approx(wanted[0]["losses"][-2:], rel=1e-6)
    if world == 2:
        assert_equal(found[0]["weights"], unbroken[0]["weights"])
    for name, weight in found[0]["weights"].items():
        torch.testing.assert_close(weight, unbroken[0]["weights"][name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, [text for row in pairs() for text in row.values()])
    return str(folder)


def trl(kind, model, tmp_path, world=2, slices=2, **more):
    return run_ranks(world, trl_run, kind, model, str(tmp_path / f"{kind}{world}"), {"slices": slices}, **more)


def test_sft(model_folder, tmp_path):
    """TRL's own loss, completion only: the same at one rank and at two."""
    two = trl("sft", model_folder, tmp_path, gradient_accumulation_steps=1)
    one = trl("sft", model_folder, tmp_path, world=1, gradient_accumulation_steps=2)
    assert_equal(one[0]["weights"], two[0]["weights"])
    losses = [row["loss"] for row in two[0]["log"]]
    assert losses[-1] < losses[0]


def test_dpo(model_folder, tmp_path):
    """The policy begins at the reference: ln 2; one rank does what two do."""
    two = trl("dpo", model_folder, tmp_path, gradient_accumulation_steps=1)
    one = trl("dpo", model_folder, tmp_path, world=1, gradient_accumulation_steps=2)
    assert two[0]["log"][0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert_equal(one[0]["weights"], two[0]["weights"])


def test_dpo_goes_on_from_a_checkpoint(model_folder, tmp_path):
    """Of two ranks, on one: the rows are the same, though TRL's columns of them are made anew in every process."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trl("dpo", model_folder, tmp_path, **saving, gradient_accumulation_steps=1)
    folder = str(tmp_path / "dpo2" / "checkpoint-2")
    again = trl("dpo", model_folder, tmp_path, world=1, resume=folder, gradient_accumulation_steps=2)
    assert again[0]["log"][-1]["loss"] == pytest.approx(whole[0]["log"][-1]["loss"], rel=1e-5)
    for name, weight in again[0]["weights"].items():
        torch.testing.assert_close(weight, whole[0]["weights"][name], rtol=0, atol=1e-6)


def test_grpo(model_folder, tmp_path):
    """KL to the reference begins at 0 and grows."""
    log = trl("grpo", model_folder, tmp_path, gradient_accumulation_steps=1)[0]["log"]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["kl"] > 1e-6


@pytest.mark.slow
def test_a_long_generation_is_no_hang(model_folder, tmp_path):
    """Rewards that come after 20 s in a run that may stand still for 10."""
    log = trl("grpo", model_folder, tmp_path, gradient_accumulation_steps=1, hang_timeout=10)[0]["log"]
    assert len(log) == 3


@pytest.mark.parametrize("kind", ["kto", "reward"])
def test_it_trains(kind, model_folder, tmp_path):
    log = trl(kind, model_folder, tmp_path, gradient_accumulation_steps=1)[0]["log"]
    assert log[-1]["loss"] < log[0]["loss"]


def test_evaluation_counts_every_token_once(tmp_path):
    """23 rows on two ranks in batches of 4: accelerate fills up; the loss is the exported model's over all tokens."""
    found = run_ranks(2, recorded_run, str(tmp_path), {"slices": 2}, per_device_eval_batch_size=4)[0]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    data = rows(23).with_format("torch")[:]
    logits = model(data["input_ids"]).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, data["labels"][:, 1:].flatten(), ignore_index=-100)
    assert found["eval_loss"] == pytest.approx(wanted.item(), rel=1e-6)
    for name, weight in found["weights"].items():
        assert torch.equal(model.get_parameter(name), weight)
    steps = [row for row in found["rows"] if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["tokens"] == 2 * 2 * 9 and row["applied"] for row in steps)
    assert found["state"] == {"state": "finished", "step": 4, "message": ""}
    assert found["run"]["slices"] == 2


def test_a_step_that_is_not_finite_is_skipped_and_recorded_as_such(tmp_path):
    found = run_ranks(2, recorded_run, str(tmp_path), {"slices": 2}, poison=4, per_device_eval_batch_size=4)[0]
    steps = [row for row in found["rows"] if "loss" in row]
    assert [row["applied"] for row in steps] == [True, True, True, False]
    assert steps[-1]["loss"] is None
    assert found["skipped"] == 1


def test_too_many_skipped_steps_end_the_run(tmp_path):
    with pytest.raises(RankError, match="StopError"):
        run_ranks(2, recorded_run, str(tmp_path), {"slices": 2}, poison=2, max_skipped_steps=2)
    assert json.loads((tmp_path / "run_state.json").read_text())["state"] == "failed"


def test_a_second_train_goes_on_from_the_weights(tmp_path):
    found = run_ranks(1, recorded_run, str(tmp_path), {"slices": 1}, twice=True, max_steps=2)[0]
    assert [row["step"] for row in found["rows"] if "loss" in row] == [1, 2]
    first = run_ranks(1, recorded_run, str(tmp_path / "once"), {"slices": 1}, max_steps=2)[0]
    assert found["eval_loss"] < first["eval_loss"]


def test_mistakes_are_found_before_a_weight_is_read(model_folder):
    cases = {
        "no section": ("SFT", {"hd_pissa": None}, {}),
        "unknown key": ("SFT", {"hd_pissa": {"rank": 8}}, {}),
        "stage 2": ("SFT", {"zero_optimization": {"stage": 2}}, {}),
        "fewer rows than a step takes": ("SFT", {}, {"gradient_accumulation_steps": 64}),
        "slices that do not divide": ("SFT", {"hd_pissa": {"slices": 4}}, {"gradient_accumulation_steps": 2}),
        "lm_head under the chunked head": ("SFT", {"hd_pissa": {"target_modules": ["q_proj", "lm_head"]}}, {}),
        "JSON and arguments differ": ("SFT", {"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}),
        "slices too many for a weight": ("SFT", {"hd_pissa": {"r": 32, "slices": 1}}, {}),
        "no such target": ("SFT", {"hd_pissa": {"target_modules": ["q_prj"]}}, {}),
        "weight decay": ("SFT", {}, {"weight_decay": 0.1}),
        "another optimizer": ("DPO", {}, {"optim": "adafactor"}),
        "rows by length": ("Reward", {}, {"train_sampling_strategy": "group_by_length"}),
        "small checkpoints, and the best put back": (
            "SFT",
            {},
            {"checkpoint_kind": "small", "load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        ),
        "checkpoints on the hub": ("SFT", {}, {"push_to_hub": True}),
        "split batches": ("SFT", {}, {"accelerator_config": {"split_batches": True}}),
    }
    found = run_ranks(1, refusals, model_folder, cases)[0]
    assert found == dict.fromkeys(cases, "ConfigError")


def test_early_stopping_and_the_best_model(tmp_path):
    more = {"learning_rate": 0.5, "max_steps": 8, "lr_scheduler_type": "constant"}
    found = run_ranks(2, best_run, str(tmp_path), {"slices": 2}, **more)[0]
    best = min(range(len(found["losses"])), key=found["losses"].__getitem__)
    assert len(found["losses"]) < 8, "it never got worse: nothing was shown"
    assert found["after"] == pytest.approx(found["losses"][best], rel=1e-6)
    assert f"checkpoint-{best + 1}" in found["kept"]
    assert len(found["kept"]) <= 2


def test_what_is_sent_to_vllm_is_what_is_exported(model_folder, tmp_path):
    sent = run_ranks(2, synced_weights, model_folder, str(tmp_path), {"slices": 2})[0]
    exported = load_file(tmp_path / "model.safetensors")
    assert_equal(sent, exported)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_scripts_of_trl(name, model_folder, tmp_path):
    """From the installed wheel, on two ranks, with our class in place of TRL's."""
    data = tmp_path / "data"
    data.mkdir()
    trl_data(name).to_json(data / "train.jsonl")
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps(config(slices=2)))
    more = {"reward_funcs": "trainer_runs.digits", "num_generations": 2, "max_completion_length": 6}
    more = more if name == "grpo" else {}
    losses = run_ranks(2, trl_script, name, model_folder, str(data), str(tmp_path / "out"), str(ds), **more)[0]
    assert len(losses) == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_dpo_with_a_precomputed_reference(model_folder, tmp_path):
    """The reference's log-probabilities come from the model before training: the same run without a second model."""
    more = {"gradient_accumulation_steps": 1, "file": str(tmp_path / "rows.jsonl")}  # TRL caches beside a file
    trl_data("dpo").to_json(more["file"])
    held = trl("dpo", model_folder, tmp_path, **more)[0]
    before = trl("dpo", model_folder, tmp_path / "p", precompute_ref_log_probs=True, **more)[0]
    assert [r["loss"] for r in before["log"]] == pytest.approx([r["loss"] for r in held["log"]], rel=1e-6)
    for name, weight in held["weights"].items():
        torch.testing.assert_close(before["weights"][name], weight, rtol=0, atol=1e-6)
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    log = trl("dpo", str(other), tmp_path / "q", precompute_ref_log_probs=True, **more)[0]["log"]
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6), "those of the first model were taken for its own"


@pytest.mark.slow
def test_packed_rows_do_not_see_each_other(model_folder, tmp_path):
    """Two rows packed into one, without flash attention: the losses of the same rows apart."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 20, (24, 9), generator=generator).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    more = {"file": str(tmp_path / "rows.jsonl"), "train_sampling_strategy": "sequential", "max_steps": 4}
    packing = {"packing": True, "max_length": 18, "per_device_train_batch_size": 1}
    apart = trl("sft", model_folder, tmp_path / "apart", slices=1, **more)[0]["log"]
    packed = trl("sft", model_folder, tmp_path / "packed", slices=1, **more, **packing)[0]["log"]
    assert [row["loss"] for row in packed] == pytest.approx([row["loss"] for row in apart], rel=1e-5)


def test_a_base_that_lacks_weights_is_refused(model_folder, tmp_path):
    """transformers would fill them with random numbers."""
    shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    told = run_ranks(2, load_incomplete, str(tmp_path / "model"), str(tmp_path / "out"))
    assert told == ["ConfigError"] * 2
