"""Draws the report of a run again, from what is in its output folder: pictures and report.html. No GPU, no model.

    python launch/report.py --output_dir outputs/run1

Also for a run that is going on, was killed or has failed. What a person can get wrong: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import command_line

NEEDED = ("metrics.jsonl", "run.json")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ConfigError for a folder that is no run's."""
    parser = command_line.PlainParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, help="output folder of launch/train.py")
    args = parser.parse_args(argv)
    command_line.check_paths(args, "output_dir")
    folder = Path(args.output_dir)
    if not folder.is_dir():
        raise ConfigError(f"--output_dir {folder}: no such folder; give the output folder of a run")
    if not any((folder / name).is_file() for name in NEEDED):
        raise ConfigError(f"--output_dir {folder}: no {' and no '.join(NEEDED)} there; give the output folder of a run")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    from hdpissa.engine.report import write_report
    from hdpissa.launch.train_arguments import TrainArguments
    from hdpissa.launch.train_report import defaults

    folder = Path(args.output_dir)
    try:
        names = write_report(folder, defaults=defaults(TrainArguments()))
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be written ({error.strerror}); give a writable one") from None
    print(f"{folder}: {', '.join(names)}")


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
