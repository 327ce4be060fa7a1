"""Tokenizers that put an EOS behind every text: an answer begins where its prompt ends, and ends once."""

from __future__ import annotations

import datasets
import pytest
from data_cases import BOS, EOS, ROWS, character_tokenizer, encode, ids, texts
from tokenizers import processors

from hdpissa.engine.data_encode import prompt_ids

PUT = {"<s> $A </s>": [BOS], "$A </s>": [], "$A </s> </s>": [], "<s> $A": [BOS], "$A": []}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def tokenizer_that_puts(single: str, **special):
    tokenizer = character_tokenizer(**special)
    known = [(token, at) for token, at in (("<s>", BOS), ("</s>", EOS)) if token in single]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    return tokenizer


@pytest.mark.parametrize("single", PUT)
@pytest.mark.parametrize("format", ["alpaca", "prompt_completion", "text", "messages"])
def test_all_of_the_answer_is_learned_and_one_eos(format, single):
    """The same rows and labels as with a tokenizer that puts nothing behind; chat templates write their own tokens."""
    rows, expected = ROWS[format]
    if not PUT[single]:
        expected = [text.replace("<s>", "") for text in expected]
    tokenizer = tokenizer_that_puts(single)
    assert texts(encode(datasets.Dataset.from_list(rows), tokenizer=tokenizer), tokenizer) == expected


@pytest.mark.parametrize("single", PUT)
def test_no_eos_stands_behind_a_prompt(single):
    tokenizer = tokenizer_that_puts(single)
    assert prompt_ids(tokenizer, "q") == [*PUT[single], *ids("q")]


def test_a_bos_that_is_the_eos_too_stays_in_front():
    tokenizer = tokenizer_that_puts("</s> $A", bos_token="</s>")
    assert prompt_ids(tokenizer, "q") == [EOS, *ids("q")]
