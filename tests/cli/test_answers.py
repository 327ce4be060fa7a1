"""When an answer is right, and how answers are generated."""

from __future__ import annotations

import launch_runs
import pytest
import torch

from hdpissa.launch.common.generation import generate
from hdpissa.launch.evaluation import answers
from hdpissa.launch.evaluation.answers import extract, is_right, style_of


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\boxed{\dfrac{1}{2}}", True),
        (r"so \boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{1} then \boxed{2}", r"\boxed{2}", True),  # the last one counts
        (r"\boxed{\{1, 2\}}", r"thus \boxed{\{1,2\}}", True),
        (r"it is 2", r"\boxed{2}", False),
        (r"\boxed{2", r"\boxed{2}", False),
        (r"\boxed{1,234}", r"\boxed{1234}", True),
        (r"\boxed{(1,2)}", r"\boxed{(12)}", False),
        (r"\boxed{10\%}", r"\boxed{10}", True),
        ("#### 18\nThe answer is: 18", "9 * 2 = 18\n#### 18\nThe answer is: 18", True),
        ("The answer is: 18", "#### 18", False),
        ("3 apples and 4 pears make 7", "7", False),
        ("-1,234.50", "-1234.5", True),
        ("1/2", "0.5", True),
        ("#### 1.8e1", "#### 18", True),
        ("#### 1e-400", f"#### 0.{'0' * 20}1", False),
        ("It is 3 + 4 = 7.\n#### 7\n", "x\n#### 7", True),
        ("#### $7.00.", "#### 7", True),
        ("#### 7\n#### 8", "#### 8", False),  # the first one counts
        ("#### 17", "#### 7", False),
        ("The answer is 7", "#### 7", False),  # the mark is part of the task
        ("####", "#### 7", False),
        ("yes ", "no", False),
        ("no number", "7", False),
        ("", "7", False),
    ],
)
def test_an_answer_is_judged_by_the_style_of_the_reference(answer, reference, right):
    assert is_right(answer, reference) is right


@pytest.mark.parametrize(
    "answer",
    ["1e1000000000", "1E+1_000_000_000", "1e-1000000000", "1e" + "9" * 40, "9" * 100_000, "1/" + "3" * 9_000, "1e1__0"],
    ids=lambda text: text[:20],
)
def test_numbers_that_take_long_are_not_worked_out(monkeypatch, answer):
    """A model may say any; letter by letter they are still the same."""
    asked = []
    monkeypatch.setattr(answers, "Fraction", asked.append)  # which works nothing out
    for number in ("18", "1e3"):
        assert not is_right(f"#### {answer}", f"#### {number}")
    assert is_right(f"#### {answer}", f"#### {answer}")
    assert set(asked) <= {"18", "1e3", "1e1__0"}


@pytest.mark.parametrize(
    ("text", "style", "result"),
    [
        (r"\boxed{x^{2}}", "boxed", "x^{2}"),
        ("a\n#### $1,000.\nb", "mark", "1000"),
        ("it makes 12.", "text", "it makes 12."),
        ("yes ", "text", "yes"),
        ("####", "mark", ""),
    ],
)
def test_styles(text, style, result):
    assert (style_of(text), extract(text)) == (style, result)


def test_batched_answers_are_those_of_each_alone(tmp_path):
    """In their order; padding on the left changes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = launch_runs.make_inputs(tmp_path)["model_name_or_path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts = ["a b c d e f", "x", "What is 3 + 4?", "one two three four five"]
    ids, device = tokenizer(prompts)["input_ids"], torch.device("cpu")
    alone, batched = (
        generate(model, tokenizer, ids, batch_size=n, max_new_tokens=6, device=device) for n in (1, len(prompts))
    )
    assert alone == batched
    assert len(set(alone)) == len(prompts)
