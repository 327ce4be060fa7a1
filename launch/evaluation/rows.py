"""The rows of `hdpissa evaluate`: read as train.py reads them for SFT, made tokens by TRL, and turned into questions.

What the command line leaves open is as in the run that made the model.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common.hub import reading
from hdpissa.launch.training.alpaca import prompt_ids

COLUMNS = ("prompt_field", "response_field", "prompt_template")  # of ScriptArguments, as the run had them
ROWS = ("dataset_name", "dataset_config", "dataset_revision", "dataset_train_split")  # of the run's evaluation rows
READING = ("max_length", "truncation_mode", "dataset_text_field", "completion_only_loss", "assistant_only_loss")
OPTIONS = (*ROWS, *COLUMNS, *READING)


def arguments(args: argparse.Namespace, run: dict[str, Any], scratch: str) -> Any:
    """`script_arguments.Arguments` of an SFT run with these rows, the run's own where `args` leave something open.

    Raises:
        ConfigError: no rows are named; a value that TRL refuses.
    """
    import trl

    from hdpissa.launch.training.script_arguments import SFT_DEFAULTS, Arguments, ScriptArguments

    class Config(trl.SFTConfig):
        place_model_on_device = False  # type: ignore[assignment]  # it has no weights

    given, of_run = vars(args), run.get("arguments") or {}
    named: dict[str, Any] = {name: of_run.get(name) for name in COLUMNS if of_run.get(name) is not None}
    if "dataset_name" not in given and of_run.get("trainer", "sft") == "sft":
        named |= _evaluation_rows(of_run)
    named |= {name: given[name] for name in (*COLUMNS, *ROWS) if name in given}
    if not named.get("dataset_name"):
        raise ConfigError(
            f"--model {args.model}: no run.json names its evaluation rows; give --dataset_name, or --tasks"
        )
    cut = {"max_length": SFT_DEFAULTS["max_length"]}
    cut |= {name: of_run[name] for name in READING if of_run.get(name) is not None}
    cut |= {name: given[name] for name in READING if name in given}
    fixed: dict[str, Any] = {"output_dir": scratch, "report_to": "none", "use_cpu": True, "bf16": False}
    fixed |= {"trust_remote_code": args.trust_remote_code}
    training: Any = reading("--model", args.model, lambda: Config(**fixed, **cut))
    return Arguments(ScriptArguments(**named), training, trl.DatasetMixtureConfig(), frozenset(given))


def _evaluation_rows(of_run: dict[str, Any]) -> dict[str, Any]:
    """ROWS of a run's evaluation rows, by its arguments; none where it had none."""
    name, split = of_run.get("eval_dataset_name"), of_run.get("dataset_test_split")
    if not name and not split:
        return {}
    found = {n: of_run[n] for n in ("dataset_config", "dataset_revision") if of_run.get(n) is not None}
    return found | {"dataset_name": name or of_run.get("dataset_name"), "dataset_train_split": split or "train"}


def prepare(arguments: Any, rows: Any, tokenizer: Any, config: Any) -> tuple[Any, Any, int | None]:
    """(`input_ids` and `labels` as SFTTrainer makes them, cut at max_length; its collator; the model's positions).

    Positions are None where the model has no table of them.

    Args:
        config: of the model, which is made without weights: TRL wants one.

    Raises:
        ConfigError: rows that TRL cannot read, or that the model cannot.
    """
    import copy

    import torch
    import trl
    from transformers import AutoModelForCausalLM

    from hdpissa.launch.planning.model_work import table_size

    name, trust = str(arguments.script.dataset_name), arguments.training.trust_remote_code
    with torch.device("meta"):
        model = reading(
            "--model",
            config.name_or_path,
            lambda: AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust),
        )
    trainer: Any = reading(
        "--dataset_name",
        name,
        lambda: trl.SFTTrainer(model=model, args=arguments.training, train_dataset=rows, processing_class=tokenizer),
    )
    found = trainer.train_dataset.select_columns(["input_ids", "labels"])
    if not len(found):
        raise ConfigError(f"--dataset_name {name}: nothing of its rows counts within --max_length; give a larger one")
    vocabulary, longest = model.get_input_embeddings().num_embeddings, max(map(len, found["input_ids"]))
    if (token := max(map(max, found["input_ids"]))) >= vocabulary:
        raise ConfigError(f"--dataset_name {name}: token {token} is there, and the model has {vocabulary} embeddings")
    if (table := table_size(model)) is not None and longest > table:
        raise ConfigError(
            f"--dataset_name {name}: rows have {longest} tokens; give --max_length {table}, as the model's"
        )
    return found, trainer.data_collator, table


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it and as text, and the answer that the row has."""

    ids: list[int]
    text: str
    reference: str


def questions(arguments: Any, rows: Any, tokenizer: Any, limit: int | None, longest: float) -> list[Question]:
    """The first `limit` questions of the rows that `train_rows.read_rows` has read.

    Raises:
        ConfigError: there is none; one has more than `longest` tokens.
    """
    from hdpissa.launch.training.rows import instruction_columns, load

    texts, columns = rows.train, {}
    if rows.template:  # these rows are tokens, and a prompt's last one may have merged with the answer's first
        texts = load(arguments, arguments.script.dataset_name, arguments.script.dataset_train_split, streaming=False)
        columns = instruction_columns(texts, arguments)
    found = (_question(row, tokenizer, rows.template, columns) for row in texts)
    chosen = list(itertools.islice(filter(None, found), limit))
    if not chosen:
        raise ConfigError("--eval_exact_match: no row has a prompt and an answer; leave it out")
    if (most := max(len(question.ids) for question in chosen)) > longest:
        raise ConfigError(
            f"--max_new_tokens: with prompts of {most} tokens the model has too few positions; give fewer"
        )
    return chosen


def _question(row: dict[str, Any], tokenizer: Any, template: Any, columns: dict[str, str]) -> Question | None:
    """What a row asks for its last answer; None for one that is text, or that ends with a question."""
    import trl

    if template:
        inputs = [row[columns["input"]]] if "input" in columns else []
        text = template.render(row[columns["prompt"]], *inputs)
        return Question(prompt_ids(tokenizer, text), text, row[columns["response"]].strip())
    row = dict(trl.maybe_convert_to_chatml(row))
    if messages := row.pop("messages", None):
        row |= {"prompt": messages[:-1], "completion": messages[-1:]}
    if not row.get("prompt") or not row.get("completion"):
        return None
    if not trl.is_conversational(row):
        return Question(prompt_ids(tokenizer, row["prompt"]), row["prompt"], row["completion"].strip())
    *_, answer = row.pop("completion")  # beside which TRL would cut the prompt to where the two diverge
    if answer["role"] != "assistant":
        return None
    text = trl.apply_chat_template(row, tokenizer)["prompt"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Question(ids, text, str(answer["content"]).strip())
