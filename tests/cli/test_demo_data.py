"""The demo problems: right answers, no problem in both files, the same for the same seed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hdpissa.launch.demo_data import KINDS, generate

SCRIPT = Path(__file__).parents[2] / "launch" / "demo_data.py"

# A second solver, which knows only the question: a phrase of it, and a formula of
# the numbers in it in reading order (as many as the formula has arguments).
SOLVERS = {
    "of change": lambda n, price, paid: paid - n * price,
    "equally among": lambda total, friends, lost: total // friends - lost,
    "times as many": lambda first, factor: first + factor * first,
    "kilometres an hour": lambda speed, hours, rest: speed * hours + rest,
    "every week for": lambda weekly, weeks, spent: weekly * weeks - spent,
    "A baker fills": lambda trays, each, morning, afternoon: trays * each - morning - afternoon,
    "In a sale": lambda price, percent: price * (100 - percent) // 100,
    "garden is": lambda length, width, price: 2 * (length + width) * price,
    "years older": lambda age, gap, years: age + gap + years,
    "years younger": lambda age, gap, years: age - gap + years,
    "-page book": lambda monday, pages, more: pages - 2 * monday - more,
    "boxes are needed": lambda size, total: total // size,
    "average score": lambda *scores: sum(scores) // len(scores),
}
EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")


def calculate(expression: str) -> float:
    """Left to right; the working never mixes + or − with a later * or /."""
    first, *rest = expression.split()
    value = float(first)
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        other = float(number)
        value = {"+": value + other, "-": value - other, "*": value * other, "/": value / other}[operator]
    return value


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    return generate(6000, seed=3)


def test_every_answer_agrees_with_a_second_solver(problems):
    used = set()
    for problem in problems:
        phrases = [phrase for phrase in SOLVERS if phrase in problem["instruction"]]
        assert len(phrases) == 1, problem["instruction"]
        numbers = [int(number) for number in re.findall(r"\d+", problem["instruction"])]
        assert problem["response"].splitlines()[-1] == f"#### {SOLVERS[phrases[0]](*numbers)}"
        used.add(phrases[0])
    assert used == set(SOLVERS)
    assert len(KINDS) >= 8


def test_every_line_of_the_working_is_a_true_equation_and_leads_to_the_answer(problems):
    for problem in problems:
        *lines, answer = problem["response"].splitlines()
        assert 1 <= len(lines) <= 3
        equations = [EQUATION.search(line) for line in lines]
        assert all(found and calculate(found[1]) == int(found[2]) for found in equations), problem
        assert answer == f"#### {equations[-1][2]}"
        assert int(equations[-1][2]) >= 0


def test_problems_differ_and_a_longer_list_starts_with_the_shorter(problems):
    assert len({problem["instruction"] for problem in problems}) == len(problems)
    assert generate(100, seed=3) == problems[:100]
    assert generate(100, seed=4) != problems[:100]
    with pytest.raises(ValueError, match="negative"):
        generate(-1, seed=0)


def test_script_writes_the_same_two_disjoint_files_each_time(tmp_path):
    texts = []
    for name in ("one", "two"):
        command = [sys.executable, SCRIPT, "--output_dir", tmp_path / name, "--train", "40", "--eval", "9"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == str(tmp_path / name)
        texts.append([(tmp_path / name / f"{part}.jsonl").read_text() for part in ("train", "eval")])
    assert texts[0] == texts[1]
    train, evaluation = ([json.loads(line) for line in text.splitlines()] for text in texts[0])
    assert (len(train), len(evaluation)) == (40, 9)
    assert all(set(row) == {"instruction", "response"} for row in train + evaluation)
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in evaluation}


def test_script_refuses_empty_files(tmp_path):
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path, "--train", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--train" in done.stderr
