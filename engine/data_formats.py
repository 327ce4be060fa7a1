"""Which columns of a row mean what: the five formats that people keep data for fine-tuning in.

| format | columns |
| --- | --- |
| alpaca | a prompt, an answer (any two columns), and Alpaca's `input` and `output`; `system`, `history` |
| sharegpt | `conversations` of {from, value}; `system`, `tools` |
| messages | `messages` (or `conversations`) of {role, content}; `system`, `tools` |
| prompt_completion | `prompt` and `completion`, both texts or both lists of messages (and `system`, `tools`) |
| text | `text` |

Own file because recognising a format and reading a row of it need neither a tokenizer nor a template.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConfigError

FORMATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "text")
MORE = ("input", "system", "history")  # beside Alpaca's prompt and answer
LISTS = ("messages", "conversations", "conversation")  # columns that hold a conversation

Pairs = tuple[tuple[str, str], ...]

# What people have called the speakers of a ShareGPT conversation → the roles of chat templates.
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "developer": "developer",  # OpenAI's name of a system turn
    "ipython": "ipython",  # Llama 3's name of a tool's turn
}


@dataclass(frozen=True)
class Fields:
    """What the command line says about columns.

    Attributes:
        given: whether the user named the prompt's or the answer's column; then these two columns are meant.
        prefix: of the options' names in messages, "eval_" for evaluation rows.
    """

    prompt: str = "instruction"
    response: str = "response"
    text: str = "text"
    given: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class RowFormat:
    """A format and the columns that it is read from.

    Attributes:
        columns: (meaning, column) pairs, e.g. (("prompt", "instruction"), ("response", "output")).
        chat: whether rows are lists of messages.
        unread: columns that the format might have meant, and that are left alone, each with the option that reads it,
            or "".
    """

    name: str
    columns: tuple[tuple[str, str], ...]
    chat: bool = False
    unread: tuple[tuple[str, str], ...] = ()

    def column(self, meaning: str) -> str | None:
        return dict(self.columns).get(meaning)

    def __str__(self) -> str:
        noun = "column" if len(self.columns) == 1 else "columns"
        text = f"{self.name} ({noun} {', '.join(column for _, column in self.columns)})"
        for option in dict.fromkeys(option for _, option in self.unread):
            names = [column for column, reads in self.unread if reads == option]
            verb, pronoun = ("is", "it") if len(names) == 1 else ("are", "them")
            text += f"; {', '.join(names)} {verb} not read" + (f", {option} reads {pronoun}" if option else "")
        return text

    def without(self, meaning: str, option: str) -> RowFormat:
        """The same, but for a column that only an option reads."""
        column = self.column(meaning)
        if column is None:
            return self
        columns = tuple(pair for pair in self.columns if pair[0] != meaning)
        return replace(self, columns=columns, unread=(*self.unread, (column, option)))


# ---------------------------------------------------------------- recognising


def recognise(first: Mapping[str, Any], fields: Fields, wanted: str | None = None) -> RowFormat:
    """The format of rows like `first`: the one that is wanted, or what the columns say.

    Raises ConfigError that names the columns, where they are those of no format or not of the wanted one.
    """
    if wanted is not None:
        found = _WANTED[wanted](first, fields)
    elif fields.given or {fields.prompt, fields.response} <= set(first):
        found = _two_columns(first, fields)
    else:
        found = next(filter(None, (_WANTED[name](first, fields) for name in _ORDER)), None)
    if found is not None:
        return found
    if wanted not in (None, "alpaca"):
        raise ConfigError(
            f"--{fields.prefix}dataset_format {wanted} wants {_NEEDS[wanted]}, and the dataset's columns are "
            f"{', '.join(first)}; name another format, or rename the columns"
        )
    missing = fields.prompt if fields.prompt not in first else fields.response
    raise ConfigError(
        f"column {missing!r} is not in the dataset; its columns are {', '.join(_similar(missing, first))}; set "
        f"--{fields.prefix}prompt_field and --{fields.prefix}response_field to two of them"
        + (f", or use the columns of another format ({', '.join(FORMATS[1:])})" if wanted is None else "")
    )


def _two_columns(first: Mapping[str, Any], fields: Fields) -> RowFormat | None:
    if not {fields.prompt, fields.response} <= set(first):
        return None
    left = [name for name in MORE if name in first and name not in (fields.prompt, fields.response)]
    unread = tuple((name, "--dataset_format alpaca") for name in left)
    return RowFormat("alpaca", (("prompt", fields.prompt), ("response", fields.response)), unread=unread)


def _alpaca(first: Mapping[str, Any], fields: Fields) -> RowFormat | None:
    response = fields.response if fields.response in first else "output"
    if not {fields.prompt, response} <= set(first):
        return None
    there = {name for name in MORE if name in first and name not in (fields.prompt, response)}
    read = [name for name in MORE[1:] if name in there and _MEANT[name](first[name])]
    columns = [("prompt", fields.prompt), ("response", response), *((name, name) for name in read)]
    if "input" in there:
        columns.insert(1, ("input", "input"))
    return RowFormat("alpaca", tuple(columns), unread=tuple((name, "") for name in MORE[1:] if name in there - {*read}))


def _sharegpt(first: Mapping[str, Any], fields: Fields) -> RowFormat | None:
    return _list_of("from", "sharegpt", first, ("system", "tools"))


def _messages(first: Mapping[str, Any], fields: Fields) -> RowFormat | None:
    return _list_of("role", "messages", first, ("system", "tools"))


def _list_of(key: str, name: str, first: Mapping[str, Any], more: Sequence[str]) -> RowFormat | None:
    for column in LISTS:
        turns = as_list(first.get(column))
        if turns and key in turns[0]:
            also, unread = _beside(first, more)
            return RowFormat(name, (("messages", column), *also), chat=True, unread=unread)
    return None


def _prompt_completion(first: Mapping[str, Any], fields: Fields) -> RowFormat | None:
    if not {"prompt", "completion"} <= set(first):
        return None
    chat = all(_is_messages(first[column]) for column in ("prompt", "completion"))
    more, unread = _beside(first, ("system", "tools")) if chat else ((), (("system", ""),) if "system" in first else ())
    columns = (("prompt", "prompt"), ("completion", "completion"), *more)
    return RowFormat("prompt_completion", columns, chat=chat, unread=unread)


def _beside(first: Mapping[str, Any], names: Sequence[str]) -> tuple[Pairs, Pairs]:
    """(columns beside a conversation that are read, those of another kind of value that are not)."""
    read = [name for name in names if name in first and _MEANT[name](first[name])]
    return tuple((name, name) for name in read), tuple(
        (name, "") for name in names if name in first and name not in read
    )


def _text(first: Mapping[str, Any], fields: Fields) -> RowFormat | None:
    return RowFormat("text", (("text", fields.text),)) if fields.text in first else None


# What a column of that name has to hold to be meant; the first row may have nothing there.
_MEANT: dict[str, Callable[[Any], bool]] = {
    "system": lambda value: value is None or isinstance(value, str),
    "history": lambda value: as_pairs(value) is not None,
    "tools": lambda value: True,
}
_WANTED = dict(zip(FORMATS, (_alpaca, _sharegpt, _messages, _prompt_completion, _text), strict=True))
_ORDER = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
_NEEDS = {
    "sharegpt": "a column 'conversations' of {from, value}",
    "messages": "a column 'messages' of {role, content}",
    "prompt_completion": "columns 'prompt' and 'completion'",
    "text": "the column of --dataset_text_field",
}


def _similar(name: str, columns: Mapping[str, Any]) -> list[str]:
    """All columns, the most similar to a name first."""
    return difflib.get_close_matches(name, list(columns), n=len(columns), cutoff=0.0)


def _is_messages(value: Any) -> bool:
    turns = as_list(value)
    return bool(turns) and "role" in turns[0]


def as_list(value: Any) -> list[dict[str, Any]]:
    """A list of dicts, also from its JSON text, which is how a CSV file holds one; else an empty list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return list(value) if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else []


