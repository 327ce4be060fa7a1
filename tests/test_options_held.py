"""Every public option has a test that fails when the option is ignored: the table in options_held.py is whole."""

from __future__ import annotations

import argparse

import options_held
import pytest


def test_every_option_is_held():
    wrong = options_held.problems()
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_script_is_known():
    new = options_held.scripts_without_a_command()
    assert not new, (
        f"launch/ has scripts that tests/options_held.py does not know: {', '.join(new)}. Add each to COMMANDS "
        f"(with the function that makes its parser) or to NO_COMMANDS there."
    )


def test_options_are_found():
    found = options_held.public_options()
    assert {"--gpus", "--json"} <= set(found["plan"])
    assert {"--checkpoint", "--rank"} <= set(found["export"])
    assert {"r", "init.tol", "kernels.impl"} <= set(found["hd_pissa"])
    assert not any("--help" in options for options in found.values())


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, 'x: --new is held by no test. Write one that fails when the option is ignored, and add "--new": "test_fi'),
        ({"--new": "test_options_held::test_options_are_found", "--old": "test_a::test_b"}, "no option any more"),
        ({"--new": "test_options_held::test_nothing"}, "there is no such test"),
        ({"--new": "test_checksum::test_nothing"}, "there is no such test"),
        ({"--rank": "test_options_held::test_options_are_found"}, "x: --new is held by no test"),
        ({"--new": "test_checksum::test_known_values"}, "there is no such test"),
    ],
)
def test_the_table_is_checked(monkeypatch, table, words):
    monkeypatch.setattr(options_held, "HELD", {"x": table})
    monkeypatch.setattr(options_held, "public_options", lambda: {"x": ["--new"]})
    assert words in "\n".join(options_held.problems())


def test_a_test_that_does_not_know_the_option(monkeypatch):
    monkeypatch.setattr(options_held, "HELD", {"x": {"--never_written": "test_eigen::test_it"}})
    monkeypatch.setattr(options_held, "public_options", lambda: {"x": ["--never_written"]})
    monkeypatch.setattr(options_held, "tests_in", lambda file: {"test_it"})
    (line,) = options_held.problems()
    assert "mentions the option" in line


def test_the_parser_is_caught_and_let_go():
    def make(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--one", "-o")
        parser.add_argument("--two", action="store_true")
        parser.parse_args(argv)

    assert options_held.options_of(make) == ["--one", "--two"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    assert parser.parse_args(["--one", "1"]).one == "1"
