"""Evaluates a trained model: with lm-eval's tasks, or on a dataset, by loss and right answers.

    python launch/evaluate.py --model outputs/run1 --tasks gsm8k,hellaswag --num_fewshot 5 --limit 100
    python launch/evaluate.py --model outputs/run1 --dataset_name test.jsonl --eval_exact_match

`--model` is a run's output folder, its model/ or adapter/, a checkpoint (which is exported to a temporary folder
first), or any Hugging Face folder or hub name. A dataset is read as the run read its own (template, columns, lengths
from run.json), unless the command line says otherwise; without one it is the run's evaluation set. What stands after
`--` is handed to lm-eval as it is. One process; what a person can get wrong: one line, exit code 2.
"""

from __future__ import annotations

import sys

if __name__ == "evaluate":
    # A script of launch/ has this folder first on sys.path; whoever imports PyPI's `evaluate` there must get that.
    sys.path[:] = [folder for folder in sys.path if f"{folder}/evaluate.py" != __file__]
    del sys.modules["evaluate"]
    __import__("evaluate")

import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import command_line, help_pages, options_data
from hdpissa.launch.command_line import at_least, check_paths, option
from hdpissa.launch.options_data import DataOptions, ReadingOptions
from hdpissa.launch.options_training import TrainingOptions

INSTALL = 'pip install "lm-eval[hf]"'


@dataclass
class EvaluateOptions:
    """What is evaluated, and how."""

    model: str = option("", "a run's folder, model/, adapter/, a checkpoint, a Hugging Face folder or hub name")
    tasks: str | None = option(None, "lm-eval's tasks, with commas between them")
    num_fewshot: int | None = option(None, "examples in lm-eval's prompts; default: the task's")
    limit: float | None = option(None, "rows per task, or their share, for a quick look (lm-eval)")
    batch_size: str = option("8", "rows at a time; with --tasks also lm-eval's auto, or auto:N")
    eval_exact_match: bool = option(False, "ask the rows of the dataset, too, and count the right answers")
    eval_max_samples: int | None = option(None, "rows that are asked, the first ones; default: all")
    max_new_tokens: int = option(256, "length of an answer; evaluations within a run have 128 unless told")
    output_path: str | None = option(None, "folder for the results")
    device: str | None = option(None, "cpu, cuda, cuda:1, …; default: the GPUs, where there are some")
    trust_remote_code: bool = option(False, "run model code that comes with the model")


@dataclass
class EvaluateArguments(ReadingOptions, EvaluateOptions):
    """Evaluates a trained model, with lm-eval's tasks or on a dataset."""


SECTIONS: dict[str, type] = {"evaluate": EvaluateOptions, "data": ReadingOptions}
HELP = help_pages.Page(
    "Evaluates a trained model: with lm-eval's tasks, or on a dataset, by loss and right answers.",
    (
        "hdpissa evaluate --model outputs/run1 --tasks gsm8k,hellaswag --num_fewshot 5 --limit 100 [-- lm-eval's own]",
        "hdpissa evaluate --model outputs/run1 --dataset_name test.jsonl --eval_exact_match",
        "",
        "What is not given is read from the run's run.json, where the model comes from a run.",
    ),
    ("model",),
)


@dataclass(frozen=True)
class Located:
    """A model on disk or on the hub.

    Attributes:
        folder: to load. base: of an adapter, the model that it belongs to.
        run: arguments of the run that made it, by run.json; empty where that is not there.
        checkpoint: it has to be exported from there first.
    """

    folder: str
    base: str | None
    run: dict[str, Any]
    checkpoint: Path | None = None

    def __str__(self) -> str:
        if self.checkpoint is not None:
            return f"checkpoint {self.checkpoint}"
        return f"{self.folder} (an adapter) on {self.base}" if self.base else self.folder


# --- which model -----------------------------------------------------------------------------------


def locate(name: str) -> Located:
    """Finds out what a folder holds; ConfigError where it holds no model."""
    from hdpissa.engine import folders
    from hdpissa.engine.checkpoint_format import MANIFEST

    path = Path(name)
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(f"--model {name}: no such folder; give a run's folder, a model's, or a hub name")
        return Located(name, None, {})
    if (path / MANIFEST).is_file():
        return Located(str(path), None, _arguments(path.parent), path)
    for folder, run in ((path, path.parent), (path / "model", path), (path / "adapter", path)):
        if (folder / "adapter_config.json").is_file():
            return Located(str(folder), _base_of(folder), _arguments(run))
        if (folder / "config.json").is_file():
            return Located(str(folder), None, _arguments(run))
    best = folders.best(path)
    found = [path / best] if best and (path / best / MANIFEST).is_file() else folders.candidates(path)
    if not found:
        raise ConfigError(f"--model {name}: holds no model, no adapter and no checkpoint; give a folder that does")
    return Located(str(found[0]), None, _arguments(path), found[0])


def _base_of(adapter: Path) -> str:
    try:
        named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if not named or not isinstance(named, str):
        raise ConfigError(f"--model {adapter}: its adapter_config.json names no base_model_name_or_path; mend it")
    return named


