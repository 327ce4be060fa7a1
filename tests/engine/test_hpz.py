"""hpZ (`zero_hpz_partition_size`): a second copy of W on every host, which an update must not leave stale.

DeepSpeed renews that copy for weights that it trains itself; it holds frozen ones to be unchanging.
"""

from __future__ import annotations

import pytest
import torch
from hpz_runs import train_with_copies
from ranks import run_ranks
from tiny import ds_settings, tiny_llama

RANKS, PER_HOST = 4, 2


def settings(hpz, **zero):
    return ds_settings(slices=4, zero={"zero_hpz_partition_size": hpz, **zero})


@pytest.fixture(scope="module")
def plain():
    return run_ranks(RANKS, train_with_copies, settings(1))


@pytest.fixture(scope="module")
def with_hpz():
    return run_ranks(RANKS, train_with_copies, settings(PER_HOST))


def same(one, other) -> bool:
    """Losses, evaluation losses and weights, bit for bit."""
    (a, *_), (b, *_) = one, other
    return (a["losses"], a["eval"]) == (b["losses"], b["eval"]) and all(
        torch.equal(w, b["weights"][name]) for name, w in a["weights"].items()
    )


def test_bitwise_the_run_without_it(plain, with_hpz):
    assert same(plain, with_hpz)
    assert len(set(plain[0]["eval"])) == 4, "nothing was learned, so nothing could go stale"


def test_it_is_really_on(plain, with_hpz):
    assert plain[0]["after"] == []
    assert sum(with_hpz[0]["after"]) > 0


def test_control_kept_copies_are_stale(plain):
    """Every forward sees W as it was at the start: the evaluation loss stands still."""
    stale = run_ranks(RANKS, train_with_copies, settings(PER_HOST), keep=True)
    assert not same(plain, stale)
    assert len(set(stale[0]["eval"])) == 1


def test_small_weights_that_stay_gathered():
    """With the default threshold a tiny model is persistent altogether."""
    held = {"stage3_param_persistence_threshold": 100_000}
    one, other = (run_ranks(RANKS, train_with_copies, settings(hpz, **held)) for hpz in (1, PER_HOST))
    assert same(one, other)


def test_from_a_checkpoint(plain, tmp_path):
    """Read in shards, past the copies that DeepSpeed made of the random weights before."""
    tiny_llama().save_pretrained(tmp_path)
    found = run_ranks(RANKS, train_with_copies, settings(PER_HOST), source=str(tmp_path))
    assert same(plain, found)
