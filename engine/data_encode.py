"""From a row of any format to text, and to the characters of it that carry loss.

Own file because this is all that the formats differ in: what comes out, `Rendered`, is tokenised in one way (data.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .chat_template import ChatTemplate
from .data_formats import RowFormat, history_of, messages_of, more_of, text_of, tools_of
from .errors import ConfigError
from .prompts import PromptTemplate

IGNORE = -100  # torch's cross entropy skips this label
Learn = Literal["completion", "assistant", "everything"]
LOSS_ON = {"completion": "the answer", "assistant": "the assistant's turns", "everything": "everything"}
KEPT, CUT, UNLABELLED, TOO_LONG = range(4)  # what became of a row


@dataclass(frozen=True)
class Encoding:
    """How rows of one set become tokens and labels; all of it is part of the cache's key.

    Attributes:
        template: of prompts, for the formats that are not chats.
        chat_template: Jinja text, for those that are; for alpaca rows, too, where it is given.
        learn: which part carries loss: the completion, the assistant's turns, or everything.
        truncation: of rows longer than max_length: "truncate", "drop" or "error".
    """

    format: RowFormat
    template: str
    chat_template: str | None
    learn: Learn
    max_length: int
    truncation: str = "truncate"

    def key(self) -> dict[str, Any]:
        """What the encoded rows depend on."""
        return asdict(self)


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        spans: the characters that carry loss; None: all of them, or all behind `prompt`.
        prompt: the beginning whose own number of tokens is masked, as published for the Alpaca template.
        special: whether the tokenizer puts its BOS in front; chat templates write their own.
    """

    text: str
    spans: list[tuple[int, int]] | None = None
    prompt: str | None = None
    special: bool = True


def choose_learn(
    format: RowFormat,
    *,
    train_on_prompt: bool = False,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool | None = None,
) -> Learn:
    """Which part of such rows carries loss, by the three names that people have for it. Raises ConfigError."""
    if train_on_prompt and (completion_only_loss or assistant_only_loss):
        other = "--completion_only_loss" if completion_only_loss else "--assistant_only_loss"
        raise ConfigError(f"--train_on_prompt and {other} contradict each other; leave one out")
    if assistant_only_loss and not format.chat:
        raise ConfigError(f"--assistant_only_loss: rows of {format} have no turns; leave it out")
    if completion_only_loss and format.name not in ("alpaca", "prompt_completion"):
        instead = "--assistant_only_loss" if format.chat else "nothing"
        raise ConfigError(f"--completion_only_loss: rows of {format} have no completion; use {instead} in its place")
    if train_on_prompt or (completion_only_loss is False and not assistant_only_loss):
        return "everything"
    if format.name in ("sharegpt", "messages"):
        return "everything" if assistant_only_loss is False else "assistant"
    if format.name == "text":
        return "everything"
    return "assistant" if assistant_only_loss else "completion"


# ---------------------------------------------------------------- text


def render(
    row: Mapping[str, Any], index: int, tokenizer: Any, encoding: Encoding, chat: ChatTemplate | None
) -> Rendered:
    """A row as text. Raises ConfigError that names the row."""
    format = encoding.format
    if chat is not None:
        try:
            return _render_chat(row, index, chat, encoding)
        except ConfigError as error:
            known = str(error).startswith("row ")
            raise error if known else ConfigError(f"row {index} (from 0): {error}") from None
    if format.name == "text":
        return Rendered(_with_eos(text_of(row, format.columns[0][1], index), tokenizer))
    if format.name == "prompt_completion":
        prompt, completion = (text_of(row, column, index) for _, column in format.columns)
        text = _with_eos(prompt + completion, tokenizer)
        return Rendered(text, None if encoding.learn == "everything" else [(len(prompt), len(text))])
    instruction, more, answer = _alpaca(row, index, format)
    prompt = PromptTemplate(encoding.template).render(instruction, more)
    if system := more_of(row, format.column("system"), index):
        prompt = f"{system}\n\n{prompt}"
    text = prompt + answer + "\n" + tokenizer.eos_token
    return Rendered(text, prompt=None if encoding.learn == "everything" else prompt)


def _alpaca(row: Mapping[str, Any], index: int, format: RowFormat) -> tuple[str, str, str]:
    """(instruction, input, answer); most rows have no input."""
    columns = dict(format.columns)
    prompt = text_of(row, columns["prompt"], index)
    return prompt, more_of(row, columns.get("input"), index), text_of(row, columns["response"], index)


