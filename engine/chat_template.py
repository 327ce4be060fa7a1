"""A tokenizer's chat template: messages become text, and which characters of it the model has to write itself.

Own file because training, `--preview` and sample prompts must write the very same characters, and because templates
do not say what is whose. Two ways to know:

* the template marks the assistant's part with {% generation %}: that is taken as it is;
* else an assistant's turn begins where the template's own generation prompt ends, and ends before the next message,
  at the last special token (the end of turn). Each boundary is found by rendering a shorter conversation, and
  compared with the text of the whole; a template that writes earlier turns differently when more follow is only
  followed where that leaves no doubt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import ConfigError

OWN = "tokenizer"  # the value of --chat_template that means the tokenizer's own
MARK = re.compile(r"{%-?\s*generation\s*-?%}")
QUOTED = re.compile(r"""(?<=['"])[\w-]+(?=['"])""")
OR_EVERYTHING = ", or --assistant_only_loss false"
TODAY = datetime(2024, 7, 26, 12)  # of every template that asks: the date that Llama 3's own say without a clock
CLOCK = "strftime_now"  # transformers' function that templates ask for the date
SENTINEL = "\ue000"  # of the private use area: no template looks at it, no message has it
Message = dict[str, Any]


def resolve_chat_template(value: str | None, tokenizer: Any) -> str | None:
    """The Jinja text: of a file, the value itself, or the tokenizer's own (None where it has none)."""
    if value in (None, OWN):
        try:
            return tokenizer.get_chat_template()
        except ValueError:  # it has none, or several and none that is the default
            if value is None:
                return None
            raise ConfigError(
                f"--chat_template {OWN}: the tokenizer has no template of its own; give a Jinja file"
            ) from None
    assert value is not None
    text = value if "{{" in value or "{%" in value else _read(value)
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=text)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ConfigError(f"--chat_template is no Jinja template (line {error.lineno}: {error.message})") from None
    except (jinja2.exceptions.TemplateError, TypeError):  # what it wants shows when it is given a row
        pass
    return text


def _read(path: str) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ConfigError(
            f"--chat_template {path[:60]!r}: {reason}; give a Jinja file, a Jinja text, or '{OWN}' for the tokenizer's "
            f"own"
        ) from None


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja text and the tokenizer whose special tokens it writes."""

    text: str
    tokenizer: Any

    @property
    def dated(self) -> str:
        """The date that it writes as today's, "" where it writes none."""
        return TODAY.strftime("%d %b %Y") if CLOCK in self.text else ""

    @cached_property
    def names(self) -> frozenset[str]:
        """Words that stand in quotes: roles that it knows are among them."""
        return frozenset(QUOTED.findall(self.text))

    @property
    def marked(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return MARK.search(self.text) is not None

    def write(
        self, messages: Sequence[Message], tools: list[dict] | None = None, *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text; `generation_prompt` adds what stands before the assistant's next words."""
        return self._render(messages, tools, add_generation_prompt=generation_prompt)[0]

    def render(self, instruction: str) -> str:
        """A single question as the model has seen it, for a tokenizer that puts its own BOS in front."""
        text = self.write([{"role": "user", "content": instruction}], generation_prompt=True)
        bos = self.tokenizer.bos_token
        adds = bos is not None and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds else text

    def assistant_spans(
        self, messages: Sequence[Message], tools: list[dict] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, [begin, end) of what the assistant writes in it, turn by turn, end of turn included)."""
        if self.marked:
            return self._render(messages, tools, return_assistant_tokens_mask=True)
        text = self.write(messages, tools)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        begins = [self._begin(messages, at, tools, text) for at in turns]
        return text, [(b, self._end(messages, at, tools, text, b)) for b, at in zip(begins, turns, strict=True)]

    def completion_span(
        self, prompt: Sequence[Message], completion: Sequence[Message], tools: list[dict] | None = None
    ) -> tuple[str, tuple[int, int]]:
        """(text of both, [begin, end) of the completion, whoever speaks in it)."""
        messages = [*prompt, *completion]
        text = self.write(messages, tools)
        return text, (self._begin(messages, len(prompt), tools, text), self._trimmed(text, len(text)))

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that follows an assistant's words, "" where there is none."""
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        rest = self.write(turn).partition(SENTINEL)[2]
        found = [(rest.find(token), token) for token in self._special if token in rest]
        return min(found)[1] if found else ""

    def stops(self) -> list[int]:
        """The end of turn as a token, by which an answer ends; none where the template has none, or tells none."""
        try:
            token = self.end_of_turn
        except ConfigError:  # it wants other turns than one question and one answer
            return []
        return [self.tokenizer.convert_tokens_to_ids(token)] if token else []

    # --- boundaries ----------------------------------------------------------------------------------

    def _begin(self, messages: Sequence[Message], at: int, tools: list[dict] | None, text: str) -> int:
        """Where the words of message `at` begin: after what the template writes to make an assistant speak.

        A probe in the message's place shows where words can stand. Generation prompts that open a thought which the
        conversation does not have (DeepSeek-R1's) agree with it only up to there, and count as far as they agree.
        """
        before = list(messages[:at])
        probe = self.write([*before, {"role": messages[at]["role"], "content": SENTINEL}], tools)
        begin = probe.find(SENTINEL)
        if begin < 0:
            raise _unclear("it leaves out the words of a turn")
        if before and messages[at]["role"] == "assistant":
            prompt = self.write(before, tools, generation_prompt=True)
            begin = min(begin, _agreement(prompt, probe))
            if not probe[:begin].startswith(self.write(before, tools)):
                raise _unclear("it writes what stands before a turn differently when more follows")
        if text[:begin] != probe[:begin]:
            raise _unclear("it writes what stands before a turn differently when more follows")
        return begin

    def _end(self, messages: Sequence[Message], at: int, tools: list[dict] | None, text: str, begin: int) -> int:
        """Where the assistant stops: behind its end of turn, without the blank that may follow."""
        until = self.write(messages[: at + 1], tools)
        if text.startswith(until):
            return self._trimmed(text, len(until))
        end = text.find(self.end_of_turn, begin) if self.end_of_turn else -1
        if end < 0:
            raise _unclear("it writes a turn differently when more follows")
        return end + len(self.end_of_turn)

    def _trimmed(self, text: str, end: int) -> int:
        """Without the white space behind a special token: after its end of turn nobody asks the model for more."""
        stripped = text[:end].rstrip()
        return len(stripped) if stripped.endswith(self._special) else end

    @cached_property
    def _special(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)})

    @cached_property
    def _timeless(self) -> str:
        """The text with a macro in place of the clock: a run that goes on another day must have the same tokens.

        A macro, because templates are given plain values only. Its own line, which Jinja drops, so that the text begins
        as it did.
        """
        if CLOCK not in self.text:
            return self.text
        codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ%"]
        said = "".join(f".replace({code!r}, {TODAY.strftime(code)!r})" for code in codes)
        return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{said} }}}}{{%- endmacro %}}\n{self.text}"

    def _render(self, messages: Sequence[Message], tools: list[dict] | None, **options: Any) -> tuple[str, list]:
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        special = self.tokenizer.special_tokens_map
        try:
            texts, spans = render_jinja_template([plain], tools, chat_template=self._timeless, **special, **options)
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"the chat template refuses it ({' '.join(str(error).split())[:150]})") from None
        return texts[0], spans[0] if spans else []


def _agreement(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _unclear(why: str) -> ConfigError:
    return ConfigError(
        f"the chat template does not show which words are the assistant's ({why}); give a --chat_template that marks "
        f"them with {{% generation %}}{OR_EVERYTHING}"
    )
