"""Errors that users see as one line, without a traceback.

* `ConfigError`: bad input (a config key, a path, a column name). Scripts under `launch/` print the line on rank 0 and
  exit with code 2.
* `LostError`: ranks lost each other. Each prints its line and exits with code 1.
* `StopError`: all ranks found together that the run must not go on. Rank 0 prints the line; exit code 1.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy."""


class LostError(RuntimeError):
    """A collective failed, or could not have ended. The message is one line: what was lost, and what to do."""


class StopError(RuntimeError):
    """The run must not go on, and every rank knows it. The message is one line: what, at which step, on which rank."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as part of a one-line message, at most `limit` characters.

    For an error of the file system the file and the system's words ("x.json: No space left on device"), for this
    package's own errors their message, for any other "KeyError: 'name'".
    """
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (ConfigError, LostError, StopError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:limit]
