"""A real pretrained model (SmolLM2-135M-Instruct, from a PyPI package) on two real ranks, bf16 compute.

Its first six layers in `make test`, all thirty in `make slow`: bf16 is slow on a CPU that has no instructions for it.
"""

from __future__ import annotations

import pytest
import torch
from engine_runs import train_real
from ranks import run_ranks
from tiny import ds_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpissa.launch.demo_model import ensure_demo_model

TEXT = "### Instruction:\nWhat is 12 + 30?\n\n### Response:12 + 30 = 42\n#### 42\n"


@pytest.fixture(scope="module", params=[6, pytest.param(30, marks=pytest.mark.slow)], ids="{} layers".format)
def layers(request):
    return request.param


@pytest.fixture(scope="module")
def real(tmp_path_factory, layers):
    """(what the ranks returned, the export's folder)."""
    model = ensure_demo_model()
    ids = AutoTokenizer.from_pretrained(model)(TEXT, return_tensors="pt")["input_ids"]
    folder = str(tmp_path_factory.mktemp("real") / "model")
    settings = ds_settings(bf16=True, slices=2, r=16)
    return run_ranks(2, train_real, settings, model, ids, folder, steps=3, lr=2e-4, layers=layers), folder


def test_it_learns(real, layers):
    """The first six layers never were a model by themselves; measured in the third step: 0.71 of the first loss."""
    ranks, _ = real
    losses = ranks[0]["losses"]
    assert losses[-1] < {6: 0.75, 30: 0.7}[layers] * losses[0]


def test_masters_start_from_the_files_own_fp32_values(real, layers):
    """Every one of the 7 weights of each layer, before the first step, equals the checkpoint's bit for bit."""
    ranks, _ = real
    assert ranks[0]["exact_at_start"] == 7 * layers


def test_memory_is_what_the_design_says(real):
    """Live tensors of a rank: 4 bytes per target weight and 2 per other one over the ranks, factors and moments."""
    ranks, _ = real
    for rank in ranks:
        assert rank["memory"]["measured"] == pytest.approx(rank["memory"]["expected"], rel=0.05)


def test_the_export_is_an_ordinary_model(real):
    """transformers alone computes the engine's logits from the exported folder."""
    ranks, folder = real
    ids = ranks[0]["ids"]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits.float()
        accurate = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    ours = ranks[0]["logits"]
    # the same bf16 weights: what is left is the order of bf16 sums, which must cost no more than bf16 itself
    assert (ours - plain).norm() <= (plain - accurate).norm()
    assert torch.equal(ours.argmax(-1), plain.argmax(-1))
