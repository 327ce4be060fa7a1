"""Names of models and data: paths are told from names on the hub, and what is nowhere is refused at once."""

from __future__ import annotations

import time

import huggingface_hub
import pytest

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import hub


def test_paths_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    paths = ["gpt2", "./x", "/a/b", "~/models/x", "a/b/c", "rows.jsonl", "config.json"]
    assert [name for name in [*paths, "org/model", "gpt3", "meta-llama/Llama-3.1-8B"] if hub.is_path(name)] == paths


@pytest.mark.parametrize("name", ["./nope", "a/b/c", "out/nope", "x" * 300, "a//b"])
def test_what_is_nowhere_is_refused_at_once(monkeypatch, name):
    """With at most one request, which is not repeated."""
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="--model"):
        hub.check_model("--model", name)
    assert time.monotonic() - begun < 5
    assert asked in ([], [name])


def test_a_model_on_the_hub_is_let_pass(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    hub.check_model("--model", "org/model")


def test_nothing_is_asked_offline(monkeypatch):
    """The libraries find out by themselves, at once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)
    hub.check_model("--model", "org/model")
