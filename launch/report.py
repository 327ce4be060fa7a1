"""Draws the page of a run again, from the files in its output folder: needs no GPU and reads no model.

    hdpissa report outputs/run1

Also for a run that goes on, was killed or failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import command_line
from hdpissa.launch.reporting.page import write_report


def main(argv: list[str] | None = None) -> None:
    """Raises ConfigError for a folder that is no run's, or cannot be written."""
    parser = command_line.PlainParser(prog="hdpissa report", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", help="output folder of a run")
    folder = Path(parser.parse_args(argv).folder).expanduser()
    try:
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "run.json")):
            raise ConfigError(f"{folder}: no metrics.jsonl and no run.json there; give the output folder of a run")
        print(f"{folder}: {', '.join(write_report(folder))}")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
