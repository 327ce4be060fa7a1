"""The folders of the tests, whose modules import each other by their plain names."""

from __future__ import annotations

import os
from pathlib import Path


def put_on_path() -> None:
    """For processes that tests start: the fork server of Python 3.11 does not pass sys.path on."""
    tests = Path(__file__).parent
    folders = [
        str(tests),
        *(str(path) for path in sorted(tests.iterdir()) if path.is_dir() and path.name[0] not in "._"),
    ]
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *(path for path in known if path and path not in folders)])
