"""What the scripts' command lines have in common: Hugging Face's parser over a dataclass, and its mistakes in one line.

Unknown names are refused with the nearest valid one. Imports neither torch nor DeepSpeed at module level.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any, NoReturn

from hdpissa.engine.errors import ConfigError

NAME_MAX, PATH_MAX = 255, 4095  # of Linux


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of the dataclass: an option with its default and its line in --help."""
    return field(default=default, metadata={"help": text, **more})


def make_parser(sections: Mapping[str, type], *, prog: str) -> argparse.ArgumentParser:
    """A parser for dataclasses of options, each a section of --help under its name."""
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    for name, section in sections.items():
        section._argument_group_name = name  # type: ignore[attr-defined]  # what HfArgumentParser looks for
    parser = HfArgumentParser(list(sections.values()), prog=prog, allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = _refuse  # type: ignore[method-assign, assignment]
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # of `bool | None`: --name alone means yes, too
            action.nargs, action.const = "?", True
        if action.default in ("", None):  # required, or off: "(default: )" says nothing, and this prints as nothing
            action.help = f"{action.help}%(default).0s"
    return parser


class PlainParser(argparse.ArgumentParser):
    """argparse's own, for scripts of a few options without a dataclass; its mistakes are reported like theirs."""

    def error(self, message: str) -> NoReturn:
        _refuse(message)


def read(
    parser: argparse.ArgumentParser, argv: list[str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, Any], set[str]]:
    """(values of all options, names of those that really stand on the command line).

    Args:
        elsewhere: names of options that other commands have → what to do here.

    Raises:
        ConfigError: unknown arguments, values of a wrong type.
    """
    found, unknown = parser.parse_known_args(argv)
    options = {name: action.dest for action in parser._actions for name in action.option_strings}
    if unknown:
        names = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown[:1]
        unknown = [f"{name}; {elsewhere.get(name[2:]) or _hint(name, options)}" for name in dict.fromkeys(names)]
        raise ConfigError(f"unknown argument{'s' if len(unknown) > 1 else ''} {', and '.join(unknown)}")
    named = (text.split("=")[0] for text in argv)
    return vars(found), {options[name] for name in named if name in options}


def _hint(name: str, options: Collection[str]) -> str:
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else "see --help"


def at_least(args: object, limit: int, *names: str) -> None:
    """Raises ConfigError for the first option of these that is smaller, or not a number; None is none given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= limit:
            rule = "must not be negative" if limit == 0 else f"must be at least {limit}"
            raise ConfigError(f"--{name} is {value}: {rule}")


def one_of(args: object, name: str, valid: Iterable[str]) -> None:
    """Raises ConfigError for an option that has none of these values."""
    if getattr(args, name) not in valid:
        raise ConfigError(f"--{name} is {getattr(args, name)}: must be one of {', '.join(valid)}")


def check_paths(args: object, *names: str) -> None:
    """Expands ~, which a shell leaves in --name=~/x, and YAML everywhere.

    Raises:
        ConfigError: an option that no file can be named by, on which every look at the disk would end; a path that
            this user may not look at.
    """
    for name in names:
        value = getattr(args, name)
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
        _refuse_hidden(name, getattr(args, name))
        longest = max((len(part) for part in os.fsencode(value or "").split(b"/")), default=0)
        if longest > NAME_MAX or len(os.fsencode(value or "")) > PATH_MAX:
            raise ConfigError(
                f"--{name} {value[:40]}…: the name is too long, at most {NAME_MAX} bytes between two slashes and "
                f"{PATH_MAX} in all are possible; give a shorter one"
            )


def _refuse_hidden(name: str, value: str | None) -> None:
    """A path below a folder that may not be searched: pathlib raises PermissionError at every look at it."""
    try:
        os.stat(value or ".")
    except PermissionError:
        raise ConfigError(f"--{name} {value}: permission denied; give a path that you may read") from None
    except (OSError, ValueError):  # not there, or no path at all: whoever reads it says so
        pass


def exit_code(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs a script's `main`: what it returns, 0 for nothing, or 2 with a user's mistake as one line."""
    try:
        return main(argv) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# What argparse says of a value: (option, what is wrong); and what a value of a type must be.
_VALUE = re.compile(r"argument (?P<option>--\w+)[^:]*: invalid (?P<type>\w+) value: (?P<value>.*)", re.DOTALL)
_TRUTH = re.compile(r"argument (?P<option>--\w+)[^:]*: Truthy value expected: got (?P<value>.*?) but", re.DOTALL)
_MISSING = re.compile(r"argument (?P<option>--\w+)[^:]*: expected (one|at least one) argument")
_RULES = {"int": "a whole number", "float": "a number, such as 1e-4"}


def _refuse(message: str) -> NoReturn:
    """argparse's own words in ours."""
    if (found := _VALUE.match(message)) and (rule := _RULES.get(found["type"])):
        raise ConfigError(f"{found['option']} is {ast.literal_eval(found['value'])}: must be {rule}")
    if found := _TRUTH.match(message):
        raise ConfigError(f"{found['option']} is {found['value']}: must be true or false")
    if found := _MISSING.match(message):
        raise ConfigError(f"{found['option']} has no value; give one, or leave it out; see --help")
    raise ConfigError(f"command line: {message.rstrip('.')}; see --help")
