"""Loading and saving: exact fp32 start values, the exported Hugging Face folder."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from engine_runs import export_and_compare, loading_error, start_values, write_error
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import ds_settings, target_names, tiny_batch, tiny_llama
from transformers import AutoModelForCausalLM

from hdpissa.engine.export import writer
from hdpissa.kernels.reference import split_fp32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny fp32 checkpoint in several files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llama(tie=True).save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").exists()
    return str(folder)


def plain_logits(folder, dtype):
    """What transformers alone computes from the exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model, model(**tiny_batch(999, 0, 0)).logits.float()


@pytest.mark.parametrize(("world_size", "tie", "file_bytes"), [(1, False, None), (2, True, None), (4, False, 6_000)])
def test_export_in_fp32_gives_the_engines_logits(tmp_path, world_size, tie, file_bytes):
    """One rank and several, tied and not, one file and many."""
    settings = ds_settings(slices=4, accumulation=max(1, 4 // world_size))
    runs = run_ranks(world_size, export_and_compare, settings, str(tmp_path), model={"tie": tie}, file_bytes=file_bytes)
    model, logits = plain_logits(tmp_path, torch.float32)
    assert torch.allclose(logits, runs[0]["logits"], rtol=1e-5, atol=1e-5)
    for name, w in runs[0]["weights"].items():
        assert torch.equal(model.get_parameter(name), w)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(file_bytes)
    assert not list(tmp_path.glob(".*"))
    report = json.loads((tmp_path / "hdpissa_export.json").read_text())
    for file in tmp_path.glob("*.safetensors"):
        record = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        assert report["files"].pop(file.name) == record
    assert not report["files"]
    batch = tiny_batch(999, 0, 0)
    again = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], pad_token_id=0, max_new_tokens=4, do_sample=False
    )
    assert torch.equal(again, runs[0]["ids"])


def test_export_under_bf16_compute(tmp_path):
    """The default writes what was computed with, bf16; fp32 holds the exact master."""
    settings = ds_settings(bf16=True, slices=2)
    run = run_ranks(2, export_and_compare, settings, str(tmp_path / "bf16"))[0]
    saved = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(saved[n], split_fp32(w)[0]) for n, w in run["weights"].items())
    # The same kernels on the same weights; threads may split a sum differently, so not to the last bit, but to
    # much less than bf16 itself costs.
    _, logits = plain_logits(tmp_path / "bf16", torch.bfloat16)
    _, accurate = plain_logits(tmp_path / "bf16", torch.float32)
    assert (logits - run["logits"]).norm() <= 0.25 * (logits - accurate).norm()
    run = run_ranks(2, export_and_compare, settings, str(tmp_path / "fp32"), dtype="fp32")[0]
    saved = load_file(tmp_path / "fp32" / "model.safetensors")
    assert all(torch.equal(saved[n], w) for n, w in run["weights"].items())
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"


def test_a_loaded_checkpoint_trains_and_exports(tmp_path, checkpoint):
    """from_pretrained under zero.Init, several files, tied embeddings, no rank with the whole model."""
    settings = ds_settings(slices=2)
    run = run_ranks(2, export_and_compare, settings, str(tmp_path), source=checkpoint)[0]
    _, logits = plain_logits(tmp_path, torch.float32)
    assert torch.allclose(logits, run["logits"], rtol=1e-5, atol=1e-5)


def test_exact_fp32_start_under_bf16_compute(checkpoint):
    """ZeRO-3 rounds to bf16 while it loads; the masters still start from the file's own values."""
    weights, warnings = run_ranks(2, start_values, ds_settings(bf16=True, slices=2), checkpoint)[0]
    net = tiny_llama(tie=True)
    assert set(weights) == set(target_names(net))
    assert all(torch.equal(w, net.get_parameter(n).detach()) for n, w in weights.items())
    assert not warnings
    rounded = [not torch.equal(w, w.bfloat16().float()) for w in weights.values()]
    assert all(rounded), "the checkpoint must hold values that bf16 cannot, or this test shows nothing"


def test_missing_weights_are_refused(tmp_path):
    """transformers would fill them with random numbers and train those."""
    net = tiny_llama()
    state = {n: p for n, p in net.state_dict().items() if "layers.1.mlp.up_proj" not in n}
    net.save_pretrained(tmp_path, state_dict=state)
    messages = run_ranks(2, loading_error, ds_settings(slices=2), str(tmp_path))
    assert all("layers.1.mlp.up_proj.weight" in message for message in messages)


def test_weights_changed_after_loading_are_not_overwritten_from_the_file(checkpoint):
    """The file's rows are taken only where they round to what is loaded; else the loaded values, with a warning."""
    weights, warnings = run_ranks(2, start_values, ds_settings(bf16=True, slices=2), checkpoint, disturb=True)[0]
    net = tiny_llama(tie=True)
    for name, w in weights.items():
        assert torch.equal(w, (net.get_parameter(name).detach().bfloat16() * 1.5).float())
    assert "14 of 14 targets start from bf16-rounded values" in warnings[0]


FAILURES = ("disk full", "flipped byte", "no room", "bad generation config")


@pytest.mark.parametrize(
    ("how", "format"), [*((how, "hf") for how in FAILURES), ("disk full", "peft"), ("flipped byte", "peft")]
)
def test_a_failure_while_writing_reaches_every_rank(tmp_path, how, format):
    """Rank 0 alone writes: whatever goes wrong there, no rank waits for it, and an earlier export stays as it was."""
    names = [writer.REPORT, "model.safetensors" if format == "hf" else "adapter_config.json"]
    for name in names:
        (tmp_path / name).write_text("an earlier export")
    messages = run_ranks(2, write_error, ds_settings(slices=2), str(tmp_path), how=how, format=format)
    assert messages[0] == messages[1]
    assert str(tmp_path) in messages[0]
    assert len(messages[0].splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"an earlier export"}


def test_a_failed_export_is_an_error_on_every_rank(tmp_path):
    """A folder that cannot be made: no rank hangs, each gets the message or is told who has it."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    messages = run_ranks(2, write_error, ds_settings(slices=2), str(blocked / "model"))
    assert messages[0] == messages[1]
    assert str(blocked) in messages[0]


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_what_no_export_wrote_is_not_replaced(tmp_path, format):
    """Somebody's model or adapter; every rank refuses."""
    theirs = tmp_path / "adapter_model.safetensors"
    theirs.write_text("trained for weeks")
    messages = run_ranks(2, write_error, ds_settings(slices=2), str(tmp_path), format=format)
    assert messages[0] == messages[1]
    assert theirs.name in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]
    assert theirs.read_text() == "trained for weeks"
