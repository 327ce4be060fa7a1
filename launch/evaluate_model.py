"""Evaluates a model: its loss and right answers on a dataset, or lm-eval's tasks.

    python launch/evaluate_model.py --model outputs/run1 --dataset_name test.jsonl --eval_exact_match
    python launch/evaluate_model.py --model outputs/run1 --tasks gsm8k,hellaswag --num_fewshot 5 [-- lm-eval's own]

--model is a Hugging Face folder or hub name, of a model or of a LoRA adapter, or a run's folder: its model/, else its
adapter/. Rows are read as train.py reads them for SFT; what the command line leaves open is as in the run's run.json.
One process; results on stdout and in --output_path, progress on stderr. A mistake ends in one line, exit code 2.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import command_line
from hdpissa.launch.common.hub import check_model, reading
from hdpissa.launch.evaluation import rows as evaluate_rows
from hdpissa.launch.evaluation.rows import Question
from hdpissa.launch.training.alpaca import IGNORE

TASKS = ("num_fewshot", "limit")  # options that only --tasks reads
ANSWERS = ("eval_max_samples", "max_new_tokens")  # that only --eval_exact_match reads


@dataclass(frozen=True)
class Located:
    """A model on disk or on the hub.

    Attributes:
        folder: what transformers loads. base: of an adapter, the model it belongs to.
        run: run.json of the run that made it; empty where there is none.
    """

    folder: str
    base: str | None
    run: dict[str, Any]


# --- the command line ------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, those about data only where they are given; the words after --, for lm-eval); ConfigError."""
    parser = command_line.PlainParser(
        prog="hdpissa evaluate",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--model", required=True, help="a run's folder, a model's, a LoRA adapter's, or a hub name")
    add("--batch_size", default="8", help="rows at a time (8); with --tasks also lm-eval's auto, auto:N")
    add("--device", default=None, help="cpu, cuda:1, …; default: the GPUs, where there are some")
    add("--output_path", default=None, help="folder for evaluation.json and answers.jsonl, or for lm-eval's results")
    add("--trust_remote_code", action="store_true", default=False, help="run code that comes with the model")
    add(
        "--eval_exact_match",
        action="store_true",
        help="answer the rows' questions, and count the right answers",
    )
    add("--eval_max_samples", type=int, help="number of questions, the first ones; default: all")
    add("--max_new_tokens", type=int, help="length of an answer (256)")
    add("--tasks", default=None, help="lm-eval's tasks, with commas between them")
    add("--num_fewshot", type=int, help="lm-eval: examples in a prompt; default: the task's")
    add("--limit", type=float, help="lm-eval: rows of a task, or a share of them")
    data = parser.add_argument_group("data", "as train.py's; default: those of the run")
    add = data.add_argument
    truth: dict[str, Any] = {"type": _truth, "choices": (True, False), "nargs": "?", "const": True}
    add("--dataset_name", help="file, folder or hub name; default: the run's evaluation rows")
    add("--dataset_config", help="configuration of a hub dataset")
    add("--dataset_revision", help="branch, tag or commit of a hub dataset")
    add("--dataset_split", dest="dataset_train_split", help="also test[:100] (train)")
    add("--prompt_field", help="column of prompts (instruction)")
    add("--response_field", help="column of answers (response)")
    add("--prompt_template", help="alpaca, none, a file, or text with {instruction}")
    add("--dataset_text_field", help="column of plain text (text)")
    add("--max_length", type=int, help="tokens at which a row is cut (512)")
    add("--completion_only_loss", **truth, help="whether only answers carry loss (where rows have both)")
    add("--assistant_only_loss", **truth, help="whether only the assistant's words carry loss")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    check(args, argv[cut + 1 :])
    return args, argv[cut + 1 :]


def _truth(word: str) -> Any:
    return json.loads(word.lower())


def check(args: argparse.Namespace, more: list[str]) -> None:
    """Raises ConfigError for options that are out of range, or have no effect."""
    given = set(vars(args))
    of_data = given & {*evaluate_rows.OPTIONS, *ANSWERS, "eval_exact_match"}
    if args.tasks and of_data:
        raise ConfigError(f"--{min(of_data)} with --tasks: lm-eval reads its own rows; leave one of them out")
    if not args.tasks and (unread := more or [f"--{name}" for name in TASKS if name in given]):
        raise ConfigError(f"{unread[0]} is for lm-eval: give --tasks, or leave it out")
    if "eval_exact_match" not in given and given & {*ANSWERS}:
        raise ConfigError(f"--{min(given & {*ANSWERS})} has no effect without --eval_exact_match")
    if not args.tasks and not (args.batch_size.isdecimal() and int(args.batch_size)):
        raise ConfigError(f"--batch_size is {args.batch_size}: must be a number of rows")
    command_line.at_least(args, 1, *given & {*ANSWERS, "max_length"})


def locate(name: str) -> Located:
    """The model or adapter of this name; ConfigError where there is none."""
    from transformers.utils.peft_utils import find_adapter_config_file

    path, folder = Path(name).expanduser(), name
    run: dict[str, Any] = {}
    if path.is_dir():
        folders, files = (path, path / "model", path / "adapter"), ("config.json", "adapter_config.json")
        found = [place for place in folders if any((place / name).is_file() for name in files)]
        if not found:
            raise ConfigError(
                f"--model {name}: holds no model and no adapter; make one of a checkpoint with hdpissa export"
            )
        folder = str(found[0])
        file = (path.parent if found[0] == path else path) / "run.json"
        run = reading("--model", name, lambda: json.loads(file.read_text())) if file.is_file() else {}
    else:
        check_model("--model", name)
    adapter = reading("--model", name, lambda: find_adapter_config_file(folder))
    base = None
    if adapter:
        base = reading("--model", name, lambda: json.loads(Path(adapter).read_text())["base_model_name_or_path"])
    if base and importlib.util.find_spec("peft") is None:
        raise ConfigError(f"--model {name}: an adapter needs peft, which is not installed: pip install peft")
    return Located(folder, base, run)


# --- a dataset -------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, found: Located, scratch: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures of the model on the rows, the graded answers); each figure is printed as soon as it is known."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hdpissa.launch.training.rows import read_rows

    arguments = evaluate_rows.arguments(args, found.run, scratch)
    trust = {"trust_remote_code": args.trust_remote_code}
    config = reading("--model", args.model, lambda: AutoConfig.from_pretrained(found.base or found.folder, **trust))
    tokenizer = read_tokenizer(args, found)
    rows = read_rows(arguments, tokenizer)
    tokens, collate, positions = evaluate_rows.prepare(arguments, rows.train, tokenizer, config)
    limits = {"batch_size": int(args.batch_size), "max_new_tokens": vars(args).get("max_new_tokens", 256)}
    questions = []
    if "eval_exact_match" in args:  # the last token of an answer needs no position
        longest = math.inf if positions is None else positions + 1 - limits["max_new_tokens"]
        questions = evaluate_rows.questions(arguments, rows, tokenizer, vars(args).get("eval_max_samples"), longest)
    place = {"device_map": args.device or "auto", "dtype": "auto"}  # of an adapter the base, too
    read = functools.partial(AutoModelForCausalLM.from_pretrained, found.folder, **place, **trust)
    model = reading("--model", args.model, read).eval()
    dtype, dataset = str(model.dtype).removeprefix("torch."), arguments.script.dataset_name
    print(f"{found.folder}, {dtype} on {model.device}; {len(tokens)} rows of {dataset}", flush=True)
    figures: dict[str, Any] = {"model": found.folder, "base": found.base, "dataset": dataset, "dtype": dtype}
    loss, count = mean_loss(model, tokens, collate, limits["batch_size"])
    figures |= _print({"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "eval_tokens": count})
    if not questions:
        return figures, []
    graded = answer(model, tokenizer, questions, rows.chat, limits)
    right = sum(row["right"] for row in graded) / len(graded)
    return figures | limits | _print({"eval_exact_match": right, "eval_samples": len(graded)}), graded


def _print(figures: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{name} {value:.8g}" for name, value in figures.items()), flush=True)
    return figures


def read_tokenizer(args: argparse.Namespace, found: Located) -> Any:
    """The model's; of an adapter without one, the base's."""
    from transformers import AutoTokenizer

    bare = found.base and Path(found.folder).is_dir() and not any(Path(found.folder).glob("tokenizer*"))
    name = found.base if bare else found.folder
    read = functools.partial(AutoTokenizer.from_pretrained, name, trust_remote_code=args.trust_remote_code)
    tokenizer = reading("--model", args.model, read)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def mean_loss(model: Any, rows: Any, collate: Any, batch_size: int) -> tuple[float, int]:
    """(cross entropy per target token of all rows, number of target tokens)."""
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    total, count = 0.0, 0
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])  # like lengths together; the largest batch first
    for start in tqdm(range(0, len(order), batch_size), desc="loss", unit="batch", mininterval=1):
        batch = collate([rows[row] for row in order[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**batch, use_cache=False).logits[:, :-1]
            labels = labels.to(logits.device)
            total += cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").item()
        count += int((labels != IGNORE).sum())
    return total / max(count, 1), count


def answer(model: Any, tokenizer: Any, questions: list[Question], chat: bool, limits: dict[str, int]) -> list[dict]:
    """The model's greedy answers, each with its prompt, the row's own answer, its result, and whether it is right.

    Args:
        chat: whether an answer ends where the chat template ends a turn, too.
        limits: `batch_size` and `max_new_tokens`.
    """
    import torch
    from tqdm import tqdm

    from hdpissa.launch.common import generation
    from hdpissa.launch.evaluation import answers
    from hdpissa.launch.training.results import end_of_turn

    if chat:
        generation.add_stops(model, tokenizer, end_of_turn(tokenizer))
    order = sorted(range(len(questions)), key=lambda row: -len(questions[row].ids))
    found: dict[int, str] = {}
    size = limits["batch_size"]
    for start in tqdm(range(0, len(order), size), desc="answers", unit="batch", mininterval=1):
        chosen = order[start : start + size]
        prompts = [questions[row].ids for row in chosen]
        with torch.inference_mode():
            texts = generation.generate(model, tokenizer, prompts, **limits, device=model.device)
        found |= dict(zip(chosen, texts, strict=True))
    return [
        {
            "prompt": question.text,
            "reference": question.reference,
            "answer": found[row],
            "result": answers.extract(found[row]),
            "right": answers.is_right(found[row], question.reference),
        }
        for row, question in enumerate(questions)
    ]


# --- lm-eval ---------------------------------------------------------------------------------------


def lm_eval_command(args: argparse.Namespace, found: Located, more: list[str]) -> list[str]:
    """lm-eval's command line, as its users would type it; ConfigError where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('--tasks needs lm-eval, which is not installed: pip install "lm-eval[hf]"')
    model: dict[str, str] = {"pretrained": found.base or found.folder, "dtype": "auto"}
    if found.base:
        model["peft"] = found.folder
        if any(Path(found.folder).glob("tokenizer*")):  # which has the template that was trained with
            model["tokenizer"] = found.folder
    if args.trust_remote_code:
        model["trust_remote_code"] = "True"
    if any("," in value for value in model.values()):
        raise ConfigError(f"--model {args.model}: lm-eval takes no comma in a name; rename the folder")
    options: dict[str, Any] = {"model": "hf", "model_args": ",".join(f"{key}={value}" for key, value in model.items())}
    options |= {name: vars(args).get(name) for name in ("tasks", *TASKS, "batch_size", "device", "output_path")}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    # -P: neither this folder nor the current one answers in place of a package that lm-eval imports
    return [sys.executable, "-P", "-m", "lm_eval", *words, *more]


def main(argv: list[str] | None = None) -> int:
    args, more = parse(list(sys.argv[1:] if argv is None else argv))
    found = locate(args.model)
    if args.tasks:
        return subprocess.run(lm_eval_command(args, found, more), check=False).returncode
    if args.device:
        import torch

        reading("--device", args.device, lambda: torch.zeros(1, device=args.device).tolist())
    output = args.output_path and Path(args.output_path).expanduser()
    if output:
        reading("--output_path", str(output), lambda: output.mkdir(parents=True, exist_ok=True))
    with tempfile.TemporaryDirectory(prefix="hdpissa-") as scratch:
        figures, graded = evaluate(args, found, scratch)
    if output:
        (output / "evaluation.json").write_text(json.dumps(figures) + "\n")
        if graded:
            (output / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
