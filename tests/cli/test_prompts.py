"""Prompt templates by name, file and text."""

from __future__ import annotations

import pytest

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common.prompts import ALPACA, resolve_template


def test_alpaca_ends_with_the_response_header_and_braces_are_harmless(tmp_path):
    assert resolve_template("alpaca").text == ALPACA
    assert resolve_template("alpaca").render("{x} {instruction}") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\n{x} {instruction}\n\n### Response:"
    )
    assert resolve_template("none").render("2{}") == "2{}"
    assert resolve_template(r"\boxed{} {instruction}").render("a") == r"\boxed{} a"
    (tmp_path / "prompt.txt").write_text("Q: {instruction}\nA:\n")
    assert resolve_template(str(tmp_path / "prompt.txt")).render("x") == "Q: x\nA:"


@pytest.mark.parametrize("value", ["alpacca", "Answer:\n{input}", "{instruction} {instruction}", "a" * 9999, ""])
def test_bad_template_is_one_line(value):
    with pytest.raises(ConfigError) as caught:
        resolve_template(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
