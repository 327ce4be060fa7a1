"""--preview: training rows as the model will see them, with what carries loss marked, and nothing trained.

On a terminal what is learned is bold and green and the rest is dim; elsewhere it stands between ⟪ and ⟫.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from hdpissa.engine.metrics import counted

BEGIN, END = "⟪", "⟫"


def show_rows(args: Any, job: Any, console: Console | None = None) -> None:
    """Prints the sets and the first samples in the order of training."""
    from hdpissa.launch.train_data import tell_rows

    console = console or Console(highlight=False, soft_wrap=True)
    for line in tell_rows(job.rows, job.data):
        console.print(line, markup=False)
    kind = "sample" if job.data.packed else "row"
    mark = "bold and green" if console.is_terminal else f"between {BEGIN} and {END}"
    console.print(f"what carries loss is {mark}", markup=False)
    for number, sample in enumerate(itertools.islice(_samples(job.data), args.preview), start=1):
        tokens = sum(len(row["input_ids"]) for row in sample)
        learned = sum(label >= 0 for row in sample for label in row["labels"][1:])
        packed = f" ({counted(len(sample), 'row')})" if job.data.packed else ""
        console.print(f"\n--- {kind} {number}{packed}: {tokens} tokens, {learned} carry loss", markup=False)
        for row in sample:
            console.print(_row(row, job.tokenizer, plain=not console.is_terminal))


def _samples(data: Any) -> Iterator[list[Any]]:
    """The samples of the run's first epoch, slice by slice, in the order of steps."""
    places = itertools.product(range(data.steps_per_epoch), range(data.slices), range(data.micro_batches_per_slice))
    return itertools.chain.from_iterable(data.units(*place) for place in places)


def _row(row: Any, tokenizer: Any, *, plain: bool) -> Text:
    """A row's text; tokens of one kind that stand together are decoded together, so that words stay whole."""
    text = Text()
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in itertools.groupby(pairs, key=lambda pair: pair[1] >= 0):
        words = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        if plain:
            text.append(f"{BEGIN}{words}{END}" if learned else words)
        else:
            text.append(words, style="bold green" if learned else "dim")
    return text
