"""The peak of a process's anonymous memory: pages of mapped files are the system's to drop, and are not counted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self


def anonymous_bytes() -> int:
    """This process's anonymous memory now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak:
    """The largest `anonymous_bytes` while the block runs, sampled every 5 ms."""

    def __enter__(self) -> Self:
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())
