"""Loading row by row: the model that transformers would have loaded, without any rank reading all of it."""

from __future__ import annotations

import json

import pytest
import torch
from load_runs import load, load_and_generate, refused
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import ds_settings, tiny_llama
from transformers import AutoModelForCausalLM

SETTINGS = ds_settings(slices="auto")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    """(folder, the model) in several files; sizes that no number of ranks divides."""
    folder = tmp_path_factory.mktemp("checkpoint")
    net = tiny_llama(tie=request.param)
    net.generation_config.max_new_tokens = 77
    net.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return str(folder), net


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_value_arrives(checkpoint, world):
    folder, net = checkpoint
    ranks = run_ranks(world, load, SETTINGS, folder)
    found = ranks[0]["values"]
    expected = dict(net.named_parameters()) | dict(net.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.detach()), name
    for rank in ranks:
        assert not rank["warnings"]
        assert not rank["training"]
        assert rank["generation"]["max_new_tokens"] == 77
        both = ["model.embed_tokens.weight", "lm_head.weight"]
        assert rank["tied"] == (both if net.config.tie_word_embeddings else both[:1])


def test_only_own_rows_are_read(checkpoint):
    """On 4 ranks no rank asks for more than a quarter of a matrix's rows, and the two at the cuts."""
    folder, _ = checkpoint
    for rank in run_ranks(4, load, SETTINGS, folder, count_reads=True):
        assert rank["rows"]["(61, 20)"] <= 17
        assert rank["rows"]["(27, 20)"] <= 8
        assert len(rank["rows"]) > 3


def test_rounded_to_the_compute_dtype(checkpoint):
    folder, net = checkpoint
    rank = run_ranks(2, load, ds_settings(bf16=True, slices=2), folder)[0]
    assert rank["dtypes"] == ["torch.bfloat16"]
    for name, param in net.named_parameters():
        assert torch.equal(rank["values"][name], param.detach().bfloat16()), name


def without_prefix(state):
    return {name.removeprefix("model."): value for name, value in state.items() if name != "lm_head.weight"}


def test_names_that_do_not_map_are_left_to_transformers(tmp_path):
    """A base model's checkpoint lacks the prefix: transformers adds it, on its own path, and that is told."""
    net = tiny_llama(tie=True)
    net.save_pretrained(tmp_path)
    state = without_prefix(load_file(tmp_path / "model.safetensors"))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    rank = run_ranks(2, load, SETTINGS, str(tmp_path))[0]
    assert "the files hold no model.embed_tokens.weight: the whole checkpoint is read on rank 0" in rank["warnings"][0]
    for name, value in plain.named_parameters():
        assert torch.equal(rank["values"][name], value.detach()), name


def test_other_formats_are_left_to_transformers(tmp_path):
    net = tiny_llama()
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    rank = run_ranks(2, load, SETTINGS, str(tmp_path))[0]
    assert "the checkpoint is not in safetensors files" in rank["warnings"][0]
    assert all(torch.equal(rank["values"][n], p.detach()) for n, p in net.named_parameters())


def test_integers_are_left_to_transformers(tmp_path):
    """Weights that somebody has quantised are not numbers to copy."""
    net = tiny_llama()
    net.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = (100 * state[name]).to(torch.int8)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    rank = run_ranks(2, load, SETTINGS, str(tmp_path))[0]
    assert f"{name} is of dtype I8 in the files" in rank["warnings"][0]


def test_a_truncated_file_is_told_on_every_rank(tmp_path):
    """Also where only one host's copy is damaged."""
    for rank in range(2):
        tiny_llama().save_pretrained(tmp_path / str(rank))
    file = tmp_path / "1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    for message in run_ranks(2, refused, SETTINGS, f"{tmp_path}/{{rank}}"):
        assert f"{file}: " in message


def test_shapes_are_compared(tmp_path):
    """A config that does not fit its files: transformers' own refusal, not a shard cut from the wrong matrix."""
    net = tiny_llama()
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 54}))
    with pytest.raises(AssertionError, match=r"size mismatch|shape"):
        run_ranks(2, load, SETTINGS, str(tmp_path))


def test_it_computes(checkpoint):
    folder, net = checkpoint
    ids = torch.arange(1, 8)[None]
    expected = net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = run_ranks(2, load_and_generate, SETTINGS, folder)
    assert all(torch.equal(tokens, expected) for tokens in found)
