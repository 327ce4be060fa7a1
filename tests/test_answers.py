"""What a model is asked, and when its answer is right."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest

from hdpissa.engine import answers
from hdpissa.engine.answers import extract, is_right, style_of
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.generation import questions
from hdpissa.launch import train_arguments

# --- answers ---------------------------------------------------------------------------------------


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
        ("first 3, so the answer is: 18.", "The answer is: 18", True),
        ("The answer is 17", "The answer is: 18", False),
        ("3 apples and 4 pears make 7", "7", True),
        ("7 is what 3 and 4 make", "7", False),
        ("about -1,234.50 dollars", "-1234.5", True),
        ("1/2", "0.5", True),
        ("#### 1.8e1", "#### 18", True),
        ("#### 1e-400", f"#### 0.{'0' * 20}1", False),
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
        ("The answer is: 3 m", "said", "3 m"),
        ("it makes 12.", "number", "12"),
        ("yes ", "text", "yes"),
        ("####", "mark", ""),
    ],
)
def test_styles(text, style, result):
    assert (style_of(text), extract(text)) == (style, result)


# --- questions -------------------------------------------------------------------------------------


class Words:
    """A tokenizer of numbers."""

    eos_token_id = 9

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if i != self.eos_token_id)


def test_questions_are_what_comes_before_the_last_answer():
    rows = [
        ([1, 2, 3, 9], [-100, -100, 3, 9]),
        ([1, 2, 3, 4, 9], [-100, 2, -100, 4, 9]),  # the second turn of two
        ([1, 2], [1, 2]),  # nothing but an answer
        ([1, 2, 3, 4, 5], [-100, 2, 3, 4, 5]),  # cut
        ([1, 2, 3], [-100, 2, 3]),
    ]
    table = datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    found = questions(table, Words(), max_length=5)
    assert [(q.ids, q.text, q.reference) for q in found] == [
        ([1, 2], "1 2", "3"),
        ([1, 2, 3], "1 2 3", "4"),
        ([1], "1", "2 3"),
    ]
    assert questions(table, Words(), limit=1) == found[:1]


def test_rows_to_evaluate_on_are_needed():
    from hdpissa.launch.train_questions import read_questions

    nothing = SimpleNamespace(held_out=None)
    for name, value in {"eval_exact_match": True, "sample_steps": 2, "early_stopping_patience": 1}.items():
        args = train_arguments.TrainArguments(**{name: value})
        with pytest.raises(ConfigError, match=f"--{name} needs evaluation rows"):
            read_questions(args, None, nothing)
    plain = SimpleNamespace(dataset=datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]))
    answers_only = SimpleNamespace(held_out=plain, ask=lambda use: plain)
    for name, value in {"eval_exact_match": True, "sample_steps": 2}.items():
        with pytest.raises(ConfigError, match="no evaluation row has a prompt"):
            read_questions(train_arguments.TrainArguments(**{name: value}), Words(), answers_only)
