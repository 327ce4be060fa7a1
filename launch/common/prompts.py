"""Prompt templates: how an instruction becomes the text the model reads.

Own file because training, evaluation and the exported model's users must all
wrap an instruction in the very same characters. It knows nothing of tokenizers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hdpissa.engine.errors import ConfigError

PLACEHOLDER = "{instruction}"

# Published by the method's authors as the prompt of their runs. Every character
# counts: the recordings in the golden tests were made with it.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# Alpaca's own second wording, for rows that have an input beside the instruction.
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

NAMED = {"alpaca": ALPACA, "none": PLACEHOLDER}


@dataclass(frozen=True)
class PromptTemplate:
    """A text with `{instruction}` in it exactly once.

    Raises ConfigError if the placeholder is missing or repeated.
    """

    text: str

    def __post_init__(self) -> None:
        found = self.text.count(PLACEHOLDER)
        if found != 1:
            raise ConfigError(
                f"prompt template {_shorten(self.text)} contains {PLACEHOLDER} {found} times; "
                f"put it in exactly once, where the instruction goes"
            )

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt. An input that is not empty gets Alpaca's wording for it, in other templates a line below."""
        # Not str.format: instructions and templates may hold braces (code, LaTeX).
        if input and self.text == ALPACA:
            before, _, after = ALPACA_INPUT.partition(PLACEHOLDER)
            return before + instruction + after.replace("{input}", input)
        return self.text.replace(PLACEHOLDER, f"{instruction}\n{input}" if input else instruction)


def resolve_template(name_or_path_or_text: str) -> PromptTemplate:
    """A template by name ("alpaca", or "none": the bare instruction), from a text file, or as literal text.

    One newline at the end of a file is dropped, because editors add it; a
    template that must end in a newline ends in two. Raises ConfigError.
    """
    value = name_or_path_or_text
    if value in NAMED:
        return PromptTemplate(NAMED[value])
    if PLACEHOLDER in value:
        return PromptTemplate(value)
    path = Path(os.path.expanduser(value))  # of a user who is not there it stays as it is
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ConfigError(
            f"prompt template {_shorten(value)} is neither a known name ({', '.join(NAMED)}) nor a readable "
            f"file ({reason}); give one of these or a text containing {PLACEHOLDER}"
        ) from None
    return PromptTemplate(text.removesuffix("\n"))


def _shorten(text: str, limit: int = 60) -> str:
    """The text on one line, quoted, cut at `limit` characters."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
