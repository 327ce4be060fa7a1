"""Which options are of which dataset of a run: of each training set of a mix, and of each evaluation set.

Own file because it reads no rows: train.py asks before it does, and evaluate.py asks it of a run that has been.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hdpissa.engine import data_sources
from hdpissa.engine.data_files import split_parts
from hdpissa.engine.data_formats import Fields
from hdpissa.engine.data_sources import Source
from hdpissa.launch.options_data import EVAL, OF_EVALUATION

# Options that may have one value for each set of a mix.
PER_SOURCE = ("dataset_config", "dataset_revision", "dataset_split", "dataset_format", "prompt_field", "response_field")
# Those that name something inside one set, and can be true of no other.
OF_ONE_SET = ("dataset_config", "dataset_revision", "dataset_split")
FIELDS = ("prompt_field", "response_field")
WORDS = ("dataset_config", "dataset_revision", "dataset_format")  # whose values have no blanks in them


EvalSet = tuple[Source, dict[str, str | None]]  # with its own values of PER_SOURCE


def spread_options(values: Mapping[str, Any], count: int, *, fields_given: bool) -> list[dict[str, str | None]]:
    """For each of `count` sets its own values of the options that may have several.

    Args:
        fields_given: whether the prompt's or the answer's column is said; else the columns of a set speak for it.
    """
    columns = {name: own_values(name, values.get(name), count) for name in PER_SOURCE}
    if not fields_given:
        columns |= {name: [None] * count for name in FIELDS}
    return [{name: column[at] for name, column in columns.items()} for at in range(count)]


def own_values(name: str, value: str | None, count: int, *, prefix: str = "") -> list[str | None]:
    """The value of one such option for each of `count` sets. A column, or a split, may have blanks in it."""
    return data_sources.spread(value, count, f"--{prefix}{name}", blanks=name not in WORDS)


def eval_sets(
    values: Mapping[str, Any], trained: Sequence[Source], options: Sequence[dict[str, str | None]]
) -> list[EvalSet]:
    """The evaluation sets, each with its own values of PER_SOURCE: what --eval_… says, else its training set's, else
    what all training sets have in common.

    What names something inside a training set, its configuration, say, is not handed on to another set. Without
    --eval_dataset_name these are the training sets, whole, and each once: one that is named twice to have its rows
    twice has them once here.

    Args:
        options: of the training sets.
    """
    name = values.get("eval_dataset_name")
    sources = data_sources.parse_sources(name, "--eval_dataset_name") if name else [Source(s.name) for s in trained]
    other = common_options(options) | dict.fromkeys(OF_ONE_SET)
    found = [own or dict(other) for own in options_by_name(sources, trained, options)]
    if any(values.get(EVAL + name) is not None for name in FIELDS):  # of two columns that are meant, one may be said
        usual = {"prompt_field": Fields.prompt, "response_field": Fields.response}
        found = [own | {name: own[name] or usual[name] for name in FIELDS} for own in found]
    for name in OF_EVALUATION:
        if values.get(EVAL + name) is not None:
            for own, value in zip(found, own_values(name, values[EVAL + name], len(found), prefix=EVAL), strict=True):
                own[name] = value
    for own, split in zip(
        found, data_sources.spread(values.get("eval_split"), len(found), "--eval_split"), strict=True
    ):
        own["dataset_split"] = split or "train"
    pairs = list(zip(sources, found, strict=True))
    if not values.get("eval_dataset_name"):
        pairs = [pair for at, pair in enumerate(pairs) if pair not in pairs[:at]]
    return pairs


def options_by_name(
    sources: Sequence[Source], trained: Sequence[Source], options: Sequence[dict[str, str | None]]
) -> list[dict[str, str | None] | None]:
    """For each source those of the training set of its name; None where there is no such set.

    Where a name comes more than once, in both, the second is the second's: it may have another configuration.
    """
    left: dict[str, list[dict[str, str | None]]] = {}
    for source, own in zip(trained, options, strict=True):
        left.setdefault(source.name, []).append(own)
    found = []
    for source in sources:
        known = left.get(source.name)
        found.append(dict(known.pop(0) if len(known) > 1 else known[0]) if known else None)
    return found


def overlaps(
    trained: Sequence[Source],
    options: Sequence[dict[str, str | None]],
    held_out: Sequence[EvalSet],
) -> list[str]:
    """A line for each evaluation set that shares rows with a training set: a part of what is read whole, say."""
    found = []
    for source, own in held_out:
        for other, its in zip(trained, options, strict=True):
            here, there = own["dataset_split"] or "train", its["dataset_split"] or "train"
            same = data_sources.is_same(source.name, other.name) and all(
                own[name] == its[name] for name in ("dataset_config", "dataset_revision")
            )
            if same and shares(here, there):
                have = "have" if source.amount is None and other.amount is None else "may have"
                found.append(
                    f"evaluation data {source}, split {here}, {have} rows that are trained on ({other}, split "
                    f"{there}); give --dataset_split and --eval_split parts that exclude each other"
                )
    return list(dict.fromkeys(found))


def shares(split: str, other: str) -> bool:
    """Whether two parts of a set surely have rows in common, by what is said of them alone."""
    pairs = itertools.product(split_parts(split), split_parts(other))
    return any(a == b and _meet(x, y) for (a, x), (b, y) in pairs)


def _meet(part: str | None, other: str | None) -> bool:
    """Of [:80%] and [70%:], say; None is all of it. Rows against per cent: nobody knows without counting."""
    if part is None or other is None or part == other:
        return True
    if ("%" in part) != ("%" in other):
        return False
    (start, end), (other_start, other_end) = map(_rows, (part, other))
    return max(start, other_start) < min(end, other_end)


def _rows(part: str) -> tuple[int, int]:
    """Those that a part has of a set that is large."""
    from datasets import ReadInstruction

    [found] = ReadInstruction.from_spec(f"train{part}").to_absolute({"train": 10**9})
    return found.from_, found.to


def common_options(options: Sequence[dict[str, str | None]]) -> dict[str, str | None]:
    """What all training sets have in common; None where they differ."""
    values = {name: {each[name] for each in options} for name in PER_SOURCE}
    return {name: next(iter(found)) if len(found) == 1 else None for name, found in values.items()}