def _with_eos(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _render_chat(row: Mapping[str, Any], index: int, chat: ChatTemplate, encoding: Encoding) -> Rendered:
    format = encoding.format
    tools = tools_of(row, format.column("tools"))
    prompt, completion = _turns(row, index, format, chat.names)
    if encoding.learn == "everything":
        return Rendered(chat.write([*prompt, *completion], tools), special=False)
    if encoding.learn == "assistant":
        text, spans = chat.assistant_spans([*prompt, *completion], tools)
        if prompt:  # a prompt that has turns of the assistant is a prompt all the same
            begin = chat.completion_span(prompt, completion, tools)[1][0]
            spans = [span for span in spans if span[0] >= begin]
        return Rendered(text, spans, special=False)
    text, span = chat.completion_span(prompt, completion, tools)
    return Rendered(text, [span], special=False)


def _turns(
    row: Mapping[str, Any], index: int, format: RowFormat, roles: Collection[str]
) -> tuple[list[dict], list[dict]]:
    """(messages of the prompt, of the completion); of a conversation all are in the second."""
    columns = dict(format.columns)
    system = more_of(row, columns.get("system"), index)
    first = [{"role": "system", "content": system}] if system else []
    if format.name == "alpaca":
        instruction, more, answer = _alpaca(row, index, format)
        question = f"{instruction}\n{more}" if more else instruction
        turns = [turn for pair in history_of(row, columns.get("history"), index) for turn in _exchange(*pair)]
        asked, answered = _exchange(question, answer)
        return [*first, *turns, asked], [answered]
    if format.name == "prompt_completion":
        prompt, completion = (messages_of(row, columns[name], index, roles) for name in ("prompt", "completion"))
        return _after(first, prompt), completion
    return [], _after(first, messages_of(row, columns["messages"], index, roles))


def _exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _after(system: list[dict], messages: list[dict]) -> list[dict]:
    """The messages with the system's turn in front, unless they begin with one of their own."""
    return messages if messages[0]["role"] == "system" else [*system, *messages]


# ---------------------------------------------------------------- tokens


def encode_batch(
    batch: Mapping[str, list], indices: Sequence[int], *, tokenizer: Any, encoding: Encoding
) -> dict[str, list]:
    """Columns input_ids, labels, fate and length for every row; one that is not kept has no tokens."""
    names = list(batch)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    chat = ChatTemplate(encoding.chat_template or "", tokenizer) if encoding.format.chat else None
    texts = [render(row, index, tokenizer, encoding, chat) for row, index in zip(rows, indices, strict=True)]
    columns: dict[str, list] = {"input_ids": [], "labels": [], "fate": [], "length": []}
    for ids, labels in _tokenize(texts, tokenizer):
        fate = _fate(labels, encoding)
        keep = fate in (KEPT, CUT)
        columns["input_ids"].append(ids[: encoding.max_length] if keep else [])
        columns["labels"].append(labels[: encoding.max_length] if keep else [])
        columns["fate"].append(fate)
        columns["length"].append(len(ids))
    return columns


def _fate(labels: Sequence[int], encoding: Encoding) -> int:
    # Cut here, not by the tokenizer: `truncation_side` is "left" in some, which would
    # shift the prompt's mask, and others put back an EOS after cutting, which would
    # teach the model to stop in mid-answer.
    too_long = len(labels) > encoding.max_length
    if too_long and encoding.truncation != "truncate":
        return TOO_LONG
    if all(label == IGNORE for label in labels[1 : encoding.max_length]):  # the first token is never predicted
        return UNLABELLED
    return CUT if too_long else KEPT


def _tokenize(texts: Sequence[Rendered], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each text, uncut. All texts are of one format."""
    if not texts:
        return []
    by_spans = any(text.spans is not None for text in texts)
    if by_spans and not tokenizer.is_fast:
        raise ConfigError(
            "the tokenizer cannot tell which characters a token stands for, so turns cannot be masked; give a fast "
            "tokenizer (tokenizer.json), or --train_on_prompt"
        )
    # verbose=False: no warning about the length.
    options = {"verbose": False, "add_special_tokens": texts[0].special}
    found = tokenizer([text.text for text in texts], return_offsets_mapping=by_spans, **options)
    prompts = [text.prompt for text in texts if text.prompt is not None]
    behind = len(_put_behind(tokenizer)) if texts[0].special else 0  # texts end in their own EOS, prompts in none
    lengths = iter([len(ids) - behind for ids in tokenizer(prompts, **options)["input_ids"]] if prompts else [])
    pairs = []
    for at, (text, uncut) in enumerate(zip(texts, found["input_ids"], strict=True)):
        ids = uncut[: len(uncut) - behind]
        if text.spans is not None:
            labels = _within(ids, found["offset_mapping"][at][: len(ids)], text.spans)
        else:
            masked = min(next(lengths), len(ids)) if text.prompt is not None else 0
            labels = [IGNORE] * masked + ids[masked:]
        pairs.append((ids, labels))
    return pairs


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt as the model reads it: behind the tokenizer's BOS, without the EOS that some put behind it."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - len(_put_behind(tokenizer))]


def _put_behind(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts behind every text; nothing, in most."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(bare) + 1) if bare else []
    return next((whole[at + len(bare) :] for at in starts if whole[at : at + len(bare)] == bare), [])


def _within(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Labels of the tokens that have a character inside a span, as transformers' own assistant mask has it."""
    if not ids:
        return []
    starts, ends = np.asarray(offsets).T
    learned: np.ndarray = np.zeros(len(ids), dtype=bool)
    for begin, end in spans:
        learned |= (starts < end) & (ends > begin)
    return np.where(learned & (ends > starts), np.asarray(ids), IGNORE).tolist()
