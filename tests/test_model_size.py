"""What a run must know of its model's size: how many weights a token meets, and how many positions there are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from family_runs import make_family
from torch import nn

from hdpissa.engine.recorder import Recorder
from hdpissa.launch.model_work import active_weights
from hdpissa.launch.position_checks import table_size

# --- weights ---------------------------------------------------------------------------------------

ATTENTION = 20 * (20 + 10 + 10 + 20)  # q, k, v, o with two heads of 10 and one of keys
EXPERT, HEAD = 3 * 28 * 20, 61 * 20
COUNTS = {
    "llama": 2 * (ATTENTION + EXPERT) + HEAD,
    "gemma2": 2 * (ATTENTION + EXPERT) + HEAD,  # tied: the head counts, the lookup does not
    "gpt2": 2 * (20 * 60 + 20 * 20 + 2 * 20 * 28) + HEAD,  # tied, and Conv1D
    "mixtral": 2 * (ATTENTION + 2 * EXPERT) + HEAD,  # two of four experts
}


@pytest.mark.parametrize("name", COUNTS)
def test_weights_that_a_token_meets(name):
    assert active_weights(make_family(name)) == COUNTS[name]


def test_experts_one_by_one_count_alike():
    """As models with code of their own have them; an expert that all tokens meet counts whole."""
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(3, 5, bias=False) for _ in range(4))
    model.shared_experts = nn.Linear(3, 7, bias=False)
    model.get_output_embeddings = lambda: None
    model.config = SimpleNamespace(n_routed_experts=4, num_experts_per_tok=1)
    assert active_weights(model) == 15 + 21


def test_mfu_is_of_these_weights(tmp_path):
    recorder = Recorder(tmp_path, total_steps=1, weights=10**12, device_name="NVIDIA H100", devices=2, rank=0)
    recorder.start()
    row = recorder.step({"step": 1, "loss": 1.0, "learning_rate": 0.1, "tokens": 1000}, log=False)
    recorder.close()
    assert row["mfu"] == pytest.approx(4e12 * row["tokens_per_second"] / (2 * 989e12), rel=1e-3)


# --- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("opt", {"word_embed_proj_dim": 20, "ffn_dim": 28}, 64),  # two rows of its table are never reached
        ("gptj", {"rotary_dim": 4, "n_positions": 64}, 64),  # computed once, and as long
        ("llama", {}, None),
        ("bloom", {}, None),
    ],
)
def test_tables_of_other_families(model_type, settings, expected):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(model_type, **sizes | settings)
    model = AutoModelForCausalLM.from_config(config)
    assert table_size(model) == expected
    if expected:
        with torch.no_grad():
            assert math.isfinite(model(torch.zeros(1, expected, dtype=torch.long)).logits.sum().item())
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.zeros(1, expected + 1, dtype=torch.long))
