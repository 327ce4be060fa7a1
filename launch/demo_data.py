"""Arithmetic word problems with worked answers, for runs without a download.

    python launch/demo_data.py --output_dir DIR [--train 512 --eval 64 --seed 0]

Writes train.jsonl and eval.jsonl with the fields `instruction` and `response`.
A response is the working, one short line per step, then `#### N` as in GSM8K,
N an integer. No problem is in both files; the same seed gives the same files.
Each function below makes one kind of problem and computes the answer as it
writes the working, so that the two cannot disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

NAMES = (
    *("Ada", "Ben", "Chika", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kavya", "Liam"),
    *("Mei", "Noor", "Oscar", "Priya", "Quentin", "Rosa", "Samuel", "Tova", "Umar", "Vera", "Wanda", "Yusuf"),
)
OBJECTS = ("pencils", "marbles", "stickers", "apples", "buttons", "postcards", "seashells", "badges", "coins")
GOODS = ("notebooks", "mugs", "lamps", "scarves", "kites", "puzzles", "plants", "posters")
DISHES = ("muffins", "bread rolls", "biscuits", "pancakes", "dumplings")
VEHICLES = ("bus", "train", "cyclist", "lorry", "ferry")

Problem = tuple[str, list[str], int]  # instruction, lines of the working, answer


def change(rng: Random) -> Problem:
    count, price, name, good = rng.randint(2, 9), rng.randint(2, 19), rng.choice(NAMES), rng.choice(GOODS)
    cost = count * price
    paid = cost + rng.randint(1, 40)
    question = (
        f"{name} buys {count} {good} at {price} dollars each and pays with {paid} dollars. "
        f"How many dollars of change does {name} get?"
    )
    return (
        question,
        [f"The {good} cost {count} * {price} = {cost}.", f"{paid} - {cost} = {paid - cost}"],
        paid - cost,
    )


def sharing(rng: Random) -> Problem:
    friends, each, name, thing = (
        rng.randint(2, 12),
        rng.randint(5, 30),
        rng.choice(NAMES),
        rng.choice(OBJECTS),
    )
    total, lost = friends * each, rng.randint(1, 4)
    question = (
        f"{name} shares {total} {thing} equally among {friends} friends. "
        f"Then every friend loses {lost} of them. How many {thing} does each friend have now?"
    )
    lines = [f"Each friend gets {total} / {friends} = {each}.", f"{each} - {lost} = {each - lost}"]
    return question, lines, each - lost


def times_as_many(rng: Random) -> Problem:
    first, factor, thing = rng.randint(3, 60), rng.randint(2, 6), rng.choice(OBJECTS)
    one, other = rng.sample(NAMES, 2)
    second = first * factor
    question = (
        f"{one} has {first} {thing}. {other} has {factor} times as many. "
        f"How many {thing} do {one} and {other} have together?"
    )
    lines = [f"{other} has {first} * {factor} = {second}.", f"{first} + {second} = {first + second}"]
    return question, lines, first + second


def journey(rng: Random) -> Problem:
    speed, hours, rest, vehicle = (
        rng.randint(12, 95),
        rng.randint(2, 8),
        rng.randint(5, 90),
        rng.choice(VEHICLES),
    )
    so_far = speed * hours
    question = (
        f"A {vehicle} covers {speed} kilometres an hour for {hours} hours and then another {rest}. "
        f"How many kilometres is that in all?"
    )
    lines = [f"In {hours} hours: {speed} * {hours} = {so_far}.", f"{so_far} + {rest} = {so_far + rest}"]
    return question, lines, so_far + rest


def savings(rng: Random) -> Problem:
    weekly, weeks, name = rng.randint(4, 25), rng.randint(4, 20), rng.choice(NAMES)
    saved = weekly * weeks
    spent = rng.randint(1, saved - 1)
    question = (
        f"{name} saves {weekly} dollars every week for {weeks} weeks and then spends {spent} on a present. "
        f"How many dollars are left?"
    )
    lines = [f"{name} saves {weekly} * {weeks} = {saved}.", f"{saved} - {spent} = {saved - spent}"]
    return question, lines, saved - spent


def bakery(rng: Random) -> Problem:
    trays, per_tray, dish = rng.randint(4, 15), rng.randint(6, 24), rng.choice(DISHES)
    baked = trays * per_tray
    morning = rng.randint(1, baked // 2)
    afternoon = rng.randint(1, baked // 3)
    left = baked - morning - afternoon
    question = (
        f"A baker fills {trays} trays with {per_tray} {dish} each, sells {morning} in the morning "
        f"and {afternoon} in the afternoon. How many {dish} remain?"
    )
    lines = [
        f"The baker makes {trays} * {per_tray} = {baked}.",
        f"After the morning: {baked} - {morning} = {baked - morning}.",
        f"{baked - morning} - {afternoon} = {left}",
    ]
    return question, lines, left


def discount(rng: Random) -> Problem:
    percent, price, good = rng.choice((5, 10, 20, 25, 40, 50)), 20 * rng.randint(1, 45), rng.choice(GOODS)
    off = price * percent // 100  # whole: prices are multiples of 20, percentages of 5
    question = (
        f"A box of {good} costs {price} dollars. In a sale its price is reduced by {percent} percent. "
        f"How many dollars does it cost in the sale?"
    )
    lines = [f"The reduction is {price} * {percent} / 100 = {off}.", f"{price} - {off} = {price - off}"]
    return question, lines, price - off


def fence(rng: Random) -> Problem:
    length, width, price, name = rng.randint(5, 40), rng.randint(3, 30), rng.randint(2, 15), rng.choice(NAMES)
    half, around = length + width, 2 * (length + width)
    question = (
        f"{name}'s rectangular garden is {length} metres long and {width} metres wide. "
        f"A fence costs {price} dollars a metre. How many dollars does a fence around the garden cost?"
    )
    lines = [
        f"One long and one short side: {length} + {width} = {half}.",
        f"All around: 2 * {half} = {around}.",
        f"{around} * {price} = {around * price}",
    ]
    return question, lines, around * price


def ages(rng: Random) -> Problem:
    age, gap, years = rng.randint(12, 60), rng.randint(1, 10), rng.randint(2, 20)
    one, other = rng.sample(NAMES, 2)
    word, sign = rng.choice((("older", 1), ("younger", -1)))
    now = age + sign * gap
    question = (
        f"{one} is {age} years old. {other} is {gap} years {word} than {one}. How old will {other} be in {years} years?"
    )
    lines = [
        f"{other} is {age} {'+' if sign > 0 else '-'} {gap} = {now} now.",
        f"{now} + {years} = {now + years}",
    ]
    return question, lines, now + years


def reading(rng: Random) -> Problem:
    monday, more, name = rng.randint(8, 60), rng.randint(2, 30), rng.choice(NAMES)
    tuesday = monday + more
    both = monday + tuesday
    pages = both + rng.randint(10, 200)
    question = (
        f"{name} reads {monday} pages of a {pages}-page book on Monday "
        f"and {more} pages more than that on Tuesday. How many pages remain?"
    )
    lines = [
        f"On Tuesday: {monday} + {more} = {tuesday}.",
        f"On both days: {monday} + {tuesday} = {both}.",
        f"{pages} - {both} = {pages - both}",
    ]
    return question, lines, pages - both


def packing(rng: Random) -> Problem:
    size, boxes, thing = rng.randint(4, 24), rng.randint(3, 40), rng.choice(OBJECTS)
    total = size * boxes
    question = f"A box holds {size} {thing}. How many boxes are needed for {total} {thing}?"
    return question, [f"{total} / {size} = {boxes}"], boxes


def average(rng: Random) -> Problem:
    mean, first, second, name = (
        rng.randint(55, 70),
        rng.randint(30, 75),
        rng.randint(30, 75),
        rng.choice(NAMES),
    )
    third = 3 * mean - first - second  # 15 to 150; the mean is whole by construction
    total = 3 * mean
    question = f"{name} scores {first}, {second} and {third} points in three games. What is the average score?"
    lines = [
        f"Two games: {first} + {second} = {first + second}.",
        f"All three: {first + second} + {third} = {total}.",
        f"{total} / 3 = {mean}",
    ]
    return question, lines, mean


KINDS: tuple[Callable[[Random], Problem], ...] = (
    *(change, sharing, times_as_many, journey, savings, bakery),
    *(discount, fence, ages, reading, packing, average),
)


def generate(count: int, seed: int) -> list[dict[str, str]]:
    """`count` different problems, kinds in turn; a longer list starts with the shorter one.

    Raises ValueError if count is negative or more than there are problems.
    """
    if count < 0:
        raise ValueError(f"the number of problems is {count}; it must not be negative")
    rng = Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    draws = 0
    while len(rows) < count:
        instruction, lines, answer = KINDS[draws % len(KINDS)](rng)
        draws += 1
        if draws > 10 * count + 1000:
            raise ValueError(f"cannot make {count} different problems; ask for fewer")
        if instruction not in seen:
            seen.add(instruction)
            rows.append({"instruction": instruction, "response": "\n".join([*lines, f"#### {answer}"])})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write train.jsonl and eval.jsonl: arithmetic problems.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--train", type=int, default=512, help="problems in train.jsonl (default 512)")
    parser.add_argument("--eval", type=int, default=64, help="problems in eval.jsonl (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.train < 1 or arguments.eval < 1:
        parser.error("--train and --eval must be at least 1")
    try:
        rows = generate(arguments.train + arguments.eval, arguments.seed)
        folder = Path(arguments.output_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.jsonl", rows[: arguments.train])
        write(folder / "eval.jsonl", rows[arguments.train :])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
