"""What a run must know of its model's size: how many weights a token meets, and how many positions there are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from family_runs import make_family
from launch_runs import flags, make_inputs, read_json
from mistakes import argument, assert_told, collect
from torch import nn

from hdpissa.engine import ConfigError
from hdpissa.engine.recorder import Recorder
from hdpissa.launch import evaluate, train_arguments
from hdpissa.launch.model_work import active_weights
from hdpissa.launch.position_checks import check_positions, table_size, trained_length
from hdpissa.launch.train_checks import check

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("positions") / "inputs"


@pytest.fixture(scope="module")
def inputs(folder):
    """A GPT-2 of 64 positions, beside a Llama that was trained on as many; rows are longer."""
    found = make_inputs(folder, train=16, evaluate=4)
    vocabulary = read_json(folder / "model" / "config.json")["vocab_size"]
    for name in ("gpt2", "llama"):
        (folder / name).mkdir()
        for file in (folder / "model").glob("token*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
        make_family(name, vocab_size=vocabulary, max_position_embeddings=64).save_pretrained(folder / name)
    return found


GPT2 = {"model_name_or_path": "DIR/gpt2", "prompt_template": "none"}
CASES = [
    argument(
        "rows longer than the positions",
        ("--max_length is 512 and rows have up to", "GPT2LMHeadModel has 64 positions", "give --max_length 64"),
        model_name_or_path="DIR/gpt2",
    ),
    argument(
        "packed rows longer than the positions",
        ("--max_length is 65 and rows have up to 65 tokens", "give --max_length 64"),
        **GPT2,
        max_length=65,
        packing=True,
    ),
    argument(
        "a stream that may be longer than the positions",
        ("streamed rows have up to 65 tokens", "64 positions"),
        **GPT2,
        max_length=65,
        streaming=True,
        eval_dataset_name=None,
    ),
    argument(
        "answers that run over the positions",
        ("--max_new_tokens is 60", "64 positions", "give --max_new_tokens"),
        **GPT2,
        max_length=64,
        max_new_tokens=60,
        sample_prompt="What is 1 + 1? " * 2,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mistake)
def test_one_line_and_exit_code_2(results, case):
    assert_told(case, results[case.mistake])


@pytest.fixture(scope="module")
def results(folder, inputs):
    return collect(CASES, folder, inputs)


def checked(inputs, folder, tmp_path, monkeypatch, **options):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    wanted = inputs | {"output_dir": str(tmp_path / "out"), "max_steps": 2} | options
    return check(*train_arguments.parse(flags(wanted)))


def test_what_fits_is_let_pass(inputs, folder, tmp_path, monkeypatch):
    """Rows of just as many tokens as there are positions."""
    gpt2 = {"model_name_or_path": str(folder / "gpt2"), "prompt_template": "none", "max_length": 64}
    job = checked(inputs, folder, tmp_path, monkeypatch, **gpt2)
    assert (job.notes, job.weights) == ([], active_weights(make_family("gpt2", vocab_size=len(job.tokenizer))))
    assert max(map(len, job.rows.train.dataset["input_ids"])) == 64


def test_rotary_positions_are_a_note(inputs, folder, tmp_path, monkeypatch):
    job = checked(inputs, folder, tmp_path, monkeypatch, model_name_or_path=str(folder / "llama"))
    (note,) = job.notes
    assert note.endswith("and the model's max_position_embeddings is 64")
    assert checked(inputs, folder, tmp_path, monkeypatch).notes == []


def test_evaluate_refuses_them_too(inputs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    words = {"model": folder / "gpt2", "dataset_name": inputs["eval_dataset_name"], "device": "cpu"}
    with pytest.raises(ConfigError, match=r"rows have up to .* tokens: GPT2LMHeadModel has 64 positions"):
        evaluate.main(flags(words))
    evaluate.main(flags(words | {"max_length": 64, "prompt_template": "none"}))


def rows_of(*lengths):
    found = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    return SimpleNamespace(train=SimpleNamespace(dataset=found), held_out=None)


def test_the_last_token_of_an_answer_needs_no_position():
    model, args = make_family("gpt2"), SimpleNamespace(max_length=64, max_new_tokens=5)
    questions = [SimpleNamespace(ids=[0] * n) for n in (7, 60)]
    assert check_positions(args, model, rows_of(64), questions) is None
    with torch.no_grad():
        ids = torch.zeros(1, 60, dtype=torch.long)
        out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 65)
    args.max_new_tokens = 6
    with pytest.raises(ConfigError, match=r"a prompt has 60 tokens.*give --max_new_tokens 5, or shorter prompts"):
        check_positions(args, model, rows_of(64), questions)
    with pytest.raises(ConfigError, match="evaluation rows have up to 65 tokens"):
        check_positions(args, model, SimpleNamespace(train=rows_of(3).train, held_out=rows_of(65).train))


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


def test_a_stretched_rotary_embedding_was_trained_further():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert trained_length(SimpleNamespace(max_position_embeddings=32768, rope_parameters=rope)) == 131072
    assert trained_length(SimpleNamespace(max_position_embeddings=64)) == 64
