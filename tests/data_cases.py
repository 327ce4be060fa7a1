"""What the tests of data share: a tokenizer of characters, rows in every format and every kind of source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hdpissa.engine.data import IGNORE, encode_rows, find_format
from hdpissa.engine.data_encode import Encoding, choose_learn
from hdpissa.engine.data_formats import Fields
from hdpissa.launch import train_arguments
from hdpissa.launch.train_data import read_rows

BOS, EOS, PAD = 0, 1, 2
# no BOS and no special token but the end of turn: what a template may do at its simplest
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# the same with tools, as the families' own templates write them
TOOLS_CHAT = CHAT.replace(
    "{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
)
TOOLS_CHAT = "{% if tools %}{{ tools | tojson }}{% endif %}" + TOOLS_CHAT


def character_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """One token per character (id = 3 + position in the ASCII table), BOS put in front."""
    vocab = {"<s>": BOS, "</s>": EOS, "<pad>": PAD} | {chr(code): 3 + code for code in range(128)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def ids(text: str) -> list[int]:
    return [3 + ord(character) for character in text]


def marked(tokenizer: Any, row: dict[str, list[int]]) -> str:
    """A row's text with what carries loss between « and »."""
    text, before = "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORE)
        text += ("«" if label >= 0 else "»") * ((label >= 0) != before) + tokenizer.decode([token])
        before = label >= 0
    return text + "»" * before


def encode(rows: Any, *, chat: str | None = CHAT, template: str = "<{instruction}>", **options: Any) -> Any:
    """TokenizedRows of a set whose format is recognised or given; the options are those of the command line."""
    tokenizer = options.pop("tokenizer", None) or character_tokenizer()
    fields = Fields(**{name: options.pop(name) for name in ("prompt", "response", "given") if name in options})
    format = find_format(rows, fields, options.pop("dataset_format", None))
    limits = {"max_length": options.pop("max_length", 200), "truncation": options.pop("truncation", "truncate")}
    learn = choose_learn(format, **options)
    return encode_rows(rows, tokenizer, Encoding(format, template, chat, learn, **limits))


def texts(found: Any, tokenizer: Any = None) -> list[str]:
    return [marked(tokenizer or character_tokenizer(), row) for row in found.dataset]


# --- rows ------------------------------------------------------------------------------------------

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CONVERSATION = [{"role": "system", "content": "s"}, QUESTION, ANSWER, {"role": "user", "content": "r"}]
CONVERSATION += [{"role": "assistant", "content": "b"}]
SHARED = [("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")]
TURNS = "[system]s</s>[user]q</s>[assistant]«a</s>»[user]r</s>[assistant]«b</s>»"


def using(tool: str, argument: str) -> tuple[dict[str, Any], str]:
    """(a row that calls a tool with an argument of its own, how it is read)."""
    call = {"function": {"name": tool, "arguments": {argument: "x"}}}
    schema = {"name": tool, "parameters": {"properties": {argument: {"type": "string"}}, "required": [argument]}}
    asked = {"role": "assistant", "tool_calls": [call]}
    row = {"messages": [QUESTION, asked, {"role": "tool", "content": "t"}, ANSWER], "tools": [schema]}
    text = f"{json.dumps([schema])}[user]q</s>[assistant]«{json.dumps(call)}</s>»[tool]t</s>[assistant]«a</s>»"
    return row, text


# format → (rows, how they are read)
ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "alpaca": (
        [{"instruction": "q", "input": "", "output": "a"}, {"instruction": "q", "input": "i", "output": "b"}],
        ["<s><q>«a\n</s>»", "<s><q\ni>«b\n</s>»"],
    ),
    "sharegpt": ([{"conversations": [{"from": who, "value": text} for who, text in SHARED]}] * 2, [TURNS] * 2),
    "messages": ([{"messages": CONVERSATION}] * 2, [TURNS] * 2),
    "prompt_completion": (
        [{"prompt": "q ", "completion": "a"}, {"prompt": "r", "completion": "b</s>"}],
        ["<s>q «a</s>»", "<s>r«b</s>»"],
    ),
    "text": ([{"text": "ab"}, {"text": "c</s>"}], ["«<s>ab</s>»", "«<s>c</s>»"]),
}
CALLS = [using("find", "n"), using("add", "m")]
TOOL_ROWS = [row for row, _ in CALLS], [text for _, text in CALLS]
SOURCES = ("jsonl", "json", "csv", "parquet", "arrow", "saved", "folder")


def write(rows: list[dict[str, Any]], folder: Path, source: str) -> Path:
    """The rows as a source of that kind; lists in a CSV file are JSON texts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows.{source}"
    match source:
        case "jsonl" | "folder":
            path = path if source == "jsonl" else folder / "folder" / "train.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return path if source == "jsonl" else path.parent
        case "json":
            path.write_text(json.dumps(rows))
        case "csv":
            flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
            pandas.DataFrame(flat).to_csv(path, index=False)
        case "parquet":
            pandas.DataFrame(rows).to_parquet(path)
        case "arrow" | "saved":
            datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
            if source == "saved":
                return folder / "saved"
            next((folder / "saved").glob("*.arrow")).rename(path)
    return path


# --- the command line -------------------------------------------------------------------------------


def jsonl(folder: Path, name: str, rows: Any) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parse(source: Any = "d", **options: Any) -> tuple[Any, frozenset[str]]:
    """train.py's own command line for a dataset."""
    from launch_runs import flags

    required = {"ds_config": "a.json", "model_name_or_path": "m", "output_dir": "o", "dataset_name": str(source)}
    return train_arguments.parse(flags(required | options))


def read(source: Any, **options: Any) -> Any:
    """What it reads."""
    args, given = parse(source, **options)
    return read_rows(args, given, character_tokenizer(chat_template=CHAT))
