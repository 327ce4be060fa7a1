"""What the result of a worked answer is, and whether it is the right one.

How a reference states its result says how an answer has to:

| style | the result is |
| --- | --- |
| `boxed` | what stands in the last `\\boxed{…}` |
| `mark` | what follows the first `####`, to the end of the line, as GSM8K writes it |
| `text` | all of it |

Two results are the same letter by letter, or as numbers: 1,234 and 1234, 0.5 and 1/2 and `\\frac{1}{2}`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

Style = Literal["boxed", "mark", "text"]

MARK = "####"
LONGEST, LARGEST_EXPONENT = 50, 400  # of numbers: characters, and the power of ten that is written with "e"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_EXPONENT = re.compile(r"e([-+]?\d[\d_]*)", re.IGNORECASE)
_NOISE = re.compile(r"\\left|\\right|\\!|\\,|\\ |\\%|%|\\\$|\$|\\text\{\s*[^}]*\}$|\s+")


def style_of(reference: str) -> Style:
    """How a text states its result."""
    if _BOXED.search(reference):
        return "boxed"
    return "mark" if MARK in reference else "text"


def result_of(text: str, style: Style) -> str | None:
    """The result that a text states in a style; None where it states none."""
    if style == "boxed":
        return _last_box(text)
    if style == "mark":
        _, found, after = text.partition(MARK)
        return _tidy(after.strip().split("\n")[0]) if found else None
    return text.strip()


def extract(answer: str) -> str:
    """The result of a text in its own style; empty when nothing follows the mark."""
    return result_of(answer, style_of(answer)) or ""


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer states the reference's result, in the reference's style."""
    style = style_of(reference)
    one, other = result_of(answer, style), result_of(reference, style)
    if not one or not other:
        return False
    if one == other or _plain(one) == _plain(other):
        return True
    numbers = _value(one), _value(other)
    return None not in numbers and numbers[0] == numbers[1]


def _last_box(text: str) -> str | None:
    """What stands in the last box, braces counted; None for a box that is not closed, too."""
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return _tidy(text[start:at])
    return None


def _tidy(text: str) -> str:
    """Without what does not count: a dollar sign, commas in numbers, a full stop at the end."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.strip())
    return text.removeprefix("$").removesuffix(".").removesuffix("$").strip()


def _plain(text: str) -> str:
    """A formula without its spacing and units."""
    return _NOISE.sub("", re.sub(r"\\[dt]frac", r"\\frac", text))


def _value(text: str) -> Fraction | None:
    """As a number, exactly; None where it is none, or one that would take long: answers are whatever a model says."""
    if len(text) > LONGEST:
        return None
    text = _plain(text).replace(",", "")
    text = _FRACTION.sub(r"\1\2/\3", text)
    exponent = _EXPONENT.search(text)
    try:
        if exponent and abs(int(exponent[1])) > LARGEST_EXPONENT:
            return None
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