def as_pairs(value: Any) -> list[tuple[str, str]] | None:
    """A list of [instruction, answer] pairs, also from its JSON text; None where it is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return None
    return [(str(question), str(answer)) for question, answer in value]


# ---------------------------------------------------------------- reading a row


def text_of(row: Mapping[str, Any], column: str, index: int) -> str:
    """A cell as text. Raises ConfigError for an empty one, or for a list."""
    value = row[column]
    if value is None:
        raise ConfigError(f"row {index} (from 0) has nothing in column {column!r}; fill it or drop the row")
    if isinstance(value, list | dict):
        raise ConfigError(f"column {column!r} holds {type(value).__name__}s; name a column of plain text")
    return str(value)  # a column may hold numbers


def more_of(row: Mapping[str, Any], column: str | None, index: int) -> str:
    """A cell as text that may be empty, or of no column. Raises ConfigError for a list."""
    return text_of(row, column, index) if column is not None and row[column] is not None else ""


def history_of(row: Mapping[str, Any], column: str | None, index: int) -> list[tuple[str, str]]:
    """The (instruction, answer) pairs before a row's own. Raises ConfigError for anything else."""
    pairs = as_pairs(row[column]) if column else []
    if pairs is None:
        raise ConfigError(
            f"row {index} (from 0) has no list of [instruction, answer] pairs in column {column!r}; mend the row, or "
            f"rename the column"
        )
    return pairs


def messages_of(row: Mapping[str, Any], column: str, index: int, roles: Collection[str] = ()) -> list[dict[str, Any]]:
    """A cell as messages with `role`, whichever of the two spellings it has. Raises ConfigError.

    Args:
        roles: what the chat template calls by name; these stay as they are, but for the names of user and assistant.
    """
    turns = as_list(row[column])
    if not turns:
        raise ConfigError(f"row {index} (from 0) has no list of messages in column {column!r}; fill it or drop the row")
    return [_message(turn, index, column, roles) for turn in turns]


def _message(turn: dict[str, Any], index: int, column: str, roles: Collection[str]) -> dict[str, Any]:
    if (role := turn.get("role")) is not None:
        return without_nones(turn) | {"role": _role(role, index, column, roles)}
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in ROLES or text is None:
        raise ConfigError(
            f"row {index} (from 0), column {column!r}: a turn from {speaker!r} with "
            f"{'nothing' if text is None else 'something'} to say; known speakers are {', '.join(ROLES)}"
        )
    return {"role": ROLES[speaker], "content": text}


def _role(role: Any, index: int, column: str, roles: Collection[str]) -> str:
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if role in roles and known not in ("user", "assistant"):
        return role
    if known is None:
        raise ConfigError(
            f"row {index} (from 0), column {column!r}: a turn with the role {role!r}; known roles are "
            f"{', '.join(ROLES)}, and those that the chat template calls by name; rename it"
        )
    return known


def tools_of(row: Mapping[str, Any], column: str | None) -> list[dict[str, Any]] | None:
    """The tools that a row's conversation may call, None where it has none."""
    return without_nones(as_list(row[column])) or None if column else None


def without_nones(value: Any) -> Any:
    """Without the keys that have nothing, at every depth: Arrow gives each row the keys that any other has."""
    if isinstance(value, dict):
        return {key: without_nones(inner) for key, inner in value.items() if inner is not None}
    return [without_nones(inner) for inner in value] if isinstance(value, list) else value
