"""Slices: the same whoever computes them, kept on disk, and never taken from a cache that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from decompose_runs import refusal, slices
from ranks import run_ranks
from tiny import tiny_llama

COUNTS = {1: {"slices": 4, "accumulation": 4}, 2: {"slices": 4, "accumulation": 2}, 4: {"slices": 2}}


def same(one: dict, other: dict) -> bool:
    return all(
        one[kind].keys() == other[kind].keys() and all(torch.equal(one[kind][n], other[kind][n]) for n in one[kind])
        for kind in "AB"
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_placement_changes_nothing(world):
    """14 matrices over 1, 2 and 4 ranks, the last wave of the round not full; bit for bit the same slices."""
    for rank in run_ranks(world, slices, [{}, {"placement": "round_robin"}], **COUNTS[world]):
        first, second = rank
        assert same(first, second)
        assert len(first["A"]) == 14
        assert first["progress"] == second["progress"] == list(first["A"])
        assert 0 < first["report"].residual == second["report"].residual < 1e-4
        assert first["report"] == second["report"]


@pytest.mark.parametrize("placement", ["rank0", "round_robin"])
def test_what_cannot_be_decomposed_is_refused_on_every_rank(placement):
    name = "model.layers.1.mlp.up_proj.weight"
    messages = run_ranks(2, refusal, {"placement": placement}, poison=name)
    assert all("layers.1.mlp.up_proj" in message for message in messages)


@pytest.mark.parametrize(("world", "placement"), [(1, "rank0"), (2, "round_robin"), (4, "rank0")])
def test_a_second_start_reads_the_cache(tmp_path, world, placement):
    init = {"cache_dir": str(tmp_path / "cache"), "placement": placement}
    for rank in run_ranks(world, slices, [init, init], **COUNTS[world]):
        first, second = rank
        assert not first["report"].cached
        assert second["report"].cached
        assert second["report"].residual == first["report"].residual
        assert same(first, second)
        assert first["progress"] == second["progress"]
        assert not second["messages"]
    [folder] = (tmp_path / "cache").iterdir()
    assert not list(folder.glob("*.partial"))


def test_another_world_size_reads_the_same_cache(tmp_path):
    init = {"cache_dir": str(tmp_path)}
    alone = run_ranks(1, slices, [init], slices=4, accumulation=4)[0][0]
    for rank, found in enumerate(run_ranks(2, slices, [init], slices=4, accumulation=2)):
        assert found[0]["report"].cached
        for name, A in found[0]["A"].items():
            assert torch.equal(A, alone["A"][name])  # of all slices on every rank
            assert torch.equal(found[0]["B"][name], alone["B"][name][2 * rank : 2 * rank + 2])


def truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-40])


def flip(folder: Path) -> None:
    """One exponent bit of one number."""
    file = sorted(folder.glob("*.safetensors"))[5]
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x20
    file.write_bytes(content)


def lose(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def garble_index(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def swap(folder: Path) -> None:
    """Two layers' files of one shape change places: valid files of the wrong weights."""
    files = sorted(folder.glob("*.safetensors"))
    first, second = files[0], files[7]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [(truncate, "damaged"), (flip, "not those of these weights"), (lose, "damaged"), (garble_index, "damaged"),
     (swap, "not those of these weights")],
)  # fmt: skip
def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, damage, told):
    init = {"cache_dir": str(tmp_path)}
    good = run_ranks(2, slices, [init], **COUNTS[2])
    [folder] = tmp_path.iterdir()
    damage(folder)
    again = run_ranks(2, slices, [init, init], **COUNTS[2])
    for before, after in zip(good, again, strict=True):
        assert same(before[0], after[0])
        assert not after[0]["report"].cached
        assert after[1]["report"].cached, "the cache is whole again"
    assert told in again[0][0]["messages"][0]
    assert "the weights are decomposed" in again[0][0]["messages"][0]
    assert not again[1][0]["messages"], "rank 0 speaks for all"


def test_a_stale_cache_is_noticed(tmp_path):
    """Weights that were never in a file have nothing in the key that tells them apart: the product does."""
    init = {"cache_dir": str(tmp_path)}
    run_ranks(2, slices, [init], **COUNTS[2])
    other = run_ranks(2, slices, [init], scale=1.0001, **COUNTS[2])
    plain = run_ranks(2, slices, [{}], scale=1.0001, **COUNTS[2])
    assert "not those of these weights" in other[0][0]["messages"][0]
    assert all(same(o[0], p[0]) for o, p in zip(other, plain, strict=True))


def test_checkpoints_and_settings_have_keys_of_their_own(tmp_path):
    source, cache = tmp_path / "model", tmp_path / "cache"
    tiny_llama().save_pretrained(source)
    several = [{"cache_dir": str(cache)}, {"cache_dir": str(cache), "method": "full"}]
    run_ranks(1, slices, several, source=str(source), slices=1)
    run_ranks(1, slices, several[:1], source=str(source), slices=2, accumulation=2)
    assert len(list(cache.iterdir())) == 3
    copied = tmp_path / "copy"
    shutil.copytree(source, copied, copy_function=shutil.copy)  # as a new download: same bytes, another time
    run_ranks(1, slices, several[:1], source=str(copied), slices=1)
    assert len(list(cache.iterdir())) == 4
    assert all(json.loads((folder / "index.json").read_text())["targets"] == 14 for folder in cache.iterdir())


def test_hosts_with_copies_of_the_model_share_a_cache(tmp_path):
    """Each host's files have times of their own; rank 0's name the cache, and the second start reads it."""
    tiny_llama().save_pretrained(tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1", copy_function=shutil.copy)
    init = {"cache_dir": str(tmp_path / "cache"), "placement": "round_robin"}
    ranks = run_ranks(2, slices, [init, init], source=f"{tmp_path}/{{rank}}", **COUNTS[2])
    assert all(second["report"].cached for _, second in ranks)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "file").touch()
    messages = run_ranks(2, refusal, {"cache_dir": str(tmp_path / "file")}, poison="lm_head.weight")
    assert all("hd_pissa.init.cache_dir" in message for message in messages)
