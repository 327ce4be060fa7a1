"""What a card, `hdpissa env` and refusals of the hub say in words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from report_runs import write_run

from hdpissa.engine import data_sources, hub_errors, model_card
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.metrics import RunFiles, counted
from hdpissa.launch import env_report, train_checks


def record(folder: Path, **changes) -> RunFiles:
    found = RunFiles.read(write_run(folder, steps=4, slices=1))
    found.run.update(changes)
    return found


# --- model cards --------------------------------------------------------------------------------------


def test_one_is_not_many(tmp_path):
    assert (counted(1, "slice"), counted(2, "slice"), counted(0, "weight")) == ("1 slice", "2 slices", "0 weights")
    run = record(tmp_path)
    trained = model_card.from_record(run, step=4, template=None)
    text = model_card.write_card(tmp_path, trained, {"format": "hf", "dtype": "bf16"}).read_text()
    assert "With 1 slice of rank 16" in text
    assert "| method | HD-PiSSA, 1 slice of rank 16 |" in text
    assert "1 slices" not in text


def test_a_card_has_no_row_of_the_data(tmp_path):
    """A card is published; what it asks is a placeholder, and says so."""
    run = record(tmp_path)
    trained = model_card.from_record(run, step=4, template="Q: {instruction}\nA:")
    text = model_card.write_card(tmp_path, trained, {"format": "hf", "dtype": "bf16"}).read_text()
    assert f'instruction = "{model_card.QUESTION}"  # put in your own' in text


# --- hdpissa env -----------------------------------------------------------------------------------


def test_no_heading_stands_alone():
    text = env_report.text({"devices": {"deepspeed takes": ""}, "variables": {}, "torch": {"threads": 1}})
    assert text.splitlines() == [
        "devices", "  none", "", "variables", "  none of those that steer a run is set", "", "torch", "  threads  1",
    ]  # fmt: skip


# --- the hub ---------------------------------------------------------------------------------------


def test_a_name_that_is_nowhere(monkeypatch):
    """The real libraries, which may not ask the hub: a model, and a dataset."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (huggingface_hub.constants, datasets.config):  # which have read it when they were imported
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    rule = "it is not in this machine's cache, and the hub was not reached, as HF_HUB_OFFLINE is set"
    remedy = "check name and network, or give a folder"
    with pytest.raises(ConfigError) as error:
        train_checks.read_model_config(SimpleNamespace(model_name_or_path="no/such", trust_remote_code=False))
    assert str(error.value) == f"--model_name_or_path no/such: no usable model there ({rule}); {remedy}"
    with pytest.raises(ConfigError) as error:
        data_sources.load_rows("no/such")
    assert str(error.value) == f"dataset 'no/such', split 'train', cannot be read ({rule}); {remedy}"


def test_what_the_hub_answers():
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    for kind, words, remedy in (
        (errors.GatedRepoError, "accepted the conditions", "hf auth login"),
        (errors.RepositoryNotFoundError, "or it is private", "check the name, or hf auth login"),
        (errors.RevisionNotFoundError, "no such revision", "branch, tag or commit"),
    ):
        wrapped = OSError("a long story")
        wrapped.__cause__ = kind("Client Error", response=response)
        found = hub_errors.explain(wrapped)
        assert found is not None
        assert words in found[0]
        assert remedy in found[1]
    assert hub_errors.explain(OSError("no such file")) is None


def test_a_message_ends_with_a_sentence():
    long = "It is so. " + "And this goes on and on without an end" * 9
    assert hub_errors.reason(ValueError(long)) == "It is so"
    assert hub_errors.reason(ValueError("word " * 80)) == ("word " * 40).strip() + " …"
    assert hub_errors.reason(ValueError("one\n line.")) == "one line"
