"""Where a chat's turn ends, there an answer ends: in generation, and by the exported generation_config."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from data_cases import ROWS, character_tokenizer
from launch_runs import flags
from transformers import GenerationConfig

from hdpissa.engine.chat_template import ChatTemplate
from hdpissa.engine.generation import generate
from hdpissa.launch import train_arguments
from hdpissa.launch.export_template import write_stops
from hdpissa.launch.train_checkpoints import Checkpoints
from hdpissa.launch.train_data import read_rows
from hdpissa.launch.train_questions import stop_at_turns

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def base_tokenizer(template: str = CHATML):
    """A base model's: ChatML's tokens are there, and EOS is the end of a document."""
    tokenizer = character_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def read(tmp_path, format, tokenizer, **options):
    path = tmp_path / f"{format}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[format][0]))
    required = {"ds_config": "a.json", "model_name_or_path": "m", "output_dir": "o", "dataset_name": str(path)}
    args, given = train_arguments.parse(flags(required | options))
    return args, read_rows(args, given, tokenizer)


class Model:
    """Keeps what it is asked for, and says nothing."""

    def __init__(self, eos):
        self.generation_config, self.asked = GenerationConfig(eos_token_id=eos), {}

    def generate(self, input_ids, **how):
        self.asked = how
        return input_ids


@pytest.mark.parametrize(("own", "expected"), [(1, [1, "end"]), ([1, 40], [1, 40, "end"]), (None, [1, "end"])])
def test_answers_and_exports_end_where_a_turn_does(tmp_path, own, expected):
    tokenizer, model = base_tokenizer(), Model(own)
    _, rows = read(tmp_path, "messages", tokenizer)
    (line,) = stop_at_turns(model, tokenizer, rows)
    assert line == "answers end at <|im_end|>, too: the chat template's end of turn"
    expected = [tokenizer.convert_tokens_to_ids("<|im_end|>") if end == "end" else end for end in expected]
    assert model.generation_config.eos_token_id == expected
    generate(model, tokenizer, [[5, 6]], batch_size=1, max_new_tokens=1, device=torch.device("cpu"))
    assert model.asked["eos_token_id"] == expected
    assert stop_at_turns(model, tokenizer, rows) == []


def test_other_rows_and_other_templates_add_no_end(tmp_path):
    """Rows that are no chats; a template whose turns end in EOS; one that cannot tell, or that has no end of turn."""
    tokenizer = base_tokenizer()
    for format in ("alpaca", "text", "prompt_completion"):
        assert read(tmp_path, format, tokenizer)[1].stops == []
    rows = read(tmp_path, "alpaca", tokenizer, chat_template="tokenizer")[1]
    assert rows.stops == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ended = read(tmp_path, "messages", base_tokenizer(CHATML.replace("<|im_end|>", "</s>")))[1]
    model = Model(1)
    assert stop_at_turns(model, tokenizer, ended) == []
    assert model.generation_config.eos_token_id == 1
    for text in ("{{ raise_exception('no') }}", "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"):
        assert ChatTemplate(text, tokenizer).stops() == []


def test_checkpoints_keep_the_end_of_turn_for_their_exports(tmp_path):
    data = SimpleNamespace(steps_per_epoch=3, micro_batch_size=1, micro_batches_per_slice=1, identity=dict)
    kept = {}
    for format in ("messages", "alpaca"):
        tokenizer = base_tokenizer()
        args, rows = read(tmp_path, format, tokenizer)
        job = SimpleNamespace(
            data=data, total_steps=8, plan=SimpleNamespace(rank=0, slices=1), tokenizer=tokenizer, rows=rows
        )
        engine = SimpleNamespace(save_checkpoint=lambda folder, **how: how["client_state"], global_steps=1)
        kept[format] = Checkpoints(args, job, None, None)._save(engine, background=False)
    assert kept["messages"]["stop_token_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert "stop_token_ids" not in kept["alpaca"]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": 1, "top_p": 0.5}}, {"eos_token_id": [1, 7], "top_p": 0.5}),
        ({"generation_config.json": {"eos_token_id": [7, 1]}}, {"eos_token_id": [7, 1]}),
        ({"config.json": {"eos_token_id": 1, "bos_token_id": 0}}, {"eos_token_id": [1, 7], "bos_token_id": 0}),
        ({}, {"eos_token_id": [7]}),
    ],
)
def test_an_export_from_a_checkpoint_ends_there_too(tmp_path, base, expected):
    """Its generation_config.json, a copy of the base's, or one of the base's configuration where it has none."""
    for name, content in base.items():
        (tmp_path / name).write_text(json.dumps(content))
    write_stops({"stop_token_ids": [7]}, tmp_path, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected
    (tmp_path / "generation_config.json").unlink()
    write_stops({}, tmp_path, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
