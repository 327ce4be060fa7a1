"""Instructions and answers as published: the Alpaca prompt, the answer, a line break, EOS; and how a model sees rows.

The prompt is masked by the number of its own tokens, also where the last of them merges with the answer's first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common.prompts import PromptTemplate

IGNORE = -100  # torch's cross entropy skips this label
BEGIN, END = "⟪", "⟫"


@dataclass(frozen=True)
class AlpacaEncoder:
    """Rows of text to `input_ids` and `labels`, for `Dataset.map(…, batched=True)`; uncut.

    Attributes:
        prompt, response: columns. input: Alpaca's column of that name, None where it is not read.
        learn_prompt: everything carries loss.
    """

    tokenizer: Any
    template: PromptTemplate
    prompt: str
    response: str
    input: str | None = None
    learn_prompt: bool = False

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        names = [name for name in (self.prompt, self.response, self.input) if name]
        rows = list(zip(*([_text(name, value) for value in batch[name]] for name in names), strict=True))
        prompts = [self.template.render(row[0], *row[2:]) for row in rows]
        eos = self.tokenizer.eos_token
        ids = self._ids([prompt + row[1] + "\n" + eos for prompt, row in zip(prompts, rows, strict=True)], ends=2)
        masked = [0 if self.learn_prompt else len(part) for part in self._ids(prompts, ends=1)]
        labels = [[IGNORE] * min(n, len(row)) + row[n:] for n, row in zip(masked, ids, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _ids(self, texts: list[str], ends: int) -> list[list[int]]:
        """Token ids, without the EOS that some tokenizers put behind every text: behind `ends - 1` of our own."""
        end = [self.tokenizer.eos_token_id] * ends
        found = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return [ids[:-1] if ids[-ends:] == end else ids for ids in found]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt as the model reads it."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _text(name: str, value: Any) -> str:
    if value is None or isinstance(value, list | dict):
        raise ConfigError(f"column {name!r} has a row with {value!r:.60}: must be text; leave that row out")
    return str(value)


def show_rows(rows: Any, tokenizer: Any, count: int) -> None:
    """Prints rows of token ids with what carries loss marked, others as they are."""
    console = Console(highlight=False, soft_wrap=True)
    mark = "bold and green" if console.is_terminal else f"between {BEGIN} and {END}"
    for number, row in enumerate(itertools.islice(rows, count), start=1):
        if "labels" not in row:
            console.print(f"\n--- row {number}", *(f"{k}: {v}" for k, v in row.items()), sep="\n", markup=False)
            continue
        learned = sum(label != IGNORE for label in row["labels"][1:])
        counts = f"{len(row['input_ids'])} tokens, {learned} carry loss ({mark})"
        console.print(f"\n--- row {number}: {counts}", markup=False)
        console.print(_marked(row, tokenizer, plain=not console.is_terminal))


def _marked(row: Mapping[str, list[int]], tokenizer: Any, *, plain: bool) -> Text:
    """A row's text; tokens of one kind that stand together are decoded together, so that words stay whole."""
    text = Text()
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        words = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        if plain:
            text.append(f"{BEGIN}{words}{END}" if learned else words)
        else:
            text.append(words, style="bold green" if learned else "dim")
    return text
