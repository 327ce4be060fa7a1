"""--help by section: what a command needs, a table for each section, and a search through all options.

Made from the dataclasses of the options alone, so that it needs neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from hdpissa.engine.distributed.launcher import speaking_rank
from hdpissa.engine.errors import ConfigError

HELP = ("-h", "--help")
WIDTH = 100  # of what is written into a file or a pipe


@dataclass(frozen=True)
class Page:
    """What --help says beside the options.

    Attributes:
        title: what the command does, one sentence. usage: lines of the first page.
        required: names of options that must be given.
    """

    title: str
    usage: Sequence[str]
    required: Sequence[str] = ()


def answered(argv: Sequence[str], sections: Mapping[str, type], page: Page) -> bool:
    """Prints what a command line with --help asks for; False for one that does not ask."""
    help_at = next((place for place, word in enumerate(argv) if word in HELP), None)
    if help_at is None:
        return False
    if speaking_rank(os.environ) == "0":  # the others would say the same
        topic = [word for word in argv[help_at + 1 :] if not word.startswith("--local_rank")]
        show(sections, page, " ".join(topic))
    return True


def show(sections: Mapping[str, type], page: Page, topic: str = "") -> None:
    """The first page, or the sections and options that the topic names."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    chosen = _chosen(sections, topic)
    if not topic and len(sections) > 1:
        _first_page(sections, page, console)
    elif not chosen:
        choice = f"sections: {', '.join(sections)}, or all" if len(sections) > 1 else "--help alone shows all"
        raise ConfigError(f"--help {topic}: no option has that word; {choice}")
    else:
        if not topic:
            _head(page, console)
        for name, options in chosen.items():
            console.print(_table(name, options, page, several=len(sections) > 1))


def _chosen(sections: Mapping[str, type], topic: str) -> dict[str, list[Field[Any]]]:
    """Sections with the options to be shown: a section, an option, or all that have the word in name or text."""
    every = {name: list(fields(section)) for name, section in sections.items()}
    if topic in ("", "all"):
        return every
    word = topic.lower().lstrip("-")
    tests: tuple[Callable[[str, Field[Any]], bool], ...] = (
        lambda name, option: name == topic,
        lambda name, option: option.name == word,
        lambda name, option: name.startswith(topic),
        lambda name, option: word in f"{option.name} {_text(option)}".lower(),
    )
    for test in tests:
        found = {name: [option for option in options if test(name, option)] for name, options in every.items()}
        if any(found.values()):
            return {name: options for name, options in found.items() if options}
    return {}


def _text(option: Field[Any]) -> str:
    aliases = option.metadata.get("aliases") or []
    also = f" (also {', '.join(aliases)})" if aliases else ""
    return f"{option.metadata.get('help', '')}{also}"


def default_of(option: Field[Any]) -> str:
    """As it is typed; nothing for what is empty or required."""
    value = option.default_factory() if option.default_factory is not MISSING else option.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in (None, "", MISSING) else str(value)


def _first_page(sections: Mapping[str, type], page: Page, console: Any) -> None:
    from rich.table import Table

    _head(page, console)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, section in sections.items():
        table.add_row(name, ", ".join(option.name for option in fields(section)))
    console.print(table)
    console.print("\n--help SECTION shows its options with their defaults, --help WORD all that have the word,")
    console.print("--help all everything.")


def _head(page: Page, console: Any) -> None:
    for line in [page.title, "", *page.usage]:
        console.print(line, markup=False, soft_wrap=True)
    console.print()


def _table(name: str, options: Sequence[Field[Any]], page: Page, *, several: bool) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=name if several else None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("option", "default"):
        table.add_column(column, overflow="fold", no_wrap=column == "option")
    table.add_column("meaning", ratio=1)
    for each in options:
        default = "required" if each.name in page.required else default_of(each)
        table.add_row(f"--{each.name}", escape(default), escape(_text(each)))
    return table