def _arguments(run: Path) -> dict[str, Any]:
    """The arguments of a run; none where there is no run.json."""
    try:
        return dict(json.loads((run / "run.json").read_text())["arguments"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# --- the command line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is asked for, beside the arguments.

    Attributes:
        given: options that stand on the command line. What the run has set may be of its training rows alone.
        sets: for each dataset the options that may have one value for each.
        more: what is lm-eval's own.
    """

    given: frozenset[str]
    sets: list[dict[str, str | None]]
    more: list[str]


def parse(argv: list[str]) -> tuple[EvaluateArguments, Located, Request]:
    """(arguments, filled up with the run's; the model; the rest).

    Raises:
        ConfigError: what does not fit.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    if help_pages.answered(argv[:cut], SECTIONS, HELP):
        raise SystemExit(0)
    parser = command_line.make_parser(SECTIONS)
    values, given = command_line.read(parser, argv[:cut], OF_A_RUN)
    if not values["model"]:
        raise ConfigError("missing --model; see --help")
    check_paths(known := SimpleNamespace(**values), "model", "output_path")
    values = vars(known)
    found = locate(values["model"])
    inherited = _as_in_the_run(found.run, given)
    args = EvaluateArguments(**(values | inherited))
    options_data.check_reading(args)
    check_use(args, given)
    check_batch_size(args)
    at_least(args, 1, "max_new_tokens", "eval_max_samples")
    at_least(args, 0, "num_fewshot", "limit")
    more = argv[cut + 1 :]
    if more and not args.tasks:
        raise ConfigError(f"-- {more[0]}: what stands after -- is for lm-eval; give --tasks, or leave it out")
    if not args.tasks and not args.dataset_name:
        why = "its run had no evaluation set" if found.run else "no run.json beside it names evaluation rows"
        raise ConfigError(f"--model {args.model}: {why}; give --tasks, or --dataset_name")
    sets = [] if args.tasks else options_of_sets(args, given, found.run)
    return args, found, Request(frozenset(given), sets, more)


# Options of train.py that have another name here.
OF_A_RUN = {
    "eval_dataset_name": "use --dataset_name", "eval_split": "use --dataset_split", "model_name_or_path": "use --model",
    "per_device_eval_batch_size": "use --batch_size",
}  # fmt: skip
# Options that only one of the two ways to evaluate reads; reading data is of the second.
OF_LM_EVAL = ("num_fewshot", "limit")
OF_ANSWERS = ("eval_max_samples", "max_new_tokens")


def check_use(args: EvaluateArguments, given: Collection[str]) -> None:
    """Raises ConfigError for an option that would count for nothing."""
    of_data = (*OF_ANSWERS, "eval_exact_match", *(f.name for f in fields(ReadingOptions)))
    unread = next((name for name in (of_data if args.tasks else OF_LM_EVAL) if name in given), None)
    if unread and args.tasks:
        raise ConfigError(f"--{unread} is of a dataset, and with --tasks lm-eval reads its own; leave one of them out")
    if unread:
        raise ConfigError(
            f"--{unread} is lm-eval's, with --tasks; of a dataset take a part, as in --dataset_split 'test[:100]'"
        )
    unread = next((name for name in OF_ANSWERS if name in given), None)
    if unread and not args.eval_exact_match:
        raise ConfigError(f"--{unread} without --eval_exact_match: nothing is asked; give that, too, or leave it out")


def check_batch_size(args: EvaluateArguments) -> None:
    """Raises ConfigError for what is neither a number of rows nor, with --tasks, lm-eval's word for finding one."""
    said = args.batch_size
    automatic = re.fullmatch(r"auto(:[1-9]\d*)?", said) is not None
    if automatic and not args.tasks:
        raise ConfigError(f"--batch_size is {said}: it is lm-eval that finds one, with --tasks; give a number")
    if not automatic and not re.fullmatch(r"[-+]?\d{1,9}", said):
        raise ConfigError(f"--batch_size is {said[:20]}: must be a number, or auto or auto:N with --tasks")
    if not automatic and int(said) < 1:
        raise ConfigError(f"--batch_size is {said}: must be at least 1")


def options_of_sets(
    args: EvaluateArguments, on_command_line: set[str], run: dict[str, Any]
) -> list[dict[str, str | None]]:
    """For each dataset its own format, columns and so on: those of the command line, else those of the run.

    As in the run these are, of its evaluation rows, what it read them by; of one of its training sets, that set's; of
    another, what all its training sets have in common. Of a set that only the command line names the run's columns may
    be true; its revision, say, cannot.
    """
    from hdpissa.engine.data_sources import parse_sources
    from hdpissa.launch import train_sets as data

    trained = parse_sources(run["dataset_name"]) if run.get("dataset_name") else []
    said = any(
        name in on_command_line or run.get(name) not in (None, getattr(DataOptions, name)) for name in data.FIELDS
    )
    there = data.spread_options(run, len(trained), fields_given=said) if trained else []
    held_out = data.eval_sets(run, trained, there)
    if "dataset_name" in on_command_line:
        sources = parse_sources(args.dataset_name)
        sets = [*trained, *(source for source, _ in held_out)]
        own = [*there, *(options for _, options in held_out)]
        other = data.common_options(there) | dict.fromkeys(data.OF_ONE_SET)
        split = {"dataset_split": args.dataset_split}
        found = [(known or other) | split for known in data.options_by_name(sources, sets, own)]
    else:
        args.dataset_name = " ".join(str(source) for source, _ in held_out)
        found = [options for _, options in held_out]
    for name in on_command_line & set(data.PER_SOURCE):
        for options, value in zip(found, data.own_values(name, getattr(args, name), len(found)), strict=True):
            options[name] = value
    return found


def _as_in_the_run(run: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The run's own way to read data, without what the command line says; its evaluation set if that names no other."""
    from hdpissa.launch.train_sets import OF_ONE_SET

    known = {f.name for f in fields(ReadingOptions)}
    values = {name: value for name, value in run.items() if name in known and name not in given}
    if is_gone(values.get("chat_template")):  # the tokenizer beside the model has it
        values["chat_template"] = "tokenizer"
    if "dataset_name" in given:
        return {name: value for name, value in values.items() if name not in OF_ONE_SET}
    held_out = bool(run.get("eval_dataset_name") or run.get("eval_split"))
    values["dataset_name"] = (run.get("eval_dataset_name") or _names(run.get("dataset_name"))) if held_out else ""
    if "dataset_split" not in given:
        values["dataset_split"] = run.get("eval_split") or "train"
    return values


def is_gone(chat_template: str | None) -> bool:
    """Whether it is the name of a file that is not there any more."""
    is_text = chat_template in (None, "", "tokenizer") or "{{" in str(chat_template) or "{%" in str(chat_template)
    return not is_text and not os.path.isfile(os.path.expanduser(str(chat_template)))


def _names(sets: str | None) -> str:
    """Of training sets with numbers of rows the names alone: of their evaluation split all rows count."""
    from hdpissa.engine.data_sources import parse_sources

    return " ".join(source.name for source in parse_sources(sets)) if sets else ""


# --- lm-eval ---------------------------------------------------------------------------------------


def refuse_without_lm_eval() -> None:
    """ConfigError with how to install it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-eval, which is not installed: {INSTALL}")


def lm_eval_command(args: EvaluateArguments, folder: str, base: str | None, more: list[str]) -> list[str]:
    """lm-eval's command line, as its users would type it."""
    model = {"pretrained": base or folder, "dtype": "auto"}
    model |= {"peft": folder} if base else {}
    if base and (Path(folder) / "tokenizer_config.json").is_file():  # which has the template that was trained with
        model["tokenizer"] = folder
    model |= {"trust_remote_code": "True"} if args.trust_remote_code else {}
    if any("," in value for value in model.values()):
        raise ConfigError(f"--model {args.model}: lm-eval takes no comma in a name; rename the folder")
    options = {
        "--model": "hf",
        "--model_args": ",".join(f"{key}={value}" for key, value in model.items()),
        "--tasks": args.tasks,
        "--num_fewshot": args.num_fewshot,
        "--limit": args.limit,
        "--batch_size": args.batch_size,
        "--device": args.device,
        "--output_path": args.output_path,
    }
    words = [word for name, value in options.items() if value is not None for word in (name, f"{value}")]
    # -P: neither this folder nor the current one answers in place of a package that lm-eval imports
    return [sys.executable, "-P", "-m", "lm_eval", *words, *more]


# --- wiring ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    from hdpissa.launch import evaluate_dataset, evaluate_model, evaluate_results

    args, found, request = parse(list(sys.argv[1:] if argv is None else argv))
    if args.tasks:
        refuse_without_lm_eval()
    else:
        evaluate_results.check_folder(args.output_path)
        evaluate_model.check_device(args.device)
    with tempfile.TemporaryDirectory(prefix="hdpissa-") as scratch:
        folder = found.folder
        if found.checkpoint is not None:
            from hdpissa.launch.export_checkpoint import export, open_checkpoint
            from hdpissa.launch.export_template import lost_template

            folder = f"{scratch}/model"
            reader = open_checkpoint(str(found.checkpoint))
            print(export(reader, Path(folder), format="hf"))
            if lost := lost_template(reader.manifest.client_state):
                print(f"warning: {lost}", file=sys.stderr)
        if args.tasks:
            code = subprocess.run(lm_eval_command(args, folder, found.base, request.more), check=False).returncode
            if code:
                raise SystemExit(code)
        else:
            print(f"model: {found}", flush=True)
            seed = found.run.get("seed", TrainingOptions.seed)
            figures, answers = evaluate_dataset.evaluate(args, request, folder, found.base, seed=seed)
            if args.output_path:
                known = {"model": args.model, "evaluated": str(found), "dataset": args.dataset_name}
                evaluate_results.write(args.output_path, known | figures, answers)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
