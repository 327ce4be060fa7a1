"""Saving and resuming through the real engine: bit for bit at one world size, up to rounding at another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_runs import refuse, resume_here, train_on
from ranks import run_ranks
from tiny import ds_settings

S, STEPS, SAVED = 4, 6, 3


def settings(world_size: int, **more) -> dict:
    """The same run at every world size: S slices, one micro-batch each and step; two on 8 ranks' worth."""
    return ds_settings(slices=more.pop("slices", S), accumulation=max(1, S // world_size), **more)


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_state(whole: dict, resumed: dict) -> None:
    """Moments and running sums of every slice, bit for bit."""
    for state, slices in whole["state"].items():
        for slice_id, views in slices.items():
            for (name, A, B), (other, C, D) in zip(views, resumed["state"][state][slice_id], strict=True):
                assert name == other
                assert torch.equal(A, C), (state, slice_id, name)
                assert torch.equal(B, D), (state, slice_id, name)


def assert_close(whole: dict, resumed: dict, limit: float = 1e-6) -> None:
    for name, W in whole.items():
        assert (resumed[name] - W).norm() <= limit * W.norm(), name


CASES = {
    "factors": {},
    "bf16": {"bf16": True},
    "fp32 master": {"bf16": True, "master": {"format": "fp32"}},
    "dense": {"delta": {"exchange": "dense"}},
    "shared slices": {"slices": 1},
    "bf16 on the wire": {"delta": {"dtype": "bf16"}},
    "dropout": {"dropout": 0.2},  # in the model: masks come from the generators
}


SLOW = ("fp32 master", "bf16 on the wire")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def saved(request, tmp_path_factory):
    """Six steps on two ranks without a break, with a checkpoint after the third."""
    case = dict(CASES[request.param])
    model = {"attention_dropout": case.pop("dropout", 0.0)}
    folder, config = tmp_path_factory.mktemp("saved"), settings(2, **case)
    how = {"save_at": (SAVED,), "save_dir": str(folder), "async_save": True}
    return folder, config, model, run_ranks(2, train_on, config, stop=STEPS, model=model, **how)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(saved):
    folder, config, model, whole = saved
    resumed = run_ranks(2, train_on, config, stop=STEPS, start_from=str(folder), model=model)
    for a, b in zip(whole, resumed, strict=True):
        assert list(b["losses"]) == [3, 4, 5]
        assert all(a["losses"][step] == loss for step, loss in b["losses"].items())
        assert_equal(a["weights"], b["weights"])
        assert_same_state(a, b)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_ranks(2, train_on, settings(2), stop=STEPS, save_at=(SAVED,), save_dir=str(folder))


def test_load_checkpoint_takes_everything_back(plain):
    """After a decomposition and a step of its own the engine still goes on as if it had been there."""
    folder, whole = plain
    resumed = run_ranks(2, train_on, settings(2), stop=STEPS, start_from=str(folder), load_later=True)
    assert_equal(whole[0]["weights"], resumed[0]["weights"])
    assert_same_state(whole[0], resumed[0])


@pytest.mark.parametrize("world_size", [1, 4])
def test_elastic(plain, world_size):
    """Saved on two ranks: one or four go on, up to the order of sums."""
    folder, whole = plain
    resumed = run_ranks(world_size, train_on, settings(world_size), stop=STEPS, start_from=str(folder))
    assert_close(whole[0]["weights"], resumed[0]["weights"])


@pytest.mark.parametrize("world_size", [1, 4])
def test_elastic_the_other_way(plain, world_size, tmp_path):
    _, whole = plain
    run_ranks(world_size, train_on, settings(world_size), stop=SAVED, save_at=(SAVED,), save_dir=str(tmp_path))
    resumed = run_ranks(2, train_on, settings(2), stop=STEPS, start_from=str(tmp_path))
    assert_close(whole[0]["weights"], resumed[0]["weights"])


@pytest.mark.parametrize(("save_on", "resume_on"), [(4, 3), (2, 8)])
def test_reshaping_alone_changes_no_bit(tmp_path, save_on, resume_on):
    """Loaded at another world size, nothing trained: weights, moments and sums are what was saved."""
    slices = {"slices": save_on} if resume_on % 3 else {"slices": 12}
    first = ds_settings(accumulation=12 // save_on if slices["slices"] == 12 else 1, **slices)
    then = ds_settings(accumulation=max(1, slices["slices"] // resume_on), **slices)
    model = {"hidden": 64, "intermediate_size": 96}
    a = run_ranks(save_on, train_on, first, stop=2, save_at=(2,), save_dir=str(tmp_path), model=model)
    b = run_ranks(resume_on, train_on, then, stop=2, start_from=str(tmp_path), model=model)
    assert_equal(a[0]["weights"], b[0]["weights"])
    for run in b:
        for state, held in run["state"].items():
            for slice_id, views in held.items():
                saved_views = next(r["state"][state][slice_id] for r in a if slice_id in r["state"][state])
                for (name, A, B), (_, C, D) in zip(views, _by_name(saved_views, views), strict=True):
                    assert torch.equal(A, C), name
                    assert torch.equal(B, D), name


def _by_name(found, like):
    held = {name: (name, A, B) for name, A, B in found}
    return [held[name] for name, *_ in like]


# --- small checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["factor", "dense"])
def test_small_checkpoints_resume_to_rounding(tmp_path, exchange):
    """First order only: base model and running sums are all there is."""
    config = settings(2, delta={"second_order": False, "exchange": exchange})
    whole = run_ranks(2, train_on, config, stop=STEPS, save_at=(SAVED,), save_dir=str(tmp_path), kind="small")
    resumed = run_ranks(2, train_on, config, stop=STEPS, start_from=str(tmp_path))
    assert_close(whole[0]["weights"], resumed[0]["weights"], 2e-7)
    assert not list(tmp_path.glob("checkpoint-3/weights*"))


def test_a_small_checkpoint_cannot_follow_other_steps(tmp_path):
    config = settings(2, delta={"second_order": False})
    run_ranks(2, train_on, config, stop=1, save_at=(1,), save_dir=str(tmp_path), kind="small")
    message = run_ranks(2, refuse, config, start_from=str(tmp_path), load_later=True)
    assert "small" in message[0]
    assert message[0] == message[1]


# --- what does not fit -----------------------------------------------------------------------------

OTHERS = {
    "slices is 4 in the checkpoint, 2 here": {"slices": 2},
    "r of model.layers.0.self_attn.q_proj is 2 in the checkpoint, 1 here": {"r": 1},
    "scale of model.layers.0.self_attn.q_proj is 1.0 in the checkpoint, 2.0 here": {"lora_alpha": 4},
    "14 weights are trained in the checkpoint, 2 here": {"target_modules": ["q_proj"]},
    "delta.second_order is True in the checkpoint, False here": {"delta": {"second_order": False}},
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_checkpoint_of_other_settings_is_refused(plain, message):
    told = run_ranks(2, refuse, settings(2, **OTHERS[message]), start_from=str(plain[0]))
    assert message in told[0]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("model", "what"), [({"seed": 1}, "16 of 21 weights differ"), ({"layers": 1}, "14 weights are trained")]
)
def test_a_checkpoint_of_another_base_is_refused(plain, model, what):
    told = run_ranks(2, refuse, settings(2), start_from=str(plain[0]), model=model)
    assert what in told[0]


def test_one_embedding_that_differs_is_another_base(plain):
    told = run_ranks(2, refuse, settings(2), start_from=str(plain[0]), spoil="model.embed_tokens.weight")
    assert "1 of 21" in told[0]
    assert "model.embed_tokens.weight" in told[0]


def test_gradients_under_way_cannot_be_saved(tmp_path):
    told = run_ranks(1, resume_here, settings(1), save_dir=str(tmp_path))
    assert "save_checkpoint" in told[0]


# --- folders ---------------------------------------------------------------------------------------


def test_retention_latest_and_constant_files(tmp_path):
    """Two are kept, `latest` names the last, and the factors are one file with as many names."""
    run_ranks(2, train_on, settings(2), stop=5, save_at=(1, 2, 4, 5), save_dir=str(tmp_path), save_total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-5\n"
    inodes = {(tmp_path / f"checkpoint-{n}" / "factors-00001.safetensors").stat().st_ino for n in (4, 5)}
    assert len(inodes) == 1
    manifest = json.loads(Path(tmp_path, "checkpoint-5", "checkpoint.json").read_text())["content"]
    assert manifest["client_state"] == {"seen": 4}
    assert len(manifest["files"]) == 2 + 2 + 2 * S
