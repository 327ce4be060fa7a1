"""The options of the published reference code (GitHub MuLabPKU/HD-PiSSA), understood by train.py.

Most are other names for the same. Where something else was meant, the value is converted and a note says so;
what cannot be meant here is refused. docs/coming-from-the-reference.md has the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hdpissa.engine.errors import ConfigError

SAME = {
    "model_path": "model_name_or_path",
    "output_path": "output_dir",
    "data_path": "dataset_name",
    "data_split": "dataset_split",
    "ranks_per_gpu": "r",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
}
CONVERTED = ("accumulation_steps", "dataset_field", "schedule", "alpha", "dropout", "world_size")
NAMES = (*SAME, *CONVERTED)


def translate(argv: list[str], processes: int | None) -> tuple[list[str], list[str]]:
    """(a command line with our names, notes for the user).

    Args:
        processes: how many take part in the run; None while nobody knows.

    Raises:
        ConfigError: a value that cannot be meant here, or one setting under two names.
    """
    kept: list[str] = []
    found: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, joined, value = word.partition("=")
        if name.startswith("--") and name[2:] in NAMES:
            given = value if joined else next(words, None)
            if given is None:
                raise ConfigError(f"command line: {name} has no value; see --help")
            found[name[2:]] = given
        elif kept and kept[-1] == "--target_modules":  # theirs are one text, ours several words
            kept += word.split()
        else:
            kept.append(word)
    ours, notes = convert(found, {word.split("=")[0].removeprefix("--") for word in kept}, processes)
    return [*kept, *(text for name, value in ours.items() for text in (f"--{name}", str(value)))], notes


def rename(content: dict[str, Any], processes: int | None) -> list[str]:
    """`translate` for the keys of a YAML file, in place; returns the notes."""
    theirs = {name: content.pop(name) for name in NAMES if name in content}
    ours, notes = convert(theirs, content.keys(), processes)
    content |= ours
    if isinstance(content.get("target_modules"), str):
        content["target_modules"] = content["target_modules"].split()
    return notes


def convert(
    theirs: Mapping[str, Any], given: Collection[str], processes: int | None
) -> tuple[dict[str, Any], list[str]]:
    """(settings under our names, notes), for a mapping that has the reference's names alone.

    Args:
        given: our names that are set beside them.
    """
    ours = {SAME[name]: value for name, value in theirs.items() if name in SAME}
    origin = {SAME[name]: name for name in theirs if name in SAME}
    notes: list[str] = []
    for name in theirs.keys() & set(CONVERTED):
        values, note = _converted(name, str(theirs[name]), theirs, processes)
        ours |= values
        origin |= dict.fromkeys(values, name)
        notes += [note] if note else []
    twice = next((name for name in ours if name in given), None)
    if twice:
        raise ConfigError(f"--{origin[twice]} and --{twice} mean the same; keep one of them")
    return ours, sorted(notes)


def _converted(name: str, text: str, theirs: Mapping[str, Any], processes: int | None) -> tuple[dict[str, Any], str]:
    match name:
        case "accumulation_steps":
            return _accumulation(_number(name, text, whole=True), processes)
        case "world_size":
            return _world_size(_number(name, text, whole=True), processes)
        case "dataset_field":
            fields = text.split()
            if len(fields) != 2:
                raise ConfigError(
                    f'--dataset_field is "{text}": must be two columns, prompt and answer, "query response"'
                )
            return {"prompt_field": fields[0], "response_field": fields[1]}, ""
        case "schedule":
            if text not in ("cosine", "linear"):
                raise ConfigError(
                    f"--schedule is {text}: must be one of cosine, linear; see --lr_scheduler_type for more"
                )
            return {"lr_scheduler_type": text}, ""
        case "dropout":
            if _number(name, text) != 0:
                raise ConfigError(f"--dropout is {text}: must be 0, slices have no dropout; leave it out")
            return {}, ""
        case _:
            return _alpha(_number(name, text), theirs)


def _number(name: str, text: str, *, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or (whole and (value != int(value) or value < 1)):
        rule = "a whole number of at least 1" if whole else "a number"
        raise ConfigError(f"--{name} is {text}: must be {rule}; correct it")
    return value


def _accumulation(total: float, processes: int | None) -> tuple[dict[str, Any], str]:
    """Theirs counts the micro-batches of all GPUs in a step, ours those of one process."""
    if processes is None:
        return {"gradient_accumulation_steps": int(total)}, ""
    if total % processes:
        raise ConfigError(
            f"--accumulation_steps is {total:g} with {processes} processes, over which the reference shares them out: "
            f"must be a multiple of {processes}; or use --gradient_accumulation_steps, which counts those of one"
        )
    own = int(total) // processes
    note = f"--accumulation_steps {total:g} over {processes} processes: --gradient_accumulation_steps {own}"
    return {"gradient_accumulation_steps": own}, note


def _world_size(wanted: float, processes: int | None) -> tuple[dict[str, Any], str]:
    if processes is not None and wanted != processes:
        raise ConfigError(
            f"--world_size is {wanted:g}, but the launcher has started {processes}: must be the same; start that many "
            f"(hdpissa train --num_accelerators {wanted:g}), or give --slices {wanted:g} for as many slices"
        )
    return {}, ""


def _alpha(alpha: float, theirs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """There alpha // r multiplies the gradient: nothing is left of it after Adam, unless it is 0."""
    r = _number("ranks_per_gpu", str(theirs.get("ranks_per_gpu", 1)), whole=True)
    if alpha // r < 1:
        raise ConfigError(
            f"--alpha is {alpha:g} with r = {r:g}: in the reference that trains nothing (alpha // r is 0); leave it out"
        )
    return {}, f"--alpha {alpha:g} changes nothing, as in the reference, where Adam cancels it; see --lora_alpha"
