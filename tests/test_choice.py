"""Choices are measured once, kept, told, and survive files that are not theirs."""

from __future__ import annotations

import json
import logging

import pytest

from hdpissa.kernels import choice


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HDPISSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_known", {})
    return tmp_path / "cache"


class Stopwatch:
    """Takes the candidates' own word for how long they run."""

    def __init__(self):
        self.calls = 0

    def __call__(self, run):
        self.calls += 1
        return run()


def candidates(**times):
    return {name: (lambda ms=ms: ms) for name, ms in times.items()}


def test_the_fastest_is_measured_once(cache, caplog):
    caplog.set_level(logging.INFO)
    watch = Stopwatch()
    for _ in range(2):
        assert choice.fastest("forward T8", candidates(separate=2.0, fused=1.5), measure=watch) == "fused"
    assert watch.calls == 2
    assert "forward T8: fused (separate 2.000 ms, fused 1.500 ms)" in caplog.text
    assert choice.fastest("backward T8", candidates(separate=1.0, fused=1.0), measure=watch) == "separate"


def test_kept_for_the_next_process(cache, monkeypatch):
    watch = Stopwatch()
    choice.fastest("a", candidates(x=1.0, y=2.0), measure=watch)
    choice.fastest("b", candidates(x=2.0, y=1.0), measure=watch)
    [file] = cache.glob("choices-*.json")
    assert json.loads(file.read_text()) == {"a": "x", "b": "y"}
    monkeypatch.setattr(choice, "_known", {})
    assert choice.fastest("a", candidates(x=9.0, y=2.0), measure=watch) == "x"
    assert watch.calls == 4


@pytest.mark.parametrize("content", ["", "no json", "[1, 2]", '{"a": "gone"}', "3"])
def test_a_file_that_says_nothing_useful_is_measured_over(cache, content):
    watch = Stopwatch()
    choice.fastest("other", candidates(x=1.0), measure=watch)
    [file] = cache.glob("choices-*.json")
    file.write_text(content)
    assert choice.fastest("a", candidates(x=2.0, y=1.0), measure=watch) == "y"
    assert json.loads(file.read_text())["a"] == "y"


def test_no_place_to_keep_it_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HDPISSA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(choice, "_known", {})
    assert choice.fastest("a", candidates(x=2.0, y=1.0), measure=Stopwatch()) == "y"
    assert "could not be kept" in caplog.text
